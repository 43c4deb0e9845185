"""Why a step was killed, read from Workflows as Argo writes them."""

import base64
import gzip
import json

import pytest

from salun_core.sweeps.failed_pods import LINE, why_killed
from tests.support.api_server import NAME, WORKFLOW_PATH


def rows(**pods):
    """The rows of a Workflow of Kubeflow: for each step a DAG, in it the attempts of a pod named executor."""
    found = {}
    for number, (step, attempts) in enumerate(pods.items()):
        around = f"{NAME}-{number}"
        found[around] = {"type": "DAG", "displayName": step.replace("_", "-"), "phase": "Failed", "message": "child"}
        for attempt, message in enumerate(attempts):
            row = {"type": "Pod", "displayName": f"executor({attempt})", "boundaryID": around, "message": message}
            phase, at = ("Failed" if message else "Succeeded"), f"2026-11-27T1{number}:0{attempt}:00Z"
            found[f"{around}-{attempt}"] = {**row, "phase": phase, "finishedAt": at}
    return found


def workflow(nodes, spec=None, **status):
    head = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": {"name": NAME}}
    return 200, {**head, "spec": spec or {}, "status": {"phase": "Running", "nodes": nodes, **status}}


CAUSES = {
    "main: OOMKilled (exit code 137)": ("out of memory", "memory in the run form"),
    "main: Error (exit code 137)": ("killed, mostly for memory", "memory in the run form"),
    "Pod was active on the node longer than the specified deadline": ("over its time limit", "max_requests"),
    "Step exceeded its deadline": ("over its time limit", "faster devices"),
    "The node was low on resource: memory. Threshold quantity: 100Mi, available: 52Mi.": ("evicted", "submit"),
    "Pod was terminated in response to imminent node shutdown.": ("its node was lost", "submit"),
    "Preempted in order to admit critical pod": ("its node was lost", "submit"),
    "main: Error (exit code 143)": ("stopped from outside", "submit"),
    "pod deleted": ("its node was lost", "submit"),
    'Usage of EmptyDir volume "dshm" exceeds the limit "2Gi".': ("shared memory", "SALUN_SHARED_MEMORY"),
    "workflow shutdown with strategy:  Terminate": ("was terminated", "submit"),
    "Pod failed before main container starts due to ImagePullBackOff: Back-off pulling image": ("image", "SALUN_IMAGE"),
    "main: StartError (exit code 128): exec format error": ("Argo reports: main: StartError", "events"),
}


@pytest.mark.parametrize("message", CAUSES)
def test_the_message_of_the_pod_gives_reason_and_advice(kubernetes, message):
    kubernetes.answers[WORKFLOW_PATH] = workflow(rows(unlearn=[message]))
    found = why_killed("unlearn")
    text, advice = CAUSES[message]
    assert text in found.text
    assert " ".join(message.split()) in found.text
    assert advice in found.advice
    assert kubernetes.asked == [(WORKFLOW_PATH, "Bearer of-the-pod")]


def test_the_last_attempt_of_the_step_counts(kubernetes):
    pods = rows(
        compute_mask=["pod deleted", ""], unlearn=["pod deleted", "main: OOMKilled (exit code 137)"], purge=["x"]
    )
    kubernetes.answers[WORKFLOW_PATH] = workflow(pods)
    assert why_killed("unlearn").text.startswith("out of memory")
    assert why_killed("compute_mask").text.startswith("its node was lost")


def test_without_a_step_the_pod_that_failed_last_counts(kubernetes):
    pods = rows(purge_store=["main: Error (exit code 1)"], claim_requests=["main: OOMKilled (exit code 137)"])
    kubernetes.answers[WORKFLOW_PATH] = workflow(pods)
    assert why_killed("").text.startswith("out of memory")
    assert why_killed("unlearn").text.startswith("out of memory")


@pytest.mark.parametrize("spec", [{"activeDeadlineSeconds": 0}, {"shutdown": "Terminate"}, {"shutdown": "Stop"}])
def test_a_run_that_was_terminated_is_named_so_whatever_its_pods_say(kubernetes, spec):
    kubernetes.answers[WORKFLOW_PATH] = workflow(rows(unlearn=["main: Error (exit code 137)"]), spec)
    assert why_killed("unlearn").text == "the run was terminated"


def test_a_large_workflow_has_its_rows_packed(kubernetes):
    packed = base64.b64encode(gzip.compress(json.dumps(rows(unlearn=["pod deleted"])).encode())).decode()
    kubernetes.answers[WORKFLOW_PATH] = workflow({}, compressedNodes=packed)
    assert why_killed("unlearn").text.startswith("its node was lost")


def test_a_long_message_is_cut_to_one_line(kubernetes):
    kubernetes.answers[WORKFLOW_PATH] = workflow(rows(unlearn=["init: Error (exit code 1):\n" + "no room " * 100]))
    text = why_killed("unlearn").text
    assert "\n" not in text
    assert len(text) == LINE + len("Argo reports: ")


NOTHING = {
    "no pod failed": workflow(rows(unlearn=[""])),
    "no rows": workflow({}),
    "offloaded": workflow(None, offloadNodeStatusVersion="fnv:784644"),
    "damaged rows": workflow({}, compressedNodes="H4sIAAAA"),
    "rows that are no base64": workflow({}, compressedNodes="ä"),
    "rows of another type": workflow(["unlearn"]),
    "no right": (403, {"kind": "Status", "code": 403}),
    "gone": (404, {"kind": "Status", "code": 404}),
    "a proxy": (200, "<html></html>"),
}


@pytest.mark.parametrize("answer", NOTHING.values(), ids=NOTHING)
def test_what_cannot_be_read_gives_no_reason(kubernetes, answer):
    kubernetes.answers[WORKFLOW_PATH] = answer
    assert why_killed("unlearn") is None


def test_outside_of_a_cluster_nobody_is_asked(account):
    assert why_killed("unlearn") is None
