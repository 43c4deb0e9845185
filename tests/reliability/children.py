"""Processes that do one thing and are stopped or killed at an exact step of it."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

from boto3.s3.transfer import TransferConfig

from salun_core.errors import ConflictError
from salun_core.registry.versions import publish_head, stage_version
from salun_core.storage import s3 as s3_files
from salun_core.storage.keys import head_key
from salun_core.sweeps.settle import settle
from tests.reliability import journal, mutants
from tests.reliability.plan import Plan
from tests.support import toy_line as toy

STOPS = ("before the log", "before the upload", "before the swap")
MULTIPART = 200_000
_PART = 64 * 1024


def late(plan: Plan, line: str, run: str, stop: str) -> None:
    """Claim and erase, but sleep at a step until somebody wakes us; leave word of how it ended."""
    os.environ.update(plan.environ)
    asleep = []

    def sleep(step: str, key: str) -> None:
        steps = {
            STOPS[0]: step == "before put" and key == f"runs/{run}/events/000005.json",
            STOPS[1]: step == "before upload",
            STOPS[2]: step == "before put" and key == head_key(line),
        }
        if steps[stop] and not asleep:
            asleep.append(step)
            os.kill(os.getpid(), signal.SIGSTOP)

    store = journal.JournalStore(plan.uri, plan.journal)
    context = toy.sweep_context(store)
    for item in plan.asked():
        if item.line == line:
            context.ledger.submit(item.id, line, toy.target(*item.numbers))
    claimed = toy.claim_next(context, run, line, **plan.policy)
    store.hook = sleep
    try:
        toy.erase(context, claimed.record)
        outcome = "published"
    except ConflictError:
        outcome = "refused"
    store.hook = lambda step, key: None
    settle(context, line, run)
    plan.tell(run, outcome)


def killed_at(plan: Plan, line: str, request: int, large: bool) -> None:
    """Publish a version, and die before the n-th request to the store, or after the last of them."""
    os.environ.update(plan.environ)
    store = journal.JournalStore(plan.uri, plan.journal)
    sent = []

    def count(model: object, **_: object) -> None:
        if len(sent) == request:
            os.kill(os.getpid(), signal.SIGKILL)
        sent.append(model.name)

    store.native[0].meta.events.register("before-call.s3", count)
    publish_large(store, line, f"killed-{request}", large)
    plan.tell("requests", str(len(sent)))
    os.kill(os.getpid(), signal.SIGKILL)


def publish_large(store: journal.JournalStore, line: str, run: str, large: bool) -> None:
    """Publish a version with a file beside the set of what was forgotten, in parts where it is large."""
    s3_files._TRANSFER = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART, use_threads=False)
    parent = toy.head(store, line)
    with tempfile.TemporaryDirectory() as folder:
        model, weights = Path(folder) / toy.MODEL, Path(folder) / "weights.bin"
        gone = toy.forgotten(store, parent) | {toy.sample(0)}
        model.write_bytes(toy.canonical_json(sorted(gone)))
        weights.write_bytes(f"{run} ".encode().ljust(MULTIPART if large else 100, b"."))
        fields = {"line": line, "parent": parent.digest, "run": run, "method": "salun", "forget_count": 1}
        version, _ = stage_version(store, fields, {toy.MODEL: model, weights.name: weights})
    publish_head(store, line, version, parent.digest, run)


def die_once(plan: Plan, line: str, run: str, step: str, key: str, mutant: str | None) -> None:
    """Claim and erase with a seeded defect, and die at the first step of that name on a key that ends so."""
    os.environ.update(plan.environ)

    def die(at: str, on: str) -> None:
        if at == step and on.endswith(key):
            os.kill(os.getpid(), signal.SIGKILL)

    with mutants.seeded(mutant):
        context = toy.sweep_context(journal.JournalStore(plan.uri, plan.journal))
        claimed = toy.claim_next(context, run, line, **plan.policy)
        context.store.hook = die
        toy.erase(context, claimed.record)


def sweep_often(plan: Plan, count: int, every: int) -> None:
    """File and erase one request after the other, and note the memory in use every so often."""
    os.environ.update(plan.environ)
    context = toy.sweep_context(journal.JournalStore(plan.uri))
    for number in range(count):
        line = plan.lines[number % len(plan.lines)]
        context.ledger.submit(f"r-{number}", line, toy.target(number // len(plan.lines)))
        claimed = toy.claim_next(context, f"run-{number}", line, **plan.policy)
        toy.erase(context, claimed.record)
        settle(context, line, f"run-{number}")
        if (number + 1) % every == 0:
            journal.write(plan.journal, kind="memory", sweeps=number + 1, bytes=_resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
