"""Search for a classifier's settings on held-out data, within the margins of the gate policy."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from salun_core.errors import DataError, GateRefusedError, ModelError
from salun_core.evaluation import Evidence, Metric
from salun_core.evaluation.evidence import (
    EVALUATED,
    Forgotten,
    Integrity,
    Measured,
    TuningFacts,
)
from salun_core.gate import Cause, GateDecision, Policy, Refusal, Verdict, decide, load_policy
from salun_core.methods.config import pick_device
from salun_core.methods.distributed import SINGLE_PROCESS
from salun_core.methods.method import resolve_config
from salun_core.saliency import SaliencyMask
from salun_core.tasks.classification.inputs import ClassifierInputs
from salun_core.tasks.masks import TUNED_MASK
from salun_core.tasks.resolve import AUTO, read_policy
from salun_core.tasks.task import TunedRun, TuningOptions
from salun_core.tuning import ConstraintResult, Problem, Sets, Tuned, TuningLog, parse_budget, tune
from salun_core.tuning.search import passes_of
from salun_core.tuning.space import Choice, spaces_of

if TYPE_CHECKING:
    from salun_core.tasks.classification import ClassificationTask

TUNING_LOG, UNBOUNDED = "tuning.json", "none: the objective alone decides"
_RETAIN_DRAW = 500  # minimum images of D_r; splits are ordered by digest, so the first images are a random sample
_AFTER_SEARCH = "give a larger --tune-budget or another method, or retrain: --method retrain"


def search(
    task: ClassificationTask,
    inputs: ClassifierInputs,
    method: str,
    overrides: Mapping[str, Any],
    options: TuningOptions,
) -> TunedRun:
    """Search for the settings of a method, or for a method and its settings.

    `method` may name several with commas between them, or `auto`; `epochs` of the overrides is the maximum. The scores
    are computed once, as in the mask step, and give the masks of all densities. The search does not use the test data.
    GateRefusedError if no setting satisfies the policy; ModelError if there is no policy and no trial gave a model.
    """
    network = inputs.original.model
    normalised = any(isinstance(module, _BatchNorm) for module in network.modules())
    spaces = spaces_of(method, overrides, options.density, normalised)
    device = pick_device(str(overrides.get("device", "auto")))
    sets = _sets(inputs, device)
    budget = parse_budget(options.budget, len(inputs.forget) + len(inputs.retain))
    constraint = PolicyConstraint.of(inputs, options.policy_uri if options.bounded else None)
    started = time.perf_counter()
    masked = [space.method for space in spaces if space.densities] if options.random_mask_seed is None else []
    scores = None
    if masked:  # once for all methods: they depend on the model and D_f alone
        config = resolve_config(task.methods, masked[0], overrides)
        scores = task.score(inputs, config, device, SINGLE_PROCESS).values
    scored = time.perf_counter() - started
    problem = Problem(
        model=network.to(device),
        method=method,
        spaces=spaces,
        images=(inputs.forget.to(device), inputs.retain.to(device)),
        sets=sets,
        constraint=constraint,
        scores=scores,
        budget=budget,
        seed=int(overrides.get("seed", 0)),
        spent=len(inputs.forget) if masked else 0,
        random_seed=options.random_mask_seed,
    )
    tuned = tune(problem, options.on_trial)
    if tuned.chosen is None:
        if constraint.policy is None:
            raise ModelError("no setting gave a model", tuned.broken, "give a larger budget or other settings")
        if options.on_refusal:
            options.on_refusal(_refusal(constraint, tuned))
        raise GateRefusedError(
            f"no setting satisfies the policy {constraint.name}, of {len(tuned.trials)} that were tried",
            tuned.broken,
            f"{_AFTER_SEARCH}; nothing was written",
        )
    return _tuned_run(inputs, problem, tuned, constraint, scored, options)


def _refusal(constraint: PolicyConstraint, tuned: Tuned) -> GateDecision:
    """Return a decision in the form of the gate's, so that a sweep tries its next recipe.

    It has the causes of all rules that the nearest trial breaks. If every trial diverged, the search did damage.
    """
    nearest = tuned.nearest
    broken = zip(nearest.refused, nearest.causes, strict=True) if nearest else [(tuned.broken, Cause.DAMAGED)]
    words = f"none of {len(tuned.trials)} settings satisfies the policy"
    verdicts = []
    for why, cause in broken:
        figures = f"the closest one breaks {why}" if nearest else why
        refusal = Refusal(words=words, figures=figures, cause=cause, next=_AFTER_SEARCH)
        wanted = "a setting within the policy"
        verdicts.append(Verdict(rule="tuning", threshold=wanted, passed=False, reason=why, refusal=refusal))
    return GateDecision(
        passed=False,
        policy=constraint.name,
        policy_digest=constraint.digest,
        evidence_digest=constraint.evidence({}).digest,
        summary=f"tuning: {words}: {tuned.broken}",
        verdicts=verdicts,
    )


def _sets(inputs: ClassifierInputs, device: torch.device) -> Sets:
    nothing = DataError(
        "there are no held-out images to tune on",
        "the split has no validation samples of the kept classes",
        "train with `validation_fraction: 0.1` in the data spec; the test split is never used",
    )
    if not inputs.split.validation:
        raise nothing
    held_out = inputs.data.images("validation", inputs.original.normalisation)
    known = set(inputs.retain.labels.tolist())
    kept = [index for index, label in enumerate(held_out.labels.tolist()) if label in known][:EVALUATED]
    if not kept:
        raise nothing
    draw = inputs.retain.select(range(min(len(inputs.retain), max(_RETAIN_DRAW, len(kept)))))
    forget, retain, unseen = (part.to(device) for part in (inputs.forget, draw, held_out.select(kept)))
    return Sets(forget, retain, unseen, inputs.emptied)


@dataclass(frozen=True)
class PolicyConstraint:
    """Checks a trial's metrics against the policy rules that held-out data can decide.

    Without a policy all is allowed.
    """

    policy: Policy | None
    forgotten: Forgotten

    @property
    def name(self) -> str:
        """Name of the policy, or a note that the search has no policy."""
        return self.policy.name if self.policy else UNBOUNDED

    @property
    def digest(self) -> str:
        """Digest of the policy; empty without a policy."""
        return self.policy.digest if self.policy else ""

    @classmethod
    def of(cls, inputs: ClassifierInputs, uri: str | None) -> PolicyConstraint:
        """Read the policy; without an address, everything is allowed.

        UsageError if the policy does not exist or has faults.
        """
        own = cls(load_policy("classifier") if uri else None, inputs.forgotten())
        return own if uri in (AUTO, None) else cls(read_policy(uri, own.evidence({})), own.forgotten)

    def evidence(self, metrics: Mapping[str, Metric]) -> Evidence:
        """Return the metrics as evidence without a model."""
        return Evidence(
            created_at="",
            measured=Measured(before="", after="", dataset="", split="", forget_set=""),
            forgotten=self.forgotten,
            integrity=Integrity(weights=0, weights_changed=0, non_finite=0, buffers_changed=0),
            metrics=dict(metrics),
        )

    def __call__(self, metrics: Mapping[str, Metric]) -> ConstraintResult:
        """Check metrics; rules on metrics that only the evaluation measures are left to the gate."""
        if self.policy is None:
            return ConstraintResult([])
        verdicts = [
            verdict
            for verdict in decide(self.evidence(metrics), self.policy).verdicts
            if verdict.metric in metrics and verdict.margin is not None and not verdict.passed
        ]
        reasons = [f"{item.rule} {item.threshold.split(' ', 1)[-1]}: {item.actual:.4f}" for item in verdicts]
        causes = [item.refusal.cause for item in verdicts if item.refusal]  # a failed rule has a refusal
        return ConstraintResult(reasons, sum(-(item.margin or 0.0) for item in verdicts), causes)

    def unmeasured(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the metrics that the policy's rules for this kind of forget set need and a trial does not measure."""
        kinds, rules = set(self.forgotten.kinds), self.policy.rules if self.policy else []
        rules = [rule for rule in rules if not rule.targets or kinds & set(rule.targets)]
        return sorted({rule.metric for rule in rules} - set(metrics))


def _tuned_run(
    inputs: ClassifierInputs,
    problem: Problem,
    tuned: Tuned,
    constraint: PolicyConstraint,
    scored: float,
    options: TuningOptions,
) -> TunedRun:
    chosen = tuned.chosen
    assert chosen is not None
    mask = chosen.mask.with_facts({**inputs.digests, "seconds": f"{scored:.3f}"}) if chosen.mask else None
    record = tuned.trials[chosen.number]
    if options.on_chosen:
        choice = Choice(chosen.result.method, record.settings, record.density, record.epochs)
        options.on_chosen((problem.spent if mask else 0) + passes_of(problem, choice, record.epochs))
    log = TuningLog(
        method=problem.method,
        chosen_method=chosen.result.method,
        not_tried=tuned.not_tried,
        seed=problem.seed,
        optimiser=f"optuna {version('optuna')}, Gaussian process",
        budget=problem.budget.text,
        policy=constraint.name,
        policy_digest=constraint.digest,
        not_judged=constraint.unmeasured(record.figures),
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
        method=problem.method if len(problem.spaces) > 1 else None,
    )
    extra = {TUNING_LOG: (json.dumps(log.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()}
    if mask is not None:
        extra[TUNED_MASK] = _bytes_of(mask)
    return TunedRun(chosen.result, mask, facts, extra)


def _bytes_of(mask: SaliencyMask) -> bytes:
    with tempfile.TemporaryDirectory(prefix="salun-mask-") as folder:
        mask.save(Path(folder, TUNED_MASK))
        return Path(folder, TUNED_MASK).read_bytes()
