"""Data sets, split manifests, forget sets and images on the device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salun_core.data.forget_set import ForgetSet, ForgetTarget, resolve_forget
    from salun_core.data.images import ImageSet
    from salun_core.data.loading import LoadedData, load_data
    from salun_core.data.spec import DataSpec, load_spec
    from salun_core.data.split import SplitManifest

__all__ = [
    "DataSpec",
    "ForgetSet",
    "ForgetTarget",
    "ImageSet",
    "LoadedData",
    "SplitManifest",
    "load_data",
    "load_spec",
    "resolve_forget",
]

_HOME = {
    "ForgetSet": "forget_set",
    "ForgetTarget": "forget_set",
    "ImageSet": "images",
    "LoadedData": "loading",
    "SplitManifest": "split",
    "DataSpec": "spec",
    "load_data": "loading",
    "load_spec": "spec",
    "resolve_forget": "forget_set",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds
    """Import a name when it is first asked for: requests name forget targets and need no torch."""
    if name not in _HOME:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"salun_core.data.{_HOME[name]}"), name)
