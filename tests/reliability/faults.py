"""The rows with a faulty network: replies that are lost, calls that are answered by errors."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from salun_core.errors import ConflictError
from salun_core.registry.lookup import read_head
from salun_core.storage.keys import event_key, head_key, lease_key, request_key
from salun_core.storage.leases import acquire, release
from tests.reliability import harness, journal
from tests.reliability.audit import Verdict
from tests.reliability.figures import Figures
from tests.reliability.journal import JournalStore
from tests.support import toy_line as toy
from tests.support.fault_proxy import LOST, FaultProxy

_LONGEST_CALL = 60.0  # seconds; five tries of botocore wait for 15 at most


class LostReplies:
    """Loses the reply to the first write of chosen keys, once each.

    Args:
        uri: the store.
        meanwhile: what somebody else does before the write is sent again.
    """

    def __init__(self, uri: str, meanwhile=None) -> None:
        self.uri, self.waiting, self.meanwhile = uri, set(), meanwhile
        parts = urlsplit(os.environ["AWS_ENDPOINT_URL"])
        self.proxy = FaultProxy((parts.hostname, parts.port), self._lose)

    def _lose(self, request: str) -> bytes | None:
        method, path, _ = request.split(" ")
        key = next((key for key in self.waiting if method == "PUT" and path.partition("?")[0].endswith(key)), None)
        if key is None:
            return None
        self.waiting.remove(key)
        if self.meanwhile:
            self.meanwhile()
        return LOST

    @contextlib.contextmanager
    def store(self) -> Iterator[JournalStore]:
        """Yield a store that is reached through the proxy."""
        with self.proxy:
            yield JournalStore(self.uri, endpoint=self.proxy.endpoint)


def _operations(store: JournalStore, lost: LostReplies, number: int) -> None:
    """Submit, move, lease and publish on a line of their own; of each the reply to its write is lost."""
    line, request = f"line-{number}", f"r-{number}"
    context = toy.sweep_context(store)
    kind = number % 5
    keys = (request_key(request), event_key(request, 1), event_key(request, 2), lease_key(line), head_key(line))
    parent = toy.begin(JournalStore(lost.uri), line) if kind == 4 else None
    if kind == 3 and number % 2:  # a lease that was held before is swapped, not created
        acquire(JournalStore(lost.uri), line, "run-0", 60)
        release(JournalStore(lost.uri), line, "run-0")
    lost.waiting.add(keys[kind])
    if kind < 3:
        context.ledger.submit(request, line, toy.target(1))
        context.ledger.hold(request, "ana", "identity in doubt")
        assert [event.n for event in context.ledger.events(request)] == [1, 2]
    elif kind == 3:
        assert acquire(store, line, "run-1", 60).epoch == 1 + number % 2
        assert acquire(store, line, "run-1", 60).beat == 2 + 2 * (number % 2)
    else:
        toy.publish(store, line, parent, {toy.sample(1)}, "run-1", 1)
        assert read_head(store, line)[0].sequence == 2


def lost_replies(uri: str, count: int) -> Figures:
    """Lose one reply of each of many operations, some at a time."""
    begin, verdict = time.monotonic(), Verdict()
    lost = LostReplies(f"{uri}/{secrets.token_hex(6)}")

    def once(number: int) -> None:
        try:
            _operations(store, lost, number)
        except ConflictError:
            verdict.false_conflicts += 1
        except AssertionError:
            verdict.twice += 1

    with lost.store() as store, ThreadPoolExecutor(8) as pool:
        list(pool.map(once, range(count)))
        faults = lost.proxy.faults
    more = f"{faults} replies lost, over submit, move, lease and swap"
    seconds = time.monotonic() - begin
    return Figures("lost replies", requests=count, seconds=seconds, verdict=verdict, more=more, holds=faults == count)


def faulty_store(uri: str, requests: int, workers: int, share: float = 0.3, backoff: float = 1.0) -> Figures:
    """Answer a share of all calls with 500, 503, 409 (writes only), or by closing the connection."""
    dice, parts = random.Random(3), urlsplit(os.environ["AWS_ENDPOINT_URL"])

    def fault(request: str) -> bytes | None:
        if dice.random() >= share:
            return None
        return dice.choice([*_BROKEN, *([_RACE] if request.startswith("PUT") else [])])

    settings = {
        "lines": ("line-0",),
        "requests": requests,
        "workers": workers,
        "backoff": backoff,
        "lease_seconds": 120,
        "max_requests": 64,
    }
    with (
        FaultProxy((parts.hostname, parts.port), fault) as proxy,
        harness.planned(uri, **settings) as plan,
    ):
        figures = harness.run_crew("a faulty store", plan, 0, endpoint=proxy.endpoint)
        slow = max((note["seconds"] for note in journal.read(plan.journal) if note["kind"] == "call"), default=0.0)
        ended = sum(note["kind"] == "gave up" for note in journal.read(plan.journal))
        figures.tell(f"{proxy.faults} faults; the longest call took {slow:.1f} s; {ended} steps gave up and ran again")
        figures.holds = slow < _LONGEST_CALL
        return figures


def _answer(status: int, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


_BROKEN = (_answer(500, "InternalError"), _answer(503, "SlowDown"), LOST)
_RACE = _answer(409, "ConditionalRequestConflict")
