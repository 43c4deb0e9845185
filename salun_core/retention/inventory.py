"""The inventory of a store that the retention rules are applied to, with the state of each version. Read-only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property

from salun_core.data.targets import RedactedTarget
from salun_core.errors import IntegrityError
from salun_core.registry.lookup import lines, read_head, read_version
from salun_core.registry.manifest import Head, VersionManifest
from salun_core.requests.reading import read_all
from salun_core.requests.schema import Outcome, RequestState, Status
from salun_core.storage.erase import StoredKey, Upload, stored_keys, unfinished_uploads, upload_bytes
from salun_core.storage.keys import kind_of_key
from salun_core.storage.leases import holder_of, read_lease
from salun_core.storage.s3 import S3Store
from salun_core.sweeps.context import in_parallel
from salun_core.sweeps.runs import ENDED, RunLog, RunStatus
from salun_core.times import as_utc, utc_clock

ALIVE = timedelta(hours=24)
"""A run without an event for so long, and without a lease, is dead."""
MAY_WAIT = timedelta(days=7)
"""How long a run may wait for a node: nobody renews its lease, but it is the run's own until another run takes it."""

KeysByKind = Mapping[str, Sequence[tuple[StoredKey, Mapping[str, str]]]]


def by_kind(keys: Iterable[StoredKey]) -> KeysByKind:
    """Group stored keys by their kind, each with the values in it (`kind_of_key`)."""
    found: dict[str, list[tuple[StoredKey, Mapping[str, str]]]] = {}
    for item in keys:
        kind, values = kind_of_key(item.key)
        found.setdefault(kind, []).append((item, values))
    return found


@dataclass(frozen=True)
class RunSummary:
    """What the store holds about a run.

    Args:
        line: its model line; None if only files of the run are known.
        parent: the version that it started from.
        members: ids of its requests.
        at: when it reached that status; without a log, when its newest file was written.
        marks: its disposal records, such as `disposed-data`.
    """

    line: str | None
    parent: str | None
    members: Sequence[str]
    status: RunStatus | None
    at: datetime
    marks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RequestSummary:
    """A request, without its target.

    Args:
        at: when it reached that status; None if it has no events yet.
        run: the run that caused the status.
        outcome: how it was completed.
        redacted: whether its target was removed.
        hashed: whether hashes of its target were kept.
    """

    line: str
    status: Status
    at: datetime | None = None
    run: str | None = None
    outcome: Outcome | None = None
    redacted: bool = False
    hashed: bool = False


@dataclass(frozen=True, kw_only=True)
class StoreInventory:
    """Everything that a deletion plan is made from; runs and requests by id.

    Args:
        keys: everything in the store, sorted.
        manifests: every version that has a manifest, by line and digest.
        holders: the run that holds the lease of a line.
        unreturned: runs whose lease ended, and was neither given back nor taken; they may wait for a node.
        uploads: unfinished multipart uploads, with their bytes.
    """

    keys: Sequence[StoredKey] = ()
    heads: Mapping[str, Head] = field(default_factory=dict)
    manifests: Mapping[tuple[str, str], VersionManifest] = field(default_factory=dict)
    holders: Mapping[str, str] = field(default_factory=dict)
    unreturned: frozenset[str] = frozenset()
    runs: Mapping[str, RunSummary] = field(default_factory=dict)
    requests: Mapping[str, RequestSummary] = field(default_factory=dict)
    uploads: Sequence[tuple[Upload, int]] = ()

    @cached_property
    def all_keys(self) -> KeysByKind:
        """Every key by its kind, deleted ones with remaining S3 versions included."""
        return by_kind(self.keys)

    @cached_property
    def rolled_back(self) -> frozenset[tuple[str, str]]:
        """The versions, by line and digest, that a rollback undid; it counts only outside the ancestry of HEAD."""
        return self._live_versions("rollback")

    @cached_property
    def disposed(self) -> frozenset[tuple[str, str]]:
        """The versions, by line and digest, whose weights were deleted by an earlier purge."""
        return self._live_versions("disposed")

    @cached_property
    def held(self) -> frozenset[tuple[str, str]]:
        """The versions, by line and digest, that have a hold."""
        return self._live_versions("hold")

    def _live_versions(self, kind: str) -> frozenset[tuple[str, str]]:
        found = self.all_keys.get(kind, ())
        return frozenset((values["line"], values["digest"]) for item, values in found if item.live)

    @cached_property
    def certificates(self) -> frozenset[str]:
        """The requests that have a certificate."""
        return frozenset(values["request"] for item, values in self.all_keys.get("certificate", ()) if item.live)

    @cached_property
    def children(self) -> Mapping[tuple[str, str], Sequence[str]]:
        """The versions made from each version, by line and digest."""
        found: dict[tuple[str, str], list[str]] = {}
        for (line, digest), item in self.manifests.items():
            found.setdefault((line, item.parent or ""), []).append(digest)
        return found

    def descendants(self, line: str, digest: str) -> set[str]:
        """Return a version and all versions that were made from it."""
        found, todo = {digest}, [digest]
        while todo:
            new = set(self.children.get((line, todo.pop()), ())) - found
            found |= new
            todo += new
        return found

    def finished_at(self, run: str, now: datetime) -> datetime | None:
        """Return when a run was over, or None if it may still work or its requests are not settled.

        If a run stopped without an end, it is the time of its last event.
        """
        summary = self.runs.get(run)
        if summary is None or run in self.holders.values():
            return None
        caused = [item for name in summary.members if (item := self.requests.get(name)) and item.run == run]
        if summary.status in ENDED and not any(item.status is Status.IN_PROGRESS for item in caused):
            return max([summary.at, *(item.at for item in caused if item.at)])
        return summary.at if now - summary.at >= self.patience(run) else None

    def patience(self, run: str) -> timedelta:
        """Return after how long without an event a run without an end counts as dead."""
        return MAY_WAIT if run in self.unreturned else ALIVE

    def certified(self, run: str) -> list[str]:
        """Return the requests that a run completed and that have a certificate, sorted."""
        members = self.runs[run].members if run in self.runs else ()
        found = ((name, self.requests.get(name)) for name in members)
        completed = {name for name, item in found if item and (item.status, item.run) == (Status.COMPLETED, run)}
        return sorted(completed & self.certificates)


def scan_store(store: S3Store, now: datetime) -> StoreInventory:
    """Read everything that a deletion plan is made from.

    IntegrityError if a manifest, lease or request is damaged, so that it is unknown what is still needed.
    """
    # HEADs come first: a manifest is written before HEAD names it, so the listing has the manifest of each HEAD.
    heads = {line: read_head(store, line) for line in lines(store)}
    keys = stored_keys(store)
    live = by_kind(item for item in keys if item.live)

    def values(kind: str, name: str) -> list[str]:
        return [found[name] for _, found in live.get(kind, ())]

    versions = list(zip(values("manifest", "line"), values("manifest", "digest"), strict=True))
    manifests = dict(zip(versions, in_parallel(lambda item: read_version(store, *item), versions), strict=True))
    runs = {  # a run that no request caused has no log, only a version
        item.run: RunSummary(item.line, item.parent, (), None, datetime.fromisoformat(item.created_at))
        for item in manifests.values()
        if item.run
    } | _scan_runs(store, live)
    holders = {line: holder_of(store, line) for line in values("lease", "line")}
    leases = [read_lease(store, line) for line in values("lease", "line")]
    return StoreInventory(
        keys=keys,
        heads={line: head[0] for line, head in heads.items() if head},
        manifests=manifests,
        holders={line: holder for line, holder in holders.items() if holder},
        unreturned=frozenset(lease.holder for lease in leases if lease and not lease.released),
        runs=runs,
        requests={state.request.id: _summarise_request(state) for state in read_all(store)},
        uploads=[(upload, upload_bytes(store, upload)) for upload in unfinished_uploads(store, as_utc(now))],
    )


def _summarise_request(state: RequestState) -> RequestSummary:
    last, target = state.last, state.request.target
    return RequestSummary(
        line=state.request.model_line,
        status=state.status,
        at=datetime.fromisoformat(last.at) if last else None,
        run=last.run if last else None,
        outcome=last.outcome if last and isinstance(last.outcome, Outcome) else None,
        redacted=isinstance(target, RedactedTarget),
        hashed=isinstance(target, RedactedTarget) and target.salt is not None,
    )


def _scan_runs(store: S3Store, live: KeysByKind) -> dict[str, RunSummary]:
    files: dict[str, list[StoredKey]] = {}
    marks: dict[str, set[str]] = {}
    for kind in ("record", "outcome", "mark", "report", "run event", "mask", "candidate"):
        for item, values in live.get(kind, ()):
            files.setdefault(values["run"], []).append(item)
            if kind == "mark":
                marks.setdefault(values["run"], set()).add(values["name"].removesuffix(".json"))

    def summarise(run: str) -> RunSummary:
        log = RunLog(store, utc_clock)
        record, last = log.read(run), log.last(run)
        at = last.at if last else record.created_at if record else None
        return RunSummary(
            line=record.line if record else None,
            parent=record.parent if record else None,
            members=tuple(member.id for member in record.members) if record else (),
            status=last.to_status if last else None,
            at=datetime.fromisoformat(at) if at else max(item.modified for item in files[run]),
            marks=frozenset(marks.get(run, ())),
        )

    names = sorted(files)
    return dict(zip(names, in_parallel(summarise, names), strict=True))


class VersionState(StrEnum):
    """How a version relates to HEAD of its line."""

    HEAD = "head"
    SUPERSEDED = "superseded"
    STAGED = "staged"


@dataclass(frozen=True)
class ClassifiedVersion:
    """A version and its state.

    Args:
        state: in use, superseded, or never published.
        since: when it was superseded, or staged.
    """

    line: str
    digest: str
    manifest: VersionManifest
    state: VersionState
    since: datetime

    @property
    def id(self) -> tuple[str, str]:
        """Line and digest."""
        return self.line, self.digest

    @property
    def digests(self) -> set[str]:
        """SHA-256 of its files."""
        return {entry.sha256 for entry in self.manifest.files.values()}


def classify_versions(inventory: StoreInventory) -> list[ClassifiedVersion]:
    """Return the state of every version; IntegrityError if a manifest in the ancestry of HEAD is missing.

    A version is superseded when its child in the ancestry of HEAD was staged. A version outside that ancestry counts as
    published, and so as superseded, only if the line was rolled back once and its run does not contradict.
    """
    lines = sorted({line for line, _ in inventory.manifests} | set(inventory.heads))
    return [item for line in lines for item in _classify_line(inventory, line)]


def _classify_line(inventory: StoreInventory, line: str) -> Iterator[ClassifiedVersion]:
    manifests = {digest: item for (of, digest), item in inventory.manifests.items() if of == line}
    head = inventory.heads.get(line)
    ancestry = list(_ancestry(line, head.version if head else None, manifests))
    child = dict(zip(ancestry[1:], ancestry, strict=False))
    rolled_back = head is not None and head.sequence != len(ancestry)  # else each publish moved HEAD to its child

    def staged_at(digest: str) -> datetime:
        return datetime.fromisoformat(manifests[digest].created_at)

    def left_at(digest: str | None) -> datetime:
        """Return when HEAD left the branch of a version: when the next version after the fork was staged."""
        while digest in manifests and digest not in ancestry:
            digest = manifests[digest].parent
        assert head is not None
        following = child.get(digest or "")
        return staged_at(following) if following else datetime.fromisoformat(head.published_at)

    for digest, manifest in sorted(manifests.items()):
        state, since = VersionState.SUPERSEDED, staged_at(digest)
        if ancestry[:1] == [digest]:
            state = VersionState.HEAD
        elif digest in child:
            since = staged_at(child[digest])
        elif (line, digest) in inventory.rolled_back or rolled_back and _was_published(inventory, line, digest):
            since = max(since, left_at(manifest.parent))
        else:
            state = VersionState.STAGED
        yield ClassifiedVersion(line, digest, manifest, state, since)


def _was_published(inventory: StoreInventory, line: str, digest: str) -> bool:
    """Return whether a version outside the ancestry of HEAD may have been HEAD before a rollback."""
    run = inventory.runs.get(inventory.manifests[line, digest].run or "")
    if run is None or run.status not in ENDED or run.status is RunStatus.PUBLISHED:
        return True
    return any(_was_published(inventory, line, name) for name in inventory.children.get((line, digest), ()))


def _ancestry(line: str, digest: str | None, manifests: Mapping[str, VersionManifest]) -> Iterator[str]:
    while digest is not None:
        if digest not in manifests:
            raise IntegrityError(
                f"the lineage of {line} is broken at {digest[:12]}",
                "that manifest is missing, so it is unknown which files are still needed",
                "restore it from a copy; until then no version is purged",
            )
        yield digest
        digest = manifests[digest].parent
