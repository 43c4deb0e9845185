"""The retention rules, and the plan of deletions that they lead to. Nothing is read or deleted here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from salun_core.config import Document
from salun_core.registry.manifest import weight_files
from salun_core.requests.schema import SETTLED, Outcome, Status
from salun_core.retention.inventory import NAMES, Artifact, Standing, Stock, VersionFacts, descendants, moment, stand
from salun_core.storage.erase import StoredKey, Upload
from salun_core.storage.keys import kind_of_key, request_key, version_key


class RetentionRules(Document):
    """How long things are kept; the defaults are the most that is allowed."""

    scratch_hours: Annotated[int, Field(ge=0, le=24)] = Field(default=24, description="forget data of a settled run")
    mask_days: Annotated[int, Field(ge=0, le=30)] = Field(default=30, description="masks of a settled run")
    weights_days: Annotated[int, Field(ge=0, le=30)] = Field(
        default=30, description="weights and list of training samples of a superseded version"
    )
    artifact_days: Annotated[int, Field(ge=0, le=30)] = Field(
        default=7, description="weights and masks under Kubeflow's pipeline root"
    )
    orphan_hours: Annotated[int, Field(ge=1, le=720)] = Field(
        default=24, description="files that no version needs, and versions that were never published"
    )
    upload_hours: Annotated[int, Field(ge=1, le=720)] = Field(default=24, description="uploads that never ended")
    every_hours: Annotated[int, Field(ge=0, le=24)] = Field(
        default=12, description="how often purge runs: what would be too old by the next time goes now"
    )

    def over(self, since: datetime, now: datetime, **limit: int) -> bool:
        """Return whether something would pass its limit (a `timedelta`) before the next purge."""
        return now - since + timedelta(hours=self.every_hours) >= timedelta(**limit)


class Kind(StrEnum):
    """What is disposed of, in the order in which it is done."""

    SCRATCH = "forget data"
    MASK = "mask"
    ARTIFACT = "pipeline artifact"
    REQUEST = "request's target"
    UPLOAD = "unfinished upload"
    MATERIALISE = "make whole"
    WEIGHTS = "superseded weights"
    STAGED = "unpublished version"
    ORPHAN = "orphan"


@dataclass(frozen=True)
class Disposal:
    """One thing to dispose of.

    Args:
        kind: what it is.
        keys: the keys to erase; of a pipeline artifact below the pipeline root. The last one goes last.
        size: in bytes, all S3 versions.
        reason: by which rule.
        run: the run it belongs to.
        line: the model line.
        version: digest of the version.
        files: names of the version's files that go.
        request: the request.
        keep_hashes: of a request: whether hashes of what it named must stay.
        upload: the unfinished upload.
    """

    kind: Kind
    keys: tuple[str, ...]
    size: int
    reason: str
    run: str | None = None
    line: str | None = None
    version: str | None = None
    files: tuple[str, ...] = ()
    request: str | None = None
    keep_hashes: bool = False
    upload: Upload | None = None


def disposal(kind: Kind, items: Sequence[StoredKey], reason: str, **facts: Any) -> Disposal:  # noqa: ANN401
    """Return the disposal of stored keys; `facts` are its other fields."""
    return Disposal(kind, tuple(item.key for item in items), sum(item.size for item in items), reason, **facts)


_PURGED_TOO = ("split.json", "mask.safetensors")  # the ids of the training samples, the critical weights


class Unneeded:
    """Sorts the versions of all lines, and finds the files that go.

    Args:
        stock: what there is.
        rules: how long it may stay.
        now: the time, with its time zone.

    Raises:
        IntegrityError: the lineage of a model line is broken.
    """

    def __init__(self, stock: Stock, rules: RetentionRules, now: datetime) -> None:
        self._stock, self._rules, self._now = stock, rules, now
        self._stored: dict[str, list[StoredKey]] = {}
        for item in stock.keys:
            kind, names = kind_of_key(item.key)
            if kind in {"blob", "delta"}:
                self._stored.setdefault(names["digest"], []).append(item)
        self.held: list[str] = []
        self.shared: list[str] = []
        self._superseded: list[VersionFacts] = []
        self._unpublished: list[VersionFacts] = []
        self._keep: set[str] = set()
        for version in stand(stock):
            self._sort(version)
        self._going = {digest for item in [*self._superseded, *self._unpublished] for digest in _digests(item)}
        self._keep |= {digest for digest in self._stored if digest not in self._keep and self._young(digest)}

    def _sort(self, item: VersionFacts) -> None:
        """Note what a version still needs, and put it on the list that it belongs to."""
        files = item.manifest.files
        needed = set(files)
        if item.standing is Standing.SUPERSEDED and self._rules.over(
            item.since, self._now, days=self._rules.weights_days
        ):
            if self._held(item):
                self.held.append(f"{item.line}@{item.digest}")
            else:
                self._superseded.append(item)
                needed -= set(purged_files(files))
        elif item.standing is Standing.STAGED and not self._in_use(item) and not self._held(item):
            self._unpublished.append(item)
            needed = set()
        self._keep |= {files[name].sha256 for name in needed}

    def _held(self, item: VersionFacts) -> bool:
        return (item.line, item.digest) in self._stock.held

    def _in_use(self, item: VersionFacts) -> bool:
        """Return whether a version that was staged may still be published."""
        run = item.manifest.run or ""
        if run in self._stock.holders.values() or self._now - item.since < timedelta(hours=self._rules.orphan_hours):
            return True
        return run in self._stock.runs and self._stock.finished_at(run, self._now) is None

    def _young(self, digest: str) -> bool:
        """Return whether a file that no version needs may be part of one that is being staged."""
        newest = max(item.modified for item in self._stored[digest])
        return digest not in self._going and self._now - newest < timedelta(hours=self._rules.orphan_hours)

    def disposals(self) -> Iterator[Disposal]:
        """Yield what goes: first the files that must be made whole, for what they rest on goes."""
        going = [*self._weights(), *self._staged(), *self._orphans()]
        erased = {names["digest"] for item in going for _, names in map(kind_of_key, item.keys) if "digest" in names}
        for digest in sorted(self._keep):
            if self._stock.bases.get(digest) in erased and not self._whole(digest):
                size = sum(item.size for item in self._stored.get(digest, []))
                yield Disposal(Kind.MATERIALISE, (digest,), size, "the file that it is a difference to goes")
        yield from going

    def _whole(self, digest: str) -> bool:
        return any(kind_of_key(item.key)[0] == "blob" and item.live for item in self._stored.get(digest, []))

    def _weights(self) -> Iterator[Disposal]:
        taken: set[str] = set()
        for item in self._superseded:
            if (item.line, item.digest) in self._stock.disposed:
                continue
            files = {name: item.manifest.files[name].sha256 for name in purged_files(item.manifest.files)}
            if not files:
                continue
            gone = {name: digest for name, digest in files.items() if digest not in self._keep}
            weights = weight_files(files)
            if not gone or (weights and not gone.keys() & weights):
                self.shared.append(f"{item.line}@{item.digest}")
                continue
            reason = f"superseded since {item.since:%Y-%m-%d %H:%M}"
            facts = {"run": item.manifest.run, "line": item.line, "version": item.digest, "files": tuple(sorted(gone))}
            yield disposal(Kind.WEIGHTS, self._take(gone.values(), taken), reason, **facts)

    def _staged(self) -> Iterator[Disposal]:
        manifests = {item.key: item for item in self._stock.keys}
        taken: set[str] = set()
        for item in self._unpublished:
            digests = [digest for digest in sorted(_digests(item)) if digest not in self._keep]
            last = manifests.get(version_key(item.line, item.digest))
            keys = [*self._take(digests, taken), *([last] if last else [])]
            reason = f"staged at {item.since:%Y-%m-%d %H:%M} and never published"
            facts = {"run": item.manifest.run, "line": item.line, "version": item.digest}
            yield disposal(Kind.STAGED, keys, reason, **facts)

    def _orphans(self) -> Iterator[Disposal]:
        for digest, items in sorted(self._stored.items()):
            if digest in self._keep:
                yield from self._second_copies(items)
            elif digest not in self._going or self._left_by_purge(digest):
                yield disposal(Kind.ORPHAN, items, "no version needs it")

    def _left_by_purge(self, digest: str) -> bool:
        """Return whether only versions that were disposed of already refer to a file: it was shared, or put back."""
        users = [item for item in [*self._superseded, *self._unpublished] if digest in _digests(item)]
        return all((item.line, item.digest) in self._stock.disposed for item in users)

    def _second_copies(self, items: list[StoredKey]) -> Iterator[Disposal]:
        """Yield what there is of a file besides the copy that is read; never its only one."""
        whole = next((item for item in items if item.live and kind_of_key(item.key)[0] == "blob"), None)
        read = whole or next((item for item in items if item.live), None)
        for item in items if read else ():
            if item is not read:
                yield disposal(Kind.ORPHAN, [item], "the file is stored in another form")

    def _take(self, digests: Iterable[str], taken: set[str]) -> list[StoredKey]:
        fresh = [digest for digest in dict.fromkeys(digests) if digest not in taken]
        taken.update(fresh)
        return [item for digest in fresh for item in self._stored.get(digest, [])]


def purged_files(names: Collection[str]) -> list[str]:
    """Return those of a version's files that go when it is superseded: weights, training samples, critical weights.

    Args:
        names: of all its files.
    """
    return [*weight_files(names), *(name for name in _PURGED_TOO if name in names)]


def _digests(item: VersionFacts) -> set[str]:
    return {entry.sha256 for entry in item.manifest.files.values()}


__all__ = ["Disposal", "Kind", "Plan", "RetentionRules", "is_known", "plan"]

Found = Mapping[str, Sequence[tuple[StoredKey, Mapping[str, str]]]]


@dataclass(frozen=True)
class Plan:
    """What goes, and what stays although it looks as if it should go.

    Args:
        disposals: in the order in which to do them.
        unknown: keys that nothing here understands; they are left alone.
        held: superseded versions that a hold keeps, as `line@digest`.
        shared: superseded versions whose weights are those of a version that stays.
        foreign_runs: runs under the pipeline root that the store does not know; they are left alone.
    """

    disposals: Sequence[Disposal]
    unknown: Sequence[str] = ()
    held: Sequence[str] = ()
    shared: Sequence[str] = ()
    foreign_runs: int = 0


def plan(stock: Stock, rules: RetentionRules, now: datetime) -> Plan:
    """Plan what must go.

    Args:
        stock: what there is.
        rules: how long it may stay.
        now: the time, with its time zone.

    Raises:
        IntegrityError: the lineage of a model line is broken, so that nobody can tell which files are needed.
    """
    keys: dict[str, list[tuple[StoredKey, Mapping[str, str]]]] = {}
    for item in stock.keys:
        kind, found = kind_of_key(item.key)
        keys.setdefault(kind, []).append((item, found))
    versions = Unneeded(stock, rules, now)
    disposals = [
        *_of_runs(stock, rules, now, keys),
        *_artifacts(stock, rules, now),
        *_targets(stock, {item.key: item for item, _ in keys.get("request", [])}),
        *_uploads(stock, rules, now),
        *versions.disposals(),
        *_probes(rules, now, keys),
    ]
    unknown = [item.key for item, _ in keys.get("unknown", []) if item.live]
    return Plan(disposals, unknown, versions.held, versions.shared, stock.foreign_runs)


def _of_runs(stock: Stock, rules: RetentionRules, now: datetime, keys: Found) -> Iterator[Disposal]:
    """Yield forget data, masks and candidate weights of runs that are over; one disposal a run and kind."""
    limits = {"scratch": {"hours": rules.scratch_hours}, "mask": {"days": rules.mask_days}}
    limits["candidate"] = {"days": rules.weights_days}
    grouped: dict[tuple[str, str], list[StoredKey]] = {}
    for kind in limits:
        for item, names in keys.get(kind, []):
            grouped.setdefault((kind, names["run"]), []).append(item)
    for (kind, run), items in grouped.items():
        over, limit = _over_at(stock, run, items, now), limits[kind]
        if over is not None and rules.over(over, now, **limit):
            name = Kind.SCRATCH if kind == "scratch" else Kind.MASK
            yield disposal(name, items, f"run over since {over:%Y-%m-%d %H:%M}", run=run)


def _over_at(stock: Stock, run: str, items: Sequence[StoredKey], now: datetime) -> datetime | None:
    """Return when a run was over; of one that is not known, when its newest file was written, a day later."""
    if run in stock.runs or run in stock.holders.values():
        return stock.finished_at(run, now)
    newest = max(item.modified for item in items)
    return newest if now - newest >= timedelta(hours=24) else None


def _artifacts(stock: Stock, rules: RetentionRules, now: datetime) -> Iterator[Disposal]:
    days = min(rules.artifact_days, rules.mask_days, rules.weights_days)
    grouped: dict[tuple[str, str], list[Artifact]] = {}
    for item in stock.artifacts:
        if item.name in NAMES:
            grouped.setdefault((item.run, item.name), []).append(item)
    for (run, name), items in grouped.items():
        over = stock.finished_at(run, now)
        if over is not None and rules.over(over, now, days=days):
            reason = f"{name} of a run that is over since {over:%Y-%m-%d %H:%M}"
            yield disposal(Kind.ARTIFACT, [item.stored for item in items], reason, run=run)


def _targets(stock: Stock, stored: dict[str, StoredKey]) -> Iterator[Disposal]:
    """Yield the settled requests that still say what they named, or keep hashes that nothing needs any more."""
    for name, item in stock.requests.items():
        if item.status not in SETTLED:
            continue
        key = request_key(name)
        keep = item.status is Status.COMPLETED and is_known(stock, name)
        old = stored[key].old if key in stored else 0
        if not item.redacted or (item.hashed and not keep) or old:
            reason = "settled" if keep or not item.hashed else "settled, and no version knows it any more"
            yield Disposal(Kind.REQUEST, (key,), 0, reason, run=item.run, request=name, keep_hashes=keep)


def is_known(stock: Stock, request: str) -> bool:
    """Return whether a version with weights may still know what a completed request named.

    A rollback to such a version would bring it back. Where that cannot be told, the answer is yes.
    """
    item = stock.requests[request]
    if item.at is None:
        return True
    forgot = _forgetting(stock, item.line, item.run, item.outcome, item.at)
    if forgot is None:
        return True
    innocent = descendants(stock, item.line, forgot)
    return any(
        line == item.line and digest not in innocent and (line, digest) not in stock.disposed
        for (line, digest), manifest in stock.manifests.items()
        if moment(manifest.created_at) < item.at
    )


def _forgetting(stock: Stock, line: str, run: str | None, outcome: Outcome | None, at: datetime) -> str | None:
    """Return the version that has forgotten a request; with nothing to erase, the one that was searched."""
    made = {d: m for (of, d), m in stock.manifests.items() if of == line and moment(m.created_at) <= at}
    if outcome is not Outcome.NOTHING_TO_ERASE:
        return next((digest for digest, item in made.items() if run and item.run == run), None)
    digest = stock.heads[line].version if line in stock.heads else None
    while digest is not None and digest not in made:
        found = stock.manifests.get((line, digest))
        digest = found.parent if found else None
    return digest


def _uploads(stock: Stock, rules: RetentionRules, now: datetime) -> Iterator[Disposal]:
    for upload, size in stock.uploads:
        if now - upload.initiated >= timedelta(hours=rules.upload_hours):
            reason = f"begun {upload.initiated:%Y-%m-%d %H:%M} and never ended"
            yield Disposal(Kind.UPLOAD, (upload.key,), size, reason, upload=upload)


def _probes(rules: RetentionRules, now: datetime, keys: Found) -> Iterator[Disposal]:
    left = [item for item, _ in keys.get("probe", []) if now - item.modified >= timedelta(hours=rules.orphan_hours)]
    if left:
        yield disposal(Kind.ORPHAN, left, "left by a probe of the store")
