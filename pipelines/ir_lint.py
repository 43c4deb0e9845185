"""Finds defects of a compiled pipeline: undeclared inputs, caches, installers, missing resource limits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipelines.form import PLACEMENT

Spec = Mapping[str, Any]
_LIMITS = {
    "cpu limit": ("resourceCpuLimit", "cpuLimit"),
    "cpu request": ("resourceCpuRequest", "cpuRequest"),
    "memory limit": ("resourceMemoryLimit", "memoryLimit"),
    "memory request": ("resourceMemoryRequest", "memoryRequest"),
}
_REFERENCE = re.compile(r"\{\{\$\.inputs\.parameters\['+([^']+)'+\]\}\}")
_INSTALLER = re.compile(r"\b(pip3?|uv|conda|apt-get|apt)\b.{0,40}\binstall\b", re.DOTALL)


def lint(spec: Spec, platform: Spec, image: str, placement: Iterable[str] = PLACEMENT) -> list[str]:
    """List the defects of a compiled pipeline.

    Args:
        spec: the pipeline spec, the first document of the compiled file.
        platform: the platform spec, its second document.
        image: the only image that an executor may name.
        placement: parameters of the run form that must reach an executor or its pod.

    Returns:
        One line per defect.
    """
    reached = set(_reached(spec, platform, spec["root"], {name: name for name in _parameters(spec["root"])}))
    return [
        *(defect for name, dag in _dags(spec) for defect in _dag_defects(spec, platform, name, dag)),
        *(defect for name, executor in _executors(spec) for defect in _executor_defects(name, executor, image)),
        *(f"parameter {name} reaches no executor and no pod" for name in placement if name not in reached),
        *_list_defects(spec),
    ]


def _dags(spec: Spec) -> Iterator[tuple[str, Spec]]:
    yield "root", spec["root"]
    for name, component in spec.get("components", {}).items():
        if "dag" in component:
            yield name, component


def _executors(spec: Spec) -> Iterator[tuple[str, Spec]]:
    for name, executor in spec["deploymentSpec"]["executors"].items():
        if "container" in executor:
            yield name, executor["container"]


def _parameters(component: Spec) -> Spec:
    found: Spec = component.get("inputDefinitions", {}).get("parameters", {})
    return found


def _pod(platform: Spec, executor: str | None) -> Spec:
    kubernetes = platform.get("platforms", {}).get("kubernetes", {})
    found: Spec = kubernetes.get("deploymentSpec", {}).get("executors", {}).get(executor, {})
    return found


def _values(node: Any, key: str) -> Iterator[Any]:  # noqa: ANN401 - a tree of plain data
    """Yield every value of a key, at any depth."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name == key:
                yield value
            yield from _values(value, key)
    elif isinstance(node, list):
        for item in node:
            yield from _values(item, key)


def _dag_defects(spec: Spec, platform: Spec, name: str, dag: Spec) -> Iterator[str]:
    tasks = dag["dag"]["tasks"]
    artifacts = dag.get("inputDefinitions", {}).get("artifacts", {})
    for task_name, task in tasks.items():
        executor = spec["components"][task["componentRef"]["name"]].get("executorLabel")
        given = task.get("inputs", {}).get("parameters", {})
        checks = (
            ("componentInputParameter", [task, _pod(platform, executor)], _parameters(dag)),
            ("componentInputArtifact", task, artifacts),
            ("producerTask", task, tasks),
        )
        for key, where, declared in checks:
            for wanted in _values(where, key):
                if wanted not in declared:
                    yield f"{name}/{task_name}: {key} {wanted} is not declared"
        for wanted in set(_references(spec, executor)) - set(given):
            yield f"{name}/{task_name}: its resources need {wanted}, which is not an input of the task"
        if task.get("cachingOptions", {}).get("enableCache"):
            yield f"{name}/{task_name}: caching is on"


def _references(spec: Spec, executor: str | None) -> list[str]:
    container = spec["deploymentSpec"]["executors"].get(executor, {}).get("container", {})
    return _REFERENCE.findall(json.dumps(container.get("resources", {})))


def _executor_defects(name: str, container: Spec, image: str) -> Iterator[str]:
    if container.get("image") != image:
        yield f"{name}: image {container.get('image')} is not {image}"
    for text in [*container.get("command", []), *container.get("args", [])]:
        if _INSTALLER.search(text):
            yield f"{name}: its command installs packages"
    resources = container.get("resources", {})
    for what, keys in _LIMITS.items():
        if not any(resources.get(key) for key in keys):
            yield f"{name}: {what} is missing"


def _reached(spec: Spec, platform: Spec, dag: Spec, origin: Mapping[str, str]) -> Iterator[str]:
    """Yield the run form's parameters that reach an executor; `origin` gives each input of the DAG its parameter."""
    for task in dag["dag"]["tasks"].values():
        given = task.get("inputs", {}).get("parameters", {})
        bound = {name: origin.get(value.get("componentInputParameter", ""), "") for name, value in given.items()}
        component = spec["components"][task["componentRef"]["name"]]
        if "dag" in component:
            yield from _reached(spec, platform, component, bound)
            continue
        executor = component.get("executorLabel")
        yield from (bound.get(name, "") for name in _references(spec, executor))
        yield from (origin.get(name, "") for name in _values(_pod(platform, executor), "componentInputParameter"))


def _list_defects(spec: Spec) -> Iterator[str]:
    """Everybody who may see a run sees its parameters, so none may hold a list of samples."""
    for name, component in [("root", spec["root"]), *spec.get("components", {}).items()]:
        for key, parameter in _parameters(component).items():
            if _is_list(parameter.get("defaultValue")):
                yield f"{name}: the default of {key} is a list of values"
    for name, dag in _dags(spec):
        for task_name, task in dag["dag"]["tasks"].items():
            if any(_is_list(value) for value in _values(task, "constant")):
                yield f"{name}/{task_name}: a constant is a list of values"


def _is_list(value: Any) -> bool:  # noqa: ANN401 - any plain value
    if isinstance(value, str):
        return len([part for part in re.split(r"[,;\s]+", value.strip("[] ")) if part]) > 1
    return isinstance(value, list) and bool(value)
