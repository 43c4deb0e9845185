"""Purges a store: deletes what the retention rules name, and certifies it.

The order, and what a kill leaves at each point:

1. Scan and plan. Nothing has changed.
2. Deltas whose base is deleted become whole files. Killed before the delta is deleted, both forms exist; the whole
   one is read, and the next purge deletes the delta.
3. Files are erased, with all their S3 versions. Killed in between, the next plan names what is left. A version's
   `disposed.json` is written after the last of its files is gone; killed before that, the next plan names the
   version again with no files left, and the record is written then.
4. The store is listed again, and addenda are issued for what is gone (see `addenda`).

While it works, versions may be staged, published or held. Before each deletion that depends on versions, every HEAD,
manifest and hold is listed again; if any is new, the deletion waits for the next purge. A version that is staged
between that listing and the deletion can lose a file that it shares; `publish_head` finds that and refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from salun_core.errors import UsageError
from salun_core.registry.holds import VersionDisposal, record_disposal
from salun_core.requests.redaction import redact_request
from salun_core.retention.addenda import issue_addenda
from salun_core.retention.inventory import PURGED_OUTPUTS, StoreInventory, scan_artifacts, scan_store
from salun_core.retention.pipeline_root import scan_pipeline_root
from salun_core.retention.rules import Deletion, DeletionKind, DeletionPlan, RetentionRules, plan, plan_old_artifacts
from salun_core.storage.blobs import materialise
from salun_core.storage.erase import Erased, abort, erase, erase_old, stored_keys
from salun_core.storage.keys import delta_key
from salun_core.telemetry.logs import get_logger
from salun_core.times import Clock, as_utc, utc_clock

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from salun_core.storage.s3 import S3Store

_ACTOR = "purge"
_BY_LINES = {DeletionKind.WEIGHTS, DeletionKind.STAGED, DeletionKind.ORPHAN}


@dataclass(frozen=True)
class PurgeReport:
    """What was deleted, or would be.

    Args:
        dry_run: whether nothing was deleted.
        plan: what had to be deleted, and what stays.
        erased: what was removed, for each deletion that was done.
        skipped: deletions that wait for the next purge, because a model line changed meanwhile.
        addenda: requests whose certificate got an addendum.
    """

    dry_run: bool
    plan: DeletionPlan
    erased: Sequence[tuple[Deletion, Erased]] = ()
    skipped: Sequence[Deletion] = ()
    addenda: Sequence[str] = ()

    @property
    def total(self) -> Erased:
        """The sum of what was removed."""
        return sum((removed for _, removed in self.erased), Erased())


def purge(
    store: S3Store,
    rules: RetentionRules | None = None,
    root: S3Store | None = None,
    *,
    old_artifacts: bool = False,
    dry_run: bool = False,
    signer: Ed25519PrivateKey | None = None,
    clock: Clock = utc_clock,
) -> PurgeReport:
    """Delete what the rules name, and add it to the certificates of the requests that it concerns.

    Args:
        store: the store of model lines.
        rules: how long things are kept; by default the longest allowed.
        root: where Kubeflow stores the artifacts of the runs.
        old_artifacts: delete at once what earlier releases left below the root (`pipeline_root`), and nothing else;
            the rules do not apply.
        dry_run: return the plan, and delete nothing.
        signer: the key that signs addenda; required if a request's certificate needs one.
        clock: returns the time now.

    Returns:
        What was done.

    Raises:
        UsageError: a certificate needs an addendum and there is no key, or old artifacts must go and there is no root;
            nothing was deleted.
        IntegrityError: an object is damaged, so it is unknown what is still needed; nothing was deleted. Or a delta
            could not be made whole; then its base stays.
        StoreError: the store is unreachable or refuses the credentials.
    """
    now = as_utc(clock())
    before = _line_objects(store)
    inventory = scan_store(store, now, root)
    found = scan_pipeline_root(_required(root), now).kept if old_artifacts else None
    planned = (
        plan(inventory, rules or RetentionRules(), now) if found is None else plan_old_artifacts(inventory, found, now)
    )
    if dry_run:
        return PurgeReport(True, planned)
    if signer is None:
        _check_nothing_to_certify(inventory, planned)
    erased: list[tuple[Deletion, Erased]] = []
    skipped: list[Deletion] = []
    for item in planned.deletions:
        if item.kind in _BY_LINES and _line_objects(store) - before:
            skipped.append(item)
            continue
        target = root if item.kind is DeletionKind.ARTIFACT else store
        assert target is not None  # without a root the plan names no artifacts
        erased.append((item, _delete(item, target)))
        if item.kind is DeletionKind.WEIGHTS:
            _record(store, inventory, item, now.isoformat())
    addenda = []
    if signer is not None:
        left = _runs_left(root, inventory, old_artifacts, now) if root is not None else None
        addenda = issue_addenda(store, inventory, stored_keys(store), left, signer, now)
    report = PurgeReport(False, planned, erased, skipped, addenda)
    removed = report.total
    get_logger().info("purged", keys=removed.keys, versions=removed.versions, bytes=removed.bytes)
    return report


def _required(root: S3Store | None) -> S3Store:
    if root is None:
        raise UsageError(
            "nothing was purged",
            "old artifacts lie in Kubeflow's store, and its pipeline root is not set",
            "give --pipeline-root, such as s3://mlpipeline/v2/artifacts",
        )
    return root


def _runs_left(root: S3Store, inventory: StoreInventory, old_artifacts: bool, now: datetime) -> set[str]:
    """List the pipeline root again, and return the known runs of which something is left."""
    artifacts, _ = scan_artifacts(root, inventory.runs)
    left = {run for run, name in artifacts if name in PURGED_OUTPUTS}
    # Outputs of other names are looked at here only: it takes a read of each small file.
    return left | {item.place.run for item in scan_pipeline_root(root, now).kept} if old_artifacts else left


def _check_nothing_to_certify(inventory: StoreInventory, planned: DeletionPlan) -> None:
    """Refuse to delete what an addendum must name if no key can sign it: an unsigned addendum proves nothing."""
    of_runs = {DeletionKind.SCRATCH, DeletionKind.MASK, DeletionKind.ARTIFACT}
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


def _delete(item: Deletion, store: S3Store) -> Erased:
    if item.kind is DeletionKind.MATERIALISE:
        (digest,) = item.keys
        materialise(store, digest)
        return erase(store, delta_key(digest))  # materialise deletes it, a bucket with versions only hides it
    if item.request is not None:
        redact_request(store, item.request, keep_hashes=item.keep_hashes)
        return erase_old(store, item.keys[0])
    if item.upload is not None:
        return abort(store, item.upload)
    return sum((erase(store, key) for key in item.keys), Erased())


def _record(store: S3Store, inventory: StoreInventory, item: Deletion, at: str) -> None:
    """Record that a version's files are gone; only now, so that no record can claim too much."""
    assert item.line is not None
    assert item.version is not None
    files = inventory.manifests[item.line, item.version].files
    size = sum(files[name].size for name in item.files)
    fields = {"line": item.line, "version": item.version, "files": list(item.files), "size": size}
    record_disposal(store, VersionDisposal(**fields, at=at, by=_ACTOR, reason=item.reason))
