"""A compiled pipeline as Kubeflow gets it: its text, its digest and the name of the version that carries the digest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipelines.step_secrets import VARIABLE, give_secrets, read_secrets
from salun_core.digest import digest_json
from salun_core.errors import UsageError, unknown_name

COMPILED = Path(__file__).resolve().parent / "compiled"
PREFIX = "salun-"
SHORT = 12
_KINDS = {
    "BOOLEAN": "yes or no",
    "LIST": "JSON list",
    "NUMBER_DOUBLE": "number",
    "NUMBER_INTEGER": "whole number",
    "STRING": "text",
    "STRUCT": "JSON object",
}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True)
class Package:
    """A compiled pipeline.

    Args:
        spec: the pipeline spec.
        platform: the platform spec: what Kubernetes is told.
    """

    spec: dict[str, Any]
    platform: dict[str, Any]

    @property
    def name(self) -> str:
        """The pipeline's name, such as salun-unlearning."""
        return str(self.spec["pipelineInfo"]["name"])

    @property
    def description(self) -> str:
        """What the pipeline does, in a sentence."""
        return str(self.spec["pipelineInfo"].get("description", ""))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of both specs; the version of the compiler does not count."""
        spec = {key: value for key, value in self.spec.items() if key != "sdkVersion"}
        return digest_json([spec, self.platform])

    @property
    def version(self) -> str:
        """The name of the version: the pipeline's, and the beginning of the digest."""
        return f"{self.name}-{self.digest[:SHORT]}"

    @cached_property
    def text(self) -> str:
        """The package to upload."""
        return str(yaml.dump_all([self.spec, self.platform], Dumper=_DUMPER, sort_keys=True, width=120))

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """The fields of the run form, by name."""
        return dict(self.spec["root"]["inputDefinitions"]["parameters"])

    def steps(self) -> list[str]:
        """Return the names of the tasks that run in a container, in the order of the source."""
        return list(dict.fromkeys(self._steps(self.spec["root"])))

    def _steps(self, dag: Mapping[str, Any]) -> Iterator[str]:
        for name, task in dag["dag"]["tasks"].items():
            component = self.spec["components"][task["componentRef"]["name"]]
            if "executorLabel" in component:
                yield name
            else:
                yield from self._steps(component)


def form_table(package: Package) -> str:
    """Return the run form's fields as a Markdown table; those that must be filled in come first."""
    rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, item in sorted(package.inputs.items(), key=lambda pair: bool(pair[1].get("isOptional"))):
        kind = _KINDS[item["parameterType"]]
        default = f"`{_default(item)}`" if item.get("isOptional") else "required"
        rows.append(f"| `{name}` | {kind} | {default} | {' '.join(str(item.get('description', '')).split())} |")
    return "\n".join(rows)


def _default(item: Mapping[str, Any]) -> str:
    value = item["defaultValue"]
    return json.dumps(int(value) if item["parameterType"] == "NUMBER_INTEGER" else value)


def shipped() -> list[str]:
    """Return the short names of the pipelines that ship, such as deletion-sweep."""
    return sorted(path.stem.removeprefix(PREFIX) for path in COMPILED.glob("*.yaml"))


def load_package(name: str, image: str | None = None) -> Package:
    """Load a pipeline that ships.

    Args:
        name: with or without the prefix: unlearning, deletion-sweep, or one of them with -cpu.
        image: of every step; else `SALUN_IMAGE`, else what the file says. Likewise `SALUN_S3_SECRETS` names the
            Secret of each step.

    Returns:
        The package.

    Raises:
        UsageError: no such pipeline ships, its file cannot be read, or `SALUN_S3_SECRETS` is wrong.
    """
    short = name.removeprefix(PREFIX)
    if short not in shipped():
        raise unknown_name("pipeline", name, shipped())
    path = COMPILED / f"{PREFIX}{short}.yaml"
    try:
        spec, platform = yaml.load_all(path.read_text(encoding="utf-8"), _LOADER)  # noqa: S506 - a safe one
        executors = spec["deploymentSpec"]["executors"].values()
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UsageError(f"cannot read {path.name}", f"no compiled pipeline: {error}", "`make generated`") from error
    if wanted := image or os.environ.get("SALUN_IMAGE"):
        for executor in executors:
            executor["container"]["image"] = wanted
    give_secrets(platform, read_secrets(os.environ.get(VARIABLE, "")))
    return Package(spec, platform)
