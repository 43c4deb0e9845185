"""Finds defects of a compiled pipeline that Kubeflow accepts, or reports only when the pipeline runs.

Undeclared inputs, caches, installers, missing limits, resources that are not text, retries that can never happen,
artifacts that may hold a model, groups without a name, and graphs that are nested too deep.
"""

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
_UNNAMED = re.compile(r"(condition|condition-branches|exit-handler|for-loop)-\d+")
_LEVELS = 2
_ARTIFACTS = ("system.Artifact", "system.Metrics", "system.ClassificationMetrics", "system.HTML", "system.Markdown")
_INSTALLER = re.compile(r"\b(pip3?|uv|conda|apt-get|apt)\b.{0,40}\binstall\b", re.DOTALL)


def lint(spec: Spec, platform: Spec, image: str, placement: Iterable[str] = PLACEMENT) -> list[str]:
    """List the defects of a compiled pipeline, one line each, from its two documents.

    `image` is the only one that an executor may name. `placement` are parameters of the run form that must reach an
    executor or its pod.
    """
    reached = set(_reached(spec, platform, spec["root"], {name: name for name in _parameters(spec["root"])}))
    return [
        *(defect for name, dag in _dags(spec) for defect in _dag_defects(spec, platform, name, dag)),
        *(defect for name, executor in _executors(spec) for defect in _executor_defects(name, executor, image)),
        *(f"parameter {name} reaches no executor and no pod" for name in placement if name not in reached),
        *_list_defects(spec),
        *_retry_defects(spec, platform),
        *_artifact_defects(spec),
        *_group_defects(spec, spec["root"], "root", 0),
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


def values(node: Any, key: str) -> Iterator[Any]:  # noqa: ANN401 - a tree of plain data
    """Yield every value of a key, at any depth."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(node, list):
        for item in node:
            yield from values(item, key)


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
            for wanted in values(where, key):
                if wanted not in declared:
                    yield f"{name}/{task_name}: {key} {wanted} is not declared"
        for wanted in sorted(set(_references(spec, executor))):
            if wanted not in given:
                yield f"{name}/{task_name}: its resources need {wanted}, which is not an input of the task"
                continue
            kind = _parameters(dag).get(given[wanted].get("componentInputParameter"), {}).get("parameterType")
            if kind != "STRING":  # the driver reads it as text: of a number it makes nothing, without an error
                yield f"{name}/{task_name}: {wanted} is a resource, and {kind} instead of STRING"
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
        yield from (origin.get(name, "") for name in values(_pod(platform, executor), "componentInputParameter"))


def _retry_defects(spec: Spec, platform: Spec) -> Iterator[str]:
    """Argo counts the window of all attempts from the start of the first one."""
    for name, dag in _dags(spec):
        for task_name, task in dag["dag"]["tasks"].items():
            executor = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            policy, timeout = task.get("retryPolicy"), int(_pod(platform, executor).get("activeDeadlineSeconds", 0))
            if policy is None or executor is None:
                continue
            window = float(str(policy.get("backoffMaxDuration", "0s")).removesuffix("s"))
            needed = (int(policy["maxRetryCount"]) + 1) * timeout
            if not timeout:
                yield f"{name}/{task_name}: it has retries and no time limit"
            elif window < needed:
                yield f"{name}/{task_name}: its attempts need {needed} s, and its window has {window:g} s"


def _artifact_defects(spec: Spec) -> Iterator[str]:
    """Kubeflow keeps each artifact: none may be of a type that stands for the data themselves."""
    for name, component in spec.get("components", {}).items():
        for key, artifact in component.get("outputDefinitions", {}).get("artifacts", {}).items():
            kind = artifact["artifactType"].get("schemaTitle")
            if kind not in _ARTIFACTS:
                yield f"{name}: output {key} is a {kind}, which Kubeflow would keep"


def _group_defects(spec: Spec, dag: Spec, name: str, level: int) -> Iterator[str]:
    if level > _LEVELS:
        yield f"{name}: the graph is nested {level} levels deep; {_LEVELS} are allowed"
    for task_name, task in dag["dag"]["tasks"].items():
        component = spec["components"][task["componentRef"]["name"]]
        if "dag" not in component:
            continue
        shown = task["taskInfo"]["name"]
        if _UNNAMED.fullmatch(shown):
            yield f"{name}/{task_name}: the group has no name"
        yield from _group_defects(spec, component, shown, level + 1)


def _list_defects(spec: Spec) -> Iterator[str]:
    """Everybody who may see a run sees its parameters, so none may hold a list of samples."""
    for name, component in [("root", spec["root"]), *spec.get("components", {}).items()]:
        for key, parameter in _parameters(component).items():
            if _is_list(parameter.get("defaultValue")):
                yield f"{name}: the default of {key} is a list of values"
    for name, dag in _dags(spec):
        for task_name, task in dag["dag"]["tasks"].items():
            if any(_is_list(value) for value in values(task, "constant")):
                yield f"{name}/{task_name}: a constant is a list of values"


def _is_list(value: Any) -> bool:  # noqa: ANN401 - any plain value
    if isinstance(value, str):
        return len([part for part in re.split(r"[,;\s]+", value.strip("[] ")) if part]) > 1
    return isinstance(value, list) and bool(value)
