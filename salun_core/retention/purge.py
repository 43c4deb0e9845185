"""Purges a store: forgets what the rules of retention say, and attests it. It may be killed anywhere and run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from salun_core.errors import UsageError
from salun_core.registry.holds import VersionDisposal, record_disposal
from salun_core.registry.sparse import materialise
from salun_core.requests.redaction import redact_request
from salun_core.retention.addenda import attest, certified
from salun_core.retention.inventory import NAMES, Artifact, Stock, take_artifacts, take_stock
from salun_core.retention.rules import Disposal, Kind, Plan, RetentionRules, plan
from salun_core.storage.erase import Erased, abort, erase, erase_old, inventory
from salun_core.storage.keys import delta_key
from salun_core.telemetry.logs import get_logger
from salun_core.times import Clock, as_utc, utc_clock

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from salun_core.storage.s3 import S3Store

_ACTOR = "purge"
_BY_LINES = {Kind.WEIGHTS, Kind.STAGED, Kind.ORPHAN}


@dataclass(frozen=True)
class PurgeReport:
    """What was disposed of, or would be.

    Args:
        dry_run: whether nothing was touched.
        plan: what had to go, and what is left alone.
        erased: what was removed, for each disposal that was done.
        skipped: disposals that wait for the next purge, because a model line moved meanwhile.
        addenda: requests whose certificate got an addendum.
    """

    dry_run: bool
    plan: Plan
    erased: Sequence[tuple[Disposal, Erased]] = ()
    skipped: Sequence[Disposal] = ()
    addenda: Sequence[str] = ()

    @property
    def total(self) -> Erased:
        """All that was removed."""
        return sum((removed for _, removed in self.erased), Erased())


def purge(
    store: S3Store,
    rules: RetentionRules | None = None,
    root: S3Store | None = None,
    *,
    dry_run: bool = False,
    signer: Ed25519PrivateKey | None = None,
    clock: Clock = utc_clock,
) -> PurgeReport:
    """Dispose of what the rules say, and add it to the certificates of the requests that it concerns.

    Args:
        store: the store of model lines.
        rules: how long things are kept; the longest that is allowed by default.
        root: where Kubeflow stores the artifacts of the runs.
        dry_run: say what would go, and touch nothing.
        signer: the key for the addenda; needed where a request's certificate must be added to.
        clock: gives the time now.

    Returns:
        What was done.

    Raises:
        UsageError: certificates must be added to, and there is no key: nothing was touched.
        IntegrityError: something is damaged, so that nobody can tell what is needed: nothing was touched; or a file
            could not be made whole, and what it rests on stays.
        StoreError: the store cannot be reached or refuses us.
    """
    now = as_utc(clock())
    before = _lines(store)
    stock = take_stock(store, now, root)
    planned = plan(stock, rules or RetentionRules(), now)
    if dry_run:
        return PurgeReport(True, planned)
    if signer is None:
        _check_nothing_to_certify(stock, planned)
    worker = _Purge(store, root, stock, before, now.isoformat())
    for item in planned.disposals:
        worker.dispose(item)
    addenda = []
    if signer is not None:
        left = None if root is None else _runs_with_weights(take_artifacts(root, stock.runs)[0])
        addenda = attest(store, stock, inventory(store), left, signer, now)
    report = PurgeReport(False, planned, worker.erased, worker.skipped, addenda)
    removed = report.total
    get_logger().info("purged", keys=removed.keys, versions=removed.versions, bytes=removed.bytes)
    return report


def _check_nothing_to_certify(stock: Stock, planned: Plan) -> None:
    """Refuse to dispose of what a certificate must tell of without a key to sign that: it would be no evidence."""
    of_runs = {item.run for item in planned.disposals if item.kind in {Kind.SCRATCH, Kind.MASK, Kind.ARTIFACT}}
    weights = {(item.line, item.version) for item in planned.disposals if item.kind is Kind.WEIGHTS}
    concerned = [run for run, item in stock.runs.items() if run in of_runs or (item.line, item.parent) in weights]
    count = sum(len(certified(stock, run)) for run in concerned)
    if count:
        raise UsageError(
            "nothing was purged, for there is no signing key",
            f"{count} certificates must be added to, and an unsigned disposal is no evidence",
            "set SALUN_SIGNING_KEY, or look with --dry-run",
        )


def _runs_with_weights(artifacts: Sequence[Artifact]) -> set[str]:
    return {item.run for item in artifacts if item.name in NAMES}


def _lines(store: S3Store) -> dict[str, str]:
    """Return what decides which versions are needed: every HEAD, manifest and hold, with its etag."""
    found = [*store.list("lines/"), *store.list("holds/")]
    return {item.key: item.etag for item in found if not item.key.endswith("/disposed.json")}


@dataclass
class _Purge:
    """Does the disposals of a plan, one after the other."""

    store: S3Store
    root: S3Store | None
    stock: Stock
    before: Mapping[str, str]
    now: str
    erased: list[tuple[Disposal, Erased]] = field(default_factory=list)
    skipped: list[Disposal] = field(default_factory=list)

    def dispose(self, item: Disposal) -> None:
        if item.kind in _BY_LINES and self._moved():
            self.skipped.append(item)
        else:
            self.erased.append((item, self._do(item)))

    def _moved(self) -> bool:
        """Return whether a version was staged, published or held since stock was taken; it may need a file."""
        return any(self.before.get(key) != etag for key, etag in _lines(self.store).items())

    def _do(self, item: Disposal) -> Erased:
        if item.kind is Kind.MATERIALISE:
            return self._make_whole(item.keys[0])
        if item.kind is Kind.REQUEST:
            return self._redact(item)
        if item.upload is not None:
            return abort(self.store, item.upload)
        store = self.root if item.kind is Kind.ARTIFACT else self.store
        assert store is not None
        removed = sum((erase(store, key) for key in item.keys), Erased())
        if item.kind is Kind.WEIGHTS:
            self._record(item)
        return removed

    def _make_whole(self, digest: str) -> Erased:
        materialise(self.store, digest)
        return erase(self.store, delta_key(digest))

    def _redact(self, item: Disposal) -> Erased:
        assert item.request is not None
        redact_request(self.store, item.request, keep_hashes=item.keep_hashes)
        return erase_old(self.store, item.keys[0])

    def _record(self, item: Disposal) -> None:
        """Say what is gone; only now, so that a record never speaks of what is still there."""
        assert item.line is not None
        assert item.version is not None
        files = self.stock.manifests[item.line, item.version].files
        record_disposal(
            self.store,
            VersionDisposal(
                line=item.line,
                version=item.version,
                files=list(item.files),
                size=sum(files[name].size for name in item.files),
                at=self.now,
                by=_ACTOR,
                reason=item.reason,
            ),
        )
