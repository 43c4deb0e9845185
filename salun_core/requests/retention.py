"""The rules of retention, and the plan of what must go by them; nothing is read or deleted here.

Forget data go when their run is settled, masks and superseded weights within 30 days. What cannot be told for sure
is left alone and listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from salun_core.requests.artifacts import NAMES
from salun_core.requests.disposal import Disposal, Kind, RetentionRules, disposal
from salun_core.requests.schema import SETTLED, Outcome, Status
from salun_core.requests.stock import Artifact, Stock, kind_of_key
from salun_core.requests.superseded import descendants, moment
from salun_core.requests.unneeded import Unneeded
from salun_core.storage.erase import StoredKey
from salun_core.storage.names import request_key

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
