"""The history of a model line: what each version erased, whether it has its weights, who holds it, what was undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from salun_core.registry.holds import holds, read_disposal
from salun_core.registry.lookup import Version, ancestry, manifests, require_head
from salun_core.registry.manifest import weight_files
from salun_core.registry.rollbacks import VersionRollback, read_rollback
from salun_core.storage import ObjectStore
from salun_core.storage.blobs import blob_size

Kept = Literal["whole", "purged", "missing"]
State = Literal["HEAD", "earlier", "undone"]


@dataclass(frozen=True)
class VersionSummary:
    """One version of a line.

    Args:
        undone: the record of that rollback; None if it was made before such records existed.
        requests: how many deletion requests its run erased; None if no recorded run made it.
        held_by: who keeps it from being purged, and why; None if nobody does.
    """

    version: Version
    state: State
    undone: VersionRollback | None
    requests: int | None
    kept: Kept
    held_by: str | None
    alarm: bool

    @property
    def size(self) -> int:
        """Size of its files in bytes."""
        return sum(entry.size for entry in self.version.manifest.files.values())


def history(
    store: ObjectStore,
    line: str,
    requests_of: Callable[[str], int | None],
    was_published: Callable[[str], bool] = lambda run: False,
) -> Sequence[VersionSummary]:
    """Summarise the versions of a line, the newest first; those that a rollback undid stand above the one it restored.

    `requests_of` returns how many requests a run erased, or None if it is not recorded. `was_published` is for
    rollbacks that left no record.
    """
    held = {hold.version: f"{hold.by}: {hold.reason}" for hold in holds(store, line)}
    past = ancestry(store, line)
    undone = list(_undone(store, line, past, was_published))

    def summary(item: Version, state: State, record: VersionRollback | None) -> VersionSummary:
        run = item.manifest.run
        requests = requests_of(run) if run else None
        alarm = item.manifest.lineage.retraining_recommended
        return VersionSummary(item, state, record, requests, _kept(store, line, item), held.get(item.digest), alarm)

    rows = []
    for place, item in enumerate(past):
        rows += [summary(late, "undone", record) for late, record in _above(item.digest, undone)]
        rows.append(summary(item, "earlier" if place else "HEAD", None))
    return rows


def _undone(
    store: ObjectStore, line: str, past: Sequence[Version], was_published: Callable[[str], bool]
) -> Iterator[tuple[Version, VersionRollback | None]]:
    """Yield the versions outside the ancestry of HEAD that were HEAD once, with the record of the rollback.

    Others were staged by a run that was killed or lost a race. A record settles it. Without one, HEAD must have moved
    more often than it has ancestors, and the version's run must have ended by publishing it.
    """
    kept = {item.digest for item in past}
    outside = [item for item in manifests(store, line) if item.digest not in kept]
    rolled_back = bool(outside) and require_head(store, line).sequence != len(past)
    for item in outside:
        record = read_rollback(store, line, item.digest)
        run = item.manifest.run
        if record is not None or (rolled_back and run is not None and was_published(run)):
            yield item, record


def _above(
    digest: str, undone: Sequence[tuple[Version, VersionRollback | None]]
) -> Iterator[tuple[Version, VersionRollback | None]]:
    """Yield the undone versions that were made from a version, or from one made from it, the newest first."""
    children = [row for row in undone if row[0].manifest.parent == digest]
    for row in sorted(children, key=lambda row: row[0].manifest.created_at, reverse=True):
        yield from _above(row[0].digest, undone)
        yield row


def _kept(store: ObjectStore, line: str, item: Version) -> Kept:
    files = item.manifest.files
    if all(blob_size(store, files[name].sha256) is not None for name in weight_files(files)):
        return "whole"
    return "missing" if read_disposal(store, line, item.digest) is None else "purged"
