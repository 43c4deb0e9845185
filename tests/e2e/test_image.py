"""The image: what its Dockerfile promises, and, when asked for, the image itself."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"


def instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, arguments) for each instruction, continuation lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    stage, found = "", []
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stage = rest.split(" AS ")[1]
        found.append((stage, word, rest))
    return found


def of(stage: str, word: str) -> list[str]:
    return [rest for where, what, rest in instructions() if (where, what) == (stage, word)]


def test_one_argument_names_the_base() -> None:
    assert of("", "ARG") == ["BASE_IMAGE=python:3.11-slim"]
    origins = {rest.split(" AS ")[0] for _, word, rest in instructions() if word == "FROM"}
    assert origins == {"${BASE_IMAGE}", "scratch", "base"}


def test_the_runtime_stage_installs_nothing() -> None:
    assert of("runtime", "FROM") == ["base AS runtime"]
    assert of("runtime", "RUN") == []
    assert not any("pip" in rest or "gcc" in rest for rest in of("base", "RUN"))
    assert "--from=builder /opt/venv /opt/venv" in of("runtime", "COPY")


def test_it_runs_as_a_numbered_user_that_is_not_root() -> None:
    last = [(word, rest) for stage, word, rest in instructions() if stage == "runtime"][-3:]
    assert last == [("USER", "10001:10001"), ("ENTRYPOINT", "[]"), ("CMD", '["salun", "--help"]')]


def test_whatever_libraries_write_goes_to_tmp() -> None:
    settings = dict(pair.split("=", 1) for pair in " ".join(of("runtime", "ENV")).split())
    for name in ("HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        assert settings[name] == "/tmp" or settings[name].startswith("/tmp/")
    assert settings["PYTHONDONTWRITEBYTECODE"] == "1"


def test_kfp_comes_with_its_client() -> None:
    text = " ".join(of("builder", "RUN"))
    assert "install -r run.txt -r kfp.txt" in text
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["kfp"]
    assert [line for line in wanted if line.startswith("kfp>")] == ["kfp>=2.16,<2.18"]


def test_no_secret_or_private_index_stays_in_a_layer() -> None:
    for stage, word, rest in instructions():
        if word in {"ARG", "ENV"}:
            assert not re.search(r"(?i)password|token|secret|://", rest), (stage, word, rest)
    assert "type=secret,id=pip.conf" in " ".join(of("builder", "RUN"))


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    admitted = {line[1:] for line in lines if line[0] == "!"}
    copied = {
        source
        for stage, word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert lines[0] == "*"
    assert admitted == copied
    assert all((ROOT / name).exists() for name in admitted)


def test_every_deployment_is_played_and_its_image_is_known() -> None:
    played = re.findall(r"image_in ([\w/.-]+)\)", (ROOT / ".ci" / "pods").read_text())
    files = [path for path in (ROOT / "manifests").rglob("*.yaml") if "kind: Deployment\n" in path.read_text()]
    assert sorted(played) == sorted(str(path.relative_to(ROOT / "manifests")) for path in files)
    for path in files:
        assert len(re.findall(r"^ +image: \S", path.read_text(), re.MULTILINE)) == 1, path


@pytest.mark.e2e
@pytest.mark.skipif(os.environ.get("SALUN_TEST_IMAGE") != "1", reason="takes minutes: SALUN_TEST_IMAGE=1 or make image")
def test_the_image_is_built_and_runs_a_step() -> None:
    done = subprocess.run([ROOT / ".ci" / "image"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    if "image: skipped" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert "image: passed" in done.stdout
