"""The diffusion task: class-conditional and text-to-image models. Importing it does not import diffusers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from salun_core.data import ForgetSet, LoadedData
from salun_core.data.forget_set import kind_of, not_kept, restored
from salun_core.data.split import SPLIT, SplitManifest, require_split
from salun_core.data.targets import RedactedTarget, Target
from salun_core.device_memory import explained
from salun_core.diffusion.denoiser import Denoiser, selected_parameters
from salun_core.errors import UsageError
from salun_core.evaluation import Evidence
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.config import pick_device
from salun_core.methods.diffusion import DEFAULT, METHODS, diffusion_config, unlearn_denoiser
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.saliency import denoising_scores
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup
from salun_core.methods.loop import OnEpoch
from salun_core.methods.method import UnlearnResult, get_method
from salun_core.methods.recipe import Escalation, Recipe
from salun_core.models.card import CARD, DiffusionCard
from salun_core.models.diffusers_folder import LoadedDiffusion, load_diffusion, model_files, save_diffusion
from salun_core.saliency import SaliencyMask
from salun_core.tasks.diffusion.evaluation import evaluate
from salun_core.tasks.diffusion.examples import build_example_sets
from salun_core.tasks.diffusion.inputs import DiffusionInputs
from salun_core.tasks.reference import reference_model
from salun_core.tasks.task import Candidate, EvaluationOptions, Scores, TunedRun, TuningOptions, named


def _encoded_denoiser(inputs: DiffusionInputs, config: DiffusionConfig, device: torch.device) -> Denoiser:
    """Return the denoiser after images and prompts were encoded; in main memory if its weights are to be sharded."""
    return inputs.family(torch.device("cpu") if config.sharding == "fsdp" else device).denoiser


class DiffusionTask:
    """Diffusion models; see `Task` for the members."""

    name = "diffusion"
    description = "diffusion model"
    card_tasks = ("class-conditional", "text-to-image")
    card_type = DiffusionCard
    methods = METHODS
    default_method = DEFAULT
    optional_metrics = False
    excerpts = False

    def load(self, folder: Path, split: SplitManifest | None = None) -> LoadedDiffusion:
        """Read a model folder and check all of it."""
        return load_diffusion(folder, split)

    def inputs(self, original: LoadedDiffusion, data: LoadedData | None, forget_set: ForgetSet) -> DiffusionInputs:
        """Combine a diffusion model, its data, if any, and a forget set."""
        return DiffusionInputs(original, data, forget_set)

    def check_targets(self, targets: Sequence[Target]) -> None:
        """Reject single samples and subjects: a diffusion model forgets classes and concepts."""
        targets = [restored(target) for target in targets]
        for kind in map(kind_of, targets):
            if kind not in {"class", "concept"}:
                raise UsageError(
                    "a diffusion model forgets classes and concepts",
                    f"a target of kind {kind!r} names single training images",
                    "name their class, or a concept by prompts",
                )
        if any(isinstance(target, RedactedTarget) for target in targets):
            raise not_kept()

    def selected(self, inputs: DiffusionInputs, config: DiffusionConfig) -> list[str]:
        """Return the parameters of the denoiser that the configuration selects; none for `text`."""
        return selected_parameters(inputs.original.network, config.selection)

    @explained()
    def score(
        self, inputs: DiffusionInputs, config: DiffusionConfig, device: torch.device, group: ProcessGroup
    ) -> Scores:
        """Score the selected parameters by the gradient of the denoising loss; every process scores all of D_f."""
        sets = build_example_sets(inputs, config, device, retain=False)
        facts = {
            "scores": "denoising-gradient-magnitude",
            "selection": config.selection,
            "passes": str(config.saliency_passes),
            "times": config.saliency_times,
        }
        return Scores(denoising_scores(_encoded_denoiser(inputs, config, device), sets, config, group), facts)

    @explained()
    def unlearn(
        self,
        inputs: DiffusionInputs,
        method: str,
        config: DiffusionConfig,
        mask: SaliencyMask | None = None,
        checkpoint: CheckpointStore | None = None,
        on_epoch: OnEpoch | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> UnlearnResult:
        """Run one method on the denoiser."""
        device = pick_device(config.device)
        sets, denoiser = build_example_sets(inputs, config, device), _encoded_denoiser(inputs, config, device)
        if config.offload != "none":  # images and prompts are encoded
            inputs.original.components.encoders_to("cpu")
        return unlearn_denoiser(
            denoiser,
            sets,
            method,
            config=config,
            mask=mask,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
            group=group,
        )

    def check_tuning(self, method: str, overrides: Mapping[str, Any]) -> bool:
        """Reject the search, which supports classifiers only."""
        raise UsageError("a diffusion model is not tuned", "the search is for classifiers", "leave out the tuning")

    def tune(
        self, inputs: DiffusionInputs, method: str, overrides: Mapping[str, Any], options: TuningOptions
    ) -> TunedRun:
        """Reject the search, like `check_tuning`."""
        self.check_tuning(method, overrides)
        raise AssertionError

    def retrain_config(self, card: DiffusionCard, device: torch.device) -> DiffusionConfig:
        """Return the settings of the card's training that unlearning shares."""
        known = {name: value for name, value in card.training.items() if name in DiffusionConfig.model_fields}
        return diffusion_config("retrain", {**known, "device": str(device)})

    @explained()
    def evaluate(self, inputs: DiffusionInputs, candidate: Candidate, options: EvaluationOptions) -> Evidence:
        """Generate images with both models and measure them."""
        return evaluate(self, inputs, candidate, options)

    def contribute(self, inputs: DiffusionInputs, candidate: Candidate, options: EvaluationOptions) -> None:
        """Train a reference together, if one is asked for; the first process generates and measures alone."""
        reference_model(self, inputs, options, candidate.facts)

    def save(
        self, folder: Path, inputs: DiffusionInputs, result: UnlearnResult, extra_files: Mapping[str, bytes]
    ) -> None:
        """Write the model folder with the new denoiser or text encoder and copies of all other components."""
        card, encoder = inputs.child_card(result.method), result.text_encoder
        text = encoder.cpu() if encoder else None
        save_diffusion(folder, inputs.original, result.model.cpu(), card, inputs.kept_split, extra_files, text)

    def version_files(self, folder: Path) -> dict[str, Path]:
        """Return the index, all components, card and split."""
        require_split(os.listdir(folder))
        return {name: folder / name for name in sorted([*model_files(folder), CARD, SPLIT])}

    def escalation(self, recipe: Recipe, *, tune: bool = False) -> Escalation:
        """Return the requested recipe, a stronger one, one with more weights, and one that selects all weights.

        The gentler ones have a third and a tenth of the rate. The other method is SalUn, unless it was the first. A
        sweep does not retrain a diffusion model, because that may take weeks; no recipe follows a requested retraining.

        Each recipe differs from the others in a setting that is read. Only a method with a mask has recipes with more
        weights. A closed form reads neither steps nor rate: both weights of what it preserves are divided by ten and a
        hundred, or multiplied for gentler recipes; one of them alone would leave the other as the limit. One that does
        not read `edit_strength` has one strength.
        """
        recipe = named(self, recipe)
        config, row = diffusion_config(recipe.method, recipe.method_config), get_method(METHODS, recipe.method)
        if row.fresh_start:
            return Escalation(recipes=[recipe])

        def changed(**factors: float) -> Recipe:
            settings = {name: float(f"{factor * getattr(config, name):.4g}") for name, factor in factors.items()}
            return recipe.model_copy(update={"method_config": {**recipe.method_config, **settings}})

        stronger, gentler = [], []
        if row.edit is None:
            rate = {"steps": 2 * config.steps, "learning_rate": 2 * config.learning_rate}
            strong = recipe.model_copy(update={"method_config": {**recipe.method_config, **rate}})
            stronger = [strong, *row.with_more_weights(strong)]
            gentler = [changed(learning_rate=factor) for factor in (1 / 3, 0.1)]
        elif names := sorted({"edit_strength", "preserve_strength"} & row.config_type.model_fields.keys()):
            ways = (0.1, 0.01), (10, 100)
            stronger, gentler = ([changed(**dict.fromkeys(names, factor)) for factor in way] for way in ways)
        machine = {key: value for key, value in recipe.method_config.items() if key in {"device", "batch_size"}}
        return Escalation(
            recipes=[recipe, *stronger],
            gentler=gentler,
            others=[]
            if recipe.method == DEFAULT
            else [Recipe(method=DEFAULT, method_config=machine, seed=recipe.seed)],
        )
