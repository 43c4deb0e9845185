"""Reads the manifests: all documents with their files, and the containers, references and ports in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipelines.packages import load_package, native_text, shipped

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
NOT_KUBERNETES = ("iam", "prometheus-rules")  # policies of the store, and a plain rule file
NATIVE = MANIFESTS / "kubernetes-native"  # written on demand, not in git
CRDS = ROOT.parent / "shared" / "crds"


@dataclass(frozen=True)
class Found:
    """A document, and the file it lies in."""

    path: Path
    document: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.document["kind"]

    @property
    def name(self) -> str:
        return self.document["metadata"]["name"]

    @property
    def namespace(self) -> str | None:
        return self.document["metadata"].get("namespace")

    @property
    def labels(self) -> dict[str, str]:
        return self.document["metadata"].get("labels", {})

    def __str__(self) -> str:
        return f"{self.path.relative_to(MANIFESTS)}:{self.kind}/{self.name}"


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def read(path: Path) -> list[Found]:
    return [Found(path, document) for document in yaml.load_all(path.read_text(), LOADER) if document]


@cache
def default() -> list[Found]:
    """What `kubectl apply -f manifests/` reads."""
    return [found for path in sorted(MANIFESTS.glob("*.yaml")) for found in read(path)]


@cache
def everything(suffixes: tuple[str, ...] = (".yaml",)) -> list[Found]:
    files = (path for path in sorted(MANIFESTS.rglob("*")) if path.name.endswith(suffixes))
    ours = (path for path in files if path.relative_to(MANIFESTS).parts[0] not in (*NOT_KUBERNETES, NATIVE.name))
    return [*(found for path in ours for found in read(path)), *native()]


@cache
def native() -> list[Found]:
    """What `python -m pipelines compile --kubernetes-native` writes for the pipelines that ship."""
    packages = [load_package(name) for name in shipped()]
    texts = [(NATIVE / package.path.name, native_text(package, "salun")) for package in packages]
    return [Found(path, document) for path, text in texts for document in yaml.load_all(text, LOADER)]


def pod(found: Found) -> dict[str, Any] | None:
    """The pod's template of a workload: labels under `metadata`, the rest under `spec`."""
    spec = found.document.get("spec", {})
    if found.kind == "Pod":
        return found.document
    template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
    return template if isinstance(template, dict) and "containers" in template.get("spec", {}) else None


@cache
def workloads() -> list[Found]:
    return [found for found in everything() if pod(found)]


def containers(found: Found) -> list[dict[str, Any]]:
    spec = pod(found)["spec"]
    return [*spec.get("initContainers", []), *spec["containers"], *spec.get("ephemeralContainers", [])]


def named(kind: str, name: str, among: list[Found]) -> dict[str, Any]:
    (found,) = (item for item in among if (item.kind, item.name) == (kind, name))
    return found.document


def walk(node: Any):
    """Every dictionary in a document."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from walk(item)
