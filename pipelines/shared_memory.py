"""The size of the shared memory of the steps that compute; without one it may take all memory of its pod.

The workers of the data loader share batches in /dev/shm, which is a volume in memory. It is part of the pipeline and
not of the run form: kfp has no parameter for the size of such a volume.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from salun_core.errors import UsageError

VARIABLE = "SALUN_SHARED_MEMORY"
_SIZE = re.compile(r"0*[1-9][0-9]*(k|M|G|T|Ki|Mi|Gi|Ti)")  # a number without a unit would be bytes, and is a mistake
_SHARE = re.compile(r"[0-9.]+ *%|0?\.[0-9]+|[0-9]+/[0-9]+")


def read_shared_memory(text: str) -> str:
    """Return the size limit of the shared memory.

    Args:
        text: a quantity such as 2Gi; empty for no limit of its own.

    Raises:
        UsageError: it is a share of the memory, or not a quantity above zero.
    """
    size = text.strip()
    if not size or _SIZE.fullmatch(size):
        return size
    why = f"{text!r} is not a whole number above 0 with a unit"
    if _SHARE.fullmatch(size):
        why = f"{text!r} is a share of the memory, which is in the run form and differs between runs"
    raise UsageError(f"{VARIABLE} cannot be read", why, f"set {VARIABLE}=2Gi, or leave it out for no limit")


def limit_shared_memory(platform: Mapping[str, Any], size: str) -> None:
    """Limit the shared memory of each pod of a platform spec that has one.

    Args:
        platform: the second document of a compiled pipeline; it is changed.
        size: from `read_shared_memory`; empty leaves the pods as they are.
    """
    if not size:
        return
    for pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        for mount in pod.get("emptyDirMounts", []):
            if mount.get("medium") == "Memory":
                mount["sizeLimit"] = size
