"""What the rules of retention look at: all that a store holds, and who stands behind it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property

from salun_core.requests.runs import ENDED, RunStatus
from salun_core.requests.schema import Outcome, Status
from salun_core.storage.erase import StoredKey, Upload
from salun_core.storage.lineage import Head, VersionManifest

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


_D, _ID = r"[0-9a-f]{64}", r"[a-z0-9][a-z0-9._-]{0,62}"
LAYOUT: Mapping[str, re.Pattern[str]] = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "head": rf"lines/(?P<line>{_ID})/HEAD\.json",
        "manifest": rf"lines/(?P<line>{_ID})/versions/(?P<digest>{_D})/manifest\.json",
        "disposed": rf"lines/(?P<line>{_ID})/versions/(?P<digest>{_D})/disposed\.json",
        "blob": rf"blobs/sha256/(?P<digest>{_D})",
        "delta": rf"deltas/sha256/(?P<digest>{_D})",
        "request": rf"requests/(?P<request>{_ID})/request\.json",
        "event": rf"requests/(?P<request>{_ID})/events/\d{{6}}\.json",
        "record": rf"runs/(?P<run>{_ID})/(run|evidence|decision)\.json",
        "mark": rf"runs/(?P<run>{_ID})/(?P<mark>(disposed|attested)-[a-z]+)\.json",
        "report": rf"runs/(?P<run>{_ID})/[A-Za-z0-9._-]+\.html",
        "run event": rf"runs/(?P<run>{_ID})/events/\d{{6}}\.json",
        "mask": rf"runs/(?P<run>{_ID})/mask[A-Za-z0-9._-]*",
        "candidate": rf"runs/(?P<run>{_ID})/[A-Za-z0-9._-]+\.safetensors",
        "scratch": rf"scratch/(?P<run>{_ID})/.+",
        "certificate": rf"certificates/(?P<request>{_ID})\.json",
        "addendum": rf"addenda/(?P<request>{_ID})/.+",
        "lease": rf"leases/(?P<line>{_ID})\.json",
        "hold": rf"holds/(?P<line>{_ID})/(?P<digest>{_D})\.json",
        "index": r"index/.+",
        "work": rf"work/{_D}\.json",
        "probe": r"probe/.+",
    }.items()
}
"""Every kind of key that this code writes; the first that fits counts."""


def kind_of_key(key: str) -> tuple[str, Mapping[str, str]]:
    """Return what a key is, and the names in it; `unknown` where none of our code writes such a key.

    Example:
        >>> kind_of_key("scratch/run-1/forget.json")
        ('scratch', {'run': 'run-1'})
        >>> kind_of_key("holiday/photo.jpg")
        ('unknown', {})
    """
    for kind, pattern in LAYOUT.items():
        if found := pattern.fullmatch(key):
            return kind, found.groupdict()
    return "unknown", {}
