"""Writes the pipelines as objects of a Kubeflow that keeps them in Kubernetes: Pipeline and PipelineVersion."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, components
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from pipelines.compile import Compiled
from pipelines.packages import Package

_NOTE = "# Written by `python -m pipelines compile --kubernetes-native DIR`; change the pipeline instead.\n"


def native_objects(compiled: Compiled, namespace: str | None = None) -> list[dict[str, Any]]:
    """Return the Pipeline and the PipelineVersion of a compiled pipeline.

    Args:
        compiled: the pipeline.
        namespace: of the objects; None leaves it to `kubectl -n` or a kustomization.

    Returns:
        Both objects. A version cannot be changed once it is there, so its name carries the digest of the pipeline.
    """
    options = KubernetesManifestOptions(
        pipeline_name=compiled.name,
        pipeline_version_name=Package(compiled.spec, compiled.platform).version,
        namespace=namespace,
        include_pipeline_manifest=True,
    )
    loaded = components.load_component_from_text(compiled.text)
    with tempfile.TemporaryDirectory(prefix="salun-native-") as folder:
        path = Path(folder) / "objects.yaml"
        compiler.Compiler().compile(
            loaded, str(path), kubernetes_manifest_format=True, kubernetes_manifest_options=options
        )
        return _load(path)


def _load(path: Path) -> list[dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is
    return list(yaml.load_all(path.read_text(encoding="utf-8"), loader))  # noqa: S506 - a safe one


def native_text(compiled: Compiled, namespace: str | None = None) -> str:
    """Return both objects as a file; the same source gives the same text."""
    return _NOTE + yaml.safe_dump_all(native_objects(compiled, namespace), sort_keys=True, width=120)


def native_drift(compiled: Compiled, path: Path, namespace: str | None = None) -> str | None:
    """Compare a file with the source; the version of the compiler does not count.

    Args:
        compiled: fresh from the source.
        path: the file.
        namespace: as it was given when the file was written.

    Returns:
        What is wrong with the file, or None.
    """
    if not path.is_file():
        return f"{path.name} does not exist"
    there = _load(path)
    wanted = native_objects(compiled, namespace)
    for document in [*there, *wanted]:
        document.get("spec", {}).get("pipelineSpec", {}).pop("sdkVersion", None)
    return None if there == wanted else f"{path.name} is out of step with its source"
