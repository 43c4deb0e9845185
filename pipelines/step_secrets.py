"""The Secret from which each step takes the keys of the store: the same for all, or one per role of manifests/iam/."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from salun_core.errors import UsageError, unknown_name

VARIABLE = "SALUN_S3_SECRETS"  # noqa: S105 - the name of a variable
SECRET = "salun-s3"  # noqa: S105 - the name of a Secret, the default of every step
ROLES = {
    "claim_requests": "claimer",
    "fetch_model": "fetcher",
    "compute_mask": "worker",
    "unlearn": "worker",
    "evaluate": "evaluator",
    "gate_publish": "publisher",
    "conclude": "evaluator",
    "settle_requests": "settler",
    "sweep_compact": "sweeper",
    "purge_store": "purger",
}
"""The role whose rights each step needs."""
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
"""Names that Kubernetes allows for a Secret and for most other objects."""
_EXECUTOR = re.compile(r"exec-(.+?)(?:-\d+)?")


def read_secrets(text: str) -> dict[str, str]:
    """Read `fetch_model=salun-s3-fetcher,gate_publish=salun-s3-publisher` into names of Secrets by step.

    A step that is missing takes the common Secret. UsageError: a malformed pair, an unknown step, a step that is given
    twice, or an invalid name.
    """
    found: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        step, given, name = (part.strip() for part in pair.partition("="))
        if step not in ROLES:
            raise unknown_name("step", step, ROLES)
        if not given or not NAME.fullmatch(name) or step in found:
            why = f"{step} is given twice" if step in found else f"{name!r} is not a valid name of a Secret"
            raise UsageError(f"{VARIABLE} cannot be read", why, f"write {step}={SECRET}-{ROLES[step]}")
        found[step] = name
    return found


def give_secrets(platform: Mapping[str, Any], secrets: Mapping[str, str]) -> None:
    """Set the Secret of each step in a platform spec, in place; a step that is missing keeps its Secret."""
    for executor, pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items():
        name = secrets.get(step_of(executor))
        for source in pod.get("secretAsEnv", []) if name else []:
            source["secretName"] = name
            source["secretNameParameter"] = {"runtimeValue": {"constant": name}}


def step_of(executor: str) -> str:
    """Return the step of an executor, such as `conclude` of `exec-conclude-2`; empty for other executors."""
    found = _EXECUTOR.fullmatch(executor)
    return found[1].replace("-", "_") if found else ""
