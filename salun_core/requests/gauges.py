"""The gauges of the ledger, computed from the listings of its index and the HEADs of the model lines."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

from salun_core.errors import IntegrityError, UsageError
from salun_core.gate import LEVELS
from salun_core.registry.lookup import lines, read_head, read_version
from salun_core.registry.manifest import Head, VersionManifest
from salun_core.requests.index import IndexEntry, entries
from salun_core.requests.reading import read_last
from salun_core.requests.schema import SETTLED, RequestEvent, Status, status_after
from salun_core.storage.blobs import blob_size
from salun_core.storage.documents import parse_stored
from salun_core.storage.keys import event_key
from salun_core.storage.objects import ObjectStore
from salun_core.telemetry.logs import get_logger
from salun_core.times import Clock, as_utc, due_after_one_month

# In the order of a request's transitions: a request that moves during the listing is seen twice, not missed.
OPEN = tuple(status for status in Status if status not in SETTLED)
TARGET = timedelta(days=7)
RARELY = timedelta(minutes=10)
_OVERDUE = "overdue"
_DAMAGED, _NOT_READ = "damaged", "not_read"
_EVENTS_AT_ONCE = 500
Sample = tuple[str, Mapping[str, str], float]


def stages(received: datetime) -> Mapping[str, datetime]:
    """Return when a request passes the stages of its month.

    These are `target` (the internal target of 7 days), `half` and `most` (50 % and 80 % of the month), and `overdue`.
    """
    received = as_utc(received)
    due = due_after_one_month(received)
    month = due - received
    return {"target": received + TARGET, "half": received + month / 2, "most": received + month * 0.8, _OVERDUE: due}


@dataclass(frozen=True)
class LineGauges:
    """The gauges of a model line.

    Args:
        debt: share of the training data forgotten since the last full training.
        runs: unlearning runs since then.
        last_success: Unix time of the last publish by a run; None if unknown.
    """

    debt: float
    runs: int
    last_success: float | None


@dataclass(frozen=True)
class Snapshot:
    """The ledger and its lines at one time; ages and deadlines can be computed for any later time.

    Args:
        counts: requests by status.
        received: Unix time at which the oldest unsettled request was received; None if there is none.
        passing: by stage of `stages`, the Unix times at which the unsettled requests pass it, ascending.
        levels: completed requests by assurance level.
        unreadable: number of lines whose HEAD or version is damaged, or lacks a file.
    """

    counts: Mapping[Status, int]
    received: float | None
    passing: Mapping[str, Sequence[float]]
    levels: Mapping[str, int]
    lines: Mapping[str, LineGauges]
    unreadable: int

    def past(self, stage: str, now: float) -> int:
        """Return how many unsettled requests are past a stage at a Unix time."""
        return bisect_left(self.passing[stage], now)

    def at(self, now: float) -> Iterator[Sample]:
        """Yield name, labels and value of each gauge at a Unix time."""
        for status in Status:
            yield "salun_requests", {"status": status.value}, self.counts.get(status, 0)
        for level in (*LEVELS, _DAMAGED, _NOT_READ):
            yield "salun_requests_by_level", {"level": level}, self.levels.get(level, 0)
        oldest = 0.0 if self.received is None else max(0.0, now - self.received)
        yield "salun_oldest_request_age_seconds", {}, oldest
        yield "salun_requests_overdue", {}, self.past(_OVERDUE, now)
        for stage in self.passing:
            if stage != _OVERDUE:
                yield "salun_requests_by_deadline", {"stage": stage}, self.past(stage, now)
        yield "salun_exporter_unreadable_lines", {}, self.unreadable
        for line, gauges in self.lines.items():
            label = {"model_line": line}
            yield "salun_unlearning_debt_ratio", label, gauges.debt
            yield "salun_runs_since_training", label, gauges.runs
            if gauges.last_success is not None:
                yield "salun_last_success_timestamp_seconds", label, gauges.last_success


class GaugeReader:
    """Takes snapshots; between two of them it caches what is expensive to list and what never changes.

    It lists the open statuses each time; the settled requests, the names of the model lines and the stored files every
    `rarely`. Files are listed and not read, because the exporter must not see weights.
    """

    def __init__(self, store: ObjectStore, clock: Clock, rarely: timedelta = RARELY) -> None:
        self._store, self._clock, self._rarely = store, clock, rarely
        self._listed: datetime | None = None
        self._settled: Counter[Status] = Counter()
        self._levels: dict[tuple[str, int], str] = {}
        self._by_level: Counter[str] = Counter()
        self._superseded: frozenset[tuple[str, int]] = frozenset()
        self._known_lines: frozenset[str] = frozenset()
        self._stored: frozenset[str] = frozenset()
        self._versions: dict[tuple[str, str], VersionManifest] = {}
        self._successes: dict[str, float] = {}
        self._unreadable: frozenset[str] = frozenset()

    def take(self) -> Snapshot:
        """Read the store and return a snapshot; IntegrityError if the index holds a key that is not a valid entry."""
        found = [entry for status in OPEN for entry in entries(self._store, status)]
        now = as_utc(self._clock())
        if self._listed is None or not timedelta(0) <= now - self._listed < self._rarely:
            self._list_settled(found)
            self._listed = now
        unsettled = _newest(entry for entry in found if (entry.request, entry.n) not in self._superseded)
        readings = self._read_lines(self._known_lines.union(entry.line for entry in unsettled))
        received = sorted(datetime.fromtimestamp(entry.received, UTC) for entry in unsettled)
        times = [stages(moment) for moment in received]
        return Snapshot(
            counts={**Counter(entry.status for entry in unsettled), **self._settled},
            received=received[0].timestamp() if received else None,
            passing={stage: sorted(time[stage].timestamp() for time in times) for stage in stages(now)},
            levels=self._by_level,
            lines=readings,
            unreadable=len(self._unreadable),
        )

    def _list_settled(self, found: Sequence[IndexEntry]) -> None:
        """Count the settled requests and list the lines; only entries that a crash left behind stay in memory."""
        settled = _newest(entry for status in sorted(SETTLED) for entry in entries(self._store, status))
        both = {entry.request for entry in found}.intersection(entry.request for entry in settled)
        unsettled = {request for request in both if self._is_unsettled(request)}
        self._settled = Counter(entry.status for entry in settled if entry.request not in unsettled)
        self._count_levels(
            (entry.request, entry.n)
            for entry in settled
            if entry.status is Status.COMPLETED and entry.request not in unsettled
        )
        self._superseded = frozenset((entry.request, entry.n) for entry in found if entry.request in both - unsettled)
        self._known_lines = frozenset(lines(self._store))
        self._stored = frozenset(entry.key.rpartition("/")[2] for entry in self._store.list("blobs/"))

    def _count_levels(self, completed: Iterable[tuple[str, int]]) -> None:
        """Count completed requests, given with the number of the event that completed each, by level.

        An event never changes, so it is read once. After a start there may be many: a part of them is read each time,
        so that no refresh takes long.
        """
        known = {key: self._levels.get(key) for key in completed}
        for key in list(islice((key for key, level in known.items() if level is None), _EVENTS_AT_ONCE)):
            stored = self._store.get(event_key(*key))
            if stored is None:  # a process put the entry and died before its event
                continue
            known[key] = _DAMAGED
            with suppress(IntegrityError):
                event = parse_stored(RequestEvent, stored.data, event_key(*key))
                known[key] = event.assurance.level if event.assurance else _DAMAGED
        self._levels = {key: level for key, level in known.items() if level is not None}
        self._by_level = Counter(level or _NOT_READ for level in known.values())

    def _is_unsettled(self, request: str) -> bool:
        """Return whether a request with an open and a settled entry is unsettled.

        The new entry comes before its event, so a transition that was cut off there has settled nothing: the events
        decide. If they cannot be read, the request counts as unsettled. The request itself is not read, since the
        exporter must not see what it names.
        """
        try:
            return status_after(read_last(self._store, request)) not in SETTLED
        except (IntegrityError, UsageError):
            return True

    def _read_lines(self, names: Iterable[str]) -> dict[str, LineGauges]:
        """Read each HEAD; a damaged line is left out, so that it does not hide the deadlines of others."""
        before, self._versions = self._versions, {}
        readings: dict[str, LineGauges] = {}
        damaged: set[str] = set()
        for line in sorted(names):
            try:
                found = read_head(self._store, line)
                if found is not None:
                    readings[line] = self._line(found[0], before)
            except (IntegrityError, UsageError) as error:
                damaged.add(line)
                if line not in self._unreadable:
                    get_logger().warning("model_line_unreadable", model_line=line, error=str(error))
        self._unreadable = frozenset(damaged)
        return readings

    def _check_stored(self, manifest: VersionManifest) -> None:
        for name, entry in manifest.files.items():
            # A file that the listing lacks may have been uploaded since.
            if entry.sha256 not in self._stored and blob_size(self._store, entry.sha256) is None:
                raise IntegrityError(
                    f"{name} of {manifest.line}@{manifest.digest[:12]} is not in the store",
                    "it was deleted after the version was published",
                    "restore it from a copy, or roll the line back: `salun model rollback`",
                )

    def _line(self, head: Head, known: Mapping[tuple[str, str], VersionManifest]) -> LineGauges:
        """Return the gauges of a line; a manifest never changes, so it is read once.

        IntegrityError if the manifest is damaged, or a file of it is not stored.
        """
        name = (head.line, head.version)
        manifest = known[name] if name in known else read_version(self._store, *name)
        self._versions[name] = manifest
        self._check_stored(manifest)
        lineage = manifest.lineage
        if head.run is not None:
            self._successes[head.line] = datetime.fromisoformat(head.published_at).timestamp()
        return LineGauges(lineage.debt, lineage.runs_since_training, self._successes.get(head.line))


def _newest(found: Iterable[IndexEntry]) -> Sequence[IndexEntry]:
    """Return the entry of the last event of each request; a request that is moving has two for a moment."""
    last: dict[str, IndexEntry] = {}
    for entry in found:
        if entry.request not in last or entry.n > last[entry.request].n:
            last[entry.request] = entry
    return list(last.values())
