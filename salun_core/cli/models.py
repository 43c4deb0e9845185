"""`salun train` and `salun model`: create, import, list and roll back model lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.options import Actor, DryRun, Settings, Store, named_store, read_settings, who
from salun_core.cli.output import emit, emit_facts, emit_plan, epochs, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from salun_core.data import DataSpec
    from salun_core.registry.history import Chapter
    from salun_core.tasks.classification.training import Made


OwnData = Annotated[
    str,
    typer.Option("--data", metavar="D", help="The data: a YAML spec, a folder, parquet, `digits` or torchvision:NAME."),
]
Architecture = Annotated[
    str, typer.Option("--arch", metavar="A", help="Such as resnet8, resnet18, torchvision:NAME or timm:NAME.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write the model to.")]
Line = Annotated[str | None, typer.Option("--line", help="Also publish it as the first version of this model line.")]


def train(
    data: OwnData,
    arch: Architecture,
    out: Out,
    epochs_: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training data.")] = 30,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of the first step.")] = 0.1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a step.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights, order and augmentation.")] = 0,
    settings: Settings = [],  # noqa: B006 - typer reads it and hands over a new list
    line: Line = None,
    store: Store = None,
    dry_run: DryRun = False,
) -> None:
    """Train a classifier from fresh weights, and write its model folder."""
    from salun_core.data import load_spec
    from salun_core.tasks.classification.training import train_model, training_config

    named = {"epochs": epochs_, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    config = training_config({**named, **read_settings(settings)})
    spec = load_spec(data)
    if dry_run:
        _plan("train", spec, arch, out, line, store)
        return
    _check_line(line, store)
    with epochs(f"train {arch}", config.epochs) as on_epoch:
        made = train_model(spec, arch, config, out, on_epoch=on_epoch)
    _finish(made, out, line, store, "train")


def import_(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A .safetensors, .pt, .pth or .th file.")],
    arch: Architecture,
    data: OwnData,
    out: Out,
    mean: Annotated[
        str | None, typer.Option("--mean", help="Of the normalisation it was trained with: 0.49,0.48,0.45.")
    ] = None,
    std: Annotated[str | None, typer.Option("--std", help="The same, standard deviations.")] = None,
    line: Line = None,
    store: Store = None,
    dry_run: DryRun = False,
) -> None:
    """Turn a checkpoint of yours into a model folder, names and shapes strict. No code in it is run."""
    from salun_core.data import load_spec
    from salun_core.models.importing import read_checkpoint
    from salun_core.tasks.classification.training import import_model

    spec, scale = load_spec(data), (_numbers("--mean", mean), _numbers("--std", std))
    if dry_run:
        read_checkpoint(checkpoint)
        _plan("model import", spec, arch, out, line, store)
        return
    _check_line(line, store)
    _finish(import_model(checkpoint, spec, arch, out, *scale), out, line, store, "import")


def _numbers(option: str, text: str | None) -> list[float] | None:
    from salun_core.errors import UsageError

    try:
        return [float(part) for part in text.split(",")] if text is not None else None
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is no list of numbers", str(error), "write 0.49,0.48,0.45") from error


def _plan(verb: str, spec: DataSpec, arch: str, out: Path, line: str | None, store: str | None) -> None:
    """Read the data, build the architecture, look at the line; write nothing."""
    from salun_core.data import load_data
    from salun_core.models import build_classifier

    loaded = load_data(spec)
    images = loaded.images("train").images
    build_classifier(arch, len(loaded.table.classes), *images.shape[1:3])
    _check_line(line, store)
    facts = {"classes": len(loaded.table.classes), "train_images": len(images), "test_images": len(loaded.split.test)}
    emit_plan(verb, {"would_write": out, "would_publish": line, "arch": arch, **facts})


def _check_line(line: str | None, store: str | None) -> None:
    """Refuse a line that cannot be begun, or a store that cannot hold one safely, before the work is done."""
    from salun_core.errors import ConflictError, UsageError
    from salun_core.registry.versions import read_head
    from salun_core.storage import open_store
    from salun_core.storage.probe import require_safe

    if line is None:
        return
    if not store:
        raise UsageError("--line needs a store", "none is named", "give --store or set SALUN_STORE_URI")
    if read_head(open_store(store), line) is not None:
        raise ConflictError(f"model line {line} exists already", "it has a HEAD", "choose another name for a new line")
    require_safe(open_store(store))


def _finish(made: Made, out: Path, line: str | None, store: str | None, method: str) -> None:
    from salun_core.models import load_model
    from salun_core.storage import open_store
    from salun_core.tasks.classification.training import register_model

    facts: dict[str, object] = {"model": out, "digest": made.digest}
    facts |= {"train_accuracy": made.train_accuracy, "test_accuracy": made.test_accuracy}
    if line and store:
        count = len(load_model(out).split.train)
        facts |= {"line": line, "version": register_model(open_store(store), line, out, method, count)}
    emit_facts(facts)


def history(
    line: Annotated[str, typer.Argument(metavar="LINE", help="The model line.")],
    store: Store = None,
) -> None:
    """Show the versions of a model line, the newest first: what each erased, how it is kept, who holds it, its debt."""
    from salun_core.registry.history import tell
    from salun_core.storage import open_store
    from salun_core.sweeps.runs import RunLog
    from salun_core.times import utc_clock

    opened = open_store(named_store(store))
    chapters = tell(opened, line, RunLog(opened, utc_clock).request_count)
    emit([_document(item) for item in chapters], lambda: _print(chapters))


def _document(item: Chapter) -> dict[str, object]:
    manifest = item.version.manifest.model_dump(mode="json", exclude={"format"})
    facts = {"requests": item.requests, "weights": item.kept, "held_by": item.held_by, "alarm": item.alarm}
    return {"version": item.version.digest, **manifest, **facts}


def _print(chapters: Sequence[Chapter]) -> None:
    head = ["version", "made by", "requests", "forgotten", "debt", "runs", "weights", "held by", "published"]
    print_table(head, [_row(item) for item in chapters])
    if chapters and chapters[0].alarm:
        typer.echo("\nMuch was forgotten since the last full training: a new one is due.")


def _row(item: Chapter) -> tuple[object, ...]:
    manifest = item.version.manifest
    return (
        item.version.digest[:12],
        manifest.method,
        "-" if item.requests is None else item.requests,
        manifest.forget_count,
        f"{manifest.lineage.debt:.1%}" + (" !" if item.alarm else ""),
        manifest.lineage.runs_since_training,
        item.kept,
        item.held_by or "-",
        manifest.created_at[:16].replace("T", " "),
    )


def rollback(
    version: Annotated[str, typer.Argument(metavar="LINE@VERSION", help="The version to go back to.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit log; no personal data.")],
    store: Store = None,
    reopen: Annotated[
        bool, typer.Option("--reopen", help="Queue the deletion requests again that it undoes; else it is refused.")
    ] = False,
    actor: Actor = "",
    dry_run: DryRun = False,
) -> None:
    """Make an earlier version HEAD again. Past an erasure it is refused, unless its requests are to be reopened."""
    from salun_core.sweeps.rollback import rollback as step

    done = step(named_store(store), version, who(actor), reason, reopen=reopen, dry_run=dry_run)
    emit_facts(
        {
            "head": done.head.version if done.head else "as before (dry run)",
            "undone_versions": len(done.undone),
            "reopened_requests": len(done.reopened),
        }
    )
