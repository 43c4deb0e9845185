"""`salun train ddpm`, `salun train stable-diffusion` and the import of diffusers folders: where a line begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from salun_core.cli.models import Line, Out, OwnData, _check_line
from salun_core.cli.options import DryRun, Settings, Store, read_settings
from salun_core.cli.output import emit_facts, emit_plan, epochs

if TYPE_CHECKING:
    from salun_core.data import DataSpec
    from salun_core.methods.loop import OnEpoch
    from salun_core.models.card import GenerationEvaluation
    from salun_core.tasks.diffusion.training import MadeDiffusion

CLASSIFIER = "classifier"

Judge = Annotated[
    str | None,
    typer.Option("--judge", help="Classifier of its images: LINE, LINE@VERSION, a folder or s3://; kept in the card."),
]
Evaluation = Annotated[
    list[str],
    typer.Option("--evaluation", metavar="KEY=VALUE", help="How its images are judged; may be given again."),
]
Checkpoints = Annotated[
    Path | None, typer.Option("--checkpoints", help="Folder that keeps the state after each epoch, to resume from.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of weights, order and noise.")]


class TrainGroup(TyperGroup):
    """`salun train` with a kind of model; without one it trains a classifier, as it always did."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's, which typer hides
        """Put the kind in where none was named."""
        named = bool(args) and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named or not args else [CLASSIFIER, *args])


def train_ddpm(
    data: OwnData,
    out: Out,
    seed: Seed = 0,
    settings: Settings = [],  # noqa: B006 - typer reads it and hands over a new list
    judge: Judge = None,
    evaluation: Evaluation = [],  # noqa: B006
    checkpoints: Checkpoints = None,
    line: Line = None,
    store: Store = None,
    dry_run: DryRun = False,
) -> None:
    """Train a small class-conditional DDPM from fresh weights, and write its model folder."""
    from salun_core.tasks.diffusion.training import JUDGED_PIXELS, ddpm_recipe, train_ddpm

    recipe = ddpm_recipe({"seed": seed, **read_settings(settings)})
    spec, judged = _spec(data), _evaluation(judge, evaluation, JUDGED_PIXELS)

    def made(on_epoch: OnEpoch) -> MadeDiffusion:
        return train_ddpm(spec, recipe, out, judged, checkpoints, on_epoch)

    _train("train ddpm", made, recipe.epochs, spec, out, line, store, dry_run)


def train_stable_diffusion(
    data: OwnData,
    out: Out,
    seed: Seed = 0,
    settings: Settings = [],  # noqa: B006
    judge: Judge = None,
    evaluation: Evaluation = [],  # noqa: B006
    checkpoints: Checkpoints = None,
    line: Line = None,
    store: Store = None,
    dry_run: DryRun = False,
) -> None:
    """Train a small Stable Diffusion from fresh weights, its autoencoder first, and write its model folder."""
    from salun_core.tasks.diffusion.training import JUDGED, stable_diffusion_recipe, train_stable_diffusion

    recipe = stable_diffusion_recipe({"seed": seed, **read_settings(settings)})
    spec, judged = _spec(data), _evaluation(judge, evaluation, JUDGED)

    def made(on_epoch: OnEpoch) -> MadeDiffusion:
        return train_stable_diffusion(spec, recipe, out, judged, checkpoints, on_epoch)

    _train("train stable-diffusion", made, recipe.epochs, spec, out, line, store, dry_run)


def _train(
    verb: str,
    made: Callable[[OnEpoch], MadeDiffusion],
    length: int,
    spec: DataSpec,
    out: Path,
    line: str | None,
    store: str | None,
    dry_run: bool,
) -> None:
    """Plan a training, or run it and publish what it made where a line is named."""
    if dry_run:
        _plan(verb, spec, out, line, store)
        return
    _check_line(line, store)
    with epochs(verb, length) as on_epoch:
        trained = made(on_epoch)
    _finish(trained, out, line, store, "train")


def import_diffusion(
    source: Annotated[str, typer.Argument(metavar="FOLDER", help="A diffusers folder, or a hub name in the cache.")],
    out: Out,
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="The data, as for a classifier; none: they are generated.")
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", help="What an image of a class is called; {label} is its name.")
    ] = "an image of a {label}",
    judge: Judge = None,
    evaluation: Evaluation = [],  # noqa: B006
    classes: Annotated[str | None, typer.Option("--classes", help="Class names, by comma, where no data are.")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Fetch a hub name that is not in the local cache.")] = False,
    line: Line = None,
    store: Store = None,
) -> None:
    """Turn a diffusers folder into a model folder. Safetensors only; no code in it is run."""
    from salun_core.tasks.diffusion.importing import import_diffusion as made_of
    from salun_core.tasks.diffusion.training import JUDGED

    judged = _evaluation(judge, evaluation, JUDGED)
    spec = _spec(data) if data else None
    names = [name.strip() for name in classes.split(",")] if classes else []
    _check_line(line, store)
    _finish(made_of(source, spec, out, prompt, judged, names, hub), out, line, store, "import")


def _spec(data: str) -> DataSpec:
    from salun_core.data import load_spec

    return load_spec(data)


def _evaluation(judge: str | None, settings: list[str], defaults: GenerationEvaluation) -> GenerationEvaluation:
    from salun_core.config import parse
    from salun_core.models.card import GenerationEvaluation

    given = {**({"judge": judge} if judge else {}), **read_settings(settings)}
    return parse(GenerationEvaluation, {**defaults.model_dump(), **given}, "--evaluation")


def _plan(verb: str, spec: DataSpec, out: Path, line: str | None, store: str | None) -> None:
    from salun_core.data import load_data

    loaded = load_data(spec)
    _check_line(line, store)
    facts = {"classes": len(loaded.table.classes), "train_images": len(loaded.images("train"))}
    emit_plan(verb, {"would_write": out, "would_publish": line, **facts})


def _finish(made: MadeDiffusion, out: Path, line: str | None, store: str | None, method: str) -> None:
    from salun_core.config import load
    from salun_core.data.split import SplitManifest
    from salun_core.models.checkpoint import SPLIT
    from salun_core.storage import open_store
    from salun_core.tasks.diffusion.training import register_diffusion

    facts: dict[str, object] = {"model": out, "digest": made.digest, "parameters": made.parameters}
    facts |= {"loss": made.loss} if made.loss is not None else {}
    if line and store:
        count = len(load(SplitManifest, out / SPLIT).train)
        facts |= {"line": line, "version": register_diffusion(open_store(store), line, out, method, count)}
    emit_facts(facts)
