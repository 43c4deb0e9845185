"""Runs of the sweep's pipeline: each step is a process, which can be killed or suspended at any call to the store.

The steps are those of the product (`pods.steps`). They are forked from a process that has imported all that they
need, so that one takes a fraction of a second. The task is a small autoencoder (`tests.support.toy_task`), and the
reports have no pictures. The time of the store is its own, plus the jumps that a trial makes.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from salun_core.data import DataSpec, load_data
from salun_core.pods import ends as pod_ends
from salun_core.pods import steps as pod_steps
from salun_core.pods.pod import Pod
from salun_core.pods.reference import write_reference
from salun_core.report import plots, render
from salun_core.steps.outcome import OutcomeRecord, read_outcome
from salun_core.storage import s3
from salun_core.storage.objects import StoredObject
from salun_core.storage.s3 import S3Store, make_client
from salun_core.tasks import TASKS
from tests.reliability import journal
from tests.support import toy_task

LINE = "toy"
STEPS = ("claim", "fetch", "mask", "unlearn", "evaluate", "gate", "conclude")
CALLS = {
    **{"claim": 45, "fetch": 19, "mask": 28, "unlearn": 30, "evaluate": 31},
    **{"gate": 130, "conclude": 1, "settle": 28},
}
"""About how many calls to the store a step makes; a kill that comes later than the last one is one at the end."""
SECONDS = {
    **{"claim": 0.4, "fetch": 0.3, "mask": 0.5, "unlearn": 0.6, "evaluate": 0.8},
    **{"gate": 1.2, "conclude": 0.1, "settle": 0.3},
}
INTERNAL = 70
"""Exit code of a step that raised what no step should."""
_WRITES = ("_write", "delete", "upload")


@dataclass(frozen=True)
class Moment:
    """When a step is killed, or suspended.

    Args:
        step: its name.
        call: number of the call to the store, from 1; 0 before the process begins.
        after: whether after the call, not before it.
        seconds: kill it after so long, wherever it is; 0 for a call.
        signal: what ends it, or suspends it.
    """

    step: str
    call: int = 0
    after: bool = False
    seconds: float = 0.0
    signal: int = signal.SIGKILL


class Wire:
    """What a process does around each call to the store: count, note, move the time, and die.

    Args:
        folder: of the trial, with its journal and the jumps of its clock.
        moment: when to die; None for not at all.
    """

    def __init__(self, folder: Path, moment: Moment | None = None) -> None:
        self.folder, self.moment = folder, moment
        self.count, self.hit = 0, False

    def around(self, begins: bool) -> None:
        """Count a call, and die before or after it if it is the one."""
        self.count += begins
        if (
            self.moment
            and not self.moment.seconds
            and (self.count, not begins) == (self.moment.call, self.moment.after)
        ):
            self.die()

    def die(self) -> None:
        """Be killed, or be suspended once."""
        if self.moment and not self.hit:
            self.hit = True
            os.kill(os.getpid(), self.moment.signal)

    def jumps(self) -> Iterator[tuple[int, int]]:
        """Yield the whole seconds at which the store's clock jumped, and how far."""
        path = self.folder / "jumps"
        if path.exists():
            for line in path.read_text().splitlines():
                at, seconds = line.split()
                yield int(at), int(seconds)

    def moved(self, when: datetime) -> datetime:
        """Return the store's time for a time of the server."""
        return when + timedelta(seconds=sum(seconds for at, seconds in self.jumps() if when.timestamp() >= at))


_wire: list[Wire] = []
_unused: list[object] = []
_imported: set[str] = set()  # steps whose modules this process has imported


def now(folder: Path) -> float:
    """Return the store's time, in seconds."""
    return time.time() + sum(seconds for _, seconds in Wire(folder).jumps())


def jump(folder: Path, seconds: int) -> None:
    """Let the store's clock jump at a full second, since its times have no fractions."""
    at = int(time.time()) + 1
    time.sleep(at - time.time() + 0.02)
    with (folder / "jumps").open("a") as file:
        file.write(f"{at} {seconds}\n")


def prepare() -> None:
    """Let this process, and all that are forked from it, use the toy task and the wire."""
    TASKS["toy"] = toy_task.ToyTask()
    load_data(DataSpec(source="digits"))
    plots.draw = lambda name, width, height, paint: "<svg></svg>"  # to draw takes longer than all else
    render._template()  # it is kept
    _unused.append(make_client())  # it has no connection yet, so that each process can use its copy
    for name in (*_WRITES, "download", "_fetch"):
        setattr(S3Store, name, _wired(name, getattr(S3Store, name)))
    listed = S3Store.list

    def listing(self: S3Store, prefix: str) -> Iterator[object]:
        found = list(listed(self, prefix))
        for wire in _wire:
            wire.around(begins=True)
            wire.around(begins=False)
        yield from found

    S3Store.list = listing


def _wired(name: str, real: Callable[..., object]) -> Callable[..., object]:
    def call(self: S3Store, *args: object, **kwargs: object) -> object:
        if not _wire:
            return real(self, *args, **kwargs)
        (wire,) = _wire
        wire.around(begins=True)
        done = real(self, *args, **kwargs)
        if name == "_write":
            journal.note(wire.folder / "journal", args[0], args[1])
        if name == "_fetch" and done is not None:
            found, writer = done
            served = wire.moved(found.served) if found.served else None
            done = StoredObject(found.data, found.etag, wire.moved(found.modified), served), writer
        wire.around(begins=False)
        return done

    return call


class Run:
    """A run of the pipeline, as the controller of the Workflow drives it.

    Args:
        pod: the run.
        folder: of the trial.
        policy: file of the gate policy.
    """

    def __init__(self, pod: Pod, folder: Path, policy: Path) -> None:
        self.pod, self.folder, self.policy = pod, folder, policy
        self.made: dict[str, Path] = {}
        self.attempts = self.kills = 0
        self.stopped = 0
        self.codes: list[tuple[str, int]] = []

    @property
    def name(self) -> str:
        """Its id."""
        return self.pod.run

    @property
    def ended_by_itself(self) -> bool:
        """Whether its last step ended with an error of its own, and was not killed."""
        return bool(self.codes) and self.codes[-1][1] > 0

    @property
    def claimed(self) -> pod_steps.Claimed:
        """What its first step returned."""
        return pod_steps.Claimed(**json.loads((self.made["claim"] / "claimed.json").read_text()))

    def outcome(self) -> OutcomeRecord | None:
        """Return its outcome."""
        return read_outcome(self.pod.store, self.name)

    def go(self, first: str = "claim", moment: Moment | None = None, last: str = "conclude") -> str | None:
        """Run the steps from one on, and return the one that did not succeed; None at the end."""
        for name in STEPS[STEPS.index(first) : STEPS.index(last) + 1]:
            if not self._due(name):
                continue
            chosen = moment if moment and moment.step == name else None
            if chosen and not chosen.call and not chosen.seconds:
                self.kills += 1
                return name  # its pod never began
            if self.step(name, chosen):
                return name
        return None

    def _due(self, name: str) -> bool:
        if name == "claim":
            return True
        claimed = self.claimed
        return bool(claimed.requests or (name == "conclude" and claimed.code))

    def step(self, name: str, moment: Moment | None = None) -> int:
        """Do a step in a process, and return its exit code; a negative one is a signal. Only a success has outputs."""
        self.attempts += 1
        place = self.folder / self.name / f"{self.attempts}-{name}"
        place.mkdir(parents=True)
        process = os.fork()
        if not process:
            _in_child(self, name, place, moment)
        return self._wait(process, name, place)

    def wake(self) -> int:
        """Let the suspended step go on, and return its exit code."""
        process, name, place = self._asleep
        os.kill(process, signal.SIGCONT)
        return self._wait(process, name, place)

    def _wait(self, process: int, name: str, place: Path) -> int:
        _, status = os.waitpid(process, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            self._asleep = process, name, place
            self.stopped = process
            return -signal.SIGSTOP
        self.stopped = 0
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self.kills += code < 0
        self.codes.append((name, code))
        if not code:
            self.made[name] = place
            _import_for(name, place)
        return code

    def exit_handler(self, state: str, moment: Moment | None = None) -> int:
        """Run the exit handler, and return its exit code."""
        self.state = state
        if moment and not moment.call and not moment.seconds:
            self.kills += 1
            return -signal.SIGKILL
        return self.step("settle", moment)

    def form(self) -> dict[str, object]:
        """Return the form's parameters that the first steps take."""
        recipe = {"method": "ascent", "density": 0.5, "method_config": '{"epochs": 1}'}
        return {**recipe, "store_uri": self.pod.store_uri, "model_line": LINE, "policy_uri": str(self.policy)}


def _import_for(name: str, place: Path) -> None:
    """Import what the first process of a step had to import, so that the next ones have it."""
    if name not in _imported:
        _imported.add(name)
        for module in (place / "modules").read_text().splitlines():
            with suppress(Exception):
                importlib.import_module(module)


def _in_child(run: Run, name: str, place: Path, moment: Moment | None) -> None:
    code = INTERNAL
    try:
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        s3.shared_client = lambda: _unused[0]
        run.pod = replace(run.pod)
        _wire[:] = [Wire(run.folder, moment)]
        if moment and moment.seconds:
            signal.setitimer(signal.ITIMER_REAL, moment.seconds)  # the signal ends a process that does not handle it
        _STEPS[name](run, place)
        if name not in _imported:
            (place / "modules").write_text("\n".join(sorted(sys.modules)))
        _wire[0].die()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:  # noqa: BLE001 - of any kind: the parent counts it
        traceback.print_exc()
    finally:
        (place / "calls").write_text(str(_wire[0].count if _wire else 0))
        sys.stderr.flush()
        os._exit(code)


def _claim(run: Run, place: Path) -> None:
    given = {**run.form(), "min_requests": 1}
    claimed = pod_steps.claim(run.pod, given, str(place / "summary.md"))
    (place / "claimed.json").write_text(json.dumps(asdict(claimed)))


def _fetch(run: Run, place: Path) -> None:
    found = run.claimed
    recipe = {name: getattr(found, name) for name in ("method", "density", "method_config", "forget_manifest_uri")}
    write_reference(pod_steps.fetch_model(run.pod, {**run.form(), **recipe})[0], place / "made")


def _mask(run: Run, place: Path) -> None:
    found = run.claimed
    given = str(run.made["fetch"] / "made")
    made = pod_steps.compute_mask(run.pod, given, found.method, found.density, found.method_config)
    write_reference(made, place / "made")


def _unlearn(run: Run, place: Path) -> None:
    found = run.claimed
    made = pod_steps.unlearn(run.pod, str(run.made["mask"] / "made"), found.method, found.method_config, 0)
    write_reference(made, place / "made")


def _evaluate(run: Run, place: Path) -> None:
    made, _ = pod_steps.evaluate(run.pod, str(run.made["unlearn"] / "made"), str(place / "report.html"))
    write_reference(made, place / "made")


def _gate(run: Run, place: Path) -> None:
    files = str(place / "report.html"), str(place / "summary.md")
    made = pod_steps.gate_publish(run.pod, str(run.made["evaluate"] / "made"), str(run.policy), *files)
    write_reference(made, place / "made")


def _conclude(run: Run, place: Path) -> None:
    pod_ends.conclude(run.pod)


def _settle(run: Run, place: Path) -> None:
    pod_ends.settle(run.pod, run.state, "")


_STEPS = {
    **{"claim": _claim, "fetch": _fetch, "mask": _mask, "unlearn": _unlearn},
    **{"evaluate": _evaluate, "gate": _gate, "conclude": _conclude, "settle": _settle},
}
