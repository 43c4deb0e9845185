"""Data sets, split manifests, forget sets and images on the device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salun_core.data.forget_set import ForgetSet as ForgetSet
    from salun_core.data.forget_set import resolve_forget as resolve_forget
    from salun_core.data.images import ImageSet as ImageSet
    from salun_core.data.images import ImageSource as ImageSource
    from salun_core.data.loading import LoadedData as LoadedData
    from salun_core.data.loading import load_data as load_data
    from salun_core.data.spec import DataSpec as DataSpec
    from salun_core.data.spec import load_spec as load_spec
    from salun_core.data.split import SplitManifest as SplitManifest
    from salun_core.data.targets import ForgetTarget as ForgetTarget

_MODULES = {
    "ForgetSet": "forget_set",
    "ForgetTarget": "targets",
    "ImageSet": "images",
    "ImageSource": "images",
    "LoadedData": "loading",
    "SplitManifest": "split",
    "DataSpec": "spec",
    "load_data": "loading",
    "load_spec": "spec",
    "resolve_forget": "forget_set",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a name on first use: requests need forget targets without the import time of torch."""
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"salun_core.data.{_MODULES[name]}"), name)
