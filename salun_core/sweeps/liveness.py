"""Finds out whether the run that holds a model line lives, so that a dead one blocks the line for minutes at most.

Two APIs may know. Neither is needed: if none of them answers, the lease decides by time alone.

1. The Kubernetes API, about the Argo Workflow that the lease names. It is asked from inside a cluster only, and only
   about a Workflow of the same cluster.
   - The Workflow is gone, is being deleted, or has ended: the holder is dead.
   - It runs, and a pod waits for a node, or no pod is there: the holder lives, although nobody renews its lease.
   - It runs, and its pods are at work: unknown. A step at work renews the lease itself, and the pod of a lost node is
     shown as running for a long time.
2. The Kubeflow API of this process, about the run. The run has ended: the holder is dead. A run that is shown as
   running proves nothing, since Kubeflow shows a run whose Workflow was deleted as running for good.

What can happen: a holder that is seen as dead may still have a pod that ends within its grace period, and an answer may
be older than the holder's last write. Both are fenced like a holder that slept: see `storage.leases`. An answer is
never kept, and the conditional write that takes the lease fails if the holder renewed it meanwhile. A step that has
waited for longer than the lease and starts just now may be taken for one of a lost node, until its first renewal some
seconds later: its run is then settled, and its requests are queued again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import UUID

from salun_core.config import parse
from salun_core.digest import sha256_bytes
from salun_core.errors import UsageError
from salun_core.storage.leases import Lease, Life, Place
from salun_core.telemetry.logs import get_logger

WORKFLOW_VARIABLE, NAMESPACE_VARIABLE = "SALUN_WORKFLOW", "SALUN_NAMESPACE"
KUBEFLOW_VARIABLE, TOKEN_VARIABLE = "KFP_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105 - the name of a variable
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONNECT_SECONDS, READ_SECONDS = 2.0, 5.0  # a claim must not wait long for an API that is down
_WORKFLOW_ENDED = frozenset({"Succeeded", "Failed", "Error"})
_WORKFLOW_ALIVE = frozenset({"", "Pending", "Running"})
_RUN_ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
_LARGEST = 8 << 20  # bytes of an answer; etcd keeps no larger object than 1.5 MiB


def here() -> Place | None:
    """Return the Workflow that this process belongs to, or None outside of one."""
    cluster = _cluster()
    fields = {
        "namespace": os.environ.get(NAMESPACE_VARIABLE, "").strip(),
        "workflow": os.environ.get(WORKFLOW_VARIABLE, "").strip(),
        "cluster": cluster,
    }
    if not all(fields.values()):
        return None
    try:
        return parse(Place, fields, "the place of this process")
    except UsageError as error:  # a lease without a place is decided by time
        get_logger().warning("place_unknown", error=error.why)
        return None


def life_of(lease: Lease) -> Life:
    """Return whether the holder of a lease lives, as far as the APIs that can be reached know. It never raises.

    DEAD only if an API says that the holder's Workflow or run has ended or is gone.
    """
    found = _life_of_workflow(lease.place) if lease.place else Life.UNKNOWN
    if found is Life.UNKNOWN:
        found = _life_of_run(lease.holder)
    get_logger().info("holder_checked", model_line=lease.line, holder=lease.holder, life=str(found))
    return found


def _cluster() -> str | None:
    """Return what tells this cluster from others: the digest of its certificate authority."""
    try:
        return sha256_bytes((ACCOUNT / "ca.crt").read_bytes())
    except OSError:
        return None


def read_workflow(place: Place) -> tuple[int, Mapping[str, Any]]:
    """Read a Workflow of this cluster from the Kubernetes API: status and object. It never raises.

    The status is 0 if there is no answer, or if the place is in another cluster.
    """
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or place.cluster != _cluster():
        return 0, {}
    base = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    path = f"/apis/argoproj.io/v1alpha1/namespaces/{quote(place.namespace)}/workflows/{quote(place.workflow)}"
    return _get(base + path, ACCOUNT / "token", str(ACCOUNT / "ca.crt"))


def _life_of_workflow(place: Place) -> Life:
    status, body = read_workflow(place)
    if status == 404:  # an API server that does not have the API group answers 404 too, but names no object
        gone = body.get("reason") == "NotFound" and as_mapping(body.get("details")).get("name") == place.workflow
        return Life.DEAD if gone else Life.UNKNOWN
    if status != 200 or body.get("kind") != "Workflow":
        return Life.UNKNOWN
    state = as_mapping(body.get("status"))
    phase = state.get("phase", "")
    if phase in _WORKFLOW_ENDED or as_mapping(body.get("metadata")).get("deletionTimestamp"):
        return Life.DEAD
    if phase not in _WORKFLOW_ALIVE or (_a_pod_works(state) and not _a_pod_waits(state)):
        return Life.UNKNOWN
    return Life.ALIVE


def _a_pod_works(state: Mapping[str, Any]) -> bool:
    conditions = state.get("conditions")
    rows = [as_mapping(row) for row in conditions] if isinstance(conditions, list) else []
    return any((row.get("type"), row.get("status")) == ("PodRunning", "True") for row in rows)


def _a_pod_waits(state: Mapping[str, Any]) -> bool:
    """Return whether a pod waits, beside one that works: a purge does not hold the line, and works at the same time."""
    nodes = [as_mapping(node) for node in as_mapping(state.get("nodes")).values()]
    return any((node.get("type"), node.get("phase")) == ("Pod", "Pending") for node in nodes)


def _life_of_run(run: str) -> Life:
    base = os.environ.get(KUBEFLOW_VARIABLE, "").strip().rstrip("/")
    try:
        UUID(run)  # Kubeflow's ids are of this form: the runs of `salun sweep` need no question
    except ValueError:
        return Life.UNKNOWN
    if urlsplit(base).scheme not in {"http", "https"}:
        return Life.UNKNOWN
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    status, body = _get(f"{base}/apis/v2beta1/runs/{run}", Path(token) if token else None, None)
    return Life.DEAD if status == 200 and body.get("state") in _RUN_ENDED else Life.UNKNOWN


def _get(url: str, token: Path | None, authority: str | None) -> tuple[int, Mapping[str, Any]]:
    """Return the status and the JSON object that a server answers; 0 if there is no answer."""
    import urllib3

    headers = {"Accept": "application/json"}
    try:
        if token is not None:  # read each time, because the kubelet renews it
            headers["Authorization"] = f"Bearer {token.read_text().strip()}"
        with urllib3.PoolManager(cert_reqs="CERT_REQUIRED", ca_certs=authority) as pool:
            answer = pool.request(
                "GET",
                url,
                headers=headers,
                timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
                retries=False,
                redirect=False,  # the token is for this server only
                preload_content=False,
            )
            data = answer.read(_LARGEST)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        get_logger().warning("holder_not_checked", error=type(error).__name__)
        return 0, {}
    try:
        return answer.status, as_mapping(json.loads(data))
    except (ValueError, RecursionError):  # a proxy, or a server without this API
        return answer.status, {}


def as_mapping(value: object) -> Mapping[str, Any]:
    """Return a value of an answer if it is an object, otherwise an empty one."""
    return value if isinstance(value, dict) else {}
