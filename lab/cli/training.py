"""`salun train ddpm` and `salun train stable-diffusion`: the small models of `examples/small_diffusion`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.models import (
    Destination,
    Evaluation,
    Judge,
    Line,
    Out,
    OwnData,
    Policy,
    Seed,
    made_facts,
    read_evaluation,
)
from salun_core.cli.options import DryRun, OptionalStore, Settings, read_settings
from salun_core.cli.output import epoch_progress

if TYPE_CHECKING:
    from salun_core.data import DataSpec
    from salun_core.models.card import DiffusionCard, DiffusionEvaluation


def _train_diffusion(kind: str, about: str) -> Callable[..., None]:
    """Return the verb that trains one kind of diffusion model."""

    def train(
        data: OwnData,
        out: Out,
        seed: Seed = 0,
        settings: Settings = [],
        judge: Judge = None,
        evaluation: Evaluation = [],
        checkpoints: Annotated[Path | None, typer.Option(help="Folder for states to resume from.")] = None,
        line: Line = None,
        store: OptionalStore = None,
        policy: Policy = "auto",
        dry_run: DryRun = False,
    ) -> None:
        from lab.checkout import load_example
        from salun_core.data import load_spec
        from salun_core.tasks import register_model

        example = load_example("small_diffusion")
        recipe = example.resolve_recipe(kind, {"seed": seed, **read_settings(settings)})
        spec, to = load_spec(data), Destination(out, line, store, policy)
        settings_of_images = read_evaluation(judge, evaluation, example.KINDS[kind][1])
        planned = _planned_card(kind, spec, settings_of_images)
        if dry_run:
            to.warn(planned)
            to.plan(f"train {kind}", spec)
            return
        to.check()
        settings_of_images = to.with_judge(settings_of_images)
        warnings = to.warn(planned.model_copy(update={"evaluation": settings_of_images}))
        with epoch_progress(f"train {kind}", recipe.epochs) as on_epoch:
            made = example.train(spec, recipe, out, settings_of_images, checkpoints, on_epoch)
        to.finish(register_model, "train", made_facts(made), warnings)

    train.__doc__ = about
    return train


def _planned_card(kind: str, spec: DataSpec, evaluation: DiffusionEvaluation) -> DiffusionCard:
    """Return as much of the card of a model that will be trained as says what it will lack."""
    from salun_core.data import load_data
    from salun_core.models.card import DiffusionCard

    return DiffusionCard(
        task="class-conditional" if kind == "ddpm" else "text-to-image",
        architecture=kind,
        classes=list(load_data(spec).table.classes),
        channels=1,
        height=1,
        width=1,
        data=spec,
        dataset_digest="",
        split_digest="",
        evaluation=evaluation,
    )


train_ddpm = _train_diffusion(
    "ddpm",
    "Train a small class-conditional DDPM.\n\n"
    "It trains from fresh weights, writes a model folder, and needs a checkout of the repository.",
)
train_stable_diffusion = _train_diffusion(
    "stable-diffusion",
    "Train a small Stable Diffusion.\n\n"
    "It trains from fresh weights, writes a model folder, and needs a checkout of the repository.",
)
