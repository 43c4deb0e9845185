"""Compiles the pipelines into the files that ship, and tells when a file is out of step with its source."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from components._image import IMAGE
from pipelines import deletion_sweep, sharded_mask, unlearning
from pipelines.ir_lint import PLACEMENT, lint
from pipelines.step_secrets import give_secrets
from salun_core.errors import IntegrityError
from salun_core.telemetry.push import PIPELINE_VARIABLE

FOLDER = Path(__file__).resolve().parent / "compiled"
CPU_SUFFIX = "-cpu"
_ACCELERATORS = {"accelerator_count", "gpu_count", "pipelinechannel--gpu_count"}


@dataclass(frozen=True)
class Compiled:
    """A compiled pipeline.

    Args:
        name: of the pipeline and its file.
        header: the comment that lists the run form's parameters.
        spec: the pipeline spec.
        platform: the platform spec: what Kubernetes is told.
    """

    name: str
    header: str
    spec: dict[str, Any]
    platform: dict[str, Any]

    @property
    def path(self) -> Path:
        """The file that ships."""
        return FOLDER / f"{self.name}.yaml"

    @property
    def text(self) -> str:
        """The file's text; the same source gives the same text."""
        documents = yaml.safe_dump_all([self.spec, self.platform], sort_keys=True, width=120)
        return f"{self.header}\n{documents}"

    def defects(self) -> list[str]:
        """Return what the lint finds."""
        placement = [name for name in PLACEMENT if name != "gpu_count" or not self.name.endswith(CPU_SUFFIX)]
        return lint(self.spec, self.platform, IMAGE, placement)


def compile_all() -> list[Compiled]:
    """Compile every pipeline that ships.

    Returns:
        The unlearning pipeline, the deletion sweep and the sharded mask, each followed by the same for clusters
        without accelerators.

    Raises:
        IntegrityError: a compiled pipeline has a defect; all are listed.
    """
    sources = (
        (unlearning.unlearning, unlearning.NAME),
        (deletion_sweep.deletion_sweep, deletion_sweep.NAME),
        (sharded_mask.sharded_mask, sharded_mask.NAME),
    )
    compiled = [compile_pipeline(*source) for source in sources]
    found = [variant for item in compiled for variant in (item, without_accelerator(item))]
    for item in found:
        if defects := item.defects():
            raise IntegrityError(f"compiled {item.name} has defects", "; ".join(defects), "correct its source")
    return found


def compile_pipeline(pipeline: Any, name: str) -> Compiled:  # noqa: ANN401 - kfp's pipeline object
    """Compile one pipeline.

    Args:
        pipeline: what `dsl.pipeline` gave.
        name: of the file.

    Returns:
        The compiled pipeline.
    """
    with tempfile.TemporaryDirectory(prefix="salun-compile-") as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        text = path.read_text(encoding="utf-8")
    header = "\n".join(line.rstrip() for line in text.splitlines() if line.startswith("#"))
    spec, platform = yaml.safe_load_all(text)
    _tell_steps(spec, name)
    return Compiled(name, header, spec, platform)


def _tell_steps(spec: Mapping[str, Any], name: str) -> None:
    """Tell every step which pipeline it runs in, for the label of its metrics; a nested pipeline is none."""
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        others = [item for item in container.get("env", []) if item["name"] != PIPELINE_VARIABLE]
        container["env"] = [*others, {"name": PIPELINE_VARIABLE, "value": name}]


def without_accelerator(compiled: Compiled) -> Compiled:
    """Return the same pipeline for clusters without accelerators: no limit of them, and no parameter for it."""
    spec = deepcopy(compiled.spec)
    for executor in spec["deploymentSpec"]["executors"].values():
        executor["container"]["resources"].pop("accelerator", None)
    for dag in [spec["root"], *(component for component in spec["components"].values() if "dag" in component)]:
        for place in [dag["inputDefinitions"], *(task["inputs"] for task in dag["dag"]["tasks"].values())]:
            given = place.get("parameters", {})
            for name in [name for name, value in given.items() if _counts_accelerators(name, value)]:
                given.pop(name)
    name = f"{compiled.name}{CPU_SUFFIX}"
    spec["pipelineInfo"]["name"] = name
    _tell_steps(spec, name)
    lines = [line for line in compiled.header.splitlines() if not line.startswith("#    gpu_count:")]
    header = "\n".join(lines).replace(f"# Name: {compiled.name}", f"# Name: {name}")
    return Compiled(name, header, spec, compiled.platform)


def _counts_accelerators(name: str, value: Mapping[str, Any]) -> bool:
    return name in _ACCELERATORS or value.get("componentInputParameter") in _ACCELERATORS


def with_secrets(compiled: Compiled, secrets: Mapping[str, str]) -> Compiled:
    """Return the same pipeline with a Secret of its own for each step that is named.

    Args:
        compiled: the pipeline.
        secrets: names of Secrets by step, from `step_secrets.read_secrets`.
    """
    platform = deepcopy(compiled.platform)
    give_secrets(platform, secrets)
    return Compiled(compiled.name, compiled.header, compiled.spec, platform)


def drift(compiled: Compiled) -> str | None:
    """Compare with the file that ships; the version of the compiler does not count.

    Args:
        compiled: fresh from the source.

    Returns:
        What is wrong with the file, or None.
    """
    if not compiled.path.is_file():
        return f"{compiled.path.name} does not exist"
    shipped = list(yaml.safe_load_all(compiled.path.read_text(encoding="utf-8")))
    wanted = [compiled.spec, compiled.platform]
    return (
        None if _comparable(shipped) == _comparable(wanted) else f"{compiled.path.name} is out of step with its source"
    )


def _comparable(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in document.items() if key != "sdkVersion"} for document in documents]
