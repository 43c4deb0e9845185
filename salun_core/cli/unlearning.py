"""`salun mask`, `salun unlearn` and `salun evaluate`: steps 2 to 4 of the pipeline by hand."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.options import (
    Also,
    Data,
    Device,
    DryRun,
    Forget,
    Model,
    Settings,
    Store,
    Tune,
    TuneBudget,
    read_settings,
)
from salun_core.cli.output import emit, emit_facts, emit_plan, epochs, print_metrics, say
from salun_core.errors import UsageError

if TYPE_CHECKING:
    from salun_core.evaluation import Evidence
    from salun_core.saliency import SaliencyMask
    from salun_core.saliency.scores import Shard
    from salun_core.tasks.classification.tuning import TuneWish
    from salun_core.tuning import TrialRecord


def check_tuning(method: str, mask: Path | None, processes: int, policy: str) -> None:
    """Refuse what a search cannot do, before it starts.

    Raises:
        UsageError: a mask is given, several processes are asked for, the method has nothing to search for, or there
            is no such policy.
    """
    from salun_core.errors import UsageError
    from salun_core.tasks.resolve import check_policy
    from salun_core.tuning.space import Space

    if mask is not None:
        raise UsageError("--tune and --mask exclude each other", "the search chooses the density", "leave out --mask")
    if processes > 1:
        raise UsageError("--tune takes one process", "trials follow each other", "leave out --processes")
    Space.of(method, {})
    check_policy(policy)


def show_trials(budget: str, policy: str) -> TuneWish:
    """Return the wish for a search that says a line a trial."""
    from salun_core.tasks.classification.tuning import TuneWish

    return TuneWish(budget, policy, lambda record: say(trial_line(record)))


def trial_line(record: TrialRecord) -> str:
    """Return one trial in one line."""
    settings = [
        f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in record.settings.items()
    ]
    settings += [f"density {record.density:g}"] if record.density is not None else []
    found = "no figures" if record.distance is None else f"distance {record.distance:.4f}"
    broken = f"; breaks {', '.join(record.refused)}" if record.refused else ""
    return f"trial {record.number}: {', '.join(settings)}, {record.epochs} epochs: {found}, {record.state}{broken}"


_OPTION = "--processes"


def silent() -> bool:
    """Whether this is one of several processes and not the one that prints."""
    return os.environ.get("RANK", "0") != "0"


def check_shards(
    shard: str | None, merge: bool, files: list[Path], processes: int, random_seed: int | None
) -> Shard | None:
    """Check which of the options go together.

    Returns:
        The shard to score, if one was named.

    Raises:
        UsageError: they do not.
    """
    from salun_core.saliency.scores import Shard

    ways = [shard is not None, merge, processes > 1, random_seed is not None]
    if sum(ways[:3]) > 1 or (sum(ways) > 1 and not ways[2]):
        raise UsageError("these options exclude each other", "--shard, --merge, --processes", "give one of them")
    if bool(files) != merge:
        raise UsageError("--merge and the files of shards go together", "one is missing", "write --merge shard-*")
    return None if shard is None else Shard.parse(shard)


def score_one(model: Path, forget: str, shard: Shard, out: Path, data: str | None, device: str) -> None:
    """Score one shard, write its file and print what it is."""
    from salun_core.steps.sharding import score_shard

    header = score_shard(model, forget, shard, out, data=data, device=device)
    samples = len(shard.samples(header.samples))
    emit_facts({"shard": out, "number": str(shard), "samples": samples, "of": header.samples})


def merge_files(
    model: Path, forget: str, files: list[Path], density: float, out: Path, data: str | None
) -> SaliencyMask:
    """Merge the files of all shards into a mask and write it."""
    from salun_core.steps.sharding import merge_scores

    return merge_scores(model, forget, files, density, out, data=data)


def launch(processes: int) -> None:
    """Run this very command in several processes on this machine, joined as torchrun joins them.

    Args:
        processes: how many.

    Raises:
        typer.Exit: one failed; with the exit code of the first that did.
        UsageError: this is one of several processes already.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from salun_core.steps.processes import joined

    if "WORLD_SIZE" in os.environ:
        raise UsageError(f"{_OPTION} within torchrun", "torchrun has started the processes", f"leave {_OPTION} out")
    try:
        joined(processes, sys.executable)("-m", "salun_core.cli", *_without_option(sys.argv[1:]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        raise typer.Exit(code if code > 0 else 128 - code) from error
    except SignalException as error:
        raise typer.Exit(128 + int(error.sigval)) from error


def _without_option(arguments: list[str]) -> list[str]:
    """Leave `--processes N` out of the arguments of a verb."""
    kept = [word for word in arguments if not word.startswith(f"{_OPTION}=")]
    if _OPTION in kept:
        place = kept.index(_OPTION)
        del kept[place : place + 2]
    return kept


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
    settings: Settings = [],  # noqa: B006 - typer reads it and hands over a new list
    processes: Processes = 1,
    device: Device = "auto",
    store: Store = None,
    dry_run: DryRun = False,
) -> None:
    """Compute the saliency mask of a model: the weights that matter most for what is to be forgotten."""
    from salun_core.steps.mask import compute_mask
    from salun_core.tasks import open_inputs, resolved_config, sizes_of
    from salun_core.tasks.resolve import model_folder

    part, overrides = check_shards(shard, merge, shards or [], processes, random_seed), read_settings(settings)
    if processes > 1 and not dry_run:
        launch(processes)
        return
    with model_folder(model, store) as folder:
        if dry_run:
            resolved_config(folder, "salun", overrides)
            emit_plan("mask", {"would_write": out, **sizes_of(open_inputs(folder, forget, data)), "density": density})
            return
        if part is not None:
            score_one(folder, forget, part, out, data, device)
            return
        if merge:
            made = merge_files(folder, forget, shards or [], density, out, data)
        else:
            made = compute_mask(
                folder, forget, density, out, overrides=overrides, data=data, device=device, random_seed=random_seed
            )
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
    tune: Tune = False,
    tune_budget: TuneBudget = "20e",
    policy: Annotated[
        str, typer.Option("--policy", help="With --tune: the gate policy that bounds the search.")
    ] = "auto",
    dry_run: DryRun = False,
) -> None:
    """Make a model forget; weights outside the mask keep their bits.

    With --tune the exit code is 3 when no setting stays within the policy; nothing is written then.
    """
    from salun_core.cli.unlearning import check_tuning, show_trials
    from salun_core.steps.unlearning import read_mask, run_unlearning
    from salun_core.tasks import open_inputs, resolved_config, sizes_of
    from salun_core.tasks.resolve import model_folder

    overrides = read_settings(settings, config)
    if tune:
        check_tuning(method, mask, processes, policy)
    if processes > 1 and not dry_run:
        launch(processes)
        return
    with model_folder(model, store) as folder:
        resolved = resolved_config(folder, method, {"seed": seed, **overrides})
        if dry_run:
            inputs = open_inputs(folder, forget, data)
            read_mask(mask, inputs)
            sizes = sizes_of(inputs)
            emit_plan("unlearn", {"would_write": out, "method": method, **sizes, "epochs": resolved.epochs})
            return
        progress = nullcontext(None) if silent() or tune else epochs(method, resolved.epochs)
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
                tune=show_trials(tune_budget, policy) if tune else None,
            )
    if silent():
        return
    facts: dict[str, object] = {"method": method, "epochs": len(result.history), "samples_passed": result.passes}
    if tune:
        facts |= {"learning_rate": result.config.learning_rate, "tried": out / "tuning.json"}
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
    also: Also = "",
    data: Data = None,
    device: Device = "auto",
    store: Store = None,
    dry_run: DryRun = False,
) -> None:
    """Measure a model before and after unlearning, and write evidence and report."""
    from salun_core.errors import UsageError
    from salun_core.evaluation.optional_metrics import parse_optional_metrics
    from salun_core.steps import evaluation
    from salun_core.tasks import open_inputs, open_model, sizes_of
    from salun_core.tasks.resolve import model_folder

    parse_optional_metrics(also)
    if reference and retrain_reference:
        raise UsageError("--reference and --retrain-reference exclude each other", "both were given", "leave one out")
    with ExitStack() as stack:
        old, new = (stack.enter_context(model_folder(name, store)) for name in (before, after))
        retrained = stack.enter_context(model_folder(reference, store)) if reference else None
        if dry_run:
            inputs = open_inputs(old, forget, data)
            evaluation.check_pair(inputs.original, open_model(new), inputs.forget_set)
            samples = sizes_of(inputs)["forget_samples"]
            emit_plan("evaluate", {"would_write": f"{out}, {report}", "forget_samples": samples})
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
            store_uri=store,
            device=device,
            also=also,
        )
    emit(evidence.model_dump(mode="json"), lambda: _show_evidence(evidence, out, report))


def _show_evidence(evidence: Evidence, out: Path, report: Path) -> None:
    print_metrics(evidence)
    typer.echo(f"\nevidence  {out}\nreport    {report}")
