"""The retention rules, the garbage that they find, and the deletion plan. Nothing is read or deleted here."""

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
from salun_core.retention.inventory import ClassifiedVersion, StoreInventory, VersionState, classify_versions
from salun_core.storage.erase import StoredKey, Upload
from salun_core.storage.keys import kind_of_key, request_key, version_key

_PURGED_TOO = ("split.parquet", "mask.safetensors")  # ids of the training samples, critical weights
_HISTORY = ("head", "rollback", "disposed", "hold", "lease", "index", "outcome")
"""Documents that are replaced or deleted while a store is used; a bucket that keeps versions keeps what they were."""
_WHEN = "%Y-%m-%d %H:%M"


class RetentionRules(Document):
    """How long things are kept; the defaults are the longest allowed."""

    scratch_hours: Annotated[int, Field(ge=0, le=24)] = Field(default=24, description="forget data of a settled run")
    mask_days: Annotated[int, Field(ge=0, le=30)] = Field(default=30, description="masks of a settled run")
    weights_days: Annotated[int, Field(ge=0, le=30)] = Field(
        default=30, description="weights and list of training samples of a superseded version"
    )
    orphan_hours: Annotated[int, Field(ge=1, le=720)] = Field(
        default=24, description="files that no version needs, and versions that were never published"
    )
    outcome_days: Annotated[int, Field(ge=0, le=30)] = Field(
        default=7, description="outcomes of runs that claimed and made nothing"
    )
    upload_hours: Annotated[int, Field(ge=1, le=720)] = Field(default=24, description="uploads that never ended")
    every_hours: Annotated[int, Field(ge=0, le=24)] = Field(
        default=12, description="how often purge runs: what would be too old by the next time is deleted now"
    )

    def over(self, since: datetime, now: datetime, **limit: int) -> bool:
        """Return whether something would pass its limit (a `timedelta`) before the next purge."""
        return now - since + timedelta(hours=self.every_hours) >= timedelta(**limit)


class DeletionKind(StrEnum):
    """What is deleted, in the order in which it is done."""

    SCRATCH = "forget data"
    MASK = "mask"
    OUTCOME = "outcome"
    REQUEST = "request's target"
    UPLOAD = "unfinished upload"
    WEIGHTS = "superseded weights"
    STAGED = "unpublished version"
    ORPHAN = "orphan"
    HISTORY = "replaced document"


@dataclass(frozen=True)
class Deletion:
    """One thing to delete.

    Args:
        keys: the keys to erase, in this order.
        size: in bytes, all S3 versions.
        reason: by which rule.
        files: names of the version's files that are deleted.
        keep_hashes: for a request: whether hashes of its target must stay.
        since: for a staged version or an orphan, since when it is garbage; for replaced documents, before which time
            they were replaced.
    """

    kind: DeletionKind
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
    since: datetime | None = None

    @classmethod
    def of(cls, kind: DeletionKind, items: Sequence[StoredKey], reason: str, **fields: Any) -> Deletion:  # noqa: ANN401
        """Return the deletion of stored keys; `fields` are its other fields."""
        return cls(kind, tuple(item.key for item in items), sum(item.size for item in items), reason, **fields)


@dataclass(frozen=True)
class DeletionPlan:
    """What is deleted, and what stays although it looks like garbage.

    Args:
        deletions: in the order in which to do them.
        unknown: keys that SalUn does not write; they stay.
        held: superseded versions that a hold keeps, as `line@digest`.
        shared: superseded versions whose weights belong to a version that stays, too.
    """

    deletions: Sequence[Deletion]
    unknown: Sequence[str] = ()
    held: Sequence[str] = ()
    shared: Sequence[str] = ()


def plan(inventory: StoreInventory, rules: RetentionRules, now: datetime) -> DeletionPlan:
    """Plan what to delete; IntegrityError if a lineage is broken, so that it is unknown which files are needed."""
    garbage, held, shared = find_garbage(inventory, rules, now)
    deletions = [
        *_run_files(inventory, rules, now),
        *_outcomes(inventory, rules, now),
        *_targets(inventory),
        *_uploads(inventory, rules, now),
        *garbage,
        *_probe_files(inventory, rules, now),
        *_history(inventory, rules, now),
    ]
    unknown = [item.key for item, _ in inventory.all_keys.get("unknown", ()) if item.live]
    return DeletionPlan(deletions, unknown, held, shared)


def find_garbage(
    inventory: StoreInventory, rules: RetentionRules, now: datetime
) -> tuple[list[Deletion], list[str], list[str]]:
    """Find the files of model versions that are not needed any more.

    A file stays if any version needs it: every file of HEAD, of held versions and of versions that may still be
    published, and the evidence of superseded ones. Files are shared between versions (their key is their digest), so
    this is decided for all lines together.

    Returns the deletions in the order in which to do them; the superseded versions that a hold keeps; and those whose
    weights belong to a version that stays, too. Both as `line@digest`.
    """
    recent = timedelta(hours=rules.orphan_hours)
    superseded: list[ClassifiedVersion] = []
    unpublished: list[ClassifiedVersion] = []
    held: list[str] = []
    needed: set[str] = set()
    for item in classify_versions(inventory):
        names = set(item.manifest.files)
        over = item.state is VersionState.SUPERSEDED and rules.over(item.since, now, days=rules.weights_days)
        abandoned = item.state is VersionState.STAGED and not _may_be_published(inventory, item, now, recent)
        if over and item.id in inventory.held:
            held.append(f"{item.line}@{item.digest}")
        elif over:
            superseded.append(item)
            names -= set(purged_files(names))
        elif abandoned and item.id not in inventory.held:
            unpublished.append(item)
            names = set()
        needed |= {item.manifest.files[name].sha256 for name in names}
    files = _Files(inventory, [*superseded, *unpublished], needed, now - recent)
    weights, shared = files.superseded_weights(superseded)
    return [*weights, *files.unpublished(unpublished), *files.orphans()], held, shared


def _may_be_published(inventory: StoreInventory, item: ClassifiedVersion, now: datetime, recent: timedelta) -> bool:
    run = item.manifest.run or ""
    if run in inventory.holders.values() or now - item.since < recent:
        return True
    return run in inventory.runs and inventory.finished_at(run, now) is None


def purged_files(names: Collection[str]) -> list[str]:
    """Return the files that are deleted when a version is superseded: weights, training samples, critical weights."""
    return [*weight_files(names), *(name for name in _PURGED_TOO if name in names)]


class _Files:
    """The stored files of all versions, and which of them stay.

    Args:
        leaving: versions of which all or some files are deleted.
        needed: digests of the files that a version needs.
        recent: younger files may be part of a version that is being staged, unless a leaving version has them.
    """

    def __init__(
        self, inventory: StoreInventory, leaving: Sequence[ClassifiedVersion], needed: set[str], recent: datetime
    ) -> None:
        self._inventory, self._leaving, self._recent = inventory, leaving, recent
        self._stored: dict[str, list[StoredKey]] = {}
        for kind in ("blob", "trash"):
            for item, values in inventory.all_keys.get(kind, ()):
                self._stored.setdefault(values["digest"], []).append(item)
        known = {digest for item in leaving for digest in item.digests}
        self._stay = needed | {
            digest
            for digest, items in self._stored.items()
            if digest not in known and max(item.modified for item in items) > recent or any(map(self._in_use, items))
        }
        self._taken: set[str] = set()

    def _in_use(self, item: StoredKey) -> bool:
        """Return whether a purge at work may still need this copy of a file that it is deleting."""
        return kind_of_key(item.key)[0] == "trash" and item.modified > self._recent

    def _take(self, digests: Iterable[str]) -> list[StoredKey]:
        """Return the keys of files, copies in the trash too, that no earlier deletion of this plan has."""
        fresh = [digest for digest in dict.fromkeys(digests) if digest not in self._taken]
        self._taken.update(fresh)
        return [item for digest in fresh for item in self._stored.get(digest, ())]

    def superseded_weights(self, versions: Sequence[ClassifiedVersion]) -> tuple[list[Deletion], list[str]]:
        """Return the deletions of superseded weights, and the versions all of whose weights are still needed."""
        deletions, shared = [], []
        for item in versions:
            files = {name: item.manifest.files[name].sha256 for name in purged_files(item.manifest.files)}
            if not files or item.id in self._inventory.disposed:
                continue
            gone = {name: digest for name, digest in files.items() if digest not in self._stay}
            weights = weight_files(files)
            if not gone or (weights and not gone.keys() & weights):
                shared.append(f"{item.line}@{item.digest}")
                continue
            fields = {"run": item.manifest.run, "line": item.line, "version": item.digest, "files": tuple(sorted(gone))}
            reason = f"superseded since {item.since:{_WHEN}}"
            deletions.append(Deletion.of(DeletionKind.WEIGHTS, self._take(gone.values()), reason, **fields))
        return deletions, shared

    def unpublished(self, versions: Sequence[ClassifiedVersion]) -> Iterator[Deletion]:
        """Yield the deletions of versions that were never published; the manifest goes last, it names the files."""
        manifests = {item.key: item for item, _ in self._inventory.all_keys.get("manifest", ())}
        for item in versions:
            last = manifests.get(version_key(item.line, item.digest))
            keys = [*self._take(sorted(item.digests - self._stay)), *([last] if last else [])]
            reason = f"staged at {item.since:{_WHEN}} and never published"
            fields = {"run": item.manifest.run, "line": item.line, "version": item.digest, "since": item.since}
            yield Deletion.of(DeletionKind.STAGED, keys, reason, **fields)

    def orphans(self) -> Iterator[Deletion]:
        """Yield the deletions of files that no version has, and of old copies of those that stay."""
        for digest, items in sorted(self._stored.items()):
            if digest in self._stay:
                yield from self._old_copies(items)
            # A version that was purged before may have left a file: another version needed it then, or it was put back.
            elif all(item.id in self._inventory.disposed for item in self._leaving if digest in item.digests):
                since = max(item.modified for item in items)
                yield Deletion.of(DeletionKind.ORPHAN, items, "no version needs it", since=since)

    def _old_copies(self, items: list[StoredKey]) -> Iterator[Deletion]:
        """Yield the copies in the trash of a file that is stored; a copy may be all that is left of another."""
        kinds = [(kind_of_key(item.key)[0], item) for item in items]
        if any(kind == "blob" and item.live for kind, item in kinds):
            for kind, item in kinds:
                if kind == "trash" and not self._in_use(item):
                    yield Deletion.of(DeletionKind.ORPHAN, [item], "a killed purge left it, and the file is stored")


def _run_files(inventory: StoreInventory, rules: RetentionRules, now: datetime) -> Iterator[Deletion]:
    """Yield forget data, masks and candidate weights of runs that are over; one deletion for each run and kind."""
    limits: Mapping[str, tuple[DeletionKind, dict[str, int]]] = {
        "scratch": (DeletionKind.SCRATCH, {"hours": rules.scratch_hours}),
        "mask": (DeletionKind.MASK, {"days": rules.mask_days}),
        "candidate": (DeletionKind.MASK, {"days": rules.weights_days}),
    }
    for kind, (deletion, limit) in limits.items():
        grouped: dict[str, list[StoredKey]] = {}
        for item, values in inventory.all_keys.get(kind, ()):
            grouped.setdefault(values["run"], []).append(item)
        for run, items in grouped.items():
            over = _over_at(inventory, run, items, now)
            if over is not None and rules.over(over, now, **limit):
                yield Deletion.of(deletion, items, f"run over since {over:{_WHEN}}", run=run)


def _over_at(inventory: StoreInventory, run: str, items: Sequence[StoredKey], now: datetime) -> datetime | None:
    """Return when a run was over; for one without a log, when its newest file was written, one day later."""
    summary = inventory.runs.get(run)
    if run in inventory.holders.values():
        return None
    if summary is not None and summary.status is not None:
        return inventory.finished_at(run, now)
    newest = max([*(item.modified for item in items), *([summary.at] if summary else [])])
    return newest if now - newest >= inventory.patience(run) else None


def _outcomes(inventory: StoreInventory, rules: RetentionRules, now: datetime) -> Iterator[Deletion]:
    """Yield the outcomes of runs of which nothing else is kept: sweeps that found nothing to do, many each day."""
    kept = {manifest.run for manifest in inventory.manifests.values()} | set(inventory.holders.values())
    for kind in ("record", "run event", "report"):
        kept |= {values["run"] for _, values in inventory.all_keys.get(kind, ())}
    for item, values in inventory.all_keys.get("outcome", ()):
        run = values["run"]
        if run not in kept and rules.over(item.modified, now, days=rules.outcome_days):
            yield Deletion.of(
                DeletionKind.OUTCOME, [item], f"ended at {item.modified:{_WHEN}} and claimed nothing", run=run
            )


def _targets(inventory: StoreInventory) -> Iterator[Deletion]:
    """Yield the settled requests that still hold their target, or hashes that nothing needs any more."""
    stored = {item.key: item for item, _ in inventory.all_keys.get("request", ())}
    for name, item in inventory.requests.items():
        if item.status not in SETTLED:
            continue
        key = request_key(name)
        keep = item.status is Status.COMPLETED and still_trained_on(inventory, name)
        old = stored[key].old if key in stored else 0
        if not item.redacted or (item.hashed and not keep) or old:
            reason = "settled" if keep or not item.hashed else "settled, and no version was trained on it any more"
            yield Deletion(DeletionKind.REQUEST, (key,), 0, reason, run=item.run, request=name, keep_hashes=keep)


def still_trained_on(inventory: StoreInventory, request: str) -> bool:
    """Return whether a version that still has weights may be trained on the target of a completed request.

    A rollback to such a version would bring the target back. If it cannot be decided, the answer is yes.
    """
    item = inventory.requests[request]
    if item.at is None:
        return True
    earlier = {
        digest: manifest
        for (line, digest), manifest in inventory.manifests.items()
        if line == item.line and datetime.fromisoformat(manifest.created_at) <= item.at
    }
    if item.outcome is Outcome.NOTHING_TO_ERASE:  # the version that was searched was HEAD then
        clean = inventory.heads[item.line].version if item.line in inventory.heads else None
        while clean is not None and clean not in earlier:
            found = inventory.manifests.get((item.line, clean))
            clean = found.parent if found else None
    else:
        clean = next((digest for digest, made in earlier.items() if item.run and made.run == item.run), None)
    if clean is None:
        return True
    innocent = inventory.descendants(item.line, clean)
    return any(
        digest not in innocent and (item.line, digest) not in inventory.disposed
        for digest, manifest in earlier.items()
        if datetime.fromisoformat(manifest.created_at) < item.at
    )


def _uploads(inventory: StoreInventory, rules: RetentionRules, now: datetime) -> Iterator[Deletion]:
    for upload, size in inventory.uploads:
        if now - upload.initiated >= timedelta(hours=rules.upload_hours):
            reason = f"begun {upload.initiated:{_WHEN}} and never ended"
            yield Deletion(DeletionKind.UPLOAD, (upload.key,), size, reason, upload=upload)


def _history(inventory: StoreInventory, rules: RetentionRules, now: datetime) -> Iterator[Deletion]:
    """Yield the old S3 versions of documents, one deletion for each kind; the latest version stays, if it is live."""
    for kind in _HISTORY:
        found = [item for item, _ in inventory.all_keys.get(kind, ()) if item.replaced or not item.live]
        old = [item for item in found if rules.over(item.replaced or item.modified, now, days=rules.weights_days)]
        if old:
            before = now - timedelta(days=rules.weights_days, hours=-rules.every_hours)
            keys = tuple(item.key for item in old)
            reason = f"{kind}: replaced or deleted before {before:{_WHEN}}"
            yield Deletion(DeletionKind.HISTORY, keys, 0, reason, since=before)


def _probe_files(inventory: StoreInventory, rules: RetentionRules, now: datetime) -> Iterator[Deletion]:
    limit = timedelta(hours=rules.orphan_hours)
    left = [item for item, _ in inventory.all_keys.get("probe", ()) if now - item.modified >= limit]
    if left:
        yield Deletion.of(DeletionKind.ORPHAN, left, "left by a probe of the store")
