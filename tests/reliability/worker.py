"""The processes that the harness starts and kills: workers that file, claim, erase and settle, and a reader of HEAD."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

from botocore import endpoint

from salun_core.digest import sha256_bytes
from salun_core.errors import ConflictError, SalunError, StoreError
from salun_core.registry.lookup import read_head, read_version
from salun_core.requests.schema import Status
from salun_core.storage import s3
from salun_core.storage.keys import blob_key
from salun_core.storage.leases import holder_of
from salun_core.storage.objects import FileStore
from salun_core.sweeps.claim import Skipped
from salun_core.sweeps.context import SweepContext
from salun_core.sweeps.settle import settle
from tests.reliability import journal
from tests.reliability.plan import Plan
from tests.support import toy_line as toy

_AGAIN = 16
_TRIES = 6
T = TypeVar("T")
_OPEN = (Status.QUEUED, Status.IN_PROGRESS)


def work(plan: Plan, number: int, address: str | None = None) -> None:
    """Work until word comes to stop; whatever is raised is noted, and the next sweep begins."""
    os.environ.update(plan.environ)
    _hurry(plan.backoff)
    worker, dice = Worker(plan, number, address), random.Random()
    while plan.goes_on():
        with worker.noted():
            worker.file()
        for line in dice.sample(plan.lines, len(plan.lines)):
            with worker.noted():
                worker.sweep(line, f"w{number}-{secrets.token_hex(4)}")
        time.sleep(dice.uniform(0.1, 0.3))


def _hurry(factor: float) -> None:
    """Shorten the pauses of botocore and of the store before a call is sent again."""
    if factor != 1.0:
        hurried = SimpleNamespace(sleep=lambda seconds: time.sleep(factor * seconds), time=time.time)
        endpoint.time = s3.time = hurried


class Worker:
    """Files requests and sweeps; a step that fails is tried again with a new client, as the pipeline tries a pod again.

    Args:
        plan: what is asked.
        number: which worker it is.
        address: URL of the store, where it is not the environment's.
    """

    def __init__(self, plan: Plan, number: int, address: str | None) -> None:
        self.plan, self.number, self.address = plan, number, address
        self.filed = max(0, int(plan.told(f"filed-{number}") or 0) - _AGAIN)
        self.context = self._books()

    def _books(self) -> SweepContext:
        return toy.sweep_context(journal.JournalStore(self.plan.uri, self.plan.journal, endpoint=self.address))

    def file(self) -> None:
        """File what was released of this worker's share; a new process files the last of it again."""
        released = int(self.plan.told("released") or 0)
        for place, item in self.plan.share(self.number):
            if self.filed <= place < released:
                target = toy.target(*item.numbers)
                self._step(lambda item=item, target=target: self.context.ledger.submit(item.id, item.line, target))
                journal.write(self.plan.journal, kind="receipt", id=item.id)
                self.filed = place + 1
                self.plan.tell(f"filed-{self.number}", str(self.filed))

    def sweep(self, line: str, run: str) -> None:
        """Do one sweep: claim, erase, settle, whatever happens in between."""
        entries = self.context.ledger.entries
        if not any(entries(status, line) for status in _OPEN) or holder_of(self.context.store, line):
            return
        claimed = self._step(lambda: toy.claim_next(self.context, run, line, **self.plan.policy))
        if claimed.skipped is Skipped.LINE_HELD:
            return
        if claimed.record:
            with self.noted():
                self._step(lambda: toy.erase(self.context, claimed.record))
        self._step(lambda: settle(self.context, line, run))

    def _step(self, call: Callable[[], T]) -> T:
        for again in range(_TRIES):
            try:
                return call()
            except StoreError as error:
                self._note("gave up", error)
                if again == _TRIES - 1:
                    raise
                journal.forget_clients()
                self.context = self._books()
                time.sleep(self.plan.backoff * 2**again)
        raise AssertionError("the loop returns or raises")

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Let an error end the block, and note it; a conflict is an answer, and an unreachable store is weather."""
        try:
            yield
        except ConflictError:
            pass
        except StoreError as error:
            self._note("failed", error)
        except Exception as error:  # what no worker should meet
            self._note("error", error)

    def _note(self, kind: str, error: Exception) -> None:
        journal.write(self.plan.journal, kind=kind, error=f"{type(error).__name__}: {error}")


class Reader:
    """Reads HEAD, its manifest and its files again and again, and checks every digest.

    Args:
        store: where.
        path: the journal.
    """

    def __init__(self, store: FileStore, path: Path) -> None:
        self.store, self.path = store, path
        self.polls = self.torn = self.backwards = 0
        self._last: dict[str, tuple[int, str]] = {}

    def poll(self, line: str) -> None:
        """Read the line once."""
        self.polls += 1
        try:
            head, _ = read_head(self.store, line)
            manifest = read_version(self.store, line, head.version)
            for entry in manifest.files.values():
                stored = self.store.get(blob_key(entry.sha256))
                if stored is None or (sha256_bytes(stored.data), len(stored.data)) != (entry.sha256, entry.size):
                    self.torn += 1
        except (SalunError, TypeError):  # no HEAD, no manifest, or not the one that HEAD names
            self.torn += 1
            return
        seen, before = (head.sequence, head.version), self._last.get(line)
        if before and (seen[0] < before[0] or (seen[0] == before[0] and seen != before)):
            self.backwards += 1
        if seen != before:
            journal.write(self.path, kind="head", line=line, body=head.model_dump())
        self._last[line] = seen


def watch(plan: Plan) -> None:
    """Read all lines until word comes to stop."""
    os.environ.update(plan.environ)
    reader = Reader(journal.JournalStore(plan.uri), plan.journal)
    while plan.goes_on():
        for line in plan.lines:
            reader.poll(line)
        plan.tell("polls", f"{reader.polls} {reader.torn} {reader.backwards}")
