"""The harness: starts real processes, kills them at random moments with SIGKILL, and lets the auditor judge.

The processes are forked from one that has imported all that they need, so that a restart costs little.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Status
from salun_core.storage.keys import index_prefix
from salun_core.times import utc_clock
from tests.reliability import journal, worker
from tests.reliability.audit import Auditor
from tests.reliability.figures import Figures
from tests.reliability.plan import Plan
from tests.support import toy_line as toy
from tests.support.forked import CONTEXT

_PATIENCE = 900.0
_ANYBODY = 0.4


def start(target: Callable[..., None], *args: object) -> BaseProcess:
    """Start a process; it ends with this one."""
    process = CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """Kill a process for good, whatever it does."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)


def wait_until(holds: Callable[[], bool], seconds: float = _PATIENCE, pause: float = 0.1) -> None:
    """Wait for something that must come about.

    Raises:
        TimeoutError: it did not.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited for {seconds:g} s in vain")
        time.sleep(pause)


def environ() -> dict[str, str]:
    """Return the variables with which the store is found."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name.lower() == "no_proxy"}


@contextmanager
def planned(uri: str, **settings: object) -> Iterator[Plan]:
    """Begin some lines in a folder of a store, and plan what is asked of them."""
    with tempfile.TemporaryDirectory(prefix="salun-kills-") as folder:
        uri = f"{uri}/{secrets.token_hex(6)}"
        plan = Plan(uri, Path(folder), environ(), harness=os.getpid(), **settings)
        store = journal.JournalStore(plan.uri, plan.journal)
        for line in plan.lines:
            toy.begin(store, line)
        yield plan


class Crew:
    """Workers that are killed and started again, and a reader that is not.

    Args:
        plan: what they do.
        endpoint: URL that the workers reach the store at; the environment's by default.
    """

    def __init__(self, plan: Plan, endpoint: str | None = None) -> None:
        self.plan, self.endpoint = plan, endpoint
        self.dice = random.Random(plan.seed)
        self.kills = self.at_work = 0
        self.dead: set[str] = set()
        self.store = journal.JournalStore(plan.uri)
        self.ledger = Ledger(self.store, utc_clock)

    def __enter__(self) -> Crew:
        self.workers = [self._worker(number) for number in range(self.plan.workers)]
        self.reader = start(worker.watch, self.plan)
        return self

    def __exit__(self, *_: object) -> None:
        self.plan.tell("stop", "now")
        for process in [*self.workers, self.reader]:
            process.join(60)
            if process.is_alive():
                kill(process)

    def _worker(self, number: int) -> BaseProcess:
        return start(worker.work, self.plan, number, self.endpoint)

    def kill_some(self, count: int, together: bool) -> None:
        """Kill workers at random moments; requests are released as the kills go on, so that there is always work.

        Args:
            count: of the kills.
            together: release all at once.
        """
        for number in range(count):
            self.plan.tell(
                "released", str(self.plan.requests if together else self.plan.requests * (number + 1) // count)
            )
            time.sleep(self.dice.uniform(0.05, 0.5))
            victim = self._victim()
            kill(self.workers[victim])
            self.workers[victim] = self._worker(victim)
            self.kills += 1

    def _victim(self) -> int:
        """Choose a worker to kill: more often than not one that holds a lease, at some moment of its work."""
        if self.dice.random() < _ANYBODY:
            return self.dice.randrange(self.plan.workers)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: self._holders(), 5, 0.02)
        time.sleep(self.dice.uniform(0.0, 0.8))
        holders = sorted(self._holders())
        if not holders:
            return self.dice.randrange(self.plan.workers)
        self.at_work += 1
        name = self.dice.choice(holders)
        self.dead.add(name)
        return int(name[1:].partition("-")[0])

    def _holders(self) -> set[str]:
        """Return the runs that hold a lease and were not killed."""
        notes = [note["body"] for note in journal.read(self.plan.journal) if note["kind"] == "lease"]
        last = {body["line"]: body for body in notes}
        return {body["holder"] for body in last.values() if not body["released"]} - self.dead

    def finish(self) -> None:
        """Wait until every request is completed."""
        self.plan.tell("released", str(self.plan.requests))
        wait_until(self._all_completed, pause=0.3)

    def _all_completed(self) -> bool:
        done = {entry.request for entry in self.ledger.entries(Status.COMPLETED)}
        if len(done) < self.plan.requests:
            return False
        others = [status for status in Status if status is not Status.COMPLETED]
        return not any(True for status in others for _ in self.store.list(index_prefix(status)))

    def polls(self) -> tuple[int, int, int]:
        """Return how often the reader read, how often torn, how often backwards."""
        polls, torn, backwards = (int(text) for text in (self.plan.told("polls") or "0 0 0").split())
        return polls, torn, backwards

    def poll_up_to(self, polls: int) -> None:
        """Wait until the reader has read so often."""
        wait_until(lambda: self.polls()[0] >= polls)


def run_crew(
    name: str, plan: Plan, kills: int, polls: int = 0, endpoint: str | None = None, together: bool = False
) -> Figures:
    """Let a crew do the plan under kills, and audit it."""
    begin = time.monotonic()
    with Crew(plan, endpoint) as crew:
        crew.kill_some(kills, together)
        crew.finish()
        crew.poll_up_to(polls)
    auditor = Auditor(journal.JournalStore(plan.uri), plan.journal)
    verdict = auditor.audit(plan.asked(), plan.lines)
    seen, verdict.torn, verdict.backwards = (
        (count + more) for count, more in zip(crew.polls(), (0, verdict.torn, verdict.backwards), strict=True)
    )
    return Figures(
        name,
        workers=plan.workers,
        kills=crew.kills,
        requests=plan.requests,
        polls=seen,
        seconds=time.monotonic() - begin,
        verdict=verdict,
        versions=sum(auditor.length(line) for line in plan.lines),
        more=f"{crew.at_work} of the kills hit a holder of a lease" if kills else "",
    )
