"""The volumes of the steps of a run: the size of their shared memory, and a claim that keeps a cache of the data.

Both are part of the pipeline and not of the run form. kfp has no parameter for the size of a volume in memory, and a
claim that may be missing cannot be a parameter: a pod without a claim has no mount at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipelines.step_secrets import NAME, step_of
from salun_core.errors import UsageError

SHARED_MEMORY = "SALUN_SHARED_MEMORY"
CACHE_CLAIM = "SALUN_DATA_CACHE_CLAIM"
CACHE_MOUNT = "/cache"
CACHE_VARIABLE = "SALUN_DATA_CACHE"  # which a step reads; the module that reads it imports torch
CACHE_FOLDER = f"{CACHE_MOUNT}/salun"  # not the mount itself, which may hold lost+found and belong to root
CACHE_STEPS = frozenset({
    "claim_requests", "fetch_model", "compute_mask", "unlearn", "evaluate", "gate_publish",
    "sweep_compact",  # these load the data
    "purge_store",  # it empties the cache
})  # fmt: skip
"""Steps that mount the cache. The last steps of a run do not, so that a lost volume never keeps a run from settling."""
_SIZE = re.compile(r"0*[1-9][0-9]*(k|M|G|T|Ki|Mi|Gi|Ti)")  # a number without a unit would be bytes, and is a mistake
_SHARE = re.compile(r"[0-9.]+ *%|0?\.[0-9]+|[0-9]+/[0-9]+")


def read_shared_memory(text: str) -> str:
    """Return the size limit of the shared memory, such as 2Gi; empty for no limit of its own.

    UsageError: it is a share of the memory, or not a quantity above zero.
    """
    size = text.strip()
    if not size or _SIZE.fullmatch(size):
        return size
    why = f"{text!r} is not a whole number above 0 with a unit"
    if _SHARE.fullmatch(size):
        why = f"{text!r} is a share of the memory, which is in the run form and differs between runs"
    raise UsageError(f"{SHARED_MEMORY} cannot be read", why, f"set {SHARED_MEMORY}=2Gi, or leave it out for no limit")


def limit_shared_memory(platform: Mapping[str, Any], size: str) -> None:
    """Limit the shared memory of each pod of a platform spec that has one, in place; an empty size changes nothing."""
    if not size:
        return
    for pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        for mount in pod.get("emptyDirMounts", []):
            if mount.get("medium") == "Memory":
                mount["sizeLimit"] = size


def read_cache_claim(text: str) -> str:
    """Return the name of the PersistentVolumeClaim of the data cache, empty for none; UsageError if not valid."""
    name = text.strip()
    if name and not NAME.fullmatch(name):
        raise UsageError(
            f"{CACHE_CLAIM} cannot be read",
            f"{text!r} is not a valid name of a PersistentVolumeClaim",
            f"set {CACHE_CLAIM}=salun-data-cache, or leave it out for no cache",
        )
    return name


def mount_data_cache(spec: Mapping[str, Any], platform: Mapping[str, Any], claim: str) -> None:
    """Mount the cache, in place, into each step of a pipeline that reads or purges data, and name its folder there.

    An empty claim changes nothing.
    """
    if not claim:
        return
    mount = {"mountPath": CACHE_MOUNT, "pvcNameParameter": {"runtimeValue": {"constant": claim}}}
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for executor, item in spec["deploymentSpec"]["executors"].items():
        if step_of(executor) in CACHE_STEPS:
            # as kfp writes it: `constant` is the older field, for backends that do not read the other one
            pods[executor].setdefault("pvcMount", []).append({**mount, "constant": claim})
            item["container"].setdefault("env", []).append({"name": CACHE_VARIABLE, "value": CACHE_FOLDER})
