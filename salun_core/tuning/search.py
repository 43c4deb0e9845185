"""The search: a Gaussian process chooses settings, trials are measured on held-out data, the best allowed one stays."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSet
from salun_core.errors import SalunError, UsageError
from salun_core.evaluation.evidence import EpochRecord
from salun_core.evaluation.integrity import compare_weights
from salun_core.methods.classification import METHODS, UnlearnConfig, UnlearnResult
from salun_core.methods.classification.method import MethodContext
from salun_core.methods.method import get_method
from salun_core.saliency import SaliencyMask
from salun_core.tuning.budget import Budget, TrialRecord
from salun_core.tuning.objective import Constraint, Sets
from salun_core.tuning.space import Choice, Space
from salun_core.tuning.trial import CandidateEvaluator, EpochCallback, Measured, Trial, run_trial

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial as Suggestion

OnTrial = Callable[[TrialRecord], None]
_FAILED = 10.0  # told of a trial without figures: worse than any that breaks rules
_RANDOM = 4  # trials before the optimiser learns from them: a budget is a few dozen epochs
_WARMUP = 1  # first epoch after which it may: the first alone says little, forgetting comes before repair
_STARTUP = 2  # finished trials before the median of the others ends one


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is searched for.

    Args:
        model: the original, on the device of the images; unchanged.
        space: the method and what may vary.
        images: D_f and D_r.
        sets: what trials are measured on.
        constraint: checks figures against the policy.
        scores: saliency by parameter name: the masks of all densities; None for a method without a mask, and for
            random masks.
        budget: the most to spend.
        seed: of the optimiser.
        spent: passes that were spent before, on the scores.
        random_seed: of random masks in place of the saliency's, for a comparison.
    """

    model: nn.Module
    space: Space
    images: tuple[ImageSet, ImageSet]
    sets: Sets
    constraint: Constraint
    scores: Mapping[str, Tensor] | None
    budget: Budget
    seed: int
    spent: int = 0
    random_seed: int | None = None


@dataclass(frozen=True)
class Chosen:
    """The best trial that the policy allows.

    Args:
        number: of the trial.
        result: its model, configuration and history; seconds and passes of the whole search.
        mask: that it was trained under.
    """

    number: int
    result: UnlearnResult
    mask: SaliencyMask | None


@dataclass(frozen=True)
class Tuned:
    """What the search came to.

    Args:
        trials: all that were tried, at least one.
        passes: of all of them.
        seconds: wall clock.
        chosen: the best one; None where the policy allows none.
    """

    trials: list[TrialRecord]
    passes: int
    seconds: float
    chosen: Chosen | None

    @property
    def broken(self) -> str:
        """The rules that the nearest trial breaks, where none was chosen."""
        nearest = min((t for t in self.trials if t.distance is not None), key=_nearness, default=None)
        return "; ".join(nearest.refused) if nearest else "every trial failed or was ended before it had a model"


@dataclass
class SearchState:
    """How far the search has come."""

    passes: int
    trials: list[TrialRecord] = field(default_factory=list)
    best: Measured | None = None
    config: UnlearnConfig | None = None
    choice: Choice | None = None
    history: list[EpochRecord] = field(default_factory=list)
    chosen: int = -1


def tune(problem: Problem, on_trial: OnTrial | None = None) -> Tuned:
    """Search until the budget is spent, for the best model that stays within the policy.

    The model is the one that its trial made, not trained again: unlearning with the chosen settings and mask gives
    the same bits. With a budget in passes the same seed finds the same settings.

    Args:
        problem: what is searched for.
        on_trial: called after each trial.

    Returns:
        All trials, and the chosen one.

    Raises:
        UsageError: the budget does not suffice for one trial.
        SalunError: Optuna is not installed.
    """
    begun = time.perf_counter()
    evaluator = CandidateEvaluator(problem.model, problem.sets, problem.sets.read(problem.model), problem.constraint)
    state = SearchState(problem.spent + problem.sets.passes)
    study = _study(problem)
    while True:
        suggestion = study.ask()
        choice = problem.space.draw(suggestion)
        if not problem.budget.allows(state.passes + _least(problem, choice)):
            break
        trial = _try(problem, evaluator, state, suggestion, choice)
        _tell(study, suggestion, trial)
        if on_trial:
            on_trial(state.trials[-1])
    if not state.trials:
        raise _too_small(problem, state.passes + _least(problem, choice))
    seconds = time.perf_counter() - begun
    return Tuned(state.trials, state.passes, seconds, _chosen(problem, state, seconds))


def _study(problem: Problem) -> Study:
    try:
        import optuna
    except ImportError as error:
        raise SalunError("Optuna is not installed", str(error), "pip install 'optuna>=4'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=_WARMUP)
    with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
        sampler = optuna.samplers.GPSampler(n_startup_trials=_RANDOM, seed=problem.seed, deterministic_objective=True)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    for point in problem.space.starts():
        study.enqueue_trial(point)
    return study


def _least(problem: Problem, choice: Choice) -> int:
    """Passes that a trial costs before it has an answer."""
    epochs = 1 if problem.space.growing else choice.epochs
    return passes_of(problem, choice, epochs) + problem.sets.passes


def passes_of(problem: Problem, choice: Choice, epochs: int) -> int:
    """Return what a run of so many epochs costs in images forward and backward.

    Args:
        problem: with the method and the images.
        choice: its settings.
        epochs: to run; 0 costs nothing.
    """
    if epochs == 0:
        return 0
    config = problem.space.config(choice).model_copy(update={"epochs": epochs})
    forget, retain = problem.images
    context = MethodContext(forget, retain, _classes(problem.model, forget), config, problem.model)
    return get_method(METHODS, problem.space.method).total_passes(context)


@torch.no_grad()
def _classes(model: nn.Module, images: ImageSet) -> int:
    inputs, _ = next(iter(images.batches(1)))
    return int(model(inputs).shape[1])


def _try(
    problem: Problem, evaluator: CandidateEvaluator, state: SearchState, suggestion: Suggestion, choice: Choice
) -> Trial:
    config = problem.space.config(choice)
    before = state.passes

    def go_on(seen: Measured) -> bool:
        suggestion.report(seen.value, seen.epoch)
        spent = before + passes_of(problem, choice, seen.epoch + 1) + (seen.epoch + 1) * problem.sets.passes
        return problem.budget.allows(spent) and not suggestion.should_prune()

    callback = EpochCallback(evaluator, go_on, config.epochs)
    method, growing = problem.space.method, problem.space.growing
    trial = run_trial(method, config, problem.images, _mask(problem, choice), callback, growing)
    epochs = len(trial.history) if get_method(METHODS, method).edit is None else config.epochs
    if trial.state == "failed":
        epochs = min(epochs + 1, config.epochs)  # the one that failed was paid for
    passes = passes_of(problem, choice, epochs) + trial.readings * problem.sets.passes
    state.passes += passes
    state.trials.append(_record(len(state.trials), choice, trial, passes))
    best = trial.best
    if best is not None and not best.refused and (state.best is None or best.value < state.best.value):
        state.best, state.choice, state.chosen = best, choice, state.trials[-1].number
        state.config = config.model_copy(update={"epochs": best.epoch})
        state.history = trial.history[: best.epoch]
    return trial


def _mask(problem: Problem, choice: Choice) -> SaliencyMask | None:
    if choice.density is None:
        return None
    if problem.random_seed is not None:
        shapes = {name: tuple(parameter.shape) for name, parameter in problem.model.named_parameters()}
        return SaliencyMask.random(shapes, choice.density, problem.random_seed)
    assert problem.scores is not None  # a method with a mask has one or the other
    return SaliencyMask.from_scores(problem.scores, choice.density)


def _tell(study: Study, suggestion: Suggestion, trial: Trial) -> None:
    best = trial.best
    study.tell(suggestion, min(best.value, _FAILED) if best else _FAILED)


def _record(number: int, choice: Choice, trial: Trial, passes: int) -> TrialRecord:
    best = trial.best
    finite = best is not None and math.isfinite(best.distance)
    fields = {
        "number": number,
        "settings": choice.settings,
        "density": choice.density,
        "epochs": best.epoch if best else 0,
        "epochs_run": len(trial.history),
        "state": trial.state,
        "figures": best.figures if best else {},
        "distance": best.distance if best and finite else None,
        "refused": best.refused if best else [],
        "passes": passes,
        "seconds": trial.seconds,
    }
    return TrialRecord.model_validate(fields)


def _chosen(problem: Problem, state: SearchState, seconds: float) -> Chosen | None:
    best, config, choice = state.best, state.config, state.choice
    if best is None or config is None or choice is None:
        return None
    model = copy.deepcopy(problem.model)
    model.load_state_dict(best.state)
    compared = compare_weights(problem.model, model)
    moved = compared.weights_changed / max(1, compared.weights)
    method = problem.space.method
    result = UnlearnResult(model.eval(), method, config, state.history, seconds, state.passes, moved)
    return Chosen(state.chosen, result, _mask(problem, choice))


def _nearness(trial: TrialRecord) -> tuple[int, float]:
    return len(trial.refused), trial.distance or 0.0


def _too_small(problem: Problem, needed: int) -> UsageError:
    if problem.budget.passes is None:
        why = f"it was over before the first trial, which needs {needed} passes"
    else:
        why = f"it is {problem.budget.passes} passes, and the first trial needs {needed}"
    return UsageError(f"the budget {problem.budget.text} is too small", why, "give a larger --tune-budget")
