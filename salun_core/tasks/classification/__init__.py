"""The classification task: image classifiers."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from salun_core.data import ForgetSet, ImageSource, LoadedData
from salun_core.data.split import SPLIT, SplitManifest, require_split
from salun_core.data.targets import ConceptTarget, Target
from salun_core.device_memory import explained
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.classification import DEFAULT, METHODS, method_config, unlearn
from salun_core.methods.classification.training import fresh_classifier
from salun_core.methods.config import LoopConfig, UnlearnConfig
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup
from salun_core.methods.loop import OnEpoch
from salun_core.methods.method import UnlearnResult, get_method
from salun_core.methods.recipe import Escalation, Recipe
from salun_core.methods.sharded import collected_scores, require_several, shard_weights
from salun_core.models import LoadedModel, ModelCard, load_model, save_model
from salun_core.models.checkpoint import CARD, WEIGHTS
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.saliency import scores as saliency
from salun_core.saliency.scores import CHUNK, Slice
from salun_core.tasks.classification.evaluation import compared, evaluate
from salun_core.tasks.classification.inputs import ClassifierInputs
from salun_core.tasks.classification.tuning import search
from salun_core.tasks.task import Candidate, EvaluationOptions, Scores, TunedRun, TuningOptions, named
from salun_core.telemetry.progress import tracked
from salun_core.tuning.space import spaces_of


def _chunks(images: ImageSource) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return tracked(images.batches(CHUNK), "scoring", -(-len(images) // CHUNK))


class ClassificationTask:
    """Image classifiers; see `Task` for the members."""

    name = "classification"
    description = "classifier"
    card_tasks = ("classification",)
    card_type = ModelCard
    methods = METHODS
    default_method = DEFAULT
    optional_metrics = True
    excerpts = True

    def load(self, folder: Path, split: SplitManifest | None = None) -> LoadedModel:
        """Read a model folder and check all of it."""
        return load_model(folder, split)

    def inputs(self, original: LoadedModel, data: LoadedData | None, forget_set: ForgetSet) -> ClassifierInputs:
        """Combine a classifier, its data and a forget set."""
        assert data is not None  # the card of a classifier names its data
        return ClassifierInputs(original, data, forget_set)

    def check_targets(self, targets: Sequence[Target]) -> None:
        """Reject concepts: a classifier forgets classes, samples and subjects."""
        if any(isinstance(target, ConceptTarget) for target in targets):
            raise UsageError(
                "a classifier cannot forget a concept", "prompts name images of a text-to-image model", "name a class"
            )

    def selected(self, inputs: ClassifierInputs, config: LoopConfig) -> list[str]:
        """Return all parameters."""
        return [name for name, _ in inputs.original.model.named_parameters()]

    @explained()
    def score(self, inputs: ClassifierInputs, config: LoopConfig, device: torch.device, group: ProcessGroup) -> Scores:
        """Score all parameters on D_f; each process scores its share, or holds its slices of the weights.

        Masks are compared by digest across steps, processes and machines, so the scores must have the same bits for any
        number of threads and processes.
        """
        if config.sharding == "fsdp":
            return Scores(self._sharded_scores(inputs, device, group), {})
        part, samples = Slice(group.rank, group.size), len(inputs.forget)
        mine = inputs.forget.select(part.samples(samples)).to(device)
        network = inputs.original.model.to(device)
        with saliency.repeatable():
            scores = saliency_scores(network, _chunks(mine), cross_entropy, samples=samples, part=part)
        return Scores(scores, {})

    def _sharded_scores(
        self, inputs: ClassifierInputs, device: torch.device, group: ProcessGroup
    ) -> dict[str, torch.Tensor]:
        require_several(group.size)
        network, counts = shard_weights(copy.deepcopy(inputs.original.model).cpu(), device), float(group.main)
        with saliency.repeatable():
            slices = saliency_scores(
                network, _chunks(inputs.forget.to(device)), lambda *batch: cross_entropy(*batch) * counts
            )
        return collected_scores(network, slices)

    @explained()
    def unlearn(
        self,
        inputs: ClassifierInputs,
        method: str,
        config: UnlearnConfig,
        mask: SaliencyMask | None = None,
        checkpoint: CheckpointStore | None = None,
        on_epoch: OnEpoch | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> UnlearnResult:
        """Run one method; `retrain` starts from fresh weights of the card's architecture."""
        card = inputs.original.card
        return unlearn(
            inputs.original.model,
            method,
            forget=inputs.forget,
            retain=inputs.retain,
            config=config,
            mask=mask,
            held_out=inputs.held_out if get_method(METHODS, method).reads_held_out else None,
            fresh=lambda seed: fresh_classifier(card.architecture, inputs.retain, len(card.classes), seed),
            checkpoint=checkpoint,
            on_epoch=on_epoch,
            group=group,
        )

    def check_tuning(self, method: str, overrides: Mapping[str, Any]) -> bool:
        """Return whether there are settings to search for; a method that trains by itself finds its own."""
        if not Recipe(method=method).leaves_method_open:
            row = get_method(METHODS, method)
            if row.fresh_start or row.train:
                return False
        return bool(spaces_of(method, overrides))

    @explained()
    def tune(
        self, inputs: ClassifierInputs, method: str, overrides: Mapping[str, Any], options: TuningOptions
    ) -> TunedRun:
        """Search for settings on held-out data."""
        return search(self, inputs, method, overrides, options)

    def retrain_config(self, card: ModelCard, device: torch.device) -> UnlearnConfig:
        """Return the training recipe of the card, with batch norm set to update."""
        return method_config("retrain", {**card.training, "device": str(device), "batch_norm": "update"})

    @explained()
    def evaluate(self, inputs: ClassifierInputs, candidate: Candidate, options: EvaluationOptions) -> Evidence:
        """Measure accuracies, attacks and changed weights."""
        return evaluate(self, inputs, candidate, options)

    @explained()
    def contribute(self, inputs: ClassifierInputs, candidate: Candidate, options: EvaluationOptions) -> None:
        """Compute this process's share of the outputs, and of the training of a reference."""
        compared(self, inputs, candidate, options)

    def save(
        self, folder: Path, inputs: ClassifierInputs, result: UnlearnResult, extra_files: Mapping[str, bytes]
    ) -> None:
        """Write the model folder; a retrained model's card contains the configuration of its own training."""
        card = inputs.child_card(result.method)
        if get_method(METHODS, result.method).fresh_start:
            card = card.model_copy(update={"training": result.config.model_dump()})
        save_model(folder, result.model.cpu(), card, inputs.kept_split, extra_files)

    def version_files(self, folder: Path) -> dict[str, Path]:
        """Return weights, card and split."""
        require_split(os.listdir(folder))
        return {name: folder / name for name in (WEIGHTS, CARD, SPLIT)}

    def escalation(self, recipe: Recipe, *, tune: bool = False) -> Escalation:
        """Return the requested recipe, a stronger one, one with more weights, and a full retraining.

        The gentler ones have a third and a tenth of the rate. The others are `salun_adaptive`, which undoes what did
        harm, and SFR-on, which kept the most of D_r in the study; after `salun_adaptive` SFR-on and SCRUB. What is
        stronger than `salun_adaptive` is `salun`: it has no limits to what a round may cost. A retraining has no
        strength: only that of the model card follows.

        Each recipe differs from the others in a setting that is read: only a method with a mask reads the density, and
        not if a search tries all densities. A closed form has strengths only if it reads a setting for them, and not if
        a search tries its values.
        """
        retraining = Recipe(method="retrain", density=1.0, seed=recipe.seed)
        if recipe.leaves_method_open:  # its search has tried methods and strengths
            return Escalation(recipes=[recipe, retraining])
        recipe = named(self, recipe, tune=tune)
        config, row = method_config(recipe.method, recipe.method_config), get_method(METHODS, recipe.method)
        adapts = recipe.method == DEFAULT
        if row.fresh_start:
            return Escalation(recipes=[recipe, retraining] if recipe.method_config else [recipe])
        name = "influence_strength" if row.edit else "learning_rate"

        def changed(factor: float, **more: Any) -> Recipe:  # noqa: ANN401 - of the configuration
            setting = {name: float(f"{factor * getattr(config, name):.4g}")}
            return recipe.model_copy(update={"method_config": {**recipe.method_config, **setting, **more}})

        stronger, gentler = [], []
        if row.edit is None:
            strong = changed(3, epochs=2 * config.epochs)
            strong = strong.model_copy(update={"method": "salun"}) if adapts else strong
            searched = tune and self.check_tuning(strong.method, strong.method_config)
            stronger = [strong, *([] if searched else get_method(METHODS, strong.method).with_more_weights(strong)[:1])]
            gentler = [changed(factor) for factor in (1 / 3, 0.1)]
        elif name in row.config_type.model_fields and not tune:
            stronger, gentler = [changed(3)], [changed(factor) for factor in (1 / 3, 0.1)]
        machine = {key: value for key, value in recipe.method_config.items() if key in {"device", "batch_size"}}
        adaptive = Recipe(method=DEFAULT, method_config=machine, seed=recipe.seed)
        methods = ["sfr_on", "scrub"] if adapts else [] if recipe.method == "sfr_on" else ["sfr_on"]
        drawn = {key: value for key, value in recipe.method_config.items() if key == "retain_fraction"}
        others = [Recipe(method=name, method_config={**machine, **drawn}, seed=recipe.seed) for name in methods]
        return Escalation(
            recipes=[recipe, *stronger, retraining],
            gentler=gentler,
            others=others if adapts else [adaptive, *others],
        )
