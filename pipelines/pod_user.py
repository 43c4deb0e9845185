"""The uid of the pods of a run: that of the image, or the one that the cluster assigns.

OpenShift's restricted SCC gives each namespace a range of uids and refuses a pod that names another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salun_core.errors import UsageError

VARIABLE = "SALUN_FIXED_UID"
_ANSWERS = {"": True, "yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_FIXED = ("runAsUser", "runAsGroup")


def read_fixed_uid(text: str) -> bool:
    """Return whether the pods name their uid: yes or no, empty for yes; UsageError for another word."""
    try:
        return _ANSWERS[text.strip().lower()]
    except KeyError:
        raise UsageError(
            f"{VARIABLE} cannot be read", f"{text!r} is neither yes nor no", f"set {VARIABLE}=no"
        ) from None


def leave_uid_to_cluster(platform: Mapping[str, Any]) -> None:
    """Remove uid and gid from each pod of a platform spec, in place; `runAsNonRoot` stays."""
    for pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        for name in _FIXED:
            pod.get("securityContext", {}).pop(name, None)
