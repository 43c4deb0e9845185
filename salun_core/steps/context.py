"""What the steps of one run share: the addresses, the open store, and the models and data once they are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from salun_core.data import LoadedData
from salun_core.data.split import SPLIT, PinnedSplit, read_excerpt
from salun_core.digest import check_digest, sha256_file
from salun_core.errors import SalunError, UsageError
from salun_core.evaluation import Evidence
from salun_core.gate import LEVELS, GateDecision
from salun_core.methods.distributed import ProcessGroup, joined
from salun_core.storage import FileStore, open_store
from salun_core.storage.leases import read_lease, renew
from salun_core.storage.local_files import list_tree
from salun_core.sweeps.runs import RunLog, RunStatus
from salun_core.tasks import TASKS, open_inputs, task_of
from salun_core.tasks.task import Inputs, Model, Task
from salun_core.telemetry.observe import observed
from salun_core.telemetry.push import StepMetrics
from salun_core.times import utc_clock

_BEGUN = {
    "compute_mask": RunStatus.MASKING,
    "unlearn": RunStatus.UNLEARNING,
    "evaluate": RunStatus.EVALUATING,
}


@dataclass(frozen=True)
class RunContext:
    """A run and what its steps have loaded so far.

    A process that runs all steps keeps one context, so that models and data are loaded once. Each component of a
    pipeline creates its own.

    Args:
        before: folder of the original model.
        forget_manifest_uri: address of the forget targets.
        model_line: for metrics, logs and reports.
        store_uri: `s3://bucket/prefix`; empty without a store.
        run: id of the run of the deletion ledger; empty if there is none.
        data: data set spec, if the data are in another place than the model card says.
        device: auto, cpu, cuda or cuda:N.
        loaded: data that this process has read already; used if they are those of the model.
        pinned: digests of the split that the first step of the run found; compared with those of the inputs.
        excerpt: file with the rows of the forget set, for a step that needs no others; `before` then has no split.
    """

    before: Path
    forget_manifest_uri: str
    model_line: str = "local"
    store_uri: str = ""
    run: str = ""
    data: str | None = None
    device: str = "auto"
    loaded: LoadedData | None = field(default=None, repr=False, compare=False)
    pinned: PinnedSplit | None = None
    excerpt: Path | None = None
    _candidates: dict[Path, tuple[dict[str, str], Model]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def store(self) -> FileStore:
        """The open store."""
        return open_store(self.store_uri)

    @cached_property
    def task(self) -> Task[Any]:
        """The task of the original model."""
        return task_of(self.before)

    @cached_property
    def inputs(self) -> Inputs[Any]:
        """The original model, its data and the forget set, all checked; see `open_inputs` for the errors."""
        excerpt = read_excerpt(self.excerpt, self.pinned) if self.excerpt and self.pinned else None
        inputs = open_inputs(self.before, self.forget_manifest_uri, self.data, self.loaded, excerpt)
        if self.pinned is not None:  # vacuous for an excerpt: the steps that have the whole split compare
            check_digest("the split that the run began with", self.pinned.digest, inputs.split.digest)
            check_digest("the split that the run keeps", self.pinned.kept_digest, inputs.kept_split.digest)
        return inputs

    def require_claimed(self, policy: str | None = None) -> None:
        """Check that the run still has the inputs that its record names; without a ledger there is nothing to check.

        The frozen forget set and the policy are files that somebody may replace while the run works. A run whose inputs
        changed ends without a verdict (IntegrityError), and its requests are queued again from the ledger: nothing of
        the replaced file gets into the line. `policy` is the digest of the gate policy, if it is about to be applied.
        """
        record = RunLog(self.store, utc_clock).read(self.run) if self.store_uri and self.run else None
        if record is None:
            return
        check_digest("the forget set that the run claimed", record.forget_sha256, self.inputs.forget_set.digest)
        if policy is not None and record.policy_digest is not None:
            check_digest("the policy that the run began with", record.policy_digest, policy)

    def candidate(self, after: Path) -> Model:
        """Return the model after. It is loaded again only if its files changed: their digests are always checked.

        In a run with a pinned split, the folder may lack its split. The card must then name the split before without
        the forget set. Such a folder can be evaluated and not published. UsageError if it is of another task than the
        original.
        """
        task = task_of(after)
        if task is not self.task:
            raise UsageError(
                f"the model after is a {task.description}",
                f"the model before is a {self.task.description}",
                "compare models of one kind",
            )
        digests = {name: sha256_file(after / name) for name in sorted(list_tree(after).files)}
        known = self._candidates.get(after)
        if known is None or known[0] != digests:
            absent = self.pinned is not None and SPLIT not in digests
            self._candidates[after] = known = digests, task.load(after, self.inputs.kept_split if absent else None)
        return known[1]

    def advance(self, to: RunStatus, step: str) -> None:
        """Record how far the run came, and renew the lease of its model line. Without a ledger it does nothing.

        A step that dies after this call leaves the run at its last status; the next sweep settles it. ConflictError if
        the run has ended: another process settled it, and its result is not wanted any more.
        """
        if not (self.store_uri and self.run):
            return
        log = RunLog(self.store, utc_clock)
        log.advance(self.run, to, step, f"{step} began")
        record = log.read(self.run)
        with suppress(SalunError):  # a lease only saves work; the check of the parent keeps the line consistent
            lease = read_lease(self.store, record.line) if record else None
            if lease is not None and (lease.holder, lease.released) == (self.run, False):
                renew(self.store, lease)

    @contextmanager
    def observed(self, step: str) -> Iterator[StepMetrics]:
        """Observe a step of this run: log it, push its metrics, and record that it began."""
        with observed(step, self.model_line, self.run) as metrics:
            if step in _BEGUN:
                self.advance(_BEGUN[step], step)
            yield metrics

    @contextmanager
    def distributed(self, step: str) -> Iterator[tuple[StepMetrics, ProcessGroup]]:
        """Observe a step and join the processes that torchrun started; only the first one logs, records and pushes.

        PeerError if another process failed.
        """
        group = ProcessGroup.from_environment()
        if group.main:
            with self.observed(step) as metrics, joined(group):
                yield metrics, group
        else:
            with joined(group):
                yield StepMetrics(), group

    def require_same_inputs(self, group: ProcessGroup) -> None:
        """Check that all processes have the same model and forget set. IntegrityError if they do not."""
        group.require_same("model or forget set", " ".join(self.inputs.digests.values()))


def record_evidence(metrics: StepMetrics, evidence: Evidence, decision: GateDecision | None = None) -> None:
    """Set the metrics that evidence and the gate's decision give; a missing share is left out."""
    label = method_label(evidence.run.method)

    def after(name: str) -> float | None:
        return evidence.metrics[name].after if name in evidence.metrics else None

    wrong = after("UA")
    metrics.record("salun_forget_accuracy_ratio", None if wrong is None else 1.0 - wrong, method=label)
    metrics.record("salun_retain_accuracy_ratio", after("RA"), method=label)
    metrics.record("salun_test_accuracy_ratio", after("TA"), method=label)
    metrics.record("salun_membership_attack_ratio", after("MIA"), method=label)
    metrics.record("salun_mask_density_ratio", evidence.run.density, method=label)
    metrics.record("salun_gate_passed", None if decision is None else float(decision.passed), method=label)


def record_assurance(metrics: StepMetrics, method: str, decision: GateDecision) -> None:
    """Set the metrics of a decision's assurance level and of the figures behind it.

    A decision that refused has no level.
    """
    label = method_label(method)
    for level in LEVELS:
        metrics.record("salun_assurance_level", float(decision.level == level), method=label, level=level)
    metrics.record("salun_assurance_margin_ratio", decision.margin, method=label)
    metrics.record("salun_assurance_samples", decision.n, method=label)
    metrics.record("salun_assurance_power_ratio", decision.power, method=label)


def method_label(method: str) -> str:
    """Return the value of the metric label `method`: a method that ships, or `other` for plug-ins."""
    return method if any(method in task.methods for task in TASKS.values()) else "other"
