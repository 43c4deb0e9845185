"""The compiled pipelines: what the lint accepts, and each defect that it must find."""

import itertools
import re

import pytest

from components._image import IMAGE
from pipelines.form import PLACEMENT
from pipelines.ir_lint import lint
from pipelines.packages import COMPILED
from salun_core.storage.s3_settings import VARIABLES
from salun_core.telemetry.metrics import check_label
from tests.pipelines.conftest import read

GPU_STEPS = {"exec-compute-mask", "exec-unlearn", "exec-evaluate"}
ENDS = {"conclude", "conclude-2"}
STEPS = {
    "salun-unlearning": {
        "fetch-model",
        "compute-mask",
        "unlearn",
        "evaluate",
        "gate-publish",
        "settle-requests",
        *ENDS,
    },
    "salun-deletion-sweep-compact": {"sweep-compact", "settle-requests", "purge-store", "conclude"},
}
STEPS["salun-deletion-sweep"] = STEPS["salun-unlearning"] | {"claim-requests", "purge-store"}
COMPUTING = {
    "salun-unlearning": GPU_STEPS,
    "salun-deletion-sweep": GPU_STEPS,
    "salun-deletion-sweep-compact": {"exec-sweep-compact"},
}
SMALL = {"claim-requests", "fetch-model", "settle-requests", "purge-store", *ENDS}
ACCELERATORS = ("gpu_count", "accelerator")


def executors(documents):
    return documents[0]["deploymentSpec"]["executors"]


def pods(documents):
    return documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def tasks(documents):
    """The steps of the group that works."""
    return component(documents, "comp-condition-2")["dag"]["tasks"]


def all_tasks(documents):
    dags = [documents[0]["root"], *(item for item in documents[0]["components"].values() if "dag" in item)]
    return {name: task for dag in dags for name, task in dag["dag"]["tasks"].items()}


def component(documents, start):
    (found,) = [item for name, item in documents[0]["components"].items() if name.startswith(start)]
    return found


def test_shipped_pipelines_have_no_defect(each):
    assert lint(*each, IMAGE) == []
    without = read(f"{each[0]['pipelineInfo']['name']}-cpu")
    assert lint(*without, IMAGE, [name for name in PLACEMENT if name not in ACCELERATORS]) == []


def name_of(documents):
    return documents[0]["pipelineInfo"]["name"]


def undeclared_input(documents):
    del documents[0]["root"]["inputDefinitions"]["parameters"]["memory"]


def undeclared_in_a_pod(documents):
    pods(documents)["exec-unlearn"]["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"] = "zone"


def undeclared_artifact(documents):
    tasks(documents)["unlearn"]["inputs"]["artifacts"]["mask"] = {"componentInputArtifact": "mask"}


def unknown_producer(documents):
    tasks(documents)["evaluate"]["inputs"]["artifacts"]["unlearned"]["taskOutputArtifact"]["producerTask"] = "train"


def number_as_resource(documents):
    """What the first release shipped: pods without their accelerator, and no error."""
    component(documents, "comp-condition-2")["inputDefinitions"]["parameters"]["pipelinechannel--gpu_count"] = {
        "parameterType": "NUMBER_INTEGER"
    }


def window_shorter_than_an_attempt(documents):
    tasks(documents)["unlearn"]["retryPolicy"]["backoffMaxDuration"] = "600s"


def no_time_limit(documents):
    del pods(documents)["exec-unlearn"]["activeDeadlineSeconds"]


def model_as_artifact(documents):
    outputs = documents[0]["components"]["comp-unlearn"]["outputDefinitions"]["artifacts"]
    outputs["unlearned"]["artifactType"] = {"schemaTitle": "system.Model", "schemaVersion": "0.0.1"}


def group_without_a_name(documents):
    component(documents, "comp-exit-handler")["dag"]["tasks"]["condition-2"]["taskInfo"]["name"] = "condition-2"


def third_level(documents):
    inner = {"dag": {"tasks": {"unlearn": tasks(documents)["unlearn"]}}}
    documents[0]["components"]["comp-inner"] = inner
    tasks(documents)["inner"] = {"componentRef": {"name": "comp-inner"}, "taskInfo": {"name": "inner"}}


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
        (number_as_resource, "pipelinechannel--gpu_count is a resource, and NUMBER_INTEGER instead of STRING"),
        (window_shorter_than_an_attempt, "unlearn: its attempts need 259200 s, and its window has 600 s"),
        (no_time_limit, "unlearn: it has retries and no time limit"),
        (model_as_artifact, "comp-unlearn: output unlearned is a system.Model"),
        (group_without_a_name, "condition-2: the group has no name"),
        (third_level, "inner: the graph is nested 3 levels deep"),
        (undeclared_in_a_pod, "comp-condition-2/unlearn: componentInputParameter zone is not declared"),
        (undeclared_artifact, "comp-condition-2/unlearn: componentInputArtifact mask is not declared"),
        (unknown_producer, "comp-condition-2/evaluate: producerTask train is not declared"),
        (resource_not_given, "comp-condition-2/unlearn: its resources need pipelinechannel--memory"),
        (caching, "comp-condition-2/unlearn: caching is on"),
        (installer, "exec-evaluate: its command installs packages"),
        (foreign_image, "exec-fetch-model: image python:3.11"),
        (no_memory_limit, "exec-gate-publish: memory limit is missing"),
        (no_cpu_request, "exec-gate-publish: cpu request is missing"),
        (gpu_count_is_lost, "parameter gpu_count reaches no executor"),
        (tolerations_are_lost, "parameter tolerations reaches no executor"),
        (list_of_ids_as_default, "comp-unlearn: the default of ids is a list"),
        (ids_in_a_text, "root: the default of method is a list"),
        (ids_as_constant, "comp-condition-2/unlearn: a constant is a list"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_defect_is_found(documents, damage, message):
    damage(documents)
    assert any(message in defect for defect in lint(*documents, IMAGE))


def test_a_limit_inside_a_group_is_traced_through_it(documents):
    """kfp names an input of the group that nothing declares: the defect that the lint was written for."""
    del component(documents, "comp-condition-2")["inputDefinitions"]["parameters"]["pipelinechannel--cpu"]
    message = "comp-condition-2/unlearn: componentInputParameter pipelinechannel--cpu is not declared"
    assert message in lint(*documents, IMAGE)


def tolerations_of_the_claim_are_undeclared(sweep):
    """What kfp compiles where nothing else in the exit handler asks for them."""
    del component(sweep, "comp-exit-handler")["inputDefinitions"]["parameters"]["pipelinechannel--tolerations"]


def nested_caching(sweep):
    all_tasks(sweep)["unlearn"]["cachingOptions"] = {"enableCache": True}


def nested_gpu_count_is_lost(sweep):
    del component(sweep, "comp-exit-handler")["dag"]["tasks"]["condition-2"]["inputs"]["parameters"][
        "pipelinechannel--gpu_count"
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            tolerations_of_the_claim_are_undeclared,
            "claim-requests: componentInputParameter pipelinechannel--tolerations is not declared",
        ),
        (nested_caching, "unlearn: caching is on"),
        (nested_gpu_count_is_lost, "parameter gpu_count reaches no executor"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_defect_of_nested_groups_is_found(sweep, damage, message):
    damage(sweep)
    assert any(message in defect for defect in lint(*sweep, IMAGE))


def test_caching_is_off_everywhere(each):
    found = all_tasks(each)
    assert STEPS[name_of(each)] <= set(found)
    assert [name for name, task in found.items() if task.get("cachingOptions", {}).get("enableCache", False)] == []


RECIPE = {
    "method",
    "density",
    "policy_uri",
    "method_config",
    "seed",
    "retrain_reference",
    "tune",
    "tune_budget",
    "extra_metrics",
    "evaluation_samples",
}
BATCH = {"min_requests", "max_requests", "max_wait_hours", "max_forget_fraction", "dry_run"}


def test_run_form_explains_every_parameter(each):
    parameters = each[0]["root"]["inputDefinitions"]["parameters"]
    own = {
        "salun-unlearning": {"forget_manifest_uri", *RECIPE},
        "salun-deletion-sweep": {*BATCH, *RECIPE},
        "salun-deletion-sweep-compact": {*BATCH, *RECIPE},
    }
    assert set(parameters) == {"model_line", "store_uri", *PLACEMENT} | own[name_of(each)]
    assert [name for name, parameter in parameters.items() if not parameter.get("description")] == []


def test_the_claim_decides_which_recipe_a_sweep_runs(sweep):
    given = tasks(sweep)["fetch-model"]["inputs"]["parameters"]
    for name in ("forget_manifest_uri", "method", "density", "method_config"):
        assert given[name] == {"componentInputParameter": f"pipelinechannel--claim-requests-{name}"}
    for step in ("compute-mask", "unlearn"):
        given = tasks(sweep)[step]["inputs"]["parameters"]
        assert given["method"] == {"componentInputParameter": "pipelinechannel--claim-requests-method"}


def test_settling_always_runs_and_is_tried_nine_times(sweep):
    root = sweep[0]["root"]["dag"]["tasks"]
    settle = root["settle-requests"]
    assert settle["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert settle["retryPolicy"]["maxRetryCount"] >= 8
    assert {"settle-requests"} == {name for name in root if not name.startswith("exit-handler")}
    assert set(settle["inputs"]["parameters"]) == {"final_status", "model_line", "run_id", "store_uri"} | {
        name for name in settle["inputs"]["parameters"] if name.startswith("pipelinechannel--") or "limit" in name
    }


def test_a_verdict_is_never_repeated(each):
    """The last step fails the run by its outcome; a second attempt would fail in the same way."""
    ends = {name: task for name, task in all_tasks(each).items() if name in ENDS}
    assert ends
    assert not [name for name, task in ends.items() if "retryPolicy" in task]


def test_each_step_takes_only_what_the_one_before_made(documents):
    """One chain: no arrows from everything to everything."""
    taken = {
        name: [
            item["taskOutputArtifact"]["producerTask"]
            for item in task["inputs"].get("artifacts", {}).values()
            if "taskOutputArtifact" in item
        ]
        for name, task in tasks(documents).items()
    }
    chain = ["compute-mask", "unlearn", "evaluate", "gate-publish"]
    assert {name: taken[name] for name in chain[1:]} == {name: [before] for before, name in itertools.pairwise(chain)}
    assert tasks(documents)["conclude"]["dependentTasks"] == ["gate-publish"]


def test_the_groups_of_the_graph_have_names(each):
    dags = [each[0]["root"], *(item for item in each[0]["components"].values() if "dag" in item)]
    shown = {
        task["taskInfo"]["name"]
        for dag in dags
        for task in dag["dag"]["tasks"].values()
        if "dag" in each[0]["components"][task["componentRef"]["name"]]
    }
    assert (
        shown
        == {
            "salun-unlearning": {"unlearning", "the line is free", "the run cannot start"},
            "salun-deletion-sweep": {"sweep", "something is due", "the sweep cannot start"},
            "salun-deletion-sweep-compact": {"sweep", "the outcome is bad"},
        }[name_of(each)]
    )


def test_steps_that_move_documents_ask_for_little(each):
    for name, executor in executors(each).items():
        resources = executor["container"]["resources"]
        if name.removeprefix("exec-") in SMALL:
            assert (resources["resourceCpuRequest"], resources["resourceMemoryRequest"]) == ("100m", "512Mi")
        else:
            assert "pipelinechannel--memory" in resources["resourceMemoryRequest"]


def test_only_certifying_steps_get_the_signing_key_as_a_file(sweep):
    holders = {name for name, pod in pods(sweep).items() if pod.get("secretAsVolume")}
    assert holders == {f"exec-{step}" for step in ("claim-requests", "settle-requests", "purge-store", "gate-publish")}
    for name in holders:
        (volume,) = pods(sweep)[name]["secretAsVolume"]
        assert (volume["secretName"], volume["mountPath"]) == ("salun-signing", "/etc/salun/signing")
    for name, executor in executors(sweep).items():
        given = {item["name"]: item["value"] for item in executor["container"]["env"]}
        assert given.get("SALUN_SIGNING_KEY") == ("/etc/salun/signing/key.pem" if name in holders else None)
    assert "salun-signing" not in str([pod.get("secretAsEnv") for pod in pods(sweep).values()])


def test_only_computing_steps_request_accelerators(each):
    asking = {
        name: executor["container"]["resources"]["accelerator"]
        for name, executor in executors(each).items()
        if "accelerator" in executor["container"]["resources"]
    }
    assert set(asking) == COMPUTING[name_of(each)]
    assert {item["resourceType"] for item in asking.values()} == {
        "{{$.inputs.parameters['pipelinechannel--accelerator']}}"
    }
    assert {item["resourceCount"] for item in asking.values()} == {
        "{{$.inputs.parameters['pipelinechannel--gpu_count']}}"
    }
    assert {name for name, pod in pods(each).items() if pod.get("emptyDirMounts")} == COMPUTING[name_of(each)]


def test_mask_and_unlearning_run_one_process_per_gpu(each):
    for name, task in all_tasks(each).items():
        if name in ("compute-mask", "unlearn"):
            count = {"componentInputParameter": "pipelinechannel--gpu_count"}
            assert task["inputs"]["parameters"]["processes"] == count
    without = read(f"{name_of(each)}-cpu")
    assert not [name for name, task in all_tasks(without).items() if "processes" in task["inputs"]["parameters"]]


@pytest.mark.parametrize("variant", ["", "-cpu"])
def test_every_step_gets_the_pipeline_name_and_the_run_id(each, variant):
    """By the name that its metrics carry: of the pipeline that was started, not of one nested in it."""
    name = f"{name_of(each)}{variant}"
    documents = read(name)
    check_label("pipeline", name)
    for executor in executors(documents).values():
        assert {"name": "SALUN_PIPELINE", "value": name} in executor["container"]["env"]
    run = {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}
    steps = {name: task for name, task in all_tasks(documents).items() if f"exec-{name}" in executors(documents)}
    assert set(steps) == STEPS[name_of(each)]
    assert [name for name, task in steps.items() if task["inputs"]["parameters"].get("run_id") != run] == []


def test_pods_are_confined_and_configured(each):
    for pod in pods(each).values():
        assert pod["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
        assert int(pod["activeDeadlineSeconds"]) > 0
        assert pod["secretAsEnv"][0]["secretName"] == "salun-s3"
        assert "PUSHGATEWAY_URL" in str(pod["configMapAsEnv"])
        assert pod["configMapAsEnv"][0]["optional"] is True
        assert pod["podMetadata"]["labels"]["app.kubernetes.io/part-of"] == "salun"
        assert {"SALUN_COMMIT", "SALUN_IMAGE_DIGEST"} <= keys_of(pod)
        assert pod["tolerations"][0]["tolerationJson"]["componentInputParameter"].endswith("tolerations")


def test_kubeflows_launcher_finds_no_key_and_no_address_of_our_store(each):
    """It shares the container with the step, and reads AWS_* for its own store."""
    for pod in pods(each).values():
        given = variables_of(pod)
        assert not [name for name in given if name.startswith("AWS_")]
        assert {name for name in given if name in VARIABLES} == {*VARIABLES} - {"SALUN_S3_SESSION_TOKEN"}
        pairs = [pair for source in pod["secretAsEnv"] for pair in source["keyToEnv"]]
        assert {pair["envVar"].removeprefix("SALUN_S3_"): pair["secretKey"] for pair in pairs} == {
            "ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
            "SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
        }


def test_every_step_knows_its_workflow_and_can_ask_for_runs(each):
    for pod in pods(each).values():
        assert {item["name"]: item["fieldPath"] for item in pod["fieldPathAsEnv"]} == {
            "SALUN_WORKFLOW": "metadata.labels['workflows.argoproj.io/workflow']",
            "SALUN_NAMESPACE": "metadata.namespace",
        }
        assert "KFP_ENDPOINT" in keys_of(pod)


def variables_of(pod):
    """The names of all variables that a pod gets from Secrets, the ConfigMap and its own fields."""
    pairs = [pair for source in pod["secretAsEnv"] + pod["configMapAsEnv"] for pair in source["keyToEnv"]]
    return [pair["envVar"] for pair in pairs] + [item["name"] for item in pod["fieldPathAsEnv"]]


def keys_of(pod):
    return {item["envVar"] for item in pod["configMapAsEnv"][0]["keyToEnv"]}


def test_steps_are_retried_with_back_off(each):
    steps = [task for name, task in all_tasks(each).items() if f"exec-{name}" in executors(each)]
    assert len(steps) == len(executors(each))
    tried_once = {task["componentRef"]["name"].removeprefix("comp-") for task in steps if "retryPolicy" not in task}
    assert tried_once <= ENDS
    for task in steps:
        assert task.get("retryPolicy", {}).get("backoffDuration", "30s") == "30s"


@pytest.mark.parametrize("name", STEPS)
def test_the_file_contains_no_credential(name):
    text = (COMPILED / f"{name}.yaml").read_text(encoding="utf-8")
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret_access_key\s*[:=]\s*\S", text)
