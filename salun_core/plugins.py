"""Plug-ins: methods, metrics, architectures and attacks from other packages.

A package offers them by entry points (`salun.methods` and so on), and any object has the name `package:object`. A run
parameter or a model card may hold such a name, so that a name alone never loads code: the operator lists in
`SALUN_PLUGINS` what may be loaded. What ships has precedence, so that no package can replace a shipped name.

Entry points are read from the metadata of installed packages, and the digest from their files. Neither runs their code.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from salun_core.config import Document
from salun_core.digest import digest_json, sha256_file
from salun_core.errors import IntegrityError, UsageError

Kind = Literal["method", "metric", "architecture", "attack"]
GROUPS: Mapping[Kind, str] = {
    "method": "salun.methods",
    "metric": "salun.metrics",
    "architecture": "salun.architectures",
    "attack": "salun.attacks",
}
"""The entry point group of each kind of plug-in."""

ALLOWED_VARIABLE = "SALUN_PLUGINS"
"""The plug-ins that may be loaded, separated by commas: a distribution for what its entry points name, or
`package:object`; each may be followed by `@sha256:` and the digest of its source files."""

_PIN = "@sha256:"
_LIBRARIES = ("salun", "torchvision", "timm")  # `LIBRARY:NAME` names an architecture, not an object
_SUFFIXES = tuple(importlib.machinery.all_suffixes())
_Word = Annotated[str, Field(max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]


class PluginRecord(Document):
    """A plug-in that a run used, as evidence and certificate name it."""

    kind: Kind = Field(description="method, metric, architecture or attack")
    name: _Word = Field(description="the name that the run gave")
    object: _Word = Field(description="the object behind it, as package:object")
    distribution: _Word = Field(default="", description="the installed package; empty: a module that is not installed")
    version: _Word = Field(default="", description="version of the installed package")
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="SHA-256 over paths and SHA-256 of the source files of its top-level package"
    )

    @property
    def words(self) -> str:
        """The plug-in in one line."""
        source = f"{self.distribution} {self.version}".strip() or self.object
        return f"{self.kind} {self.name} ({source}, sha256 {self.digest[:12]})"


@dataclass(frozen=True)
class Offer:
    """A plug-in that was found and not loaded.

    `name` is that of the entry point, or `package:object`; `target` is the object, as `package:object`. `distribution`
    is empty if no installed package offers it.
    """

    kind: Kind
    name: str
    target: str
    distribution: str = ""
    version: str = ""

    @property
    def entry(self) -> str:
        """What `SALUN_PLUGINS` lists to allow it: the distribution of an entry point, or `package:object`."""
        return self.target if is_reference(self.name) else self.distribution

    def record(self) -> PluginRecord:
        """Return the record of the plug-in; its files are read, and nothing is imported."""
        return PluginRecord(
            kind=self.kind,
            name=self.name,
            object=self.target,
            distribution=self.distribution,
            version=self.version,
            digest=source_digest(self.target.partition(":")[0]),
        )


_loaded: dict[Offer, tuple[Any, PluginRecord]] = {}  # one entry per plug-in and process: modules are imported once


def is_reference(name: str) -> bool:
    """Whether a name has the form `package:object` and is not one of a library of architectures."""
    package, colon, target = name.partition(":")
    dotted = all(part.isidentifier() for part in (*package.split("."), *target.split(".")))
    return bool(colon) and dotted and package not in _LIBRARIES


def offers(kind: Kind) -> list[Offer]:
    """Return what the entry points of installed packages offer, in order of names; nothing is imported."""
    return list(_offers(kind, tuple(sys.path)))


@functools.cache
def _offers(kind: Kind, _path: tuple[str, ...]) -> tuple[Offer, ...]:
    """Read the entry points once for each state of the module path."""
    found = {
        Offer(kind, point.name, point.value.partition("[")[0].strip(), point.dist.name, point.dist.version)
        for point in importlib.metadata.entry_points(group=GROUPS[kind])
        if point.dist is not None
    }
    return tuple(sorted(found, key=lambda offer: (offer.name, offer.distribution)))


def find(kind: Kind, name: str) -> Offer | None:
    """Return the plug-in of a name without loading it; None if no package offers it, UsageError if several do."""
    if is_reference(name):
        return Offer(kind, name, name, *_distribution_of(name.partition(":")[0].partition(".")[0]))
    found = [offer for offer in offers(kind) if offer.name == name]
    if len(found) > 1:
        raise UsageError(
            f"{kind} {name} is ambiguous",
            f"{' and '.join(offer.distribution for offer in found)} offer it",
            f"write {' or '.join(offer.target for offer in found)}, or uninstall one of them",
        )
    return found[0] if found else None


@functools.cache
def _distribution_of(package: str) -> tuple[str, str]:
    """Return name and version of the distribution of a top-level package, if it is named like the package."""
    try:
        found = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "", ""
    return found.name, found.version


def load(kind: Kind, name: str) -> Any:  # noqa: ANN401 - what a plug-in is, its user checks
    """Import a plug-in and return its object; None if no package offers the name.

    The caller looks a name up among what ships first. Raises UsageError if the plug-in is not allowed, and
    IntegrityError if its files have another digest than the allowed one.
    """
    offer = find(kind, name)
    if offer is None:
        return None
    with importable_folder() if is_reference(name) else nullcontext():
        record = _loaded[offer][1] if offer in _loaded else None
        record = _allowed_record(offer, record)
        if offer not in _loaded:
            _loaded[offer] = _import(offer), record
    return _loaded[offer][0]


def loaded(kind: Kind, *names: str) -> list[PluginRecord]:
    """Return the records of those names that are plug-ins which this process has loaded; shipped names have none."""
    return [record for _, record in _loaded.values() if record.kind == kind and record.name in names]


def allow(plugin: str | Offer) -> None:
    """Allow a plug-in in this process and its children, for a user who named it to have it run.

    Of names, only `package:object` changes anything, as others may be those of what ships. A plug-in that is listed
    with a digest stays so.
    """
    item = plugin.entry if isinstance(plugin, Offer) else plugin
    named = isinstance(plugin, Offer) or is_reference(plugin)
    if named and not any(one.partition(_PIN)[0] == item for one in allowed()):
        os.environ[ALLOWED_VARIABLE] = ",".join(sorted([*allowed(), item]))


def allowed() -> list[str]:
    """Return the items of `SALUN_PLUGINS`, in order."""
    return sorted({item.strip() for item in os.environ.get(ALLOWED_VARIABLE, "").split(",")} - {""})


def records(item: str) -> list[PluginRecord]:
    """Return the records of what an item of `SALUN_PLUGINS` names, without loading it; may be empty."""
    name = item.partition(_PIN)[0]
    if is_reference(name):
        with importable_folder():
            return [Offer("method", name, name, *_distribution_of(name.partition(":")[0].partition(".")[0])).record()]
    return [offer.record() for kind in GROUPS for offer in offers(kind) if _is_named(item, offer)]


def is_allowed(offer: Offer) -> bool:
    """Whether `SALUN_PLUGINS` lists a plug-in, with a digest or without."""
    return bool(_listed(offer))


def _listed(offer: Offer) -> list[str]:
    return [item for item in allowed() if _is_named(item, offer)]


def _allowed_record(offer: Offer, known: PluginRecord | None) -> PluginRecord:
    """Refuse a plug-in that is not listed; return its record, which is made before any of its code runs.

    For a loaded plug-in, `known` is its record: what counts are the files at that time.
    """
    listed = _listed(offer)
    if not listed:
        raise UsageError(
            f"{offer.kind} {offer.name} is not allowed",
            "it is a plug-in, and loading it runs its code",
            f"if you trust it, set {ALLOWED_VARIABLE}={offer.entry}, in a pod in its image",
        )
    record = known or offer.record()
    if not names(listed, record):
        raise IntegrityError(
            f"{offer.kind} {offer.name} has other files than {ALLOWED_VARIABLE} allows",
            f"their SHA-256 is {record.digest}, and {', '.join(listed)} is allowed",
            "install the release that was allowed, or review this one and list its digest",
        )
    return record


def names(items: Iterable[str], record: PluginRecord) -> bool:
    """Whether a list of plug-ins names one: by its distribution or `package:object`, perhaps with `@sha256:` digest.

    A distribution names what its entry points offer, and nothing else in it.
    """
    offer = Offer(record.kind, record.name, record.object, record.distribution)
    return any(_is_named(item, offer) and item.partition(_PIN)[2] in ("", record.digest) for item in items)


def _is_named(item: str, offer: Offer) -> bool:
    """Whether an item names a plug-in, whatever its digest; distributions compare as PEP 503 says."""
    name = item.partition(_PIN)[0]
    by_distribution = not is_reference(offer.name) and _normal(name) == _normal(offer.distribution) != ""
    return name == offer.target or by_distribution


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def source_digest(package: str) -> str:
    """Return the SHA-256 of the files of a top-level package from which Python imports.

    It is the digest of the canonical JSON object of their SHA-256 by path. Only the first part of the dotted name
    counts. Nothing is imported.
    """
    top = package.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise _absent(package)
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    files = {
        f"{top}/{path.relative_to(root).as_posix()}": path
        for root in roots
        for path in sorted(root.rglob("*"))
        if path.name.endswith(_SUFFIXES) and "__pycache__" not in path.parts and path.is_file()
    }
    if not roots and spec.origin and Path(spec.origin).is_file():
        files[Path(spec.origin).name] = Path(spec.origin)
    if not files:
        raise UsageError(
            f"package {top} cannot be a plug-in", "it has no source files", "name an object of a package of your own"
        )
    return digest_json({name: sha256_file(path) for name, path in files.items()})


def _import(offer: Offer) -> Any:  # noqa: ANN401 - any object
    if not is_reference(offer.target):
        raise UsageError(
            f"the entry point {offer.name} of {offer.distribution} names no object",
            f"it is {offer.target!r}",
            f'write {offer.name} = "package:object" under [project.entry-points."{GROUPS[offer.kind]}"]',
        )
    package, _, target = offer.target.partition(":")
    try:
        found = importlib.import_module(package)
    except (Exception, SystemExit) as error:  # importing runs any code
        missing = isinstance(error, ModuleNotFoundError) and error.name in {package, package.split(".")[0]}
        raise (_absent(package) if missing else _broken(package, error)) from error
    try:
        for part in target.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise UsageError(
            f"{package} has no {target}",
            "the module was imported",
            f"correct the name of the {offer.kind}, or the entry point of {offer.distribution or package}",
        ) from error
    return found


def _absent(package: str) -> UsageError:
    return UsageError(
        f"package {package} cannot be imported",
        "it is neither installed nor in the working folder",
        "install it or change to its folder; in a pod, the image must contain it",
    )


def _broken(package: str, error: BaseException) -> UsageError:
    why = f"{type(error).__name__}: {str(error)[:200]}"
    return UsageError(f"package {package} cannot be imported", why, "correct its code, or install what it needs")


def wrong_type(kind: Kind, name: str, found: object, expected: str) -> UsageError:
    """Return the error for a plug-in whose object is not what its kind needs; the remedy is to "make it" `expected`."""
    return UsageError(
        f"{kind} {name} cannot be used", f"its object is of the type {type(found).__name__}", f"make it {expected}"
    )


@contextmanager
def importable_folder() -> Iterator[None]:
    """Let the block import modules of the working folder. They never hide an installed package."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
