"""The inventory of a store that the retention rules are applied to, with the state of each version. Read-only."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property

from salun_core.data.forget_set import RedactedTarget
from salun_core.errors import IntegrityError
from salun_core.registry.lookup import read_head, read_version
from salun_core.registry.manifest import Head, VersionManifest
from salun_core.requests.reading import read_all
from salun_core.requests.schema import Outcome, RequestState, Status
from salun_core.storage.blobs import delta_facts
from salun_core.storage.erase import StoredKey, Upload, inventory, unfinished_uploads, upload_bytes
from salun_core.storage.keys import kind_of_key
from salun_core.storage.leases import holder_of
from salun_core.storage.s3 import S3Store
from salun_core.sweeps.context import in_parallel
from salun_core.sweeps.runs import ENDED, RunLog, RunStatus
from salun_core.times import as_utc, utc_clock

NAMES = frozenset({"model", "mask", "unlearned", "before", "after"})
"""Outputs that hold weights, the list of training samples, or the critical weights."""
_RANDOM = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_DEEPEST = 5  # a pipeline's name may be `namespace/<n>/pipeline/<p>`


def parse_artifact(key: str, runs: Container[str]) -> tuple[str, str] | None:
    """Return run id and name of the output that a file belongs to, or None where the run is not known.

    Args:
        key: below the pipeline root.
        runs: the ids of the runs that are known.

    Example:
        >>> parse_artifact("salun-unlearning/r-1/unlearn/0b0c2b0e-6a4f-4a38-9d0c-7a8f9c1d2e3f/unlearned/x", {"r-1"})
        ('r-1', 'unlearned')
        >>> parse_artifact("salun-unlearning/r-1/compute-mask/mask", {"r-1"})
        ('r-1', 'mask')
    """
    parts = key.split("/")
    for place, part in enumerate(parts[1:_DEEPEST], 1):
        if part in runs:
            rest = parts[place + 2 :]
            if rest and _RANDOM.fullmatch(rest[0]):
                rest = rest[1:]
            return part, rest[0] if rest else ""
    return None


def run_folder(key: str) -> str:
    """Return the folder that a file of an unknown run is counted under."""
    return "/".join(key.split("/")[:2])


ALIVE = timedelta(hours=24)
"""A run that gave no sign of life for so long, and holds no lease, is dead."""


@dataclass(frozen=True)
class RunFacts:
    """A run, as far as the store knows it.

    Args:
        line: its model line; None where only files of it are known.
        parent: the version that it started from.
        members: ids of its requests.
        status: its last move; None where it has no log.
        at: when that was; of a run without a log, when its newest file was written.
        marks: which records of disposal it has, such as `disposed-data`.
    """

    line: str | None
    parent: str | None
    members: Sequence[str]
    status: RunStatus | None
    at: datetime
    marks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RequestFacts:
    """A request, without what it names.

    Args:
        line: its model line.
        status: where it stands.
        at: when it came there; None where it was received and no more.
        run: the run that moved it there.
        outcome: how it was met.
        redacted: whether what it named was removed.
        hashed: whether hashes of it were kept.
    """

    line: str
    status: Status
    at: datetime | None = None
    run: str | None = None
    outcome: Outcome | None = None
    redacted: bool = False
    hashed: bool = False


@dataclass(frozen=True)
class Artifact:
    """A file that Kubeflow keeps: key below the pipeline root, run id, name of the artifact, and the stored key."""

    run: str
    name: str
    stored: StoredKey


@dataclass(frozen=True, kw_only=True)
class Stock:
    """All that a plan is made from.

    Args:
        keys: everything in the store, sorted.
        heads: HEAD of each line.
        manifests: every version that has a manifest, by line and digest.
        bases: of each file that is stored as a difference, the file that it rests on.
        holders: the run that holds the lease of a line.
        runs: by id.
        requests: by id.
        uploads: multipart uploads that are not ended, with their bytes.
        artifacts: what lies under Kubeflow's pipeline root, of runs that are known.
        foreign_runs: how many runs lie there that are not known.
    """

    keys: Sequence[StoredKey] = ()
    heads: Mapping[str, Head] = field(default_factory=dict)
    manifests: Mapping[tuple[str, str], VersionManifest] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=dict)
    holders: Mapping[str, str] = field(default_factory=dict)
    runs: Mapping[str, RunFacts] = field(default_factory=dict)
    requests: Mapping[str, RequestFacts] = field(default_factory=dict)
    uploads: Sequence[tuple[Upload, int]] = ()
    artifacts: Sequence[Artifact] = ()
    foreign_runs: int = 0

    @cached_property
    def disposed(self) -> frozenset[tuple[str, str]]:
        """The versions, by line and digest, whose weights were disposed of."""
        return self._named("disposed")

    @cached_property
    def held(self) -> frozenset[tuple[str, str]]:
        """The versions, by line and digest, that a hold keeps."""
        return self._named("hold")

    @cached_property
    def certificates(self) -> frozenset[str]:
        """The requests that have a certificate."""
        found = (kind_of_key(item.key) for item in self.keys if item.live)
        return frozenset(names["request"] for kind, names in found if kind == "certificate")

    @cached_property
    def children(self) -> Mapping[tuple[str, str], Sequence[str]]:
        """The versions that were made from each, by line and digest."""
        found: dict[tuple[str, str], list[str]] = {}
        for (line, digest), item in self.manifests.items():
            found.setdefault((line, item.parent or ""), []).append(digest)
        return found

    def _named(self, wanted: str) -> frozenset[tuple[str, str]]:
        found = (kind_of_key(item.key) for item in self.keys if item.live)
        return frozenset((names["line"], names["digest"]) for kind, names in found if kind == wanted)

    def finished_at(self, run: str, now: datetime) -> datetime | None:
        """Return when a run was over, or None while it may still be at work or its requests wait to be settled.

        Of a run that simply stopped it is the time of its last sign of life.
        """
        facts = self.runs.get(run)
        if facts is None or run in self.holders.values():
            return None
        moved = [self.requests[name] for name in facts.members if name in self.requests]
        open_ = any(item.run == run and item.status is Status.IN_PROGRESS for item in moved)
        if facts.status in ENDED and not open_:
            return max([facts.at, *(item.at for item in moved if item.run == run and item.at)])
        return facts.at if now - facts.at >= ALIVE else None

    def erased_by(self, run: str) -> list[str]:
        """Return the requests that a run completed, sorted."""
        facts = self.runs.get(run)
        done = {name: self.requests.get(name) for name in (facts.members if facts else ())}
        return sorted(name for name, item in done.items() if item and _completed_by(item, run))


def _completed_by(item: RequestFacts, run: str) -> bool:
    return item.status is Status.COMPLETED and item.run == run


class Standing(StrEnum):
    """How a version stands to its line."""

    HEAD = "head"
    SUPERSEDED = "superseded"
    STAGED = "staged"


@dataclass(frozen=True)
class VersionFacts:
    """A version and how it stands.

    Args:
        line: its model line.
        digest: its digest.
        manifest: its manifest.
        standing: in use, superseded, or never published.
        since: when it was superseded, or staged.
    """

    line: str
    digest: str
    manifest: VersionManifest
    standing: Standing
    since: datetime


def stand(stock: Stock) -> list[VersionFacts]:
    """Return how every version stands.

    A version is superseded when its child on HEAD's lineage was staged. One that HEAD does not descend from was
    published only if its run says so, or if the line was once rolled back and nothing speaks against it.

    Raises:
        IntegrityError: a manifest on HEAD's lineage is missing.
    """
    lines = sorted({line for line, _ in stock.manifests} | set(stock.heads))
    return [item for line in lines for item in _Line(stock, line).versions()]


class _Line:
    def __init__(self, stock: Stock, line: str) -> None:
        self.stock, self.line = stock, line
        self.manifests = {digest: item for (of, digest), item in stock.manifests.items() if of == line}
        self.head = stock.heads.get(line)
        self.chain = list(self._walk(self.head.version)) if self.head else []
        self.child = {parent: child for child, parent in zip(self.chain, self.chain[1:], strict=False)}

    def _walk(self, digest: str | None) -> Iterator[str]:
        while digest is not None:
            if digest not in self.manifests:
                raise IntegrityError(
                    f"the lineage of {self.line} is broken at {digest[:12]}",
                    "that manifest is missing, so nobody can tell which files are needed",
                    "restore it from a copy; no version is purged before",
                )
            yield digest
            digest = self.manifests[digest].parent

    def versions(self) -> Iterator[VersionFacts]:
        for digest, manifest in sorted(self.manifests.items()):
            standing, since = self._stand(digest, manifest)
            yield VersionFacts(self.line, digest, manifest, standing, since)

    def _stand(self, digest: str, manifest: VersionManifest) -> tuple[Standing, datetime]:
        staged = moment(manifest.created_at)
        if self.chain and digest == self.chain[0]:
            return Standing.HEAD, staged
        if digest in self.child:
            return Standing.SUPERSEDED, moment(self.manifests[self.child[digest]].created_at)
        if self._was_published(digest, manifest):
            return Standing.SUPERSEDED, max(staged, self._left(manifest))
        return Standing.STAGED, staged

    def _was_published(self, digest: str, manifest: VersionManifest) -> bool:
        if self.head is None or self.head.sequence == len(self.chain):  # HEAD never went back
            return False
        run = self.stock.runs.get(manifest.run or "")
        if run is None or run.status not in ENDED or run.status is RunStatus.PUBLISHED:
            return True
        children = self.stock.children.get((self.line, digest), ())
        return any(self._was_published(name, self.manifests[name]) for name in children)

    def _left(self, manifest: VersionManifest) -> datetime:
        """Return when HEAD left the branch of a version: when the next version after the fork was staged."""
        assert self.head is not None
        parent = manifest.parent
        while parent in self.manifests and parent not in self.chain:
            parent = self.manifests[parent].parent
        child = self.child.get(parent or "")
        return moment(self.manifests[child].created_at if child else self.head.published_at)


def moment(text: str) -> datetime:
    """Read a time of a stored document."""
    return datetime.fromisoformat(text)


def descendants(stock: Stock, line: str, digest: str) -> set[str]:
    """Return a version and all that were made from it."""
    found, todo = {digest}, [digest]
    while todo:
        new = set(stock.children.get((line, todo.pop()), ())) - found
        found |= new
        todo += new
    return found


def take_stock(store: S3Store, now: datetime, pipeline_root: S3Store | None = None) -> Stock:
    """Read what a plan is made from.

    Args:
        store: the store of model lines.
        now: the time, with its time zone.
        pipeline_root: where Kubeflow keeps the files of the runs.

    Raises:
        IntegrityError: a manifest, a delta, a lease or a request is damaged: nobody can tell what is needed.
        StoreError: the store cannot be reached or refuses us.
    """
    keys = inventory(store)
    live: dict[str, list[tuple[StoredKey, Mapping[str, str]]]] = {}
    for item in (item for item in keys if item.live):
        kind, names = kind_of_key(item.key)
        live.setdefault(kind, []).append((item, names))
    versions = [(names["line"], names["digest"]) for _, names in live.get("manifest", [])]
    manifests = dict(zip(versions, in_parallel(lambda item: read_version(store, *item), versions), strict=True))
    runs = {**_of_manifests(manifests), **_runs(store, live)}
    artifacts, foreign = take_artifacts(pipeline_root, runs) if pipeline_root else ([], 0)
    return Stock(
        keys=keys,
        heads=_heads(store, live),
        manifests=manifests,
        bases=_bases(store, [names["digest"] for _, names in live.get("delta", [])]),
        holders=_holders(store, [names["line"] for _, names in live.get("lease", [])]),
        runs=runs,
        requests={state.request.id: _request(state) for state in read_all(store)},
        uploads=[(upload, upload_bytes(store, upload)) for upload in unfinished_uploads(store, as_utc(now))],
        artifacts=artifacts,
        foreign_runs=foreign,
    )


def _heads(store: S3Store, live: Mapping[str, Sequence[tuple[StoredKey, Mapping[str, str]]]]) -> dict[str, Head]:
    found = {names["line"]: read_head(store, names["line"]) for _, names in live.get("head", [])}
    return {line: head[0] for line, head in found.items() if head}


def _bases(store: S3Store, digests: Sequence[str]) -> dict[str, str]:
    facts = in_parallel(lambda digest: delta_facts(store, digest), digests)
    return {item.sha256: item.base for item in facts if item}


def _holders(store: S3Store, lines: Sequence[str]) -> dict[str, str]:
    found = {line: holder_of(store, line) for line in lines}
    return {line: holder for line, holder in found.items() if holder}


def _request(state: RequestState) -> RequestFacts:
    last, target = state.last, state.request.target
    redacted = isinstance(target, RedactedTarget)
    return RequestFacts(
        line=state.request.model_line,
        status=state.status,
        at=moment(last.at) if last else None,
        run=last.run if last else None,
        outcome=last.outcome if last else None,
        redacted=redacted,
        hashed=isinstance(target, RedactedTarget) and target.salt is not None,
    )


def _of_manifests(manifests: Mapping[tuple[str, str], VersionManifest]) -> dict[str, RunFacts]:
    """Return the runs that no log tells of, but a version does: those that no request asked for."""
    return {
        item.run: RunFacts(item.line, item.parent, (), None, moment(item.created_at))
        for item in manifests.values()
        if item.run
    }


def _runs(store: S3Store, live: Mapping[str, Sequence[tuple[StoredKey, Mapping[str, str]]]]) -> dict[str, RunFacts]:
    files: dict[str, list[StoredKey]] = {}
    marks: dict[str, set[str]] = {}
    for kind in ("record", "mark", "report", "run event", "mask", "candidate"):
        for item, names in live.get(kind, []):
            files.setdefault(names["run"], []).append(item)
            if kind == "mark":
                marks.setdefault(names["run"], set()).add(names["name"].removesuffix(".json"))
    found = in_parallel(lambda run: _run(store, run, files[run], frozenset(marks.get(run, ()))), sorted(files))
    return dict(zip(sorted(files), found, strict=True))


def _run(store: S3Store, run: str, files: Sequence[StoredKey], marks: frozenset[str]) -> RunFacts:
    log = RunLog(store, utc_clock)
    record, last = log.read(run), log.last(run)
    at = last.at if last else record.created_at if record else None
    return RunFacts(
        line=record.line if record else None,
        parent=record.parent if record else None,
        members=tuple(member.id for member in record.members) if record else (),
        status=last.to_status if last else None,
        at=moment(at) if at else max(item.modified for item in files),
        marks=marks,
    )


def take_artifacts(root: S3Store, runs: Container[str]) -> tuple[list[Artifact], int]:
    """Return the files of known runs under Kubeflow's pipeline root, and how many other runs lie there.

    Args:
        root: the pipeline root.
        runs: the ids of the runs that are known.
    """
    found: list[Artifact] = []
    foreign: set[str] = set()
    for item in inventory(root):
        place = parse_artifact(item.key, runs)
        if place:
            found.append(Artifact(*place, item))
        else:
            foreign.add(run_folder(item.key))
    return found, len(foreign)
