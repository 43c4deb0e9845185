"""The interface of a task: all code that depends on the kind of model. Other packages do not distinguish the kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from salun_core.data import ForgetSet, LoadedData
from salun_core.data.split import SplitManifest
from salun_core.data.targets import Target
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.evidence import EVALUATED, Forgotten, Measured, RunFacts, TuningFacts
from salun_core.gate import GateDecision
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.config import LoopConfig
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup
from salun_core.methods.loop import OnEpoch
from salun_core.methods.method import Method, UnlearnResult, resolve_config
from salun_core.methods.recipe import DEFAULT_METHOD, Escalation, Recipe
from salun_core.models.card import Card
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask
from salun_core.tasks.resolve import AUTO
from salun_core.tuning.search import OnTrial


class Model(Protocol):
    """A model folder that was read and checked."""

    @property
    def card(self) -> Card:
        """The model card."""
        ...

    @property
    def split(self) -> SplitManifest:
        """The split of its training; empty if the model has no data."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of its weights."""
        ...

    @property
    def network(self) -> nn.Module:
        """The network that unlearning changes."""
        ...


ModelT = TypeVar("ModelT", bound=Model, covariant=True)


@dataclass(frozen=True)
class Inputs(Generic[ModelT]):
    """A model, its rows (None without data) and its forget set, both checked against the model's split."""

    original: ModelT
    data: LoadedData | None
    forget_set: ForgetSet

    @property
    def split(self) -> SplitManifest:
        """The split that the model was trained on."""
        return self.original.split

    @cached_property
    def kept_split(self) -> SplitManifest:
        """The split of the unlearned model, without the forgotten samples."""
        return self.split.without(self.forget_set.samples)

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the model and the forget set, as stored in masks."""
        return {"model_digest": self.original.digest, "forget_set_digest": self.forget_set.digest}

    @property
    def generated(self) -> int:
        """Number of images generated for the concepts of the forget set."""
        return sum(concept.images for concept in self.forget_set.concepts)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples to forget and to retain, including images generated for concepts."""
        kept = len(self.split.train) - len(self.forget_set.samples)
        forgotten = len(self.forget_set.samples)
        return {"forget_samples": forgotten + self.generated, "retain_samples": kept + self.generated}

    def forgotten(self) -> Forgotten:
        """Describe the forget set without sample ids; a concept counts once to forget and once to retain."""
        return Forgotten(
            count=len(self.forget_set.samples) + self.generated,
            train_count=len(self.split.train) + 2 * self.generated,
            kinds=self.forget_set.kinds,
            classes=self.forget_set.classes,
        )

    def measured(self, candidate: Candidate, reference: nn.Module | None) -> Measured:
        """Return the digests of everything that an evaluation measures, including a retrained network, if given."""
        return Measured(
            before=self.original.digest,
            after=candidate.model.digest,
            reference=model_digest(reference) if reference else None,
            dataset=self.split.dataset_digest,
            split=self.split.digest,
            forget_set=self.forget_set.digest,
            mask=candidate.mask.digest if candidate.mask else None,
        )

    def child_card(self, method: str) -> Any:  # noqa: ANN401 - a card of the original's class
        """Return the card of a model that a method made from the original."""
        changes = {
            "split_digest": self.kept_split.digest,
            "parent": self.original.digest,
            "method": method,
            "forget_set_digest": self.forget_set.digest,
        }
        return self.original.card.model_copy(update=changes)


@dataclass(frozen=True)
class Candidate:
    """The unlearned model and its provenance; `mask` is None if its method has no mask."""

    model: Any
    facts: RunFacts
    mask: SaliencyMask | None


class Scores(NamedTuple):
    """Saliency of the parameters that may change, by name, and provenance for the mask."""

    values: dict[str, Tensor]
    facts: dict[str, str]


@dataclass(frozen=True)
class TuningOptions:
    """Options of a search for settings.

    Args:
        budget: passes (`200000`), wall clock (`90s`, `15m`, `2h`) or epochs over all training images (`20e`).
        policy_uri: the gate policy whose margins bound the search.
        on_trial: called after each trial.
        bounded: False searches without a policy and chooses the closest setting. For comparisons only, never for a
            model that is published.
        density: density of the mask, if it is not searched for.
        random_mask_seed: seed of random masks as a control; they replace the saliency masks and cost no passes.
        on_chosen: called with the passes of the chosen setting alone: its scores and its epochs.
        on_refusal: called with the decision if no setting satisfies the policy.
    """

    budget: str
    policy_uri: str = AUTO
    on_trial: OnTrial | None = field(default=None, compare=False)
    bounded: bool = True
    density: float | None = None
    random_mask_seed: int | None = None
    on_chosen: Callable[[int], None] | None = field(default=None, compare=False)
    on_refusal: Callable[[GateDecision], None] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TunedRun:
    """A model with tuned settings; `seconds` and `passes` of the result cover the whole search.

    `extra_files` are trials and mask, for the model folder. `mask` is None for a method without a mask.
    """

    result: UnlearnResult
    mask: SaliencyMask | None
    facts: TuningFacts
    extra_files: dict[str, bytes]


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Args:
        device: device of the computation.
        reference: folder of a model retrained without the forget set.
        retrain: whether to retrain a reference by the recipe on the model card.
        optional_metrics: metrics that are off by default, from `parse_optional_metrics`.
        store_uri: store with the model line of the classifier for generated images.
        group: the processes that share what can be shared.
        samples: most images of D_r and of the test split that are measured; None measures all.
    """

    device: torch.device
    reference: Path | None = None
    retrain: bool = False
    optional_metrics: Mapping[str, int] = field(default_factory=dict)
    store_uri: str | None = None
    group: ProcessGroup = SINGLE_PROCESS
    samples: int | None = EVALUATED


Config = Any
"""Configuration of a task's methods: a subclass of `LoopConfig`."""

InputsT = TypeVar("InputsT", bound=Inputs[Any])


class Task(Protocol[InputsT]):
    """One kind of model: an entry of `TASKS`."""

    @property
    def name(self) -> str:
        """Its key in `TASKS`."""
        ...

    @property
    def description(self) -> str:
        """User-facing name of the kind of model, such as "classifier"."""
        ...

    @property
    def card_tasks(self) -> Sequence[str]:
        """Values of `task` on the model cards of this kind."""
        ...

    @property
    def card_type(self) -> type[Card]:
        """Class of its model cards."""
        ...

    @property
    def methods(self) -> Mapping[str, Method[Any]]:
        """Its unlearning methods by name."""
        ...

    @property
    def default_method(self) -> str:
        """Name of the method of a run that names none."""
        ...

    @property
    def optional_metrics(self) -> bool:
        """Whether it has metrics that are off by default."""
        ...

    @property
    def excerpts(self) -> bool:
        """Whether mask and publication of large data need only the forget set's rows of the split: a `SplitExcerpt`."""
        ...

    def load(self, folder: Path, split: SplitManifest | None = None) -> Model:
        """Read a model folder and check all of it.

        Args:
            folder: the model folder.
            split: the split that its card must name; the folder's own is then not read. None reads it.

        Raises:
            UsageError: the folder is not a model folder of this task.
            ModelError: names, shapes or types differ from the architecture's.
            IntegrityError: a file is damaged, or the card belongs to another split.
        """
        ...

    def inputs(self, original: Any, data: LoadedData | None, forget_set: ForgetSet) -> InputsT:  # noqa: ANN401 - a Model
        """Combine a model of this task, its data and a forget set."""
        ...

    def check_targets(self, targets: Sequence[Target]) -> None:
        """Check that a model of this task can forget targets of these kinds.

        Raises:
            UsageError: the model cannot forget a target.
        """
        ...

    def selected(self, inputs: InputsT, config: Config) -> list[str]:
        """Return the names of the parameters that a method may change, in the network's order."""
        ...

    def score(self, inputs: InputsT, config: Config, device: torch.device, group: ProcessGroup) -> Scores:
        """Score the selected parameters on the forget set; all processes get the same scores."""
        ...

    def unlearn(
        self,
        inputs: InputsT,
        method: str,
        config: Config,
        mask: SaliencyMask | None = None,
        checkpoint: CheckpointStore | None = None,
        on_epoch: OnEpoch | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> UnlearnResult:
        """Run one method on a copy of the original; see `salun_core.methods.classification.unlearn`."""
        ...

    def check_tuning(self, method: str, overrides: Mapping[str, Any]) -> bool:
        """Return, before any work, whether a method has settings to search for; `retrain` uses its recipe.

        Raises:
            UsageError: the user has set all of them, or the task does not support tuning.
        """
        ...

    def tune(self, inputs: InputsT, method: str, overrides: Mapping[str, Any], options: TuningOptions) -> TunedRun:
        """Search for the settings that the user left open.

        Raises:
            UsageError: as for `check_tuning`, or the budget is too small.
            GateRefusedError: no setting satisfies the policy.
        """
        ...

    def retrain_config(self, card: Any, device: torch.device) -> LoopConfig:  # noqa: ANN401 - a `card_type`
        """Return the configuration of `retrain` from the recipe on a model card."""
        ...

    def evaluate(self, inputs: InputsT, candidate: Candidate, options: EvaluationOptions) -> Evidence:
        """Measure the unlearned model against the original.

        Raises:
            UsageError: an item in the options or on the model card does not exist.
            ModelError: the models do not fit each other.
        """
        ...

    def contribute(self, inputs: InputsT, candidate: Candidate, options: EvaluationOptions) -> None:
        """Take part in what `evaluate` shares among processes, in those that are not the first one."""
        ...

    def save(self, folder: Path, inputs: InputsT, result: UnlearnResult, extra_files: Mapping[str, bytes]) -> None:
        """Write the folder of the new model atomically."""
        ...

    def version_files(self, folder: Path) -> dict[str, Path]:
        """Return the files of a version by name: weights, card and split."""
        ...

    def escalation(self, recipe: Recipe, *, tune: bool = False) -> Escalation:
        """Return the recipes of a sweep: the requested one, stronger and gentler ones, and other methods.

        Each differs from the others in a setting that its method reads, so that no refused work is repeated.

        Args:
            recipe: the requested one.
            tune: whether each run searches for the settings that its recipe does not fix, and for the density.

        Raises:
            UsageError: the method or its configuration is wrong.
        """
        ...


def named(task: Task[Any], recipe: Recipe, *, tune: bool = False) -> Recipe:
    """Return a recipe that names its method, where it may be `default`.

    The default of a search is `salun`: a method that chooses its own strength has nothing to search for.
    """
    method = "salun" if tune else task.default_method
    return recipe.model_copy(update={"method": method}) if recipe.method == DEFAULT_METHOD else recipe


def check_recipe(task: Task[Any], recipe: Recipe, *, tune: bool) -> Recipe:
    """Check the method of a recipe and its settings, before any work, and return it with its method by name.

    UsageError: also if it leaves the method open without a search.
    """
    recipe = named(task, recipe, tune=tune)
    if not recipe.leaves_method_open:
        resolve_config(task.methods, recipe.method, recipe.overrides)
    elif not tune:
        raise UsageError(
            f"the method {recipe.method} needs a search", "only a search chooses a method", "add --tune, or name one"
        )
    else:
        task.check_tuning(recipe.method, recipe.overrides)
    return recipe
