"""The compiled pipelines: what the lint accepts, and each defect that it must find."""

import re

import pytest
import yaml

from components._image import IMAGE
from pipelines.compile import FOLDER
from pipelines.ir_lint import PLACEMENT, lint

GPU_STEPS = {"exec-compute-mask", "exec-unlearn", "exec-evaluate"}


def executors(documents):
    return documents[0]["deploymentSpec"]["executors"]


def pods(documents):
    return documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def tasks(documents):
    return documents[0]["root"]["dag"]["tasks"]


def test_shipped_pipelines_have_no_defect(documents):
    assert lint(*documents, IMAGE) == []
    without = yaml.safe_load_all((FOLDER / "salun-unlearning-cpu.yaml").read_text(encoding="utf-8"))
    assert lint(*without, IMAGE, [name for name in PLACEMENT if name != "gpu_count"]) == []


def undeclared_input(documents):
    del documents[0]["root"]["inputDefinitions"]["parameters"]["memory"]


def undeclared_in_a_pod(documents):
    pods(documents)["exec-unlearn"]["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"] = "zone"


def undeclared_artifact(documents):
    tasks(documents)["unlearn"]["inputs"]["artifacts"]["mask"] = {"componentInputArtifact": "mask"}


def unknown_producer(documents):
    tasks(documents)["evaluate"]["inputs"]["artifacts"]["after"]["taskOutputArtifact"]["producerTask"] = "train"


def resource_not_given(documents):
    del tasks(documents)["unlearn"]["inputs"]["parameters"]["pipelinechannel--memory"]


def caching(documents):
    tasks(documents)["unlearn"]["cachingOptions"] = {"enableCache": True}


def installer(documents):
    executors(documents)["exec-evaluate"]["container"]["command"][2] = "python3 -m pip install salun && exec"


def foreign_image(documents):
    executors(documents)["exec-fetch-model"]["container"]["image"] = "python:3.11"


def no_memory_limit(documents):
    del executors(documents)["exec-gate-publish"]["container"]["resources"]["resourceMemoryLimit"]


def no_cpu_request(documents):
    del executors(documents)["exec-gate-publish"]["container"]["resources"]["resourceCpuRequest"]


def gpu_count_is_lost(documents):
    for executor in executors(documents).values():
        executor["container"]["resources"].pop("accelerator", None)


def tolerations_are_lost(documents):
    for pod in pods(documents).values():
        pod.pop("tolerations")


def list_of_ids_as_default(documents):
    parameters = documents[0]["components"]["comp-unlearn"]["inputDefinitions"]["parameters"]
    parameters["ids"] = {"parameterType": "LIST", "defaultValue": ["000015", "000032"]}


def ids_in_a_text(documents):
    documents[0]["root"]["inputDefinitions"]["parameters"]["method"]["defaultValue"] = "000015,000032"


def ids_as_constant(documents):
    given = tasks(documents)["unlearn"]["inputs"]["parameters"]
    given["forget_manifest_uri"] = {"runtimeValue": {"constant": '["000015", "000032"]'}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (undeclared_input, "componentInputParameter memory is not declared"),
        (undeclared_in_a_pod, "root/unlearn: componentInputParameter zone is not declared"),
        (undeclared_artifact, "root/unlearn: componentInputArtifact mask is not declared"),
        (unknown_producer, "root/evaluate: producerTask train is not declared"),
        (resource_not_given, "root/unlearn: its resources ask for pipelinechannel--memory"),
        (caching, "root/unlearn: caching is on"),
        (installer, "exec-evaluate: its command installs packages"),
        (foreign_image, "exec-fetch-model: image python:3.11"),
        (no_memory_limit, "exec-gate-publish: it has no memory limit"),
        (no_cpu_request, "exec-gate-publish: it has no cpu request"),
        (gpu_count_is_lost, "parameter gpu_count reaches no executor"),
        (tolerations_are_lost, "parameter tolerations reaches no executor"),
        (list_of_ids_as_default, "comp-unlearn: the default of ids is a list"),
        (ids_in_a_text, "root: the default of method is a list"),
        (ids_as_constant, "root/unlearn: a constant is a list"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_defect_is_found(documents, damage, message):
    damage(documents)
    assert any(message in defect for defect in lint(*documents, IMAGE))


def test_a_limit_inside_a_group_is_traced_through_it(documents):
    """kfp names an input of the group that nothing declares: the defect that the lint was written for."""
    spec, _ = documents
    inner = {"dag": {"tasks": {"unlearn": tasks(documents).pop("unlearn")}}}
    spec["components"]["comp-condition"] = inner
    outer = {"componentRef": {"name": "comp-condition"}, "inputs": {"parameters": {}}}
    tasks(documents)["condition"] = outer
    assert "comp-condition/unlearn: componentInputParameter cpu is not declared" in lint(*documents, IMAGE)


def test_caching_is_off_everywhere(documents):
    assert [task.get("cachingOptions", {}).get("enableCache", False) for task in tasks(documents).values()] == [
        False
    ] * 5


def test_run_form_explains_every_parameter(documents):
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    fixed = {"model_line", "forget_manifest_uri", "method", "density", "policy_uri", "store_uri", "method_config"}
    assert fixed | {"seed", *PLACEMENT} <= set(parameters)
    assert [name for name, parameter in parameters.items() if not parameter.get("description")] == []


def test_only_the_steps_that_compute_ask_for_accelerators(documents):
    asking = {
        name: executor["container"]["resources"]["accelerator"]
        for name, executor in executors(documents).items()
        if "accelerator" in executor["container"]["resources"]
    }
    assert set(asking) == GPU_STEPS
    assert {item["type"] for item in asking.values()} == {"nvidia.com/gpu"}
    assert {name for name, pod in pods(documents).items() if pod.get("emptyDirMounts")} == GPU_STEPS


def test_pods_are_confined_and_configured(documents):
    for pod in pods(documents).values():
        assert pod["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
        assert int(pod["activeDeadlineSeconds"]) > 0
        assert pod["secretAsEnv"][0]["secretName"] == "salun-s3"
        assert "PUSHGATEWAY_URL" in str(pod["configMapAsEnv"])
        assert pod["configMapAsEnv"][0]["optional"] is True
        assert pod["podMetadata"]["labels"]["app.kubernetes.io/part-of"] == "salun"
        assert pod["tolerations"][0]["tolerationJson"] == {"componentInputParameter": "tolerations"}


def test_steps_are_tried_again_with_a_back_off(documents):
    for task in tasks(documents).values():
        assert task["retryPolicy"]["maxRetryCount"] > 0
        assert task["retryPolicy"]["backoffDuration"] == "30s"


def test_no_credential_is_in_the_file():
    text = (FOLDER / "salun-unlearning.yaml").read_text(encoding="utf-8")
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key\s*[:=]\s*\S", text)
