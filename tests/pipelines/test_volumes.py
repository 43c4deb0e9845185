"""Volumes of the steps, which are part of the pipeline: a limit of the shared memory, and a claim with a cache."""

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.local import for_this_machine
from pipelines.packages import load_package, shipped
from pipelines.step_secrets import step_of
from pipelines.volumes import CACHE_STEPS, CACHE_VARIABLE, limit_shared_memory, read_cache_claim, read_shared_memory
from salun_core.data import stored
from salun_core.errors import UsageError

COMPUTING = {
    "unlearning": {"compute-mask", "unlearn", "evaluate"},
    "deletion-sweep": {"compute-mask", "unlearn", "evaluate"},
    "deletion-sweep-compact": {"sweep-compact"},
}


def mounts(platform):
    """The volumes in memory by step."""
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): pod["emptyDirMounts"] for name, pod in pods.items() if "emptyDirMounts" in pod}


@pytest.mark.parametrize("name", shipped())
def test_the_variable_limits_the_shared_memory_of_the_steps_that_compute(name, monkeypatch):
    monkeypatch.delenv("SALUN_SHARED_MEMORY", raising=False)
    before = load_package(name)
    volume = {"medium": "Memory", "mountPath": "/dev/shm", "volumeName": "dshm"}  # noqa: S108 - in a pod
    assert mounts(before.platform) == dict.fromkeys(COMPUTING[name.removesuffix("-cpu")], [volume])
    monkeypatch.setenv("SALUN_SHARED_MEMORY", "2Gi")
    after = load_package(name)
    assert set(mounts(after.platform)) == set(mounts(before.platform))
    assert all(found == [{**volume, "sizeLimit": "2Gi"}] for found in mounts(after.platform).values())
    assert after.spec == before.spec
    assert after.version != before.version  # so that a cluster with the other one gets this version, too


def test_kfp_reads_the_limit(monkeypatch):
    """The name of the field in kfp's own definition of the platform spec."""
    from google.protobuf import json_format
    from kfp.kubernetes import kubernetes_executor_config_pb2 as definition

    monkeypatch.setenv("SALUN_SHARED_MEMORY", "512Mi")
    for found in mounts(load_package("unlearning").platform).values():
        assert json_format.ParseDict(found[0], definition.EmptyDirMount()).size_limit == "512Mi"


def test_other_volumes_keep_their_size():
    pod = {"emptyDirMounts": [{"mountPath": "/cache", "volumeName": "cache"}]}
    platform = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {"exec-unlearn": pod}}}}}
    limit_shared_memory(platform, "2Gi")
    assert pod == {"emptyDirMounts": [{"mountPath": "/cache", "volumeName": "cache"}]}


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_compiler_applies_it(how, tmp_path, monkeypatch, compiled_once):
    monkeypatch.delenv("SALUN_SHARED_MEMORY", raising=False)
    words = ["compile", "--cpu", "--kubernetes-native", str(tmp_path)]
    if how == "option":
        words += ["--shared-memory", "2Gi"]
    else:
        monkeypatch.setenv("SALUN_SHARED_MEMORY", "2Gi")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    files = sorted(tmp_path.glob("*.yaml"))
    assert files
    for path in files:
        _, version = yaml.load_all(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        limits = [one["sizeLimit"] for found in mounts(version["spec"]["platformSpec"]).values() for one in found]
        assert set(limits) == {"2Gi"}


@pytest.mark.parametrize("text", ["50%", " 12.5 %", "0.5", ".5", "1/2"])
def test_a_share_of_the_memory_is_refused(text):
    with pytest.raises(UsageError, match=r"is a share of the memory.*in the run form"):
        read_shared_memory(text)


@pytest.mark.parametrize("text", ["2", "0Gi", "-1Gi", "2 GiB", "much", "500m"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(UsageError, match=r"SALUN_SHARED_MEMORY=2Gi"):
        read_shared_memory(text)


def test_sizes():
    assert [read_shared_memory(text) for text in ("", " ", "2Gi", " 512Mi ", "1G")] == ["", "", "2Gi", "512Mi", "1G"]


MOUNT = {
    "mountPath": "/cache",
    "constant": "my-cache",
    "pvcNameParameter": {"runtimeValue": {"constant": "my-cache"}},
}


def with_claims(package):
    """The mounts of claims and the folder of the cache, by step."""
    pods = package.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found = {}
    for executor, item in package.spec["deploymentSpec"]["executors"].items():
        folder = {pair["name"]: pair["value"] for pair in item["container"]["env"]}.get(CACHE_VARIABLE)
        found[step_of(executor)] = (pods[executor].get("pvcMount", []), folder)
    return found


@pytest.mark.parametrize("name", shipped())
def test_the_variable_mounts_the_cache_into_the_steps_that_read_data(name, monkeypatch):
    monkeypatch.delenv("SALUN_DATA_CACHE_CLAIM", raising=False)
    before = load_package(name)
    assert all(given == ([], None) for given in with_claims(before).values())
    monkeypatch.setenv("SALUN_DATA_CACHE_CLAIM", "my-cache")
    after = load_package(name)
    found = with_claims(after)
    assert found.keys() - CACHE_STEPS <= {"conclude", "settle_requests"}  # they must run without the volume, too
    assert {step for step, given in found.items() if given == ([MOUNT], "/cache/salun")} == found.keys() & CACHE_STEPS
    assert all(given == ([], None) for step, given in found.items() if step not in CACHE_STEPS)
    assert after.version != before.version


def test_only_the_mount_and_the_variable_differ(monkeypatch):
    monkeypatch.delenv("SALUN_DATA_CACHE_CLAIM", raising=False)
    before = load_package("deletion-sweep")
    monkeypatch.setenv("SALUN_DATA_CACHE_CLAIM", "my-cache")
    after = load_package("deletion-sweep")
    for pod in after.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        pod.pop("pvcMount", None)
    for item in after.spec["deploymentSpec"]["executors"].values():
        item["container"]["env"] = [pair for pair in item["container"]["env"] if pair["name"] != CACHE_VARIABLE]
    assert (after.spec, after.platform) == (before.spec, before.platform)


def test_a_run_on_this_machine_has_neither_the_volume_nor_its_folder(monkeypatch):
    """Else it would leave images in a folder of this machine that no purge of the cluster empties."""
    monkeypatch.setenv("SALUN_DATA_CACHE_CLAIM", "my-cache")
    text = for_this_machine(load_package("unlearning-cpu").text, "run-1", {})
    assert "pvcMount" in text  # kfp.local ignores volumes
    assert CACHE_VARIABLE not in text


def test_the_steps_read_the_variable():
    assert CACHE_VARIABLE == stored.CACHE_VARIABLE


def test_the_mount_is_what_kfp_writes(tmp_path):
    from kfp import compiler, dsl, kubernetes

    @dsl.container_component
    def look():
        return dsl.ContainerSpec(image="busybox", command=["ls"])

    @dsl.pipeline
    def looking():
        kubernetes.mount_pvc(look(), "my-cache", "/cache")

    compiler.Compiler().compile(looking, str(tmp_path / "looking.yaml"))
    _, platform = yaml.safe_load_all((tmp_path / "looking.yaml").read_text(encoding="utf-8"))
    (pod,) = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    assert pod["pvcMount"] == [MOUNT]


def test_the_compiler_mounts_the_cache(tmp_path, monkeypatch, compiled_once):
    monkeypatch.setenv("SALUN_DATA_CACHE_CLAIM", "another")
    words = ["compile", "--cpu", "--kubernetes-native", str(tmp_path), "--data-cache", "my-cache"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    monkeypatch.setenv("SALUN_DATA_CACHE_CLAIM", "my-cache")
    for path in tmp_path.glob("*.yaml"):
        _, version = yaml.load_all(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        assert version["metadata"]["name"] == load_package(version["spec"]["pipelineName"]).version


@pytest.mark.parametrize("text", ["my_cache", "My-Cache", "-cache", "a/b", "x" * 254])
def test_what_is_not_the_name_of_a_claim_is_refused(text):
    with pytest.raises(UsageError, match=r"SALUN_DATA_CACHE_CLAIM=salun-data-cache, or leave it out"):
        read_cache_claim(text)


def test_the_name_of_a_claim():
    assert [read_cache_claim(text) for text in ("", " ", " my-cache ", "a")] == ["", "", "my-cache", "a"]
