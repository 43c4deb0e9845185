"""The operations of the deletion ledger in S3 that `benchmarks/ledger.py` times: our own code, around a toy model."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from salun_core.data.forget_set import SamplesTarget
from salun_core.requests.gauges import GaugeReader, Snapshot
from salun_core.requests.intake import submit_all
from salun_core.requests.ledger import Move, event_after
from salun_core.requests.schema import DeletionRequest, Outcome, RequestState, Status, Submission
from salun_core.storage import open_store
from salun_core.sweeps.claim import claim
from salun_core.sweeps.policy import Terms
from salun_core.sweeps.runs import RunRecord
from salun_core.sweeps.settle import settle
from salun_core.times import utc_clock
from tests import toy_line as toy

LINE = toy.LINE
THREADS = 16
TRAINED_ON = 1_000_000


class Wide(toy.ToyResolver):
    """The toy resolver for a model that was trained on so much that no bound on what a run forgets is met."""

    @property
    def train_count(self) -> int:
        """How many samples are left."""
        return TRAINED_ON - len(self.gone)

    @staticmethod
    def _names(request: DeletionRequest) -> list[str]:
        wanted = request.target
        if isinstance(wanted, SamplesTarget):
            return list(wanted.ids or ())
        raise AssertionError("the benchmark submits samples only")


class CallCounter:
    """Counts the HTTP requests that a boto3 client sends, by operation."""

    def __init__(self, client: Any) -> None:  # noqa: ANN401 - boto3's clients have no type at run time
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        client.meta.events.register("before-send.s3", self._count)

    def _count(self, event_name: str, **_: Any) -> None:  # noqa: ANN401 - botocore's own arguments
        with self._lock:
            self._counts[event_name.rsplit(".", 1)[-1]] += 1

    def during(self, work: Callable[[], object]) -> dict[str, int]:
        """Return what was sent while something was done."""
        before = self._counts.copy()
        work()
        return dict(self._counts - before)


class S3Side:
    """The ledger in a store.

    Args:
        uri: `s3://bucket/prefix`; the variables that reach it are set. The line is made if it is not there.
    """

    name = "S3 ledger"

    def __init__(self, uri: str) -> None:
        self.store = open_store(uri)
        self.books = toy.books(self.store)
        self.calls = CallCounter(self.store.native[0])
        self._filed: dict[str, DeletionRequest] = {}
        toy.begin(self.store)

    def submit(self, submissions: Sequence[Submission]) -> None:
        """File requests, as `salun request submit` does."""
        filed = submit_all(self.books.ledger, submissions, "benchmark")
        assert len(filed.receipts) == len(submissions), filed.refused
        for receipt, submission in zip(filed.receipts, submissions, strict=True):
            times = {"received_at": receipt.received_at, "due_at": receipt.due_at}
            self._filed[receipt.id] = DeletionRequest(
                id=receipt.id, model_line=receipt.model_line, target=submission.target, **times
            )

    def claim(self, run: str, limit: int) -> RunRecord:
        """Claim a batch: the whole of what a sweep's first step does, but for loading a data set."""
        terms = Terms(ladder=toy.LADDER, min_requests=1, max_requests=limit)
        claimed = claim(
            self.books,
            LINE,
            run,
            terms,
            lambda version: Wide(version.digest, frozenset(toy.forgotten(self.store, version))),
        )
        assert claimed.record is not None, claimed.reason
        return claimed.record

    def erase(self, record: RunRecord) -> None:
        """Publish the version that has forgotten a batch; not a part of the ledger."""
        toy.erase(self.books, record)

    def settle(self, record: RunRecord) -> None:
        """Certify, complete and redact the requests of a run, and free the line."""
        settled = settle(self.books, LINE, record.run, toy.terms())
        assert len(settled.completed) == len(record.members)
        for member in record.members:  # or this dictionary would be what grows
            del self._filed[member.id]

    def finish(self, count: int) -> None:
        """Complete the oldest requests by moves alone, without a run, certificates or redaction.

        What was filed is known here and is not read again: this is not timed, and takes long enough.
        """

        def complete(request_id: str) -> None:
            ledger, request = self.books.ledger, self._filed.pop(request_id)
            first = event_after(request_id, None, Move(Status.QUEUED, "benchmark", "submitted"), utc_clock())
            state = RequestState(request=request, last=first)
            taken = ledger.append(state, Status.IN_PROGRESS, "benchmark", "claimed", "filler")
            state = RequestState(request=request, last=taken)
            ledger.append(state, Status.COMPLETED, "benchmark", "published", "filler", Outcome.UNLEARNED)

        waiting = self.books.ledger.standing(Status.QUEUED, LINE)[:count]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(complete, [entry.request for entry in waiting]))

    def counts(self) -> tuple[int, int]:
        """Return how many requests wait and how many are completed."""
        ledger = self.books.ledger
        return len(ledger.standing(Status.QUEUED, LINE)), len(ledger.standing(Status.COMPLETED, LINE))

    def gauges(self) -> Callable[[], Snapshot]:
        """Return what takes the exporter's snapshots."""
        return GaugeReader(self.store, utc_clock).take

    def close(self) -> None:
        """Nothing is to be closed."""
