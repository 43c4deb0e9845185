"""The search: a Gaussian process proposes settings; the best trial on held-out data that the policy allows wins.

Among several methods the budget is divided by successive halving: each gets its defaults first, then the better half of
them gets more trials, until one is left.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from salun_core.data.images import ImageSource
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
_FIRST = 2  # epochs of each method's first trial before methods are compared; no fewer than _WARMUP
_STARTS = 0.5  # share of the budget for the first trials of all methods; the others are not tried


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of a search.

    Args:
        spaces: the methods and their search spaces, in the order in which they are tried.
        sets: images for the measurement of trials.
        scores: saliency by parameter name, source of the masks of all densities; None for methods without a mask,
            and for random masks.
        seed: seed of the optimiser.
        spent: passes already spent on the scores.
        random_seed: seed of random masks that replace the saliency masks, for a comparison.
    """

    model: nn.Module
    method: str
    spaces: Sequence[Space]
    images: tuple[ImageSource, ImageSource]
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

    def config(self, choice: Choice) -> UnlearnConfig:
        """Return the configuration of a choice."""
        (space,) = (space for space in self.spaces if space.method == choice.method)
        return space.config(choice)


@dataclass(frozen=True)
class Chosen:
    """The best trial that the policy allows.

    Args:
        result: its model, configuration and history; seconds and passes of the whole search.
    """

    number: int
    result: UnlearnResult
    mask: SaliencyMask | None


@dataclass(frozen=True)
class Tuned:
    """Result of a search.

    Args:
        trials: all trials, at least one.
        chosen: the best trial; None if the policy allows none.
        not_tried: methods that the budget did not suffice for.
    """

    trials: list[TrialRecord]
    passes: int
    seconds: float
    chosen: Chosen | None
    not_tried: list[str]

    @property
    def nearest(self) -> TrialRecord | None:
        """The trial that breaks the fewest rules; None if none gave a model whose outputs are numbers."""
        measured = [trial for trial in self.trials if trial.distance is not None]
        return min(measured, key=lambda trial: (len(trial.refused), trial.distance or 0.0), default=None)

    @property
    def broken(self) -> str:
        """The rules that the nearest trial breaks, if no trial was chosen."""
        return "; ".join(self.nearest.refused) if self.nearest else "every trial diverged"


def passes_of(problem: Problem, choice: Choice, epochs: int) -> int:
    """Return the cost of a run with this number of epochs, in image passes; 0 epochs cost nothing."""
    if epochs == 0:
        return 0
    config = problem.config(choice).model_copy(update={"epochs": epochs})
    forget, retain = problem.images
    with torch.no_grad():
        num_classes = int(problem.model(next(iter(forget.select([0]).batches(1)))[0]).shape[1])
    row = get_method(METHODS, choice.method)
    held_out = problem.sets.held_out if row.reads_held_out else None
    context = ClassifierContext(forget, retain, num_classes, config, problem.model, held_out=held_out)
    return expected_passes(row, context)


def tune(problem: Problem, on_trial: OnTrial | None = None) -> Tuned:
    """Search for the best model that satisfies the policy until the budget is spent.

    The result is the model of the chosen trial, without further training. Unlearning with the chosen method, settings
    and mask gives the same weights. `on_trial` is called after each trial, and again after a trial that went on. A
    budget that is too small for one trial is a `UsageError`.
    """
    begun = time.perf_counter()
    before = problem.sets.read(problem.model)
    evaluator = CandidateEvaluator(problem.model, problem.sets, before, problem.constraint)
    state = SearchState(problem, evaluator, problem.spent + problem.sets.passes, on_trial)
    contenders = [Contender(state, space) for space in problem.spaces]
    tried = _halve(contenders) if len(contenders) > 1 else contenders
    while tried[0].step():
        pass
    if not state.trials:
        raise _too_small(problem, state.passes + tried[0].cost(1))
    seconds = time.perf_counter() - begun
    not_tried = [contender.space.method for contender in contenders if not contender.begun]
    return Tuned(state.trials, state.passes, seconds, state.chosen(seconds), not_tried)


def _halve(contenders: Sequence[Contender]) -> list[Contender]:
    """Drop the worse half of the methods after each round, until one is left, and return it.

    In the first round each method runs its defaults for a few epochs. The rest of the budget is divided equally between
    the rounds that follow, the last method's included. Within a round the methods take turns, and a trial that was
    interrupted goes on first. The order of the contenders decides where values are equal, and which are tried if the
    budget does not suffice for all.
    """
    state = contenders[0].state
    left: list[Contender] = []
    for contender in contenders:
        # The start of the first method must be able to end, so that a small budget gives what the defaults give.
        cost = contender.cost(_FIRST)
        used = state.problem.budget.used(state.passes + cost)
        if left and (used > _STARTS or not state.affords(cost + left[0].cost(None))):
            break
        if not contender.step(_FIRST):
            break
        left.append(contender)
        state.compares = len(left) > 1
    sizes = [max(2, math.ceil(len(left) / 2))]  # defaults alone do not decide: they may be too gentle to tell apart
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    for number, size in enumerate(sizes):
        ranked = sorted(left, key=lambda contender: contender.best)
        left = ranked[:size]
        for dropped in ranked[size:]:
            dropped.run = None  # its weights and the state of its optimiser
        if len(left) < 2:
            break
        used = state.problem.budget.used(state.passes)
        until = used + (1 - used) / (len(sizes) - number)
        while state.problem.budget.used(state.passes) < until and any([contender.step() for contender in left]):
            pass
    return left[:1] or [contenders[0]]


@dataclass
class Run:
    """A trial that is running, was interrupted, or has not begun yet.

    Args:
        number: of the trial in the log; None before it begins.
        passes: spent so far.
        seconds: wall clock so far.
        value: the smallest so far.
    """

    suggestion: Suggestion
    choice: Choice
    callback: EpochCallback
    number: int | None = None
    passes: int = 0
    seconds: float = 0.0
    interrupted: bool = True
    value: float = math.inf


@dataclass
class Contender:
    """One method of a search with the trials that an optimiser proposes.

    Args:
        best: the smallest value so far.
        run: the trial that comes next, if it is known.
    """

    state: SearchState
    space: Space
    best: float = math.inf
    run: Run | None = None

    @cached_property
    def study(self) -> Study:
        """The optimiser."""
        study = _study(self.space, self.state.problem.seed)
        if len(self.state.problem.spaces) > 1:
            study.enqueue_trial(self.space.mirror())
        return study

    @property
    def begun(self) -> bool:
        """Whether a trial has begun."""
        return self.best < math.inf

    def next_run(self) -> Run:
        """Return the trial to run next: one that was interrupted, else one that the optimiser proposes."""
        if self.run is not None and self.state.hopeless(self.run.callback):
            self._end(self.run)
        if self.run is None:
            suggestion = self.study.ask()
            choice = self.space.draw(suggestion)
            self.run = Run(suggestion, choice, EpochCallback(self.state.evaluator, lambda _: True, choice.epochs))
        return self.run

    def cost(self, limit: int | None) -> int:
        """Return the passes that the next trial costs up to an epoch, without those that it has spent.

        `limit` is the epoch; None is the last. A method whose last model alone is an answer always runs to its end.
        """
        choice, reading = self.next_run().choice, self.state.problem.sets.passes
        whole = limit is None or not self.space.growing
        epochs = choice.epochs if whole else min(limit or 0, choice.epochs)
        readings = epochs if self.space.growing else 1
        return passes_of(self.state.problem, choice, epochs) + readings * reading - self.next_run().passes

    def step(self, limit: int | None = None) -> bool:
        """Run the next trial, or let an interrupted one go on, up to the epoch `limit`; None never interrupts.

        False if the budget does not allow its next epoch; nothing was run then.
        """
        state, run = self.state, self.next_run()
        if not state.affords(self.cost(len(run.callback.history) + 1)):
            return False
        best = state.run(run, limit, self.space.growing).best
        run.value = min(best.value, _FAILED) if best else _FAILED
        self.best = min(self.best, run.value)
        if not run.interrupted:
            self._end(run)
        return True

    def _end(self, run: Run) -> None:
        self.study.tell(run.suggestion, run.value)
        self.run = None


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
        passes: passes spent so far.
        best: the best allowed candidate with its configuration, history and choice; only its weights are kept in
            memory.
        compares: whether trials of several methods are compared.
        least: the smallest value of all epochs so far.
    """

    problem: Problem
    evaluator: CandidateEvaluator
    passes: int
    on_trial: OnTrial | None = None
    trials: list[TrialRecord] = field(default_factory=list)
    best: tuple[Measurement, UnlearnConfig, list[EpochRecord], Choice] | None = None
    best_number: int = -1
    compares: bool = False
    least: float = math.inf

    def affords(self, passes: int) -> bool:
        """Return whether the budget allows so many passes more."""
        return self.problem.budget.allows(self.passes + passes)

    def hopeless(self, callback: EpochCallback) -> bool:
        """Return whether a trial among several methods will not reach the best epoch so far at its pace.

        Improvements usually become smaller, so the pace of the last epoch is more than what is to be expected. A trial
        is never hopeless before the epoch that it was promised.
        """
        values = [item.value for item in callback.seen]
        if not self.compares or len(values) < _WARMUP:
            return False
        pace = max(0.0, values[-2] - values[-1])
        return values[-1] - pace * (callback.last - len(values)) > self.least

    def run(self, run: Run, limit: int | None, growing: bool) -> Trial:
        """Run one trial, or let it go on, until the epoch `limit` (None: never interrupted), and record it.

        `growing` is whether each epoch of it is an answer.
        """
        problem, choice, callback = self.problem, run.choice, run.callback
        config, reading = problem.config(choice), problem.sets.passes
        others = self.passes - run.passes

        def go_on(seen: Measurement) -> bool:
            run.suggestion.report(seen.value, seen.epoch)
            self.least = min(self.least, seen.value)
            spent = others + passes_of(problem, choice, seen.epoch + 1) + (seen.epoch + 1) * reading
            if not problem.budget.allows(spent) or run.suggestion.should_prune() or self.hopeless(callback):
                return False
            run.interrupted = seen.epoch == limit
            return not run.interrupted

        callback.go_on, run.interrupted = go_on, False
        mask, held_out = problem.mask(choice), problem.sets.held_out
        trial = run_trial(choice.method, config, problem.images, mask, callback, growing, held_out)
        run.interrupted = run.interrupted and trial.state == "stopped" and callback.improves
        row = get_method(METHODS, choice.method)
        epochs = min(len(trial.history), config.epochs) if row.edit is None else config.epochs
        if trial.state == "failed":
            epochs = min(epochs + 1, config.epochs)  # the failed epoch used budget too
        run.passes = passes_of(problem, choice, epochs) + len(trial.answers) * reading
        run.seconds += trial.seconds
        self.passes = others + run.passes
        self._keep(run, trial, config)
        return trial

    def _keep(self, run: Run, trial: Trial, config: UnlearnConfig) -> None:
        """Record a trial, in the place of what was recorded before it went on, and keep the best candidate."""
        run.number = len(self.trials) if run.number is None else run.number
        self.trials[run.number : run.number + 1] = [_record(run, trial)]
        best = trial.best
        if best is not None and not best.refused and (self.best is None or best.value < self.best[0].value):
            config = config.model_copy(update={"epochs": best.epoch})
            self.best = best, config, trial.history[: best.epoch], run.choice
            self.best_number = run.number
        if self.on_trial:
            self.on_trial(self.trials[run.number])

    def chosen(self, seconds: float) -> Chosen | None:
        """Return the best allowed candidate as the result of an unlearning run that took `seconds`."""
        if self.best is None:
            return None
        best, config, history, choice = self.best
        model = copy.deepcopy(self.problem.model)
        model.load_state_dict(best.state)
        compared = compare_weights(self.problem.model, model)
        changed = compared.weights_changed / max(1, compared.weights)
        result = UnlearnResult(model.eval(), choice.method, config, history, seconds, self.passes, changed)
        return Chosen(self.best_number, result, self.problem.mask(choice))


def _record(run: Run, trial: Trial) -> TrialRecord:
    best = trial.best
    finite = best is not None and math.isfinite(best.distance)
    fields = {
        "number": run.number,
        "method": run.choice.method,
        "settings": run.choice.settings,
        "density": run.choice.density,
        "epochs": best.epoch if best else 0,
        "epochs_run": len(trial.history),
        "state": trial.state,
        "figures": best.figures if best else {},
        "distance": best.distance if best and finite else None,
        "refused": best.refused if best else [],
        "causes": best.causes if best else [],
        "passes": run.passes,
        "seconds": run.seconds,
    }
    return TrialRecord.model_validate(fields)


def _too_small(problem: Problem, needed: int) -> UsageError:
    if problem.budget.passes is None:
        why = f"it was over before the first trial, which needs {needed} passes"
    else:
        why = f"it is {problem.budget.passes} passes, and the first trial needs {needed}"
    return UsageError(f"the budget {problem.budget.text} is too small", why, "give a larger --tune-budget")
