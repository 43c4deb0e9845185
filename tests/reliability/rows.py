"""The rows of the table: each runs one test of its size, and returns its figures."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from salun_core.registry.lookup import ancestry, missing_files
from salun_core.storage.erase import unfinished_uploads
from salun_core.storage.keys import blob_key
from salun_core.storage.leases import holder_of
from salun_core.sweeps.settle import settle
from salun_core.times import utc_clock
from tests.reliability import children, harness, journal
from tests.reliability.audit import Auditor, Verdict
from tests.reliability.figures import Figures
from tests.reliability.journal import JournalStore
from tests.reliability.mutants import MUTANTS
from tests.reliability.plan import Plan
from tests.reliability.schedules import judge
from tests.reliability.worker import Reader
from tests.support import toy_line as toy


def lines(count: int) -> tuple[str, ...]:
    """Return the names of some model lines."""
    return tuple(f"line-{number}" for number in range(count))


def ledger_under_kills(
    uri: str, workers: int, on: int, requests: int, kills: int, polls: int = 0, lease: int = 2
) -> Figures:
    """File, claim, erase and settle on several lines, and be killed all the while."""
    with harness.planned(uri, lines=lines(on), requests=requests, workers=workers, seed=1, lease_seconds=lease) as plan:
        return harness.run_crew("ledger under kills", plan, kills, polls)


def lineage_under_kills(uri: str, workers: int, requests: int, kills: int, polls: int = 0, batch: int = 64) -> Figures:
    """The same on one line, where all that waits is one batch."""
    settings = {"lines": lines(1), "requests": requests, "workers": workers, "seed": 2, "max_requests": batch}
    with harness.planned(uri, **settings) as plan:
        figures = harness.run_crew("lineage under kills", plan, kills, polls, together=True)
        figures.holds = 1 <= figures.versions <= 6
        return figures


def seeded_defects(uri: str) -> Figures:
    """Play each seeded defect's schedule with it and without it."""
    begin, verdict = time.monotonic(), Verdict()
    caught = 0
    for name in MUTANTS:
        caught += bool(judge(uri, name, name).faults)
        for fault, count in judge(uri, name, None).faults.items():
            setattr(verdict, fault, getattr(verdict, fault) + count)
    more = f"{caught} of {len(MUTANTS)} defects caught"
    seconds = time.monotonic() - begin
    return Figures("seeded defects", seconds=seconds, verdict=verdict, more=more, holds=caught == len(MUTANTS))


def late_workers(uri: str, count: int, at_once: int = 10) -> Figures:
    """Stop workers before their publish until their lease is over and another has published; then wake them."""
    begin, total, refused = time.monotonic(), Verdict(), 0
    for first in range(0, count, at_once):
        numbers = range(first, min(first + at_once, count))
        names = tuple(f"line-{number}" for number in numbers)
        with harness.planned(uri, lines=names, requests=len(names), workers=1, lease_seconds=1) as plan:
            refused += _sleep_and_wake(plan, numbers)
            verdict = Auditor(JournalStore(plan.uri), plan.journal).audit(plan.asked(), plan.lines)
            for fault, number in verdict.faults.items():
                setattr(total, fault, getattr(total, fault) + number)
    more = f"{refused} of {count} late publishes refused"
    seconds = time.monotonic() - begin
    return Figures(
        "late workers",
        min(count, at_once),
        requests=count,
        seconds=seconds,
        verdict=total,
        more=more,
        holds=refused == count,
    )


def _sleep_and_wake(plan: Plan, numbers: range) -> int:
    stops = [children.STOPS[number % len(children.STOPS)] for number in numbers]
    sleepers = [
        harness.start(children.late, plan, line, f"late-{number}", stop)
        for line, number, stop in zip(plan.lines, numbers, stops, strict=True)
    ]
    try:
        harness.wait_until(lambda: all(_is_stopped(process) for process in sleepers), 120)
        context = toy.sweep_context(JournalStore(plan.uri, plan.journal))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(_take_over, plan, context), plan.lines))
        for process in sleepers:
            os.kill(process.pid, signal.SIGCONT)
        for process in sleepers:
            process.join(120)
    finally:
        for process in sleepers:
            harness.kill(process)
    return sum(plan.told(f"late-{number}") == "refused" for number in numbers)


def _is_stopped(process: BaseProcess) -> bool:
    assert process.exitcode is None, "it did not come to its stop"
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _take_over(plan: Plan, context, line: str) -> None:
    """Wait for the end of a lease, as the store sees it, and do the work."""
    harness.wait_until(lambda: holder_of(context.store, line) is None, 60, 0.3)
    claimed = toy.claim_next(context, f"next-{line}", line, **plan.policy)
    toy.erase(context, claimed.record)
    settle(context, line, f"next-{line}")


def killed_publishes(uri: str, large: bool, sweep: bool = True) -> Figures:
    """Kill a publish before each of its requests to the store; nothing shows, and what it left is swept away."""
    begin, verdict = time.monotonic(), Verdict()
    with harness.planned(uri, lines=lines(1), requests=0, workers=1) as plan:
        store, (line,) = JournalStore(plan.uri), plan.lines
        reader, kills = Reader(store, plan.journal), 0
        while not plan.told("requests"):
            child = harness.start(children.killed_at, plan, line, kills, large)
            child.join(120)
            assert child.exitcode == -signal.SIGKILL
            kills += 1
            reader.poll(line)
            verdict.visible += bool(missing_files(store, toy.head(store, line).manifest))
        verdict.torn += reader.torn
        left = orphans(store), len(unfinished_uploads(store, utc_clock() + timedelta(days=2)))
        if sweep:
            _purge(plan.uri)
        after = orphans(store), len(unfinished_uploads(store, utc_clock() + timedelta(days=2)))
        reader.poll(line)
        verdict.torn += reader.torn
    more = f"left-over files and uploads: {left[0]} + {left[1]} before the sweep, {after[0]} + {after[1]} after"
    seconds = time.monotonic() - begin
    holds = not sweep or after == (0, 0)
    return Figures("kills in a publish", 1, kills, seconds=seconds, verdict=verdict, more=more, holds=holds)


def orphans(store: JournalStore) -> int:
    """Count files and manifests that no published version refers to."""
    needed = {entry.sha256 for version in ancestry(store, "line-0") for entry in version.manifest.files.values()}
    keep = {blob_key(digest) for digest in needed}
    past = {version.digest for version in ancestry(store, "line-0")}
    manifests = [entry.key for entry in store.list("lines/line-0/versions/") if entry.key.split("/")[3] not in past]
    return len([entry for entry in store.list("blobs/") if entry.key not in keep]) + len(manifests)


def _purge(uri: str) -> None:
    from salun_core.steps.purge import purge_store

    purge_store(uri, clock=lambda: utc_clock() + timedelta(days=2))


def flat_memory(uri: str, sweeps: int, warm_up: int = 200) -> Figures:
    """Sweep very often in one process, and compare the memory in use after some sweeps with that at the end."""
    begin = time.monotonic()
    with harness.planned(uri, lines=lines(4), requests=0, workers=1, lease_seconds=600) as plan:
        child = harness.start(children.sweep_often, plan, sweeps, 50)
        child.join(3600)
        used = {note["sweeps"]: note["bytes"] for note in journal.read(plan.journal) if note["kind"] == "memory"}
        done = child.exitcode == 0 and sweeps in used
        growth = used[sweeps] / used[warm_up] - 1 if done else float("nan")
    more = f"{growth:+.1%} of {used.get(warm_up, 0) / 1e6:.0f} MB between sweep {warm_up} and {sweeps}"
    seconds = time.monotonic() - begin
    return Figures("memory", requests=sweeps, seconds=seconds, more=more, holds=done and growth < 0.05)


def killed_training(kills: int) -> Figures:
    """Kill one training at a step of its own again and again, and compare its end with that of an unbroken one.

    All of it on one thread: with another number of threads a sum has other last bits, killed or not.
    """
    import tempfile

    import torch

    from salun_core.methods.classification import FileCheckpoint
    from salun_core.models.checkpoint import model_digest
    from tests.unit.methods import test_resume as training

    begin, settings = time.monotonic(), {"epochs": kills + 2}
    torch.set_num_threads(1)
    whole = training.start("salun", **settings)
    steps = training.STEPS_AN_EPOCH["salun"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        for number in range(kills):
            training.killed(training.break_off, "salun", path, 2 + (number * 3) % (2 * steps - 1), settings)
        fresh = []
        resumed = training.start("salun", FileCheckpoint(path), on_epoch=fresh.append, **settings)
    same = model_digest(resumed.model) == model_digest(whole.model)
    more = (
        f"weights {'identical' if same else 'DIFFERENT'}; the last process trained {len(fresh)} of {kills + 2} epochs"
    )
    seconds = time.monotonic() - begin
    return Figures("kills in mid-training", 1, kills, seconds=seconds, more=more, holds=same and 0 < len(fresh) < kills)
