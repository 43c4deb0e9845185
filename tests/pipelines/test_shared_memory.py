"""The shared memory of the steps that compute may have a limit, which is part of the pipeline."""

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.packages import load_package, shipped
from pipelines.shared_memory import limit_shared_memory, read_shared_memory
from salun_core.errors import UsageError

COMPUTING = {
    "unlearning": {"compute-mask", "unlearn", "evaluate"},
    "deletion-sweep": {"compute-mask", "unlearn", "evaluate"},
    "deletion-sweep-compact": {"sweep-compact"},
    "sharded-mask": {"score-shard"},
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
