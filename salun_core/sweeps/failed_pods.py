"""Finds out why a pod of this run failed, so that the outcome of a killed step names the reason.

A killed step writes nothing, its pod may be gone, and Kubeflow's API has no text of any step. The Argo Workflow keeps a
row for each pod in `status.nodes`, with the message of the kubelet or of Argo. A Workflow above 1 MiB has them in
`status.compressedNodes`, as base64 of gzip of JSON. One that is offloaded to Argo's database has neither.

The Workflow is read from inside the cluster, with the right of the claim to ask whether another run lives. Where it
cannot be read, nothing is known.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from salun_core.sweeps.liveness import as_mapping, here, read_workflow

LINE = 200  # characters of a message: what Kubernetes says about a pod can fill a page
_LARGEST = 64 << 20  # bytes of the rows, unpacked
_FAILED = frozenset({"Failed", "Error"})
_RETRIED = re.compile(r"\(\d+\)$")  # Argo names the attempts of a step unlearn(0), unlearn(1)
_AGAIN = "submit a new run"


@dataclass(frozen=True)
class Cause:
    """Why a step was killed, with what Argo says about the pod, and what to do."""

    text: str
    advice: str


# The first one that matches counts: the more specific ones come first.
_CAUSES: tuple[tuple[re.Pattern[str], Cause], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), Cause(text, advice))
    for pattern, text, advice in (
        (
            r"emptydir volume .* exceeds",
            "its shared memory was full",
            f"raise SALUN_SHARED_MEMORY, register the pipeline again, then {_AGAIN}",
        ),
        (r"oomkilled", "out of memory", f"give more memory in the run form, then {_AGAIN}"),
        (
            r"workflow shutdown|workflow deadline|^terminated$",
            "the run was terminated",
            f"{_AGAIN} unless that was meant",
        ),
        (
            r"specified deadline|exceeded its deadline|deadlineexceeded|max duration",
            "over its time limit",
            f"use faster devices, or let a run take less (max_requests, epochs), then {_AGAIN}",
        ),
        (r"low on resource|evict", "evicted from its node", f"{_AGAIN}; give more memory if the node was short of it"),
        (r"pod deleted|node shutdown|preempt|node.*(lost|not ready)", "its node was lost or took the pod away", _AGAIN),
        (
            r"imagepullbackoff|errimagepull|invalidimagename",
            "its image cannot be pulled",
            f"set SALUN_IMAGE to an image that the cluster can pull, register again, then {_AGAIN}",
        ),
        (r"exit code 143", "stopped from outside, as a drained node does", _AGAIN),
        (r"exit code 137", "killed, mostly for memory", f"give more memory in the run form, then {_AGAIN}"),
    )
)


def why_killed(step: str) -> Cause | None:
    """Return why a step of this run was killed, as far as its Workflow can be read; None if unknown. It never raises.

    `step` is as the outcome names it, such as compute_mask; empty if no step began.
    """
    place = here()
    status, body = read_workflow(place) if place else (0, {})
    if status != 200 or body.get("kind") != "Workflow":
        return None
    spec = as_mapping(body.get("spec"))
    if spec.get("shutdown") or spec.get("activeDeadlineSeconds") == 0:  # Argo's way, and Kubeflow's
        return Cause("the run was terminated", f"{_AGAIN} unless that was meant")
    message = _message(_nodes(as_mapping(body.get("status"))), step.replace("_", "-"))
    if not message:
        return None
    found = next((cause for pattern, cause in _CAUSES if pattern.search(message)), None)
    if found is None:
        return Cause(f"Argo reports: {message}", f"look at the pod's events, then {_AGAIN}")
    return Cause(f"{found.text}; Argo reports: {message}", found.advice)


def _nodes(state: Mapping[str, Any]) -> Mapping[str, Any]:
    if (nodes := as_mapping(state.get("nodes"))) or not isinstance(packed := state.get("compressedNodes"), str):
        return nodes
    try:
        with gzip.open(BytesIO(base64.b64decode(packed))) as file:
            return as_mapping(json.loads(file.read(_LARGEST)))
    except (ValueError, OSError, EOFError, RecursionError):  # of another version of Argo
        return {}


def _message(nodes: Mapping[str, Any], step: str) -> str:
    """Return the message of the pod of a step that failed last; without one, that of any pod that failed last."""
    failed = [node for node in map(as_mapping, nodes.values()) if node.get("type") == "Pod"]
    failed = [node for node in failed if node.get("phase") in _FAILED and node.get("message")]
    of_step = [node for node in failed if step and step in _names(nodes, node)]
    last = max(of_step or failed, key=lambda node: str(node.get("finishedAt") or ""), default={})
    return " ".join(str(last.get("message", "")).split())[:LINE]


def _names(nodes: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[str]:
    """Return the names of a pod's own row and of the row around it: Kubeflow names each pod of a step `executor`."""
    for row in (node, as_mapping(nodes.get(str(node.get("boundaryID", ""))))):
        yield _RETRIED.sub("", str(row.get("displayName", "")))
