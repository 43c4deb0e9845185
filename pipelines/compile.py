"""Compiles the pipelines into the packages that ship, each also for clusters without accelerators."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from kfp import compiler

from components._image import IMAGE
from pipelines import deletion_sweep, unlearning
from pipelines.form import PLACEMENT, component_faults
from pipelines.ir_lint import lint, values
from pipelines.packages import Package, load_documents
from salun_core.errors import IntegrityError
from salun_core.telemetry.push import PIPELINE_VARIABLE

CPU_SUFFIX = "-cpu"
_CHANNEL = "pipelinechannel--"
_ACCELERATORS = ("gpu_count", "accelerator")  # parameters that a cluster without accelerators does not have


def compile_all() -> list[Package]:
    """Compile every pipeline that ships, each followed by its variant for clusters without accelerators.

    IntegrityError lists all defects, and each default of a component that is not that of the run form.
    """
    if faults := list(component_faults()):
        raise IntegrityError("components do not fit the run form", "; ".join(faults), "correct their signatures")
    sources = (
        (unlearning.unlearning, unlearning.NAME),
        (deletion_sweep.deletion_sweep, deletion_sweep.NAME),
        (deletion_sweep.deletion_sweep_compact, deletion_sweep.COMPACT),
    )
    compiled = [compile_pipeline(*source) for source in sources]
    found = [variant for item in compiled for variant in (item, without_accelerator(item))]
    for item in found:
        placement = [name for name in PLACEMENT if name not in _ACCELERATORS or not item.name.endswith(CPU_SUFFIX)]
        if defects := lint(item.spec, item.platform, IMAGE, placement):
            raise IntegrityError(f"compiled {item.name} has defects", "; ".join(defects), "correct its source")
    return found


def compile_pipeline(pipeline: Any, name: str) -> Package:  # noqa: ANN401 - kfp's pipeline object
    """Compile what `dsl.pipeline` returned."""
    with tempfile.TemporaryDirectory(prefix="salun-compile-") as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        text = path.read_text(encoding="utf-8")
    header = "\n".join(line.rstrip() for line in text.splitlines() if line.startswith("#"))
    spec, platform = load_documents(text)
    _declare_inputs(spec, platform)
    _label_metrics(spec, name)
    return Package(spec, platform, header)


def _declare_inputs(spec: Mapping[str, Any], platform: Mapping[str, Any]) -> None:
    """Declare the parameters of the run form in each group that needs them.

    kfp's compiler passes them on as arguments of a component only. It forgets those that become resources, selectors or
    tolerations of a pod inside a condition, a loop or an exit handler, and such a step fails when it runs.
    """
    given = spec["root"]["inputDefinitions"]["parameters"]
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    def declare(dag: dict[str, Any]) -> set[str]:
        """Complete the inputs of a group below the root, and return the parameters of the form that it needs."""
        needed: set[str] = set()
        for task in dag["dag"]["tasks"].values():
            component = spec["components"][task["componentRef"]["name"]]
            if "dag" in component:
                pass_on(task, declare(component), _CHANNEL)
            used = values([task, pods.get(component.get("executorLabel"))], "componentInputParameter")
            needed |= {name for text in used if (name := text.removeprefix(_CHANNEL)) in given}
        declared = dag.setdefault("inputDefinitions", {}).setdefault("parameters", {})
        for name in needed:
            declared.setdefault(f"{_CHANNEL}{name}", {"parameterType": given[name]["parameterType"]})
        return needed

    def pass_on(task: dict[str, Any], names: set[str], prefix: str) -> None:
        inputs = task.setdefault("inputs", {}).setdefault("parameters", {}) if names else {}
        for name in sorted(names):
            inputs.setdefault(f"{_CHANNEL}{name}", {"componentInputParameter": f"{prefix}{name}"})

    for task in spec["root"]["dag"]["tasks"].values():
        component = spec["components"][task["componentRef"]["name"]]
        if "dag" in component:
            pass_on(task, declare(component), "")


def _label_metrics(spec: Mapping[str, Any], name: str) -> None:
    """Pass the pipeline's name to each step, for its metrics: a step of a nested pipeline reports the outer one."""
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        others = [item for item in container.get("env", []) if item["name"] != PIPELINE_VARIABLE]
        container["env"] = [*others, {"name": PIPELINE_VARIABLE, "value": name}]


def without_accelerator(compiled: Package) -> Package:
    """Return the pipeline for clusters without accelerators: no limit for them, and no parameter for their number."""
    spec = deepcopy(compiled.spec)
    for executor in spec["deploymentSpec"]["executors"].values():
        executor["container"]["resources"].pop("accelerator", None)
    for dag in [spec["root"], *(component for component in spec["components"].values() if "dag" in component)]:
        for place in [dag["inputDefinitions"], *(task.get("inputs", {}) for task in dag["dag"]["tasks"].values())]:
            given = place.get("parameters", {})
            for name in [name for name, value in given.items() if _of_accelerators(name, value)]:
                given.pop(name)
    name = f"{compiled.name}{CPU_SUFFIX}"
    spec["pipelineInfo"]["name"] = name
    _label_metrics(spec, name)
    comments = tuple(f"#    {one}:" for one in _ACCELERATORS)
    lines = [line for line in compiled.header.splitlines() if not line.startswith(comments)]
    header = "\n".join(lines).replace(f"# Name: {compiled.name}", f"# Name: {name}")
    return Package(spec, deepcopy(compiled.platform), header)


def _of_accelerators(name: str, value: Mapping[str, Any]) -> bool:
    names = {*_ACCELERATORS, *(f"{_CHANNEL}{one}" for one in _ACCELERATORS)}
    return name in names | {"accelerator_count", "accelerator_type"} or value.get("componentInputParameter") in names
