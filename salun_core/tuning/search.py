"""The search: a Gaussian process proposes settings; the best trial on held-out data that the policy allows wins."""

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
from salun_core.methods.classification import METHODS, expected_passes
from salun_core.methods.classification.method import ClassifierContext
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.method import UnlearnResult, get_method
from salun_core.saliency import SaliencyMask
from salun_core.tuning.budget import Budget, TrialRecord
from salun_core.tuning.objective import Constraint, Sets
from salun_core.tuning.space import Choice, Space
from salun_core.tuning.trial import CandidateEvaluator, EpochCallback, Measurement, Trial, run_trial

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial as Suggestion

OnTrial = Callable[[TrialRecord], None]
_FAILED = 10.0  # value of a trial without metrics: worse than any trial that breaks rules
_RANDOM = 3  # the start and two random trials, then the Gaussian process; small, as a budget is a few dozen epochs
_WARMUP = 2  # first epoch after which a trial may be pruned: the first predicts little, as forgetting precedes repair
_STARTUP = 2  # finished trials before the pruner compares with their median


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of a search.

    Args:
        model: the original, on the images' device; unchanged.
        space: the method and its search space.
        images: D_f and D_r.
        sets: images for the measurement of trials.
        constraint: checks metrics against the policy.
        scores: saliency by parameter name, source of the masks of all densities; None for a method without a mask,
            and for random masks.
        budget: maximum cost.
        seed: seed of the optimiser.
        spent: passes already spent on the scores.
        random_seed: seed of random masks that replace the saliency masks, for a comparison.
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

    def mask(self, choice: Choice) -> SaliencyMask | None:
        """Return the mask of a choice; None for a method without a mask."""
        if choice.density is None:
            return None
        if self.random_seed is not None:
            shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
            return SaliencyMask.random(shapes, choice.density, self.random_seed)
        assert self.scores is not None  # a method with a mask has either a random seed or scores
        return SaliencyMask.from_scores(self.scores, choice.density)


@dataclass(frozen=True)
class Chosen:
    """The best trial that the policy allows.

    Args:
        number: number of the trial.
        result: its model, configuration and history; seconds and passes of the whole search.
        mask: mask of its training.
    """

    number: int
    result: UnlearnResult
    mask: SaliencyMask | None


@dataclass(frozen=True)
class Tuned:
    """Result of a search.

    Args:
        trials: all trials, at least one.
        passes: passes of all trials.
        seconds: wall-clock time.
        chosen: the best trial; None if the policy allows none.
    """

    trials: list[TrialRecord]
    passes: int
    seconds: float
    chosen: Chosen | None

    @property
    def broken(self) -> str:
        """The rules that the closest trial breaks, if no trial was chosen."""
        measured = [trial for trial in self.trials if trial.distance is not None]
        nearest = min(measured, key=lambda trial: (len(trial.refused), trial.distance or 0.0), default=None)
        return "; ".join(nearest.refused) if nearest else "every trial failed or was ended before it had a model"


def passes_of(problem: Problem, choice: Choice, epochs: int) -> int:
    """Return the cost of a run with this number of epochs, in image passes.

    Args:
        problem: provides the method and the images.
        choice: settings of the run.
        epochs: number of epochs; 0 costs nothing.
    """
    if epochs == 0:
        return 0
    config = problem.space.config(choice).model_copy(update={"epochs": epochs})
    forget, retain = problem.images
    with torch.no_grad():
        num_classes = int(problem.model(next(iter(forget.batches(1)))[0]).shape[1])
    row = get_method(METHODS, problem.space.method)
    held_out = problem.sets.held_out if row.reads_held_out else None
    context = ClassifierContext(forget, retain, num_classes, config, problem.model, held_out=held_out)
    return expected_passes(row, context)


def tune(problem: Problem, on_trial: OnTrial | None = None) -> Tuned:
    """Search for the best model that satisfies the policy until the budget is spent.

    The result is the model of the chosen trial, without further training. Unlearning with the chosen settings and mask
    gives the same weights.

    Args:
        problem: inputs of the search.
        on_trial: called after each trial.

    Returns:
        All trials and the chosen one.

    Raises:
        UsageError: the budget is too small for one trial.
        SalunError: Optuna is not installed.
    """
    begun = time.perf_counter()
    study = _study(problem.space, problem.seed)
    before = problem.sets.read(problem.model)
    evaluator = CandidateEvaluator(problem.model, problem.sets, before, problem.constraint)
    state = SearchState(problem, evaluator, problem.spent + problem.sets.passes)
    while True:
        suggestion = study.ask()
        choice = problem.space.draw(suggestion)
        least = state.passes + passes_of(problem, choice, 1 if problem.space.growing else choice.epochs)
        least += problem.sets.passes
        if not problem.budget.allows(least):
            break
        best = state.run(suggestion, choice).best
        study.tell(suggestion, min(best.value, _FAILED) if best else _FAILED)
        if on_trial:
            on_trial(state.trials[-1])
    if not state.trials:
        raise _too_small(problem, least)
    seconds = time.perf_counter() - begun
    return Tuned(state.trials, state.passes, seconds, state.chosen(seconds))


def _study(space: Space, seed: int) -> Study:
    try:
        import optuna
    except ImportError as error:
        raise SalunError("Optuna is not installed", str(error), "pip install 'optuna>=4'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=_WARMUP)
    with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
        sampler = optuna.samplers.GPSampler(n_startup_trials=_RANDOM, seed=seed, deterministic_objective=True)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.enqueue_trial(space.start())
    return study


@dataclass
class SearchState:
    """Trials so far, and the best of them.

    Args:
        problem: inputs of the search.
        evaluator: measures candidates.
        passes: passes spent so far.
        trials: all trials so far.
        best: the best allowed candidate with its configuration, history and choice; only its weights are kept in
            memory.
        best_number: number of its trial.
    """

    problem: Problem
    evaluator: CandidateEvaluator
    passes: int
    trials: list[TrialRecord] = field(default_factory=list)
    best: tuple[Measurement, UnlearnConfig, list[EpochRecord], Choice] | None = None
    best_number: int = -1

    def run(self, suggestion: Suggestion, choice: Choice) -> Trial:
        """Run one trial and record it."""
        problem, method = self.problem, self.problem.space.method
        config, reading = problem.space.config(choice), problem.sets.passes
        before = self.passes

        def go_on(seen: Measurement) -> bool:
            suggestion.report(seen.value, seen.epoch)
            spent = before + passes_of(problem, choice, seen.epoch + 1) + (seen.epoch + 1) * reading
            return problem.budget.allows(spent) and not suggestion.should_prune()

        callback = EpochCallback(self.evaluator, go_on, config.epochs)
        mask, held_out = problem.mask(choice), problem.sets.held_out
        trial = run_trial(method, config, problem.images, mask, callback, problem.space.growing, held_out)
        epochs = min(len(trial.history), config.epochs) if get_method(METHODS, method).edit is None else config.epochs
        if trial.state == "failed":
            epochs = min(epochs + 1, config.epochs)  # the failed epoch used budget too
        passes = passes_of(problem, choice, epochs) + len(trial.answers) * reading
        self.passes += passes
        self.trials.append(_record(len(self.trials), choice, trial, passes))
        best = trial.best
        if best is not None and not best.refused and (self.best is None or best.value < self.best[0].value):
            config = config.model_copy(update={"epochs": best.epoch})
            self.best = best, config, trial.history[: best.epoch], choice
            self.best_number = self.trials[-1].number
        return trial

    def chosen(self, seconds: float) -> Chosen | None:
        """Return the best allowed candidate as the result of an unlearning run that took `seconds`."""
        if self.best is None:
            return None
        best, config, history, choice = self.best
        model = copy.deepcopy(self.problem.model)
        model.load_state_dict(best.state)
        compared = compare_weights(self.problem.model, model)
        changed = compared.weights_changed / max(1, compared.weights)
        method = self.problem.space.method
        result = UnlearnResult(model.eval(), method, config, history, seconds, self.passes, changed)
        return Chosen(self.best_number, result, self.problem.mask(choice))


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


def _too_small(problem: Problem, needed: int) -> UsageError:
    if problem.budget.passes is None:
        why = f"it was over before the first trial, which needs {needed} passes"
    else:
        why = f"it is {problem.budget.passes} passes, and the first trial needs {needed}"
    return UsageError(f"the budget {problem.budget.text} is too small", why, "give a larger --tune-budget")
