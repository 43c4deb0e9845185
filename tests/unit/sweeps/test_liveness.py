"""Whether the holder of a line lives, asked over HTTP from servers that answer as the real ones do."""

from __future__ import annotations

from datetime import timedelta

import pytest

from salun_core.errors import LineHeldError
from salun_core.storage.leases import Lease, Life, Place, acquire, read_lease
from salun_core.sweeps import liveness
from salun_core.sweeps.heartbeat import hold_line
from tests.support.api_server import NAME, WORKFLOW_PATH, issue
from tests.support.memory_store import MemoryStore

pytestmark = pytest.mark.usefixtures("account")
LINE, RUN = "faces", "5b6f4e0e-91d5-4d0f-9d5c-2f6f7a1c9b11"
RUN_PATH = f"/apis/v2beta1/runs/{RUN}"


def workflow(phase=None, pod_running=None, pods=(), **metadata):
    """A Workflow as Argo 4.0.5 shows it, without its specification."""
    status = {} if phase is None else {"phase": phase, "startedAt": "2026-11-27T09:00:00Z"}
    if pod_running is not None:
        status["conditions"] = [{"type": "PodRunning", "status": pod_running}]
    if pods:
        rows = [{"type": "Pod", "phase": pod, "templateName": "system-container-impl"} for pod in pods]
        status["nodes"] = {
            f"{NAME}-{number}": row for number, row in enumerate([{"type": "DAG", "phase": phase}, *rows])
        }
    head = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow"}
    return 200, {**head, "metadata": {"name": NAME, "namespace": "team", **metadata}, "status": status}


def failure(code, reason, message, **details):
    """What an API server answers in place of an object."""
    body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return code, {**body, "message": message, "reason": reason, "details": details, "code": code}


GONE = failure(404, "NotFound", f'workflows.argoproj.io "{NAME}" not found', name=NAME, kind="workflows")
FORBIDDEN = failure(403, "Forbidden", f'workflows.argoproj.io "{NAME}" is forbidden', name=NAME, kind="workflows")
DELETED = "2026-11-27T10:00:00Z"


def lease(place=None, holder=RUN):
    return Lease(line=LINE, holder=holder, epoch=1, beat=1, seconds=600, place=place)


@pytest.mark.parametrize(
    ("answer", "life"),
    [
        (workflow(), Life.ALIVE),  # just created: the controller has not seen it yet
        (workflow(""), Life.ALIVE),
        (workflow("Pending"), Life.ALIVE),
        (workflow("Running"), Life.ALIVE),
        (workflow("Running", "False"), Life.ALIVE),  # its pods wait for a node
        (workflow("Running", "True"), Life.UNKNOWN),  # a step at work beats; one on a lost node does not
        (workflow("Running", "True", ["Succeeded", "Running"]), Life.UNKNOWN),
        (workflow("Running", "True", ["Running", "Pending"]), Life.ALIVE),  # a purge works, the next step waits
        (workflow("Running", "False", ["Succeeded"]), Life.ALIVE),  # between two pods
        (workflow("Succeeded", "False"), Life.DEAD),
        (workflow("Failed"), Life.DEAD),
        (workflow("Error"), Life.DEAD),
        (workflow("Running", "False", deletionTimestamp=DELETED), Life.DEAD),
        (workflow("Running", "True", deletionTimestamp=DELETED), Life.DEAD),
        (workflow("Suspended"), Life.UNKNOWN),
        (GONE, Life.DEAD),
        (failure(404, "NotFound", "the server could not find the requested resource"), Life.UNKNOWN),
        ((404, "404 page not found\n"), Life.UNKNOWN),  # no Argo in this cluster
        (FORBIDDEN, Life.UNKNOWN),
        (failure(401, "Unauthorized", "Unauthorized"), Life.UNKNOWN),
        (failure(503, "ServiceUnavailable", "apiserver is shutting down"), Life.UNKNOWN),
        ((200, "<html>a proxy</html>"), Life.UNKNOWN),
        ((200, []), Life.UNKNOWN),
        ((200, {"kind": "Workflow", "metadata": None, "status": None}), Life.ALIVE),
        ((302, "http://127.0.0.1:9/elsewhere"), Life.UNKNOWN),
    ],
)
def test_the_workflow_of_the_holder_tells_whether_it_lives(kubernetes, answer, life):
    kubernetes.answers[WORKFLOW_PATH] = answer
    assert liveness.life_of(lease(liveness.here())) is life
    assert kubernetes.asked == [(WORKFLOW_PATH, "Bearer of-the-pod")]


def test_names_repeat_between_clusters_so_only_the_own_one_is_asked(kubernetes):
    kubernetes.answers[WORKFLOW_PATH] = GONE
    elsewhere = Place(namespace="team", workflow=NAME, cluster="e" * 64)
    assert liveness.life_of(lease(elsewhere)) is Life.UNKNOWN
    assert liveness.life_of(lease(None)) is Life.UNKNOWN
    assert not kubernetes.asked


def test_an_api_server_of_another_authority_is_not_believed(kubernetes, account, tmp_path):
    place = liveness.here()
    kubernetes.answers[WORKFLOW_PATH] = GONE
    other = tmp_path / "other"
    other.mkdir()
    issue(other)
    (account / "ca.crt").write_bytes((other / "ca.crt").read_bytes())
    moved = Place(namespace=place.namespace, workflow=place.workflow, cluster=liveness.here().cluster)
    assert liveness.life_of(lease(moved)) is Life.UNKNOWN
    assert not kubernetes.asked


@pytest.mark.parametrize("missing", ["token", "server"])
def test_an_api_that_cannot_be_asked_leaves_it_to_time(kubernetes, account, monkeypatch, missing):
    place = liveness.here()
    if missing == "token":
        (account / "token").unlink()
    else:
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "9")
    assert liveness.life_of(lease(place)) is Life.UNKNOWN


@pytest.mark.parametrize(
    ("state", "life"),
    [
        ("SUCCEEDED", Life.DEAD),
        ("FAILED", Life.DEAD),
        ("CANCELED", Life.DEAD),
        ("SKIPPED", Life.DEAD),
        ("CANCELING", Life.UNKNOWN),
        ("PENDING", Life.UNKNOWN),
        ("RUNNING", Life.UNKNOWN),  # also a run whose Workflow was deleted
        (None, Life.UNKNOWN),
    ],
)
def test_the_run_tells_whether_it_has_ended(kubeflow, state, life):
    kubeflow.answers[RUN_PATH] = (200, {"run_id": RUN, "state": state})
    assert liveness.life_of(lease()) is life
    assert kubeflow.asked == [(RUN_PATH, None)]


def test_kubeflow_is_asked_with_its_own_token_if_kubernetes_may_not_tell(kubernetes, kubeflow, tmp_path, monkeypatch):
    token = tmp_path / "pipelines-token"
    token.write_text("for-pipelines")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    kubernetes.answers[WORKFLOW_PATH] = FORBIDDEN
    kubeflow.answers[RUN_PATH] = (200, {"run_id": RUN, "state": "FAILED"})
    assert liveness.life_of(lease(liveness.here())) is Life.DEAD
    assert kubeflow.asked == [(RUN_PATH, "Bearer for-pipelines")]


def test_a_workflow_that_lives_is_enough(kubernetes, kubeflow):
    kubernetes.answers[WORKFLOW_PATH] = workflow("Running")
    assert liveness.life_of(lease(liveness.here())) is Life.ALIVE
    assert not kubeflow.asked


def test_a_run_that_kubeflow_does_not_know_is_left_to_time(kubeflow):
    assert liveness.life_of(lease()) is Life.UNKNOWN
    assert liveness.life_of(lease(holder="run-20261127-101500-3f9a1c")) is Life.UNKNOWN
    assert [path for path, _ in kubeflow.asked] == [RUN_PATH]  # an id of `salun sweep` is none of Kubeflow's


def test_a_process_outside_of_a_workflow_has_no_place(account, monkeypatch):
    assert liveness.here() is None
    monkeypatch.setenv("SALUN_WORKFLOW", NAME)
    monkeypatch.setenv("SALUN_NAMESPACE", "team")
    assert liveness.here() is None  # no cluster
    issue(account)
    assert (liveness.here().workflow, liveness.here().namespace) == (NAME, "team")
    monkeypatch.setenv("SALUN_WORKFLOW", "../../secrets")
    assert liveness.here() is None


def test_the_line_of_a_deleted_workflow_is_taken_at_once_and_that_of_a_waiting_one_is_not(kubernetes):
    store = MemoryStore()
    hold_line(store, LINE, RUN)
    assert read_lease(store, LINE).place.workflow == NAME
    kubernetes.answers[WORKFLOW_PATH] = workflow("Running", "False")
    store.now += timedelta(hours=3)
    with pytest.raises(LineHeldError, match=f"line held by {RUN}"):
        hold_line(store, LINE, "run-2")
    kubernetes.answers[WORKFLOW_PATH] = workflow("Running", "True")  # its node was lost while the step worked
    assert hold_line(store, LINE, "run-2").epoch == 2
    store.now += timedelta(seconds=1)
    with pytest.raises(LineHeldError):
        hold_line(store, LINE, "run-3")
    kubernetes.answers[WORKFLOW_PATH] = GONE
    assert hold_line(store, LINE, "run-3").epoch == 3


def test_a_line_is_blocked_for_no_longer_than_a_quarter_of_an_hour_if_nobody_can_be_asked():
    store = MemoryStore()
    hold_line(store, LINE, RUN)
    store.now += timedelta(minutes=15)
    assert acquire(store, LINE, "run-2", 600).epoch == 2
