"""Rolls a model line back, and past an erasure only if its requests are reopened.

The order of the writes: the lease is taken, the undone requests are reopened, the rollback is recorded with each undone
version, HEAD is replaced on the condition that it has not changed, the lease is released, and the certificates about
the undone versions are revoked. If the process dies before HEAD is replaced, the reopened requests name nothing to
erase at the next sweep and are completed again; the other order could lose them. A record whose version is still an
ancestor of HEAD has no effect, and the next attempt replaces it. If the process dies later, or stalls, the lease
expires, and the next purge revokes. A publish in between makes the replacement of HEAD fail.

A purge may delete the version's weights at any time. One that looks after the records are written sees them and puts
back what it deleted; the check after the records finds what one deleted before it looked (see `retention.purge`). A
rollback that is suspended between that check and the replacement of HEAD, for so long that another purge starts, finds
the loss in the last check and returns HEAD to where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from salun_core.certificates.issue import revoke
from salun_core.errors import ConflictError, IntegrityError, SalunError
from salun_core.registry.lookup import Version, missing_files, read_version, resolve
from salun_core.registry.manifest import Head
from salun_core.registry.rollbacks import VersionRollback, new_rollback, record_rollback
from salun_core.registry.versions import roll_back, undone_by
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Outcome, Status
from salun_core.storage import ObjectStore, open_store
from salun_core.sweeps.heartbeat import line_held
from salun_core.sweeps.runs import RunLog, new_run_id
from salun_core.telemetry.logs import get_logger
from salun_core.times import Clock, utc_clock

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True)
class RolledBack:
    """What a rollback did, or would do; `head` is None after a dry run, and `undone` has the newest version first."""

    head: Head | None
    undone: Sequence[Version]
    reopened: Sequence[str]


def rollback(
    store_uri: str,
    reference: str,
    actor: str,
    reason: str,
    *,
    reopen: bool = False,
    dry_run: bool = False,
    signer: Ed25519PrivateKey | None = None,
    clock: Clock = utc_clock,
) -> RolledBack:
    """Make an earlier version of a line its HEAD again; `reference` is `line@version`, an ancestor of HEAD.

    ConflictError if a run holds the line's lease, or if it would undo an erasure and `reopen` is not set: that queues
    the undone requests again. Without a signer, the next purge signs the revocations of their certificates.
    """
    store = open_store(store_uri)
    line, version = resolve(store, reference)
    undone = undone_by(store, line, version)
    _check_complete(store, line, version)
    ledger = Ledger(store, clock)
    requests = _completed_by(ledger, RunLog(store, clock), undone)
    searched = _found_nothing_since(ledger, line, undone)
    _check_allowed(line, version, undone, requests, reopen)
    requests += searched if reopen else []
    if dry_run:
        return RolledBack(None, undone, requests)
    holder = f"rollback-{new_run_id()}"[:63]
    with line_held(store, line, holder):
        _check_complete(store, line, version)  # again: a purge may have come between
        records = [new_rollback(line, item.digest, version, actor, reason, clock) for item in undone]
        for request in requests:
            if ledger.status(request) is Status.COMPLETED:
                ledger.reopen(request, actor, reason)
        for record in records:
            record_rollback(store, record)
        _check_complete(store, line, version)
        head = roll_back(store, line, version, undone[0].digest)
        try:
            _check_complete(store, line, version)
        except IntegrityError:
            roll_back(store, line, undone[0].digest, version)
            raise
    if signer is not None:
        _revoke(store, RunLog(store, clock), zip(undone, records, strict=True), requests, signer)
    return RolledBack(head, undone, requests)


def _revoke(
    store: ObjectStore,
    runs: RunLog,
    undone: Iterable[tuple[Version, VersionRollback]],
    reopened: Sequence[str],
    signer: Ed25519PrivateKey,
) -> None:
    """Revoke the certificates about the undone versions, if the credentials allow it; otherwise the next purge does."""
    try:
        for version, record in undone:
            made = runs.read(version.manifest.run) if version.manifest.run else None
            members = [member.id for member in made.members] if made else []
            revoke(store, record, dict.fromkeys([*members, *reopened]), signer)
    except SalunError as error:  # HEAD has moved: the rollback is done
        get_logger().warning("not_revoked", error=type(error).__name__)


def _check_complete(store: ObjectStore, line: str, version: str) -> None:
    manifest = read_version(store, line, version)
    gone = missing_files(store, manifest)
    if gone:
        raise IntegrityError(
            f"cannot roll back to {line}@{version[:12]}",
            f"{', '.join(gone)} of it was purged or is missing",
            "choose a version with all its files, or train a new one",
        )


def _completed_by(ledger: Ledger, runs: RunLog, undone: Sequence[Version]) -> list[str]:
    found = []
    for item in undone:
        record = runs.read(item.manifest.run) if item.manifest.run else None
        for member in record.members if record else ():
            last = ledger.state(member.id).last
            if last and last.to_status is Status.COMPLETED and last.run == item.manifest.run:
                found.append(member.id)
    return found


def _found_nothing_since(ledger: Ledger, line: str, undone: Sequence[Version]) -> list[str]:
    """Return the requests that found nothing to erase in versions that are undone: the one restored may have it."""
    since = min((item.manifest.created_at for item in undone), default="")
    found = ((state.request.id, state.last) for state in ledger.list(line, [Status.COMPLETED]) if undone)
    return [name for name, last in found if last and last.outcome is Outcome.NOTHING_TO_ERASE and last.at >= since]


def _check_allowed(line: str, version: str, undone: Sequence[Version], requests: Sequence[str], reopen: bool) -> None:
    forgotten = sum(item.manifest.forget_count for item in undone)
    if not forgotten or (reopen and requests):
        return
    why = f"it would undo {len(undone)} versions and {len(requests)} completed requests"
    remedy = "keep HEAD, or give --reopen to queue these requests again"
    if reopen:
        why = "no deletion request of the ledger names them, so none can be reopened"
        remedy = "file requests for them, or publish a version that has forgotten them too"
    raise ConflictError(
        f"rolling {line} back to {version[:12]} would bring back {forgotten} forgotten samples", why, remedy
    )
