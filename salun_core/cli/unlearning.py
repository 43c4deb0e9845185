"""`salun mask`, `salun unlearn` and `salun evaluate`: steps 2 to 4 of the pipeline, by hand."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.options import Data, Device, DryRun, Forget, Model, Settings, Store, read_settings
from salun_core.cli.output import emit, emit_facts, emit_plan, epochs, print_metrics, say

if TYPE_CHECKING:
    from salun_core.evaluation import Evidence

Processes = Annotated[
    int, typer.Option("--processes", min=1, help="Processes that share the work, on this machine; one a GPU.")
]
MethodName = Annotated[str, typer.Option("--method", help="The unlearning method; `salun ls methods` shows all.")]


def mask(
    model: Model,
    forget: Forget,
    out: Annotated[Path, typer.Option("--out", help="Mask file to write (.safetensors).")],
    shards: Annotated[list[Path] | None, typer.Argument(help="Files of all shards, for --merge.")] = None,
    density: Annotated[float, typer.Option("--density", help="Share of weights that are salient, in (0, 1].")] = 0.5,
    data: Data = None,
    random_seed: Annotated[
        int | None, typer.Option("--random-seed", min=0, help="Draw the mask at random: the control for saliency.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Score the I-th of N shards and write its sums.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add the shards up and write the mask.")] = False,
    processes: Processes = 1,
    device: Device = "auto",
    store: Store = None,
    dry_run: DryRun = False,
) -> None:
    """Compute the saliency mask of a model: the weights that matter most for what is to be forgotten."""
    from salun_core.cli.sharding import check_shards, launch, merge_files, score_one, silent
    from salun_core.saliency import SaliencyMask
    from salun_core.steps.inputs import load_inputs
    from salun_core.steps.mask import compute_mask
    from salun_core.steps.sources import model_folder

    part = check_shards(shard, merge, shards or [], processes, random_seed)
    if processes > 1 and not dry_run:
        launch(processes)
        return
    with model_folder(model, store) as folder:
        if dry_run:
            inputs = load_inputs(folder, forget, data)
            salient = SaliencyMask.random(dict(inputs.original.model.named_parameters()), density, 0).k
            sizes = {"forget_samples": len(inputs.forget), "retain_samples": len(inputs.retain)}
            emit_plan("mask", {"would_write": out, **sizes, "salient": salient})
            return
        if part is not None:
            score_one(folder, forget, part, out, data, device)
            return
        if merge:
            made = merge_files(folder, forget, shards or [], density, out, data)
        else:
            made = compute_mask(folder, forget, density, out, data=data, device=device, random_seed=random_seed)
    if silent():
        return
    facts = {"salient": made.k, "weights": made.weights, "density": made.density, "scores": made.facts["scores"]}
    emit_facts({"mask": out, **facts, "digest": made.digest})


def unlearn(
    model: Model,
    forget: Forget,
    out: Annotated[Path, typer.Option("--out", help="Folder to write the new model to.")],
    method: MethodName = "salun",
    mask: Annotated[Path | None, typer.Option("--mask", help="Mask file; for methods that need one.")] = None,
    data: Data = None,
    settings: Settings = [],  # noqa: B006 - typer reads it and hands over a new list
    config: Annotated[Path | None, typer.Option("--config", help="YAML or JSON with settings of the method.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of order, augmentation and random labels.")] = 0,
    processes: Processes = 1,
    store: Store = None,
    dry_run: DryRun = False,
) -> None:
    """Make a model forget; weights outside the mask keep their bits."""
    from salun_core.cli.sharding import launch, silent
    from salun_core.steps.inputs import load_inputs
    from salun_core.steps.sources import model_folder
    from salun_core.steps.unlearning import read_mask, run_unlearning
    from salun_core.unlearn import method_config

    overrides = read_settings(settings, config)
    resolved = method_config(method, {"seed": seed, **overrides})
    if processes > 1 and not dry_run:
        launch(processes)
        return
    with model_folder(model, store) as folder:
        if dry_run:
            inputs = load_inputs(folder, forget, data)
            read_mask(mask, inputs)
            sizes = {"forget_samples": len(inputs.forget), "retain_samples": len(inputs.retain)}
            emit_plan("unlearn", {"would_write": out, "method": method, **sizes, "epochs": resolved.epochs})
            return
        progress = nullcontext(None) if silent() else epochs(method, resolved.epochs)
        with progress as on_epoch:
            result = run_unlearning(
                folder,
                mask,
                forget,
                out,
                method=method,
                overrides=overrides,
                seed=resolved.seed,
                data=data,
                on_epoch=on_epoch,
            )
    if silent():
        return
    facts = {"method": method, "epochs": len(result.history), "samples_passed": result.passes}
    emit_facts({"model": out, **facts, "seconds": round(result.seconds, 3)})


def evaluate(
    before: Annotated[str, typer.Option("--before", metavar="M", help="The original model.")],
    after: Annotated[str, typer.Option("--after", metavar="M", help="The unlearned model.")],
    forget: Forget,
    out: Annotated[Path, typer.Option("--out", help="Evidence file to write (JSON).")],
    report: Annotated[Path, typer.Option("--report", help="Report to write (HTML).")],
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="M", help="A model that was retrained without the set.")
    ] = None,
    retrain_reference: Annotated[
        bool, typer.Option("--retrain-reference", help="Retrain one here, by the recipe on the model's card.")
    ] = False,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Mask file; weights outside it are compared bit by bit.")
    ] = None,
    data: Data = None,
    device: Device = "auto",
    store: Store = None,
    dry_run: DryRun = False,
) -> None:
    """Measure a model before and after unlearning, and write evidence and report."""
    from salun_core.errors import UsageError
    from salun_core.models import load_model
    from salun_core.steps import evaluation
    from salun_core.steps.inputs import load_inputs
    from salun_core.steps.sources import model_folder

    if reference and retrain_reference:
        raise UsageError("--reference and --retrain-reference exclude each other", "both were given", "leave one out")
    with ExitStack() as stack:
        old, new = (stack.enter_context(model_folder(name, store)) for name in (before, after))
        retrained = stack.enter_context(model_folder(reference, store)) if reference else None
        if dry_run:
            inputs = load_inputs(old, forget, data)
            evaluation.check_pair(inputs.original, load_model(new), inputs.forget_set)
            emit_plan("evaluate", {"would_write": f"{out}, {report}", "forget_samples": len(inputs.forget)})
            return
        if retrain_reference:
            say("retraining the reference")
        evidence = evaluation.evaluate(
            old,
            new,
            forget,
            out,
            report,
            mask=mask,
            reference=retrained,
            retrain_reference=retrain_reference,
            data=data,
            device=device,
        )
    emit(evidence.model_dump(mode="json"), lambda: _show_evidence(evidence, out, report))


def _show_evidence(evidence: Evidence, out: Path, report: Path) -> None:
    print_metrics(evidence)
    typer.echo(f"\nevidence  {out}\nreport    {report}")
