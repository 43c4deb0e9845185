"""Purges a store: deletes what the retention rules name, and certifies it.

The order, and what a kill leaves at each point:

1. Scan and plan. Nothing has changed.
2. Files are erased, with all their S3 versions. Killed in between, the next plan names what is left. A version's
   `disposed.json` is written after the last of its files is gone; killed before that, the next plan names the
   version again with no files left, and the record is written then.
3. The store is listed again, and addenda are issued for what is gone (see `addenda`).

While it works, versions may be staged, published, held or rolled back to. Two of them share a file if their bytes are
equal, and an attempt that is repeated makes equal bytes: a file that no version needs at the scan may be HEAD's a
moment later. No question asked before a deletion is safe against that, because the purge can stall between the question
and the deletion. So both sides write first and look afterwards:

- A purge copies the file to `trash/`, erases it, and then lists every HEAD, manifest, hold and rollback again. If any
  is new since before the scan, it copies the file back, and the deletion waits for the next purge. Else it erases the
  copy.
- Whoever needs the file writes its manifest, hold or rollback, and then looks whether the file is there
  (`publish_head`, `hold_version`, `rollback`). Only then does HEAD move.

The store is consistent, so at least one of the two sees the other, wherever they stall. If the purge sees the manifest,
the file comes back. If the publisher looks while it is gone, it uploads it again. A copy is named after the purge that
made it, so that two purges never share one. A kill leaves:

- after the copy: both exist. The next purge names the file again, and the copy is garbage after `orphan_hours`.
- after the erasure: only the copy exists. If a version needs the file, the next purge brings it back before it plans.
  Else the copy counts as the file, and is deleted with it; no record is written before that.
- after the copy came back: both exist, as above.

What remains is a publisher that is suspended between its look and the swap of HEAD for so long that its lease ends and
its version counts as abandoned (`orphan_hours`). So it looks again after the swap, and uploads what is missing.

Three questions before each key save work on both sides, and prove nothing: is anything new in the lines, does anybody
hold the lease of a line (a run at work may be about to find a staged or orphaned file and reuse it), and are HEAD's own
files there (else superseded weights are the last copy that a line has).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from salun_core.errors import UsageError
from salun_core.registry.holds import VersionDisposal, record_disposal
from salun_core.registry.lookup import missing_files
from salun_core.requests.redaction import redact_request
from salun_core.retention.addenda import issue_addenda
from salun_core.retention.inventory import StoreInventory, VersionState, classify_versions, scan_store
from salun_core.retention.rules import Deletion, DeletionKind, DeletionPlan, RetentionRules, plan
from salun_core.storage.erase import Erased, abort, erase, erase_old, stored_keys
from salun_core.storage.keys import blob_key, kind_of_key, lease_key, trash_key
from salun_core.storage.leases import holder_of
from salun_core.telemetry.logs import get_logger
from salun_core.times import Clock, as_utc, utc_clock

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from salun_core.storage.s3 import S3Store

_ACTOR = "purge"
_BY_LINES = {DeletionKind.WEIGHTS, DeletionKind.STAGED, DeletionKind.ORPHAN}
PATIENCE = timedelta(days=7)
"""How long staged versions and orphans wait while any run holds a lease: in a large store, some run always does."""


@dataclass(frozen=True)
class PurgeReport:
    """What was deleted, or would be.

    Args:
        erased: what was removed, for each deletion that was done.
        skipped: deletions that wait for the next purge, because a model line changed, was at work, or lacks a file.
        addenda: requests whose certificate got an addendum.
        damaged: model lines whose HEAD lacks a file; their superseded weights stay.
        cached: blocks of the data that were deleted from the cache of this machine.
    """

    dry_run: bool
    plan: DeletionPlan
    erased: Sequence[tuple[Deletion, Erased]] = ()
    skipped: Sequence[Deletion] = ()
    addenda: Sequence[str] = ()
    damaged: Sequence[str] = ()
    cached: int = 0

    @property
    def total(self) -> Erased:
        """The sum of what was removed."""
        return sum((removed for _, removed in self.erased), Erased())


def purge(
    store: S3Store,
    rules: RetentionRules | None = None,
    *,
    dry_run: bool = False,
    signer: Ed25519PrivateKey | None = None,
    clock: Clock = utc_clock,
) -> PurgeReport:
    """Delete what the rules name (by default after the longest time allowed), and add it to the certificates concerned.

    UsageError if a certificate needs an addendum and there is no key; IntegrityError if an object is damaged, so that
    it is unknown what is still needed. In both cases nothing was deleted.
    """
    now = as_utc(clock())
    before = _line_objects(store)
    inventory = scan_store(store, now)
    if not dry_run and _bring_back(store, inventory):
        inventory = scan_store(store, now)
    planned = plan(inventory, rules or RetentionRules(), now)
    if dry_run:
        return PurgeReport(True, planned)
    if signer is None:
        _check_nothing_to_certify(inventory, planned)
    erased: list[tuple[Deletion, Erased]] = []
    skipped: list[Deletion] = []
    disposal = _Disposal(store, inventory, before, now)
    for item in planned.deletions:
        removed = disposal.erase(item) if item.kind in _BY_LINES else _delete(item, store)
        if removed is None:
            skipped.append(item)
            continue
        erased.append((item, removed))
        if item.kind is DeletionKind.WEIGHTS:
            _record(store, inventory, item, now.isoformat())
    addenda = []
    if signer is not None:
        addenda = issue_addenda(store, inventory, stored_keys(store), signer, now)
    report = PurgeReport(False, planned, erased, skipped, addenda, sorted(disposal.damaged))
    total = report.total
    get_logger().info("purged", keys=total.keys, versions=total.versions, bytes=total.bytes)
    return report


def _check_nothing_to_certify(inventory: StoreInventory, planned: DeletionPlan) -> None:
    """Refuse to delete what an addendum must name if no key can sign it: an unsigned addendum proves nothing."""
    of_runs = {DeletionKind.SCRATCH, DeletionKind.MASK}
    runs = {item.run for item in planned.deletions if item.kind in of_runs}
    weights = {(item.line, item.version) for item in planned.deletions if item.kind is DeletionKind.WEIGHTS}
    concerned = [run for run, item in inventory.runs.items() if run in runs or (item.line, item.parent) in weights]
    if count := sum(len(inventory.certified(run)) for run in concerned):
        raise UsageError(
            "nothing was purged, because there is no signing key",
            f"{count} certificates need an addendum, and an unsigned one proves nothing",
            "set SALUN_SIGNING_KEY, or use --dry-run to see the plan",
        )


def _line_objects(store: S3Store) -> set[tuple[str, str]]:
    """Return everything that decides which versions are needed: HEADs, manifests and holds, with their etags."""
    found = [*store.list("lines/"), *store.list("holds/")]
    return {(item.key, item.etag) for item in found if not item.key.endswith("/disposed.json")}


class _Disposal:
    """Erases files that no version needs, unless one turns out to need them; see the protocol above.

    `before` are the objects of the lines before the scan (`_line_objects`), `now` is the time of the plan.
    """

    def __init__(self, store: S3Store, inventory: StoreInventory, before: set[tuple[str, str]], now: datetime) -> None:
        self._store, self._inventory, self._before, self._now = store, inventory, before, now
        self._name = secrets.token_hex(8)  # of this purge's copies: another purge may delete its own meanwhile
        self.damaged: set[str] = set()

    def erase(self, item: Deletion) -> Erased | None:
        """Do a deletion, the files first and the manifest that names them last; None if it waits for the next purge."""
        if item.kind is DeletionKind.WEIGHTS and not self._head_is_whole(item.line or ""):
            return None
        copies: dict[str, str] = {}
        removed = Erased()
        for key in item.keys:
            if self._must_wait(item):
                self._put_back(copies)
                return None
            kind, values = kind_of_key(key)
            if kind == "blob":
                copy = trash_key(values["digest"], self._name)
                if self._store.copy(key, copy):
                    copies[key] = copy
            elif copies:  # the manifest: it goes only if nothing came between
                self._drop(copies)
            removed += erase(self._store, key)
        if copies and self._changed():
            self._put_back(copies)
            return None
        self._drop(copies)
        return removed

    def _drop(self, copies: dict[str, str]) -> None:
        for copy in copies.values():
            erase(self._store, copy)
        copies.clear()

    def _changed(self) -> bool:
        return bool(_line_objects(self._store) - self._before)

    def _must_wait(self, item: Deletion) -> bool:
        """Return whether a line changed, or a run at work may be about to reuse garbage that is not old."""
        fresh = item.since is None or self._now - item.since < PATIENCE
        if item.kind is not DeletionKind.WEIGHTS and fresh:
            found = (lease_key.match(entry.key) for entry in self._store.list("leases/"))
            if any(holder_of(self._store, values["line"]) for values in found if values):
                return True
        return self._changed()

    def _head_is_whole(self, line: str) -> bool:
        """Return whether all files of a line's HEAD are stored; if HEAD moved meanwhile, `_changed` shows it."""
        head = self._inventory.heads.get(line)
        if head is None or not missing_files(self._store, self._inventory.manifests[line, head.version]):
            return True
        self.damaged.add(line)
        return False

    def _put_back(self, copies: Mapping[str, str]) -> None:
        for key, copy in copies.items():
            self._store.copy(copy, key)
            erase(self._store, copy)


def _bring_back(store: S3Store, inventory: StoreInventory) -> bool:
    """Bring back the files that a killed purge erased although a version needs them; return whether there were any."""
    needed = {
        digest
        for item in classify_versions(inventory)
        if item.state is not VersionState.SUPERSEDED or item.id in inventory.held
        for digest in item.digests
    }
    stored = {values["digest"] for item, values in inventory.all_keys.get("blob", ()) if item.live}
    found = False
    for item, values in inventory.all_keys.get("trash", ()):
        if item.live and values["digest"] in needed - stored:
            found |= store.copy(item.key, blob_key(values["digest"]))
    return found


def _delete(item: Deletion, store: S3Store) -> Erased:
    if item.request is not None:
        redact_request(store, item.request, keep_hashes=item.keep_hashes)
        return erase_old(store, item.keys[0])
    if item.upload is not None:
        return abort(store, item.upload)
    if item.kind is DeletionKind.HISTORY:
        return sum((erase_old(store, key, item.since) for key in item.keys), Erased())
    return sum((erase(store, key) for key in item.keys), Erased())


def _record(store: S3Store, inventory: StoreInventory, item: Deletion, at: str) -> None:
    """Record that a version's files are gone; only now, so that no record can claim too much."""
    assert item.line is not None
    assert item.version is not None
    files = inventory.manifests[item.line, item.version].files
    size = sum(files[name].size for name in item.files)
    fields = {"line": item.line, "version": item.version, "files": list(item.files), "size": size}
    record_disposal(store, VersionDisposal(**fields, at=at, by=_ACTOR, reason=item.reason))
