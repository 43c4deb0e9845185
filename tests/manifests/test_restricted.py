"""Every container of the manifests, and every step of the pipelines, keeps to the restricted pod security profile."""

import pytest
import yaml

from tests.manifests.test_manifests import PIPELINES, executors
from tests.manifests.tree import LOADER, MANIFESTS, containers, default, named, pod, workloads

ALL = [(found, item) for found in workloads() for item in containers(found)]
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def test_the_namespace_enforces_it():
    labels = named("Namespace", "salun", default())["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "warn", "audit")} == {"restricted"}


def test_there_are_containers_to_check():
    names = {line.split("name: ")[1] for path in MANIFESTS.rglob("*.yaml") for line in path.read_text().splitlines()
             if line.strip().startswith("- name: ")}  # fmt: skip
    assert {item["name"] for _, item in ALL} <= names
    assert {"pushgateway", "exporter", "submit", "seaweedfs"} <= {item["name"] for _, item in ALL}


@pytest.mark.parametrize(("found", "container"), ALL, ids=[f"{found.name}-{item['name']}" for found, item in ALL])
def test_a_container_is_restricted(found, container):
    context = container["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not context.keys() & {"privileged", "procMount", "seLinuxOptions", "runAsUser"}
    assert not any("hostPort" in port for port in container.get("ports", []))
    for kind in ("requests", "limits"):
        assert container["resources"][kind].keys() >= {"cpu", "memory"}


@pytest.mark.parametrize("found", workloads(), ids=lambda found: found.name)
def test_a_pod_is_restricted(found):
    spec = pod(found)["spec"]
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0  # the images of others name their user as text, which Kubernetes cannot check
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}
    assert all(volume.keys() - {"name"} <= VOLUMES for volume in spec["volumes"])
    assert spec["enableServiceLinks"] is False
    written = {volume["name"] for volume in spec["volumes"] if {"emptyDir", "persistentVolumeClaim"} & volume.keys()}
    mounts = [mount for item in containers(found) for mount in item["volumeMounts"]]
    assert all(mount.get("readOnly") or mount["name"] in written for mount in mounts)


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_steps_set_what_kubeflow_does_not_add(path):
    steps = yaml.load(path.read_text().split("\n---\n")[0], LOADER)["deploymentSpec"]["executors"]
    assert steps.keys() == executors(path).keys()
    for name, executor in executors(path).items():
        context = executor["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert int(context["runAsUser"]) > 0, name
        assert not context.get("privileged"), name
        resources = steps[name]["container"]["resources"]
        wanted = {"resourceCpuLimit", "resourceCpuRequest", "resourceMemoryLimit", "resourceMemoryRequest"}
        assert wanted <= resources.keys(), name
