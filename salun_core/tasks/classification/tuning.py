"""Step 3 with a search: settings are found on held-out data, within the margins of the gate's policy."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from salun_core.errors import ConflictError, DataError, GateRefusedError, ModelError
from salun_core.evaluation import Evidence, Metric
from salun_core.evaluation.evidence import Forgotten, Integrity, Measured, TuningFacts
from salun_core.gate import GateDecision, Policy, Verdict, decide, load_policy
from salun_core.methods.classification import METHODS, UnlearnResult, pick_device
from salun_core.methods.distributed import SINGLE_PROCESS
from salun_core.methods.method import get_method
from salun_core.saliency import SaliencyMask
from salun_core.steps.observe import RunRef
from salun_core.steps.sharding import forget_scores
from salun_core.steps.used_mask import BESIDE
from salun_core.storage import open_store
from salun_core.storage.keys import run_key
from salun_core.tasks.classification.inputs import Inputs
from salun_core.tasks.resolve import AUTO, read_policy
from salun_core.tuning import (
    ConstraintResult,
    Problem,
    Sets,
    Tuned,
    TuningLog,
    parse_budget,
    tune,
)
from salun_core.tuning.search import OnTrial, passes_of
from salun_core.tuning.space import Choice, Space

LOG, UNBOUNDED = "tuning.json", "none: the objective alone decides"
OnChosen = Callable[[int], None]
_RETAIN_DRAW = 500  # images of D_r at least; the order of a split makes the first ones a fair draw


@dataclass(frozen=True)
class TuningOptions:
    """How to search.

    Args:
        budget: passes (`200000`), wall clock (`90s`, `15m`, `2h`) or epochs over all training images (`20e`).
        policy_uri: whose margins bound the search: the gate's.
        on_trial: called after each trial.
        bounded: False: no policy bounds the search, and the nearest setting is taken. For a comparison, never for
            what is to be published.
        density: of the mask, where it is not to be searched for.
        random_mask_seed: the control: random masks of this seed in place of the saliency's, which cost no pass.
        on_chosen: called with the passes that the chosen setting alone costs: its scores and its epochs.
    """

    budget: str
    policy_uri: str = AUTO
    on_trial: OnTrial | None = field(default=None, compare=False)
    bounded: bool = True
    density: float | None = None
    random_mask_seed: int | None = None
    on_chosen: OnChosen | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TunedRun:
    """A model whose settings were searched for.

    Args:
        result: model, configuration and history; seconds and passes of the whole search.
        mask: that it was trained under, with its provenance; None for a method without a mask.
        facts: for `run.json`.
        beside: files for the model folder: what was tried, and the mask.
    """

    result: UnlearnResult
    mask: SaliencyMask | None
    facts: TuningFacts
    beside: dict[str, bytes]


def run_tuning(
    inputs: Inputs, method: str, overrides: Mapping[str, Any], wish: TuningOptions, run: RunRef | None = None
) -> TunedRun:
    """Search for the settings of a method.

    The scores are computed once, as `salun mask` computes them, and give the masks of all densities. Test data are
    not looked at.

    Args:
        inputs: the original model, its data and the forget set.
        method: a name of `METHODS`.
        overrides: what the user has set; it is not searched for, and `epochs` is the most to run.
        wish: budget and policy.
        run: of the deletion ledger; a refusal leaves its decision there, as the gate's does, so that the next recipe
            has its turn.

    Returns:
        The model and what was tried.

    Raises:
        UsageError: a wrong method or configuration, a budget too small, or a split without validation samples.
        GateRefusedError: no setting stays within the policy.
        ModelError: no policy bounds the search, and no trial had a model.
    """
    network = inputs.original.model
    normalised = any(isinstance(module, _BatchNorm) for module in network.modules())
    space = Space.of(method, overrides, wish.density, normalised)
    device = pick_device(str(overrides.get("device", "auto")))
    sets = _sets(inputs, device)
    budget = parse_budget(wish.budget, len(inputs.forget) + len(inputs.retain))
    judge = PolicyConstraint.of(inputs, wish.policy_uri if wish.bounded else None)
    started = time.perf_counter()
    network = network.to(device)
    salient = get_method(METHODS, method).needs_mask and wish.random_mask_seed is None
    scores = forget_scores(network, inputs.forget, device, SINGLE_PROCESS) if salient else None
    scored = time.perf_counter() - started
    problem = Problem(
        model=network,
        space=space,
        images=(inputs.forget.to(device), inputs.retain.to(device)),
        sets=sets,
        judge=judge,
        scores=scores,
        budget=budget,
        seed=int(overrides.get("seed", 0)),
        spent=len(inputs.forget) if salient else 0,
        random_seed=wish.random_mask_seed,
    )
    tuned = tune(problem, wish.on_trial)
    if tuned.chosen is None:
        if judge.policy is None:
            raise ModelError("no setting gave a model", tuned.broken, "give a larger budget or other settings")
        if run and run.store_uri and run.run:
            _keep_refusal(run, judge, tuned)
        raise GateRefusedError(
            f"no setting stays within the policy {judge.name}, of {len(tuned.trials)} that were tried",
            tuned.broken,
            "give a larger budget or another method, or retrain; nothing was written",
        )
    return _tuned_run(inputs, problem, tuned, judge, scored, wish)


def _keep_refusal(run: RunRef, judge: PolicyConstraint, tuned: Tuned) -> None:
    verdict = Verdict(rule="tuning", threshold="a setting within the policy", passed=False, reason=tuned.broken)
    decision = GateDecision(
        passed=False,
        policy=judge.name,
        policy_digest=judge.digest,
        evidence_digest=judge.evidence({}).digest,
        summary=f"tuning: none of {len(tuned.trials)} settings stays within the policy: {tuned.broken}",
        verdicts=[verdict],
    )
    with suppress(ConflictError):  # an earlier attempt of this step left its own
        open_store(run.store_uri).put_new(run_key(run.run, "decision.json"), decision.model_dump_json().encode())


def _sets(inputs: Inputs, device: torch.device) -> Sets:
    nothing = DataError(
        "there are no held-out images to tune on",
        "the split has no validation samples of the kept classes",
        "train with `validation_fraction: 0.1` in the data spec; the test split is never used",
    )
    if not inputs.original.split.validation:
        raise nothing
    held_out = inputs.data.images("validation", inputs.original.normalisation)
    known = set(inputs.retain.labels.tolist()) - set(inputs.forget_set.classes)
    kept = [index for index, label in enumerate(held_out.labels.tolist()) if label in known]
    if not kept:
        raise nothing
    draw = inputs.retain.select(range(min(len(inputs.retain), max(_RETAIN_DRAW, len(kept)))))
    forget, retain, unseen = (part.to(device) for part in (inputs.forget, draw, held_out.select(kept)))
    emptied = set(inputs.forget.labels.tolist()) - set(inputs.retain.labels.tolist())  # such as that of a person
    return Sets(forget, retain, unseen, tuple(sorted(emptied | set(inputs.forget_set.classes))))


@dataclass(frozen=True)
class PolicyConstraint:
    """Checks the figures of a trial by those rules of a policy that held-out data can answer.

    Args:
        policy: whose rules; None: nothing is refused.
        forgotten: what is to be forgotten: rules may be for some kinds alone.
    """

    policy: Policy | None
    forgotten: Forgotten

    @property
    def name(self) -> str:
        """Of the policy; without one, in words that nothing bounds the search."""
        return self.policy.name if self.policy else UNBOUNDED

    @property
    def digest(self) -> str:
        """Of the policy; empty without one."""
        return self.policy.digest if self.policy else ""

    @classmethod
    def of(cls, inputs: Inputs, uri: str | None) -> PolicyConstraint:
        """Read the policy; None is none.

        Raises:
            UsageError: there is none, or it has faults.
        """
        forget_set, split = inputs.forget_set, inputs.original.split
        forgotten = Forgotten(
            count=len(forget_set.ids),
            train_count=len(split.train),
            kinds=forget_set.kinds,
            classes=forget_set.classes,
        )
        judge = cls(load_policy("classifier") if uri else None, forgotten)
        return judge if uri in (AUTO, None) else cls(read_policy(uri, judge.evidence({})), forgotten)

    def evidence(self, metrics: Mapping[str, Metric]) -> Evidence:
        """Return what the rules are asked about: the figures alone, of no model in particular."""
        return Evidence(
            created_at="",
            measured=Measured(before="", after="", dataset="", split="", forget_set=""),
            forgotten=self.forgotten,
            integrity=Integrity(weights=0, weights_changed=0, non_finite=0, buffers_changed=0),
            metrics=dict(metrics),
        )

    def __call__(self, metrics: Mapping[str, Metric]) -> ConstraintResult:
        """Check figures; a rule on a metric that only the evaluation measures waits for the gate."""
        if self.policy is None:
            return ConstraintResult([])
        verdicts = [
            verdict
            for verdict in decide(self.evidence(metrics), self.policy).verdicts
            if verdict.metric in metrics and verdict.margin is not None and not verdict.passed
        ]
        reasons = [f"{item.rule} {item.threshold.split(' ', 1)[-1]}: {item.actual:.4f}" for item in verdicts]
        return ConstraintResult(reasons, sum(-(item.margin or 0.0) for item in verdicts))

    def not_judged(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the metrics of the policy's rules for this kind of forget set that a trial does not measure."""
        kinds, rules = set(self.forgotten.kinds), self.policy.rules if self.policy else []
        rules = [rule for rule in rules if not rule.targets or kinds & set(rule.targets)]
        return sorted({rule.metric for rule in rules} - set(metrics))


def _tuned_run(
    inputs: Inputs, problem: Problem, tuned: Tuned, judge: PolicyConstraint, scored: float, wish: TuningOptions
) -> TunedRun:
    chosen = tuned.chosen
    assert chosen is not None
    mask = chosen.mask
    if mask is not None:
        digests = {"model_digest": inputs.original.digest, "forget_set_digest": inputs.forget_set.digest}
        seed = wish.random_mask_seed
        drawn = {} if seed is None else {"scores": "random", "seed": str(seed)}
        mask = mask.with_facts({**drawn, **digests, "seconds": f"{scored:.3f}"})
    record = tuned.trials[chosen.number]
    if wish.on_chosen:
        choice = Choice(record.settings, record.density, record.epochs)
        wish.on_chosen(problem.spent + passes_of(problem, choice, record.epochs))
    log = TuningLog(
        method=problem.space.method,
        seed=problem.seed,
        optimiser=f"optuna {version('optuna')}, Gaussian process",
        budget=problem.budget.text,
        policy=judge.name,
        policy_digest=judge.digest,
        not_judged=judge.not_judged(record.figures),
        held_out=len(problem.sets.held_out),
        chosen=chosen.number,
        trials=tuned.trials,
        passes=tuned.passes,
        seconds=tuned.seconds,
    )
    facts = TuningFacts(
        trials=len(tuned.trials),
        budget=log.budget,
        passes=log.passes,
        seconds=log.seconds,
        policy_digest=log.policy_digest,
        mask=mask.digest if mask else None,
    )
    beside = {LOG: (json.dumps(log.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()}
    if mask is not None:
        beside[BESIDE] = _bytes_of(mask)
    return TunedRun(chosen.result, mask, facts, beside)


def _bytes_of(mask: SaliencyMask) -> bytes:
    with tempfile.TemporaryDirectory(prefix="salun-mask-") as folder:
        mask.save(Path(folder, BESIDE))
        return Path(folder, BESIDE).read_bytes()
