"""`salun mask`, `unlearn`, `evaluate`, `gate` and `report`: steps 2 to 5 of the pipeline by hand."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salun_core.cli.form import DEFAULTS, form_option
from salun_core.cli.options import Data, Device, DryRun, Forget, Model, OptionalStore, Settings, read_settings
from salun_core.cli.output import (
    MODE,
    echo,
    emit,
    emit_facts,
    emit_plan,
    epoch_progress,
    print_metrics,
    print_refusals,
    print_table,
    progress,
)
from salun_core.cli.runs import trial_line
from salun_core.errors import UsageError

if TYPE_CHECKING:
    from salun_core.gate import Expected, Verdict
    from salun_core.methods.recipe import Recipe

Processes = Annotated[int, typer.Option("--processes", min=1, help="Processes that share the work; one per GPU.")]
EvidenceFile = Annotated[Path, typer.Option("--evidence", help="Evidence file, from `salun evaluate`.")]


def mask(
    model: Model,
    forget: Forget,
    out: Annotated[Path, typer.Option(help="Mask file to write (.safetensors).")],
    density: Annotated[float, form_option("density")] = DEFAULTS.density,
    data: Data = None,
    random_seed: Annotated[int | None, typer.Option(min=0, help="Draw a random mask, as a control.")] = None,
    settings: Settings = [],
    processes: Processes = 1,
    device: Device = "auto",
    store: OptionalStore = None,
    dry_run: DryRun = False,
) -> None:
    """Compute the saliency mask of a model.

    The mask selects the weights that matter most for the forget set.
    """
    from salun_core.methods.method import resolve_config
    from salun_core.steps.context import RunContext
    from salun_core.steps.mask import compute_mask
    from salun_core.tasks.resolve import model_folder

    recipe = _recipe("salun", density, read_settings(settings))
    if processes > 1 and not dry_run:
        _launch(processes)
        return
    with model_folder(model, store) as folder:
        context = RunContext(folder, forget, data=data, device=device)
        if dry_run:
            resolve_config(context.task.methods, recipe.method, recipe.method_config)
            emit_plan("mask", {"would_write": out, **context.inputs.sizes, "density": density})
            return
        made = compute_mask(context, recipe, out, random_seed)
    if _is_first_process():
        facts = {"salient": made.k, "weights": made.weights, "density": made.density, "scores": made.facts["scores"]}
        emit_facts({"mask": out, **facts, "digest": made.digest})


def unlearn(
    model: Model,
    forget: Forget,
    out: Annotated[Path, typer.Option(help="Folder to write the new model to.")],
    method: Annotated[
        str,
        form_option("method", help="The unlearning method; see `salun ls methods`. auto with --tune."),
    ] = DEFAULTS.method,
    mask: Annotated[Path | None, typer.Option(help="Mask file, for methods that need one.")] = None,
    data: Data = None,
    settings: Settings = [],
    config: Annotated[Path | None, typer.Option(help="YAML or JSON with settings of the method.")] = None,
    seed: Annotated[int, form_option("seed")] = DEFAULTS.seed,
    processes: Processes = 1,
    store: OptionalStore = None,
    tune: Annotated[
        bool, form_option("tune", help="Search the settings that are not given, on validation data.")
    ] = DEFAULTS.tune,
    tune_budget: Annotated[str, form_option("tune_budget")] = DEFAULTS.tune_budget,
    policy: Annotated[
        str, form_option("policy_uri", help="The gate policy that the result of --tune must satisfy.")
    ] = DEFAULTS.policy_uri,
    dry_run: DryRun = False,
) -> None:
    """Make a model forget.

    Weights outside the mask stay bit-identical. With --tune the exit code is 3 if no setting satisfies the policy;
    nothing is written then.
    """
    from salun_core.methods.method import resolve_config
    from salun_core.steps.context import RunContext
    from salun_core.steps.unlearning import run_unlearning
    from salun_core.tasks.masks import read_mask
    from salun_core.tasks.resolve import model_folder
    from salun_core.tasks.task import TuningOptions, check_recipe

    overrides = {"seed": seed, **read_settings(settings, config)}
    if tune:
        _check_tuning(method, mask, processes, policy)
    if processes > 1 and not dry_run:
        _launch(processes)
        return
    first = _is_first_process()
    with model_folder(model, store) as folder:
        context = RunContext(folder, forget, data=data)
        recipe = _recipe(method, 1.0, overrides, overrides["seed"])  # the mask carries the density
        recipe = check_recipe(context.task, recipe, tune=tune)
        chosen, method = not recipe.leaves_method_open, recipe.method
        resolved = resolve_config(context.task.methods, method, overrides) if chosen else None
        epochs = resolved.epochs if resolved else None
        if dry_run:
            read_mask(mask, context.inputs)
            facts = {"would_write": out, "method": method, **context.inputs.sizes, "epochs": epochs}
            emit_plan("unlearn", {name: value for name, value in facts.items() if value is not None})
            return
        tuning = TuningOptions(tune_budget, policy, lambda record: progress(trial_line(record))) if tune else None
        with epoch_progress(method, epochs) if first and epochs and not tune else nullcontext(None) as on_epoch:
            result = run_unlearning(context, recipe, mask, out, on_epoch=on_epoch, tuning=tuning)
    if first:
        tried = {"learning_rate": result.config.learning_rate, "tried": out / "tuning.json"} if tune else {}
        length = {"rounds" if result.ended else "epochs": len(result.history), "samples_passed": result.passes}
        facts = {"method": result.method, **length, **tried}
        facts |= {"ended": result.ended} if result.ended else {}
        emit_facts({"model": out, **facts, "seconds": round(result.seconds, 3)})


def _recipe(method: str, density: float, settings: dict[str, Any], seed: int = 0) -> Recipe:
    from salun_core.config import parse
    from salun_core.methods.recipe import Recipe

    fields = {"method": method, "density": density, "method_config": settings, "seed": seed}
    return parse(Recipe, fields, "the command line")


def _check_tuning(method: str, mask: Path | None, processes: int, policy: str) -> None:
    """Refuse, before any work, what a search cannot do."""
    from salun_core.methods.recipe import DEFAULT_METHOD
    from salun_core.tasks.resolve import check_policy
    from salun_core.tuning.space import spaces_of

    if mask is not None:
        raise UsageError(
            "--tune and --mask cannot be used together", "the search chooses the density", "leave out --mask"
        )
    if processes > 1:
        raise UsageError("--tune uses one process", "trials run one after the other", "leave out --processes")
    if method != DEFAULT_METHOD:
        spaces_of(method, {})
    check_policy(policy)


def evaluate(
    before: Annotated[str, typer.Option(metavar="M", help="The original model.")],
    after: Annotated[str, typer.Option(metavar="M", help="The unlearned model.")],
    forget: Forget,
    out: Annotated[Path, typer.Option(help="Evidence file to write (JSON).")],
    report: Annotated[Path, typer.Option(help="Report to write (HTML).")],
    reference: Annotated[
        str | None, typer.Option(metavar="M", help="A model that was retrained without the forget set.")
    ] = None,
    retrain_reference: Annotated[
        bool, form_option("retrain_reference", help="Train a reference now, by the model card's recipe.")
    ] = DEFAULTS.retrain_reference,
    mask: Annotated[Path | None, typer.Option(help="Mask file; weights outside it are compared bit by bit.")] = None,
    extra_metrics: Annotated[str, form_option("extra_metrics")] = DEFAULTS.extra_metrics,
    evaluation_samples: Annotated[str, form_option("evaluation_samples")] = DEFAULTS.evaluation_samples,
    data: Data = None,
    processes: Processes = 1,
    device: Device = "auto",
    store: OptionalStore = None,
    dry_run: DryRun = False,
) -> None:
    """Measure a model before and after unlearning.

    It writes the evidence and a report.
    """
    from salun_core.evaluation.evidence import most_evaluated
    from salun_core.evaluation.optional_metrics import parse_optional_metrics
    from salun_core.gate import decide, default_policy, load_policy
    from salun_core.steps import evaluation
    from salun_core.steps.context import RunContext
    from salun_core.tasks.resolve import model_folder

    parse_optional_metrics(extra_metrics)
    most_evaluated(evaluation_samples)
    if reference and retrain_reference:
        raise UsageError(
            "--reference and --retrain-reference cannot be used together", "both were given", "leave one out"
        )
    if processes > 1 and not dry_run:
        _launch(processes)
        return
    with ExitStack() as stack:
        old, new = (stack.enter_context(model_folder(name, store)) for name in (before, after))
        retrained = stack.enter_context(model_folder(reference, store)) if reference else None
        context = RunContext(old, forget, store_uri=store or "", data=data, device=device)
        if dry_run:
            evaluation.check_pair(context, context.candidate(new))
            samples = context.inputs.sizes["forget_samples"]
            emit_plan("evaluate", {"would_write": f"{out}, {report}", "forget_samples": samples})
            return
        if retrain_reference and _is_first_process():
            progress("retraining the reference")
        evidence = evaluation.evaluate_together(
            context,
            new,
            out,
            report,
            mask=mask,
            reference=retrained,
            retrain_reference=retrain_reference,
            extra_metrics=extra_metrics,
            evaluation_samples=evaluation_samples,
        )
    if evidence is None:  # the first process prints
        return

    def show() -> None:
        print_metrics(evidence)
        decision = decide(evidence, load_policy(default_policy(evidence)))
        if not decision.passed:
            echo(f"\nthe policy {decision.policy} would refuse this model:")
            print_refusals(decision)
        echo(f"\nevidence  {out}\nreport    {report}")

    emit(evidence.model_dump(mode="json"), show)


def gate(
    evidence: EvidenceFile,
    out: Annotated[Path, typer.Option(help="Decision file to write (JSON), also if the gate refuses.")],
    policy: Annotated[str, form_option("policy_uri")] = DEFAULTS.policy_uri,
    before: Annotated[str | None, typer.Option(metavar="M", help="The original model.")] = None,
    after: Annotated[str | None, typer.Option(metavar="M", help="The unlearned model.")] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask.")] = None,
    forget: Annotated[str | None, typer.Option(metavar="F", help="The forget set; needs --before.")] = None,
    store: OptionalStore = None,
    dry_run: DryRun = False,
) -> None:
    """Apply a policy to evidence. The exit code is 3 if the gate refuses; the decision is written in both cases.

    The gate also checks that the evidence belongs to the models, the mask and the forget set that are given.
    """
    from salun_core.config import load
    from salun_core.evaluation import Evidence
    from salun_core.gate import decide
    from salun_core.steps.publishing import write_decision
    from salun_core.tasks.resolve import read_policy

    measured = load(Evidence, evidence)
    decision = decide(measured, read_policy(policy, measured), _expected(before, after, mask, forget, store))
    if dry_run:
        emit_plan("gate", {"would_write": out, "passed": decision.passed, "summary": decision.summary})
        return
    write_decision(out, decision)

    def show() -> None:
        rows = [
            (item.rule, item.threshold, item.actual, item.margin, ("pass" if item.passed else "FAIL") + _close(item))
            for item in decision.verdicts
        ]
        print_table(["rule", "threshold", "actual", "margin", "verdict"], rows)
        echo(f"\n{'PASSED' if decision.passed else 'REFUSED'} by policy {decision.policy}; decision in {out}")
        print_refusals(decision)

    emit(decision.model_dump(mode="json"), show)
    decision.require(str(out), told=not MODE.json)


def _close(verdict: Verdict) -> str:
    return ", by less than one sample" if verdict.close else ""


def _expected(
    before: str | None, after: str | None, mask: Path | None, forget: str | None, store: str | None
) -> Expected:
    """Return the digests of the given artifacts, to compare with those in the evidence."""
    from salun_core.gate import Expected
    from salun_core.saliency import SaliencyMask
    from salun_core.tasks import open_inputs, task_of
    from salun_core.tasks.resolve import model_folder

    digests: dict[str, str] = {}
    if forget and not before:
        raise UsageError("--forget needs --before", "the set is resolved against the model's split", "give both")
    if before:
        with model_folder(before, store) as folder:
            original = task_of(folder).load(folder)
            digests |= {"before": original.digest, "split": original.split.digest}
            digests |= {"dataset": original.split.dataset_digest}
            if forget:
                digests["forget_set"] = open_inputs(folder, forget).forget_set.digest
    if after:
        with model_folder(after, store) as folder:
            digests["after"] = task_of(folder).load(folder).digest
    if mask:
        digests["mask"] = SaliencyMask.load(mask).digest
    return Expected(**digests)


def report(
    evidence: EvidenceFile,
    out: Annotated[Path, typer.Option(help="Report to write (HTML).")],
    decision: Annotated[Path | None, typer.Option(help="Decision file, from `salun gate`.")] = None,
    line: Annotated[str, typer.Option(help="Name of the model line, for the heading.")] = "local",
    dry_run: DryRun = False,
) -> None:
    """Write the report of evidence as one HTML file.

    The file has no scripts and needs no network.
    """
    from salun_core.config import load
    from salun_core.evaluation import Evidence
    from salun_core.gate import GateDecision
    from salun_core.report import ReportContext, write_report

    measured = load(Evidence, evidence)
    verdict = load(GateDecision, decision) if decision else None
    if dry_run:
        emit_plan("report", {"would_write": out, "judged": verdict is not None})
        return
    write_report(out, measured, verdict, ReportContext(model_line=line, created_at=measured.created_at))
    emit_facts({"report": out, "bytes": out.stat().st_size, "judged": verdict is not None})


_PROCESSES = "--processes"


def _launch(processes: int) -> None:
    """Run this command again in several processes on this machine, joined as torchrun joins them.

    Exits with the code of the first process that failed; UsageError if torchrun has started this process.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from salun_core.steps.processes import joined

    if "WORLD_SIZE" in os.environ:
        what = f"{_PROCESSES} does not work within torchrun"
        raise UsageError(what, "torchrun has started the processes", f"leave {_PROCESSES} out")
    words = [word for word in sys.argv[1:] if not word.startswith(f"{_PROCESSES}=")]
    if _PROCESSES in words:
        place = words.index(_PROCESSES)
        del words[place : place + 2]
    try:
        joined(processes, sys.executable)("-m", "salun_core.cli", *words)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        raise typer.Exit(code if code > 0 else 128 - code) from error
    except SignalException as error:
        raise typer.Exit(128 + int(error.sigval)) from error


def _is_first_process() -> bool:
    """Whether this process prints: of several that torchrun started, only the first one does."""
    return os.environ.get("RANK", "0") == "0"
