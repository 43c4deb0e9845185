"""Where the client's settings come from: our own variables, SALUN_S3_*, then boto3's chain (AWS_*, roles, files).

In a pod of a run, Kubeflow's launcher shares the container with a step, and reads AWS_* for its own store. With
variables of our own, neither uses the keys or the address of the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from salun_core.errors import StoreError

PREFIX = "SALUN_S3_"
SETTINGS = ("ENDPOINT_URL", "REGION", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")
VARIABLES = tuple(f"{PREFIX}{name}" for name in SETTINGS)
_KEYS = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")


def own_settings() -> dict[str, str]:
    """Return the settings that our own variables give, by the names in `SETTINGS`; an empty variable gives none.

    StoreError if one of the two keys is set without the other, or a session token without them: boto3 would complete it
    from AWS_*, with a key of another account.
    """
    found = {name: value for name in SETTINGS if (value := os.environ.get(f"{PREFIX}{name}", ""))}
    missing = [name for name in _KEYS if name not in found]
    if missing and {*_KEYS, "SESSION_TOKEN"} & set(found):
        given = next(name for name in (*_KEYS, "SESSION_TOKEN") if name in found)
        raise StoreError(
            "cannot set up the S3 client",
            f"{PREFIX}{given} is set, but {' and '.join(PREFIX + name for name in missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not",
            f"set {' and '.join(PREFIX + name for name in _KEYS)}, or unset them to use AWS_*",
        )
    return found


def session_arguments(settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of a boto3 session for settings from `own_settings`; None leaves boto3 its own chain.

    With keys of ours, boto3 ignores AWS_SESSION_TOKEN, which belongs to other keys.
    """
    return {
        "region_name": settings.get("REGION"),
        "aws_access_key_id": settings.get("ACCESS_KEY_ID"),
        "aws_secret_access_key": settings.get("SECRET_ACCESS_KEY"),
        "aws_session_token": settings.get("SESSION_TOKEN"),
    }


def variable(name: str) -> str:
    """Return the variable to name in a message about one of `SETTINGS`: the one in use, or the one to set."""
    if not os.environ.get(f"{PREFIX}{name}"):
        for other in (f"AWS_{name}_S3", f"AWS_{name}"):
            if os.environ.get(other):
                return other
        if not any(os.environ.get(own) for own in VARIABLES):
            return f"AWS_{name}"
    return f"{PREFIX}{name}"


def both_keys() -> str:
    """Return "X_ACCESS_KEY_ID and X_SECRET_ACCESS_KEY", with the names that are in use."""
    return " and ".join(variable(name) for name in _KEYS)
