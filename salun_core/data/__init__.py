"""Data sets, split manifests, forget sets and images on the device."""

from salun_core.data.forget import ForgetSet, ForgetTarget, resolve_forget
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
