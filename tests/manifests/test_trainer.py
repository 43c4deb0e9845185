"""The TrainJob and its runtime: fields that Kubeflow Trainer has, a pod as all of ours, a command that `salun` takes.

tests/manifests/test_schemas.py checks both against their CRDs where these are at hand. Here they are held against
the API's fields (trainer.kubeflow.org/v1alpha1 of Trainer 2.0 to 2.3), and against its published models if installed.
"""

import json
import re

import kubernetes_validate
import pytest
import typer

from salun_core.cli.app import app
from salun_core.cli.options import read_settings
from salun_core.data import decode
from salun_core.methods.classification import method_config
from tests.manifests.tree import MANIFESTS, default, read

FOLDER = MANIFESTS / "trainer"
API = "trainer.kubeflow.org/v1alpha1"
TRAINER = {"image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"}
JOB = {"runtimeRef", "initializer", "trainer", "suspend", "managedBy"}  # what all versions know
RUNTIME = {"mlPolicy", "podGroupPolicy", "template"}


def shipped(kind):
    (found,) = [item for path in sorted(FOLDER.glob("*.yaml")) for item in read(path) if item.kind == kind]
    return found.document


@pytest.fixture
def job():
    return shipped("TrainJob")


@pytest.fixture
def runtime():
    return shipped("TrainingRuntime")


def pod_of(runtime):
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return replicated, replicated["template"]["spec"]["template"]


def test_the_fields_are_those_of_the_api(job, runtime):
    assert (job["apiVersion"], runtime["apiVersion"]) == (API, API)
    assert job["spec"].keys() <= JOB
    assert job["spec"]["trainer"].keys() <= TRAINER
    assert runtime["spec"].keys() <= RUNTIME
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    for number in ("numNodes", "numProcPerNode"):
        assert isinstance(job["spec"]["trainer"][number], int)


@pytest.mark.parametrize("kind", ["TrainJob", "TrainingRuntime"])
def test_the_published_models_read_every_field(kind):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    model = getattr(models, f"TrainerV1alpha1{kind}")
    document = shipped(kind)
    assert _without_none(json.loads(model.from_dict(document).to_json())) == document


def _without_none(value):
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def test_the_job_names_the_shipped_runtime(job, runtime):
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": runtime["metadata"]["name"],
    }
    assert job["metadata"]["namespace"] == runtime["metadata"]["namespace"] == "salun"


def test_trainer_finds_its_container_in_the_runtime(runtime):
    """It looks for this label, and for a container of this name, and sets PET_* variables there."""
    replicated, template = pod_of(runtime)
    labels = replicated["template"]["metadata"]["labels"]
    assert labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    assert [item["name"] for item in template["spec"]["containers"]] == ["node"]
    assert runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"] == "torch"
    assert "torch" in runtime["spec"]["mlPolicy"]


def test_the_pod_is_valid(runtime):
    _, template = pod_of(runtime)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"} | template["metadata"]}
    kubernetes_validate.validate(pod | {"spec": template["spec"]}, kubernetes_validate.latest_version(), strict=True)


def test_the_pod_is_restricted_and_has_room_to_write(runtime):
    _, template = pod_of(runtime)
    spec, (container,) = template["spec"], template["spec"]["containers"]
    for context in (spec["securityContext"], container["securityContext"]):
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["automountServiceAccountToken"] is False
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {"/tmp", "/scratch", "/dev/shm", "/artifacts"}
    assert set(mounts.values()) == {volume["name"] for volume in spec["volumes"]}
    (claim,) = [item["persistentVolumeClaim"] for item in spec["volumes"] if "persistentVolumeClaim" in item]
    assert claim["claimName"] == shipped("PersistentVolumeClaim")["metadata"]["name"]
    assert shipped("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]  # of several nodes


def test_decoded_images_go_to_a_disk_of_the_pod(job, runtime):
    """It is neither in memory nor shared, and it is deleted with the pod."""
    _, template = pod_of(runtime)
    (container,) = template["spec"]["containers"]
    (place,) = [item["value"] for item in container["env"] if item["name"] == "TMPDIR"]
    (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == place]
    (volume,) = [item for item in template["spec"]["volumes"] if item["name"] == name]
    assert volume["ephemeral"]["volumeClaimTemplate"]["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert decode.MEMORY_VARIABLE in {item["name"] for item in job["spec"]["trainer"]["env"]}


def test_the_pod_reads_what_the_default_manifests_hold(runtime):
    _, template = pod_of(runtime)
    (container,) = template["spec"]["containers"]
    names = {source: item["name"] for entry in container["envFrom"] for source, item in entry.items()}
    secret = next(item for item in read(MANIFESTS / "secret.yaml.example") if item.kind == "Secret")
    assert names["secretRef"] == secret.name
    held = {(item.kind, item.name) for item in default()}
    assert ("ConfigMap", names["configMapRef"]) in held
    assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in held


def test_one_process_per_gpu_of_a_node(job):
    trainer = job["spec"]["trainer"]
    for kind in ("requests", "limits"):
        assert int(trainer["resourcesPerNode"][kind]["nvidia.com/gpu"]) == trainer["numProcPerNode"]


def test_salun_accepts_the_command(job):
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "-m", "salun_core.cli"]
    values = {item["name"]: item["value"] for item in trainer["env"]}
    used = set(re.findall(r"\$\((\w+)\)", " ".join(trainer["args"])))
    assert used <= values.keys()
    verb, *options = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in trainer["args"]]
    command = typer.main.get_command(app).commands[verb]
    context = command.make_context(verb, list(options))
    assert str(context.params["mask"]).startswith("/artifacts/")
    assert str(context.params["out"]).startswith("/artifacts/")
    assert method_config(context.params["method"], read_settings(context.params["settings"])) == method_config(
        "salun_adaptive"
    )
    assert context.params["processes"] == 1  # torchrun starts them
