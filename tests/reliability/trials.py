"""Trials: runs of the pipeline that are killed, deleted, retried or suspended, and what the line looks like afterwards.

Each trial has a line of its own, some deletion requests, a run that something happens to, and a final sweep; an auditor
looks at all that is left. All that happens is drawn from the trial's seed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from salun_core.certificates.issue import ModelCertifier
from salun_core.certificates.keys import create_key, find_signing_key, load_public_key
from salun_core.certificates.statement import ErasureCertificate, open_statement
from salun_core.data import DataSpec, load_data
from salun_core.data.split import SplitManifest, stored_split
from salun_core.data.targets import SamplesTarget
from salun_core.errors import SalunError
from salun_core.pods.pod import Pod
from salun_core.registry.lookup import Version, read_head
from salun_core.registry.versions import fetch_version
from salun_core.requests.schema import Outcome, Status
from salun_core.steps.claim import probe_once
from salun_core.steps.outcome import OutcomeRecord, RunState
from salun_core.steps.purge import purge_store
from salun_core.storage import open_store
from salun_core.storage.keys import certificate_key
from salun_core.storage.leases import read_lease
from salun_core.sweeps import liveness
from salun_core.sweeps.context import SweepContext
from salun_core.sweeps.settle import in_progress
from salun_core.tasks import register_model
from salun_core.times import utc_clock
from tests.reliability import pods, trial_mutants
from tests.reliability.audit import Auditor, Verdict
from tests.reliability.figures import Figures
from tests.reliability.pods import CALLS, LINE, SECONDS, STEPS, Moment, Run
from tests.support import api_server, toy_task

LONGEST_BLOCK = 15 * 60
"""Seconds for which a run that is gone may block its line, by the store's clock."""
_WAITS = (0, 290, 400)  # between the claims of a line whose holder is gone; together less than the longest block
_SAMPLES = 3  # of a request
_SWEEPS = 6  # that may be needed until no request waits
_NAMESPACE = "team"
_DEAD = ("failed", "ended", "deleted", "gone")


def _answer(name: str, state: str) -> tuple[int, Mapping[str, Any]]:
    """Return what the Kubernetes API answers about a Workflow: the status, and the object that it answers."""
    if state == "gone":
        details = {"name": name, "group": "argoproj.io", "kind": "workflows"}
        return 404, {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": "NotFound",
            "details": details,
        }
    phase = {"failed": "Failed", "ended": "Succeeded"}.get(state, "Running")
    works = "True" if state in ("works", "deleted") else "False"
    deleted = {"deletionTimestamp": "2026-11-27T10:00:00Z"} if state == "deleted" else {}
    status = {"phase": phase, "conditions": [{"type": "PodRunning", "status": works}]}
    metadata = {"name": name, "namespace": _NAMESPACE, **deleted}
    return 200, {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": metadata, "status": status}


class Filed(NamedTuple):
    """A request that was filed."""

    id: str
    line: str
    samples: set[str]


@dataclass
class Ended:
    """How a trial ended.

    Args:
        seed: of the trial.
        scenario: what happened.
        mutant: the seeded defect; None for the product as it is.
        kills: processes that were killed.
        requests: that were filed.
        blocked: longest time from the death of a holder to the next successful claim, in seconds of the store.
        faults: what the auditor counted.
        notes: what it saw, to find the reason.
        seconds: how long it took.
    """

    seed: int
    scenario: str
    mutant: str | None = None
    kills: int = 0
    requests: int = 0
    blocked: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Trial:
    """One line, its requests, and the runs that work on it.

    Args:
        uri: an empty store.
        folder: of the trial.
        answers: folder of what the Kubernetes API answers.
        model: folder of the first version.
        key: public key that verifies certificates.
        seed: of all that happens.
    """

    def __init__(self, uri: str, folder: Path, answers: Path, model: Path, key: Path, seed: int) -> None:
        self.folder, self.answers, self.key, self.seed = folder, answers, load_public_key(key), seed
        self.dice = random.Random(seed)
        self.store = open_store(uri)
        self.context = SweepContext(self.store, utc_clock, ModelCertifier(self.store))
        self.ledger = self.context.ledger
        self.verdict, self.notes, self.runs, self.filed = Verdict(), [], [], []
        self.blocked, self.died = 0.0, 0.0
        self.swept = False  # whether a sweep ran to its end after all that happened
        self.asks = self.dice.random() < 0.5
        self.states: dict[str, str] = {}
        probe_once(self.store)
        split = toy_task.ToyModel(model).split
        self.ids = iter(self.dice.sample(sorted(split.train), 60))
        self.first = set(split.train)
        register_model(self.store, LINE, model, "train", len(split.train))
        for _ in range(self.dice.randint(2, 4)):
            self.file()

    def file(self) -> None:
        """File a request for samples that no other names."""
        ids = [next(self.ids) for _ in range(_SAMPLES)]
        name = f"r-{len(self.filed)}"
        self.ledger.submit(name, LINE, SamplesTarget(ids=ids))
        self.filed.append(Filed(name, LINE, set(ids)))

    def waiting(self) -> bool:
        """Return whether a request is not settled."""
        return any(self.ledger.entries(status, LINE) for status in (Status.QUEUED, Status.IN_PROGRESS))

    def run(self, strict: bool = False) -> Run:
        """Return a new run of the pipeline; the Kubernetes API shows it as one that works."""
        name = f"run-{self.seed}-{len(self.runs)}"
        policy = self.folder / f"policy-{strict:d}.json"
        rule = {"metric": "RA", "op": ">=", "value": 1.01 if strict else 0.0, "reason": "of a trial"}
        policy.write_text(json.dumps({"format": "salun.policy/v1", "name": "trial", "rules": [rule]}))
        made = Run(Pod(self.store.uri, LINE, name), self.folder, policy)
        self.runs.append(made)
        os.environ[liveness.WORKFLOW_VARIABLE] = name if self.asks else ""
        self.show(made, "works")
        return made

    def show(self, run: Run, state: str) -> None:
        """Let the Kubernetes API show the Workflow of a run in a state."""
        self.states[run.name] = state
        (self.answers / run.name).write_text(json.dumps(_answer(run.name, state)))

    def go(self, run: Run, *args: Any, **kwargs: Any) -> str | None:
        """Let a run work on, as its own Workflow."""
        os.environ[liveness.WORKFLOW_VARIABLE] = run.name if self.asks else ""
        gated = "gate" in run.made
        left = run.go(*args, **kwargs)
        if "gate" in run.made and not gated:
            self.check_gate(run)
        return left

    def check_gate(self, run: Run) -> None:
        """Check that the gate's step has settled what it published, without any net."""
        outcome = run.outcome()
        if outcome is None or outcome.state is not RunState.PUBLISHED:
            return
        left = [state.request.id for state in in_progress(self.context, LINE, run.name)]
        if left or self.holds(run):
            self.fault("outcomes", f"{run.name} published and left {left or 'the line'} unsettled")

    def moment(self, steps: Sequence[str] = STEPS, **changes: Any) -> Moment:
        """Draw a moment: before a process, before or after a call to the store, at the end, or at any time."""
        # The gate's step is chosen more often: it publishes and settles.
        step = self.dice.choices(steps, [4 if name == "gate" else 2 if name == "claim" else 1 for name in steps])[0]
        kind = self.dice.random()
        if kind < 0.1 and not changes:
            return Moment(step)
        if kind < 0.25 and not changes:
            return Moment(step, seconds=self.dice.uniform(0.02, 1.5 * SECONDS[step]))
        return Moment(step, self.dice.randint(1, CALLS[step] + 1), self.dice.random() < 0.5, **changes)

    def die(self, run: Run, moment: Moment | None = None) -> str | None:
        """Let a run work until it is killed, and return the step."""
        moment = moment or self.moment()
        left = self.go(run, moment=moment)
        self.died = pods.now(self.folder)
        self.notes.append(f"{run.name} left at {left} by {moment}")
        return left

    def holds(self, run: Run) -> bool:
        """Return whether a run holds the line, as the lease says."""
        return self.holder() == run.name

    def holder(self) -> str | None:
        """Return the run that did not give the lease back."""
        lease = read_lease(self.store, LINE)
        return lease.holder if lease is not None and not lease.released else None

    def head(self) -> str:
        """Return the version at HEAD."""
        found = read_head(self.store, LINE)
        assert found is not None
        return found[0].version

    def takeover(self) -> Run:
        """Claim the line whose holder is gone, again and again as its schedule does, and note how long that takes."""
        died = self.died
        for wait in (*_WAITS, 86400):
            if wait:
                pods.jump(self.folder, wait)
            known = self.asks and self.states.get(self.holder() or "") in _DEAD
            run = self.run()
            self.go(run, last="claim")
            outcome = run.outcome()
            if outcome is None or outcome.state is not RunState.LINE_HELD:
                blocked = pods.now(self.folder) - died
                self.blocked = max(self.blocked, blocked)
                if blocked > LONGEST_BLOCK:
                    self.fault("blocked", f"{run.name} took the line {blocked:.0f} s after its holder died")
                return run
            if known:
                self.fault("blocked", f"{run.name} found the line held by a run that is known to be dead")
            self.end(run)
        self.fault("blocked", "the line is held for good")
        raise TimeoutError("the line is held for good")

    def end(self, run: Run, state: str = "SUCCEEDED") -> None:
        """Run the exit handler; the Workflow has ended then."""
        os.environ[liveness.WORKFLOW_VARIABLE] = run.name if self.asks else ""
        if run.exit_handler(state):
            self.fault("errors", f"the exit handler of {run.name} ended with {run.codes[-1]}")
        self.gone(run, "ended" if state == "SUCCEEDED" else "failed")

    def gone(self, run: Run, state: str) -> None:
        """Let the Workflow of a run have ended, or its node be lost."""
        self.show(run, state)
        self.died = pods.now(self.folder)

    def fault(self, name: str, why: str) -> None:
        """Count a fault."""
        setattr(self.verdict, name, getattr(self.verdict, name) + 1)
        self.notes.append(f"{name}: {why}")

    def finish(self) -> None:
        """Sweep until no request waits, at least once; the last sweep runs to its end."""
        if not self.swept:
            self.file()
        for _ in range(_SWEEPS):
            if self.swept and not self.waiting():
                break
            self.swept = True
            run = self.takeover()
            left = self.go(run, "fetch")
            self.end(run, "FAILED" if left else "SUCCEEDED")
            if left:
                self.fault("errors", f"{run.name} ended at {left} with {run.codes[-2]}: {run.outcome()}")
            outcome = run.outcome()
            if outcome is None or outcome.state not in (RunState.PUBLISHED, RunState.NOTHING_TO_DO):
                self.fault("outcomes", f"the final sweep ended with {outcome}")
        if self.holder() is not None:
            self.fault("blocked", f"the final sweep left the line held by {self.holder()}")


def recreated(trial: Trial, moment: Moment | None = None) -> None:
    """A step is killed, and Argo runs it again in a new pod, once or more often; the run goes on to its end."""
    run = trial.run(strict=moment is None and trial.dice.random() < 0.15)
    left = trial.die(run, moment)
    for again in range(3):
        if left is None or run.ended_by_itself:
            break
        trial.show(run, "waits")
        if trial.asks and trial.dice.random() < 0.3:
            pods.jump(trial.folder, 20 * 60)  # no node is free; the Workflow lives, so nobody may take the line
        if trial.dice.random() < 0.4:
            held, other = trial.holds(run), trial.run()
            trial.show(run, "waits")
            stopped = trial.go(other)
            outcome = other.outcome()
            if held and (outcome is None or outcome.state is not RunState.LINE_HELD):
                trial.fault("early", f"{other.name} took the line from {run.name}, which lives")
            trial.end(other, "FAILED" if stopped else "SUCCEEDED")
        trial.show(run, "works")
        second = trial.moment(STEPS[STEPS.index(left) :]) if not again and trial.dice.random() < 0.4 else None
        left = trial.go(run, left, second)
    if run.ended_by_itself and left != "conclude":
        trial.fault("errors", f"{left} of {run.name} ended with {run.codes[-1]}")
    trial.end(run, "FAILED" if left else "SUCCEEDED")
    outcome = run.outcome()
    if outcome is None or not outcome.final:
        trial.fault("outcomes", f"{run.name} ended with {outcome}")


def vanished(trial: Trial, moment: Moment | None = None) -> None:
    """A step is killed, the Workflow is gone, and its exit handler never runs; a second run comes."""
    run = trial.run(strict=moment is None and trial.dice.random() < 0.15)
    trial.die(run, moment)
    trial.gone(run, trial.dice.choice(["gone", "deleted", "failed", "works"]))  # or its node is lost
    _second(trial)


def pending(trial: Trial) -> None:
    """The run is terminated while the pod after the claim waits for a node; nothing ran after the claim."""
    run = trial.run()
    trial.die(run, Moment("fetch"))
    trial.gone(run, trial.dice.choice(["gone", "deleted", "failed"]))
    _second(trial)


def _second(trial: Trial) -> None:
    """Let a second run take over a line with one more request: it is the final sweep, if no request waits then."""
    trial.file()
    trial.swept = True
    other = trial.takeover()
    left = trial.go(other, "fetch")
    if left:
        trial.fault("errors", f"{other.name} ended at {left} with {other.codes[-1]}: {other.outcome()}")
    if trial.dice.random() < 0.5:
        trial.end(other)
    else:
        trial.gone(other, "gone")
    outcome = other.outcome()
    if outcome is None or outcome.state is not RunState.PUBLISHED:
        trial.fault("outcomes", f"the second run ended with {outcome}")


def retried(trial: Trial, moment: Moment | None = None, alone: bool = False) -> None:
    """A step is killed and the exit handler runs; then Retry: the step and all that follow run again, the net not."""
    run = trial.run(strict=moment is None and trial.dice.random() < 0.15)
    left = trial.die(run, moment)
    trial.end(run, "FAILED" if left else "SUCCEEDED")
    if not alone and trial.dice.random() < 0.3:
        other = trial.takeover()
        stopped = trial.go(other, "fetch")
        trial.end(other, "FAILED" if stopped else "SUCCEEDED")
    before, head = run.outcome(), trial.head()
    if before is None or not before.final:
        trial.fault("outcomes", f"after its exit handler {run.name} has {before}")
    trial.show(run, "works")
    last = trial.go(run, left or "conclude")
    if last and run.codes[-1][1] not in (0, *(() if before is None else (before.code,))):
        trial.fault("outcomes", f"the Retry of {run.name} ended at {last} with {run.codes[-1]}, {before}")
    if trial.head() != head:
        trial.fault("twice", f"the Retry of {run.name} published")
    after = run.outcome()
    if before is not None and after is not None and (before.state, before.code) != (after.state, after.code):
        trial.fault("outcomes", f"the Retry changed {before} to {after}")
    trial.gone(run, "failed")
    trial.died = pods.now(trial.folder)


def net_killed(trial: Trial) -> None:
    """The exit handler itself is killed; it is repeated, or never runs again."""
    run = trial.run(strict=trial.dice.random() < 0.15)
    left = trial.die(run) if trial.dice.random() < 0.7 else trial.go(run)
    state = "FAILED" if left else "SUCCEEDED"
    run.exit_handler(state, trial.moment(["settle"]))
    trial.died = pods.now(trial.folder)
    if trial.dice.random() < 0.5:
        trial.end(run, state)
        outcome = run.outcome()
        if outcome is None or not outcome.final:
            trial.fault("outcomes", f"after its exit handler {run.name} has {outcome}")
        return
    trial.gone(run, trial.dice.choice(["gone", "failed", "works"]))
    _second(trial)


def suspended(trial: Trial, moment: Moment | None = None, early: bool | None = None) -> None:
    """A step is suspended past the lease; another run takes over; then the step wakes up and its run goes on."""
    run = trial.run()
    chosen = moment or trial.moment(STEPS[:-1], signal=signal.SIGSTOP)
    left = trial.die(run, chosen)
    if left is None:  # nothing to suspend: a refusal of the gate ended the run
        trial.end(run)
        return
    trial.gone(run, "works")
    pods.jump(trial.folder, 700)
    other = trial.takeover()
    early = trial.dice.random() < 0.4 if early is None else early
    stopped = trial.go(other, "fetch", last="evaluate" if early else "conclude")
    if not run.wake():
        trial.go(run, STEPS[STEPS.index(left) + 1])
    if early and not stopped:
        stopped = trial.go(other, "gate")
    trial.end(other, "FAILED" if stopped else "SUCCEEDED")
    trial.end(run, "FAILED")


SCENARIOS: Mapping[str, Callable[[Trial], None]] = {
    "recreated": recreated,
    "vanished": vanished,
    "retried": retried,
    "net killed": net_killed,
    "suspended": suspended,
    "pending": pending,
}
_SHARES = (5, 6, 5, 4, 5, 1)


class TrialAuditor(Auditor):
    """Audits the store of a trial: what a version has forgotten is missing from its split; certificates are signed.

    Args:
        trial: the trial.
    """

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial.store, trial.folder / "journal")
        self.trial = trial

    def _forgotten(self, version: Version) -> set[str]:
        key = (version.manifest.line, version.digest)
        if key not in self._gone:
            split = stored_split(self.store, version)
            self._gone[key] = self.trial.first - set(split.train)
        return self._gone[key] or set()

    def _certified(self, item: Filed, outcome: Outcome | None) -> bool:
        key = certificate_key(item.id)
        stored = self.store.get(key)
        if stored is None:
            return False
        try:
            stated = open_statement(ErasureCertificate, stored.data, [self.trial.key], key).predicate
        except SalunError:
            return False
        chain = self._chain(item.line)
        version = chain.get(stated.model.version)
        before = chain.get(version.manifest.parent or "") if version else None
        if version is None or before is None or (stated.request.id, stated.outcome) != (item.id, outcome):
            return False
        right = stated.procedure is not None and stated.procedure.run == version.manifest.run
        return right and item.samples <= self._forgotten(version) and not item.samples & self._forgotten(before)

    def _noted(self, verdict: Verdict) -> None:
        super()._noted(verdict)
        verdict.early = 0  # a lease may be taken from a run that is known to be dead; the scenarios check the others
        written: dict[str, set[str]] = {}
        states: dict[str, str] = {}
        for note in self.notes:
            if note["kind"] == "certificate":
                written.setdefault(note["key"], set()).add(note["sha256"])
            if note["kind"] == "outcome":
                before = states.get(note["run"], RunState.RUNNING)
                if before != RunState.RUNNING and note["state"] != before:
                    self.trial.fault("outcomes", f"{note['run']} was {before} and became {note['state']}")
                states[note["run"]] = note["state"]
        for key, found in written.items():
            if len(found) > 1:
                self.trial.fault("twice", f"{key} was written {len(found)} times")

    def check(self) -> None:
        """Audit the trial, with its runs' outcomes and scratch files."""
        trial = self.trial
        for name, count in self.audit(trial.filed, [LINE]).faults.items():
            setattr(trial.verdict, name, getattr(trial.verdict, name) + count)
            trial.notes.append(f"{name}: {count} by the auditor")
        published = {version.manifest.run: digest for digest, version in self._chain(LINE).items()}
        for run in trial.runs:
            try:
                outcome = run.outcome()
            except SalunError as error:
                trial.fault("torn", f"outcome of {run.name}: {error}")
                continue
            if outcome is not None and outcome.final:
                self._outcome(run, outcome, published.get(run.name, ""))
            for name, code in run.codes:
                if code == pods.INTERNAL:
                    trial.fault("errors", f"{name} of {run.name} raised")
        self._head()
        purge_store(self.store.uri, signer=find_signing_key(), clock=lambda: utc_clock() + timedelta(hours=25))
        left = [entry.key for entry in self.store.list("scratch/")]
        if left:
            trial.fault("kept", f"a day later there are {left}")

    def _outcome(self, run: Run, outcome: OutcomeRecord, version: str) -> None:
        if (outcome.state is RunState.PUBLISHED) != bool(version) or outcome.version != version:
            self.trial.fault("outcomes", f"{run.name} published {version[:12] or 'nothing'}, but it says {outcome}")

    def _head(self) -> None:
        """Fetch HEAD, which verifies every file."""
        (head, *_) = self._chain(LINE).values()
        try:
            with tempfile.TemporaryDirectory() as folder:
                fetch_version(self.store, LINE, head.digest, Path(folder) / "head")
        except SalunError as error:
            self.trial.fault("torn", str(error))


def one(
    uri: str,
    folder: Path,
    answers: Path,
    model: Path,
    key: Path,
    seed: int,
    scenario: str | None = None,
    mutant: str | None = None,
    **settings: Any,
) -> Ended:
    """Do one trial and audit it.

    Args:
        uri: an empty store.
        folder: of the trial; empty.
        answers: folder of what the Kubernetes API answers.
        model: folder of the first version.
        key: public key that verifies certificates.
        seed: of all that happens.
        scenario: what happens; drawn from the seed by default.
        mutant: a seeded defect.
        settings: of the scenario.
    """
    begin = time.monotonic()
    chosen = scenario or random.Random(-seed).choices(list(SCENARIOS), _SHARES)[0]
    trial = Trial(uri, folder, answers, model, key, seed)
    try:
        with trial_mutants.seeded(mutant):
            SCENARIOS[chosen](trial, **settings)
            trial.finish()
    except Exception as error:  # noqa: BLE001 - of any kind: the trial failed, and the others go on
        trial.fault("errors", f"{type(error).__name__}: {error}: {traceback.format_exc()}")
    finally:
        for run in trial.runs:
            if run.stopped:
                os.kill(run.stopped, signal.SIGKILL)
                os.waitpid(run.stopped, 0)
    TrialAuditor(trial).check()
    return Ended(
        seed,
        chosen,
        mutant,
        sum(run.kills for run in trial.runs),
        len(trial.filed),
        trial.blocked,
        trial.verdict.faults,
        trial.notes,
        time.monotonic() - begin,
    )


def begin_model(folder: Path) -> None:
    """Write the first version's model: it was not trained, since no trial looks at what it computes."""
    data = load_data(DataSpec(source="digits"))
    parts = {"train": 150, "validation": 10, "test": 30}  # few samples, whose digests take little time
    few = {name: dict(list(getattr(data.split, name).items())[:count]) for name, count in parts.items()}
    split = SplitManifest.model_validate({**data.split.model_dump(), **few})
    digests = {"dataset_digest": split.dataset_digest, "split_digest": split.digest}
    classes = list(data.table.classes)
    card = toy_task.ToyCard(classes=classes, channels=1, height=8, width=8, data=data.spec, **digests)
    toy_task.write(folder, toy_task.autoencoder(1), card, split, {})


@dataclass(frozen=True)
class Work:
    """What one process of the harness does.

    Args:
        uri: a folder of the store.
        folder: shared by all.
        environ: variables with which the store and the APIs are found.
        trials: what `one` takes for each, beside places.
    """

    uri: str
    folder: Path
    environ: Mapping[str, str]
    trials: Sequence[Mapping[str, Any]]


def work(given: Work) -> None:
    """Do trials, and append how each ended to a file of this process."""
    os.environ.update(given.environ)
    import torch

    torch.set_num_threads(1)
    liveness.ACCOUNT = given.folder / "account"
    own = given.folder / f"worker-{os.getpid()}"
    own.mkdir()
    tempfile.tempdir = str(own)  # what a killed step leaves goes with the trials
    pods.prepare()
    begin_model(own / "model")
    key = create_key(own / "keys" / "salun")
    os.environ["SALUN_SIGNING_KEY"] = str(key.private)
    for number, settings in enumerate(given.trials):
        place = own / f"trial-{number}"
        place.mkdir()
        uri = f"{given.uri}/{os.getpid()}-{number}"
        ended = one(uri, place, given.folder / "answers", own / "model", key.public, **settings)
        with (given.folder / "ended").open("a") as file:
            file.write(json.dumps(asdict(ended)) + "\n")
        if ended.faults:
            print(f"trial {ended.seed}, {ended.scenario}: {ended.faults}", *ended.notes, sep="\n  ", file=sys.stderr)
        else:
            shutil.rmtree(place)


class _Answers:
    """What the Kubernetes API answers: the files of a folder, by the name of the Workflow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, path: str, default: object) -> object:
        name = path.rpartition("/")[2]
        try:
            return json.loads((self._folder / name).read_text()) if name and "." not in name else default
        except OSError:
            return default


def run_trials(uri: str, trials: Sequence[Mapping[str, Any]], workers: int) -> list[Ended]:
    """Do trials in some processes, and return how each ended.

    Args:
        uri: a folder of the store.
        trials: what `one` takes for each.
        workers: number of processes.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="salun-trials-")))
        for name in ("account", "answers"):
            (folder / name).mkdir()
        context = api_server.issue(folder / "account")
        (folder / "account" / "token").write_text("of-the-pod")
        server = stack.enter_context(api_server.serving(context))
        server.answers = _Answers(folder / "answers")
        environ = {
            **{name: value for name, value in os.environ.items() if name.startswith(("AWS_", "OMP_", "MPL"))},
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(server.port),
            liveness.NAMESPACE_VARIABLE: _NAMESPACE,
        }
        spawn = get_context("spawn")
        shares = [Work(uri, folder, environ, trials[number::workers]) for number in range(workers)]
        processes = [spawn.Process(target=work, args=(share,), daemon=True) for share in shares]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join()
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    process.kill()
        assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
        return [Ended(**json.loads(line)) for line in (folder / "ended").read_text().splitlines()]


def figures_of(name: str, ended: Iterable[Ended], workers: int, seconds: float) -> Figures:
    """Add up how trials ended."""
    ended, verdict = list(ended), Verdict()
    for trial in ended:
        for fault, count in trial.faults.items():
            setattr(verdict, fault, getattr(verdict, fault) + count)
    counts = {name: sum(trial.scenario == name for trial in ended) for name in SCENARIOS}
    more = f"{len(ended)} trials: {', '.join(f'{name} {count}' for name, count in counts.items())}"
    more += f"; a line was blocked for {max(trial.blocked for trial in ended):.0f} s at most"
    if failed := [str(trial.seed) for trial in ended if trial.faults]:
        more += f"; failed seeds: {', '.join(failed)}"
    kills, requests = sum(trial.kills for trial in ended), sum(trial.requests for trial in ended)
    return Figures(name, workers, kills, requests, seconds=seconds, verdict=verdict, more=more)


def killed_runs(uri: str, trials: int, workers: int, first: int = 1) -> Figures:
    """Do trials of all scenarios, by consecutive seeds."""
    begin = time.monotonic()
    ended = run_trials(uri, [{"seed": first + number} for number in range(trials)], workers)
    figures = figures_of("killed runs of the pipeline", ended, workers, time.monotonic() - begin)
    figures.holds = len(ended) == trials
    return figures
