"""A compiled pipeline: its two documents, its digest, its run form, and the files and objects that are made of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipelines.pod_user import VARIABLE as FIXED_UID
from pipelines.pod_user import leave_uid_to_cluster, read_fixed_uid
from pipelines.step_secrets import VARIABLE, give_secrets, read_secrets
from pipelines.volumes import (
    CACHE_CLAIM,
    SHARED_MEMORY,
    limit_shared_memory,
    mount_data_cache,
    read_cache_claim,
    read_shared_memory,
)
from salun_core.digest import digest_json
from salun_core.errors import UsageError, unknown_name

COMPILED = Path(__file__).resolve().parent / "compiled"
PREFIX = "salun-"
SHORT = 12  # hexadecimal digits of a digest in a name
_KINDS = {
    "BOOLEAN": "yes or no",
    "LIST": "JSON list",
    "NUMBER_DOUBLE": "number",
    "NUMBER_INTEGER": "whole number",
    "STRING": "text",
    "STRUCT": "JSON object",
}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is installed


@dataclass(frozen=True)
class Package:
    """A compiled pipeline: pipeline spec, platform spec (settings for Kubernetes) and the comment with the run form."""

    spec: dict[str, Any]
    platform: dict[str, Any]
    header: str = ""

    @property
    def name(self) -> str:
        """The pipeline's name, such as salun-unlearning."""
        return str(self.spec["pipelineInfo"]["name"])

    @property
    def description(self) -> str:
        """What the pipeline does, in a sentence."""
        return str(self.spec["pipelineInfo"].get("description", ""))

    @property
    def path(self) -> Path:
        """The file in `pipelines/compiled/`."""
        return COMPILED / f"{self.name}.yaml"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of both specs, without the version of the compiler."""
        spec = {key: value for key, value in self.spec.items() if key != "sdkVersion"}
        return digest_json([spec, self.platform])

    def is_in(self, document: object) -> bool:
        """Return whether a version of Kubeflow's API, its `pipeline_spec`, has the same digest.

        That is both specs by name, or the pipeline spec alone. All its numbers went through a protobuf Struct, which
        knows no difference between 1 and 1.0.
        """
        if not isinstance(document, dict):
            return False
        given = Package(document.get("pipeline_spec") or document, document.get("platform_spec") or {})
        return bool(given._struct_digest == self._struct_digest)

    @cached_property
    def _struct_digest(self) -> str:
        spec = {key: value for key, value in self.spec.items() if key != "sdkVersion"}
        return digest_json(_as_struct([spec, self.platform]))

    @property
    def version(self) -> str:
        """The name of the version: the pipeline's name and the start of the digest."""
        return f"{self.name}-{self.digest[:SHORT]}"

    @cached_property
    def text(self) -> str:
        """The file's text, which is also what is uploaded; the same source gives the same text."""
        return f"{self.header}\n{_dump(self.spec, self.platform)}"

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


def shipped() -> list[str]:
    """Return the short names of the pipelines that ship, such as deletion-sweep."""
    return sorted(path.stem.removeprefix(PREFIX) for path in COMPILED.glob("*.yaml"))


def load_package(name: str, image: str | None = None) -> Package:
    """Load a pipeline that ships: unlearning, deletion-sweep, or one of them with -cpu, with or without the prefix.

    The image of every step is by default `SALUN_IMAGE`, else the one in the file. `SALUN_S3_SECRETS` names the Secret
    of each step, `SALUN_FIXED_UID=no` leaves the uid of the pods to the cluster, `SALUN_SHARED_MEMORY` limits the
    shared memory of those that compute, and `SALUN_DATA_CACHE_CLAIM` mounts a cache of the data.
    """
    short = name.removeprefix(PREFIX)
    if short not in shipped():
        raise unknown_name("pipeline", name, shipped())
    package = read_package(COMPILED / f"{PREFIX}{short}.yaml")
    if wanted := image or os.environ.get("SALUN_IMAGE"):
        for executor in package.spec["deploymentSpec"]["executors"].values():
            executor["container"]["image"] = wanted
    given = {name: os.environ.get(name, "") for name in (VARIABLE, SHARED_MEMORY, CACHE_CLAIM)}
    fixed_uid = read_fixed_uid(os.environ.get(FIXED_UID, ""))
    fit_to_cluster(package, given[VARIABLE], given[SHARED_MEMORY], given[CACHE_CLAIM], fixed_uid=fixed_uid)
    return package


def fit_to_cluster(package: Package, secrets: str, shared_memory: str, cache_claim: str, *, fixed_uid: bool) -> None:
    """Change what the pods of a pipeline take from the cluster, in place; this makes another version of the pipeline.

    `secrets` is `STEP=SECRET,...`, empty for the common one; `shared_memory` limits /dev/shm of the steps that compute;
    `cache_claim` is a PersistentVolumeClaim, empty for no cache. UsageError if one of them cannot be read.
    """
    give_secrets(package.platform, read_secrets(secrets))
    if not fixed_uid:
        leave_uid_to_cluster(package.platform)
    limit_shared_memory(package.platform, read_shared_memory(shared_memory))
    mount_data_cache(package.spec, package.platform, read_cache_claim(cache_claim))


def read_package(path: Path) -> Package:
    """Read the file of a compiled pipeline; UsageError if it is not one."""
    try:
        spec, platform = load_documents(path.read_text(encoding="utf-8"))
        _ = spec["deploymentSpec"]["executors"].values(), spec["root"]["inputDefinitions"]["parameters"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"cannot read {path}", f"not a compiled pipeline: {error}", "`make generated`") from error
    return Package(spec, platform)


def native_text(package: Package, namespace: str | None = None) -> str:
    """Return the text of Pipeline and PipelineVersion for a Kubeflow that keeps its pipelines in Kubernetes.

    Without a namespace, `kubectl -n` or a kustomization sets it. Kubernetes refuses to change a version, so its name
    carries the digest.
    """
    place = {"namespace": namespace} if namespace else {}
    common = {"displayName": package.name, "description": package.description}
    version = {"pipelineName": package.name, "pipelineSpec": package.spec, "platformSpec": package.platform}
    return _dump(
        {
            "apiVersion": "pipelines.kubeflow.org/v2beta1",
            "kind": "Pipeline",
            "metadata": {"name": package.name, **place},
            "spec": common,
        },
        {
            "apiVersion": "pipelines.kubeflow.org/v2beta1",
            "kind": "PipelineVersion",
            "metadata": {"name": package.version, **place},
            "spec": {**common, "displayName": package.version, **version},
        },
    )


def drift(path: Path, text: str) -> str | None:
    """Return what is wrong with a file, or None; the version of the compiler and comments do not count."""
    if not path.is_file():
        return f"{path.name} does not exist"
    there, wanted = (
        load_documents(re.sub(r"^ *sdkVersion: .*\n", "", one, flags=re.MULTILINE))
        for one in (path.read_text(encoding="utf-8"), text)
    )
    return None if there == wanted else f"{path.name} is out of step with its source"


def form_table(package: Package) -> str:
    """Return the run form's fields as a Markdown table; the required ones come first."""
    rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, item in sorted(package.inputs.items(), key=lambda pair: bool(pair[1].get("isOptional"))):
        default = f"`{default_text(item)}`" if item.get("isOptional") else "required"
        meaning = " ".join(str(item.get("description", "")).split())
        rows.append(f"| `{name}` | {_KINDS[item['parameterType']]} | {default} | {meaning} |")
    return "\n".join(rows)


def default_text(item: Mapping[str, Any]) -> str:
    """Return the default of a field of the run form as JSON, or that it is required."""
    if not item.get("isOptional"):
        return "required"
    value = item["defaultValue"]
    return json.dumps(int(value) if item["parameterType"] == "NUMBER_INTEGER" else value)


def _as_struct(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return a JSON value as a protobuf Struct gives it back: whole numbers are integers."""
    if isinstance(value, dict):
        return {key: _as_struct(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_struct(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def load_documents(text: str) -> list[dict[str, Any]]:
    """Return the documents of a YAML text, which holds mappings only."""
    return list(yaml.load_all(text, _LOADER))  # noqa: S506 - a safe one


def _dump(*documents: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump_all(documents, sort_keys=True, width=120))
