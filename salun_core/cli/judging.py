"""`salun gate` and `salun report`: judge evidence, and show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.options import DryRun, Store
from salun_core.cli.output import emit, emit_facts, emit_plan, print_table

if TYPE_CHECKING:
    from salun_core.gate import Expected, GateDecision

EvidenceFile = Annotated[Path, typer.Option("--evidence", help="Evidence file, from `salun evaluate`.")]


def gate(
    evidence: EvidenceFile,
    out: Annotated[Path, typer.Option("--out", help="Decision file to write (JSON), passed or refused.")],
    policy: Annotated[
        str, typer.Option("--policy", help="Gate policy: auto, the name of one that ships, a file, or s3://.")
    ] = "auto",
    before: Annotated[
        str | None, typer.Option("--before", metavar="M", help="Check that the evidence is of this original model.")
    ] = None,
    after: Annotated[
        str | None, typer.Option("--after", metavar="M", help="Check that the evidence is of this unlearned model.")
    ] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="Check that the evidence is of this mask.")] = None,
    forget: Annotated[
        str | None, typer.Option("--forget", metavar="F", help="Check that it is of this forget set; needs --before.")
    ] = None,
    store: Store = None,
    dry_run: DryRun = False,
) -> None:
    """Judge evidence by a policy. Exit code 3 when the gate refuses; the decision is written all the same."""
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
    emit(decision.model_dump(mode="json"), lambda: _show(decision, out))
    decision.require()


def _expected(
    before: str | None, after: str | None, mask: Path | None, forget: str | None, store: str | None
) -> Expected:
    """The digests of the artifacts at hand, where they were given."""
    from salun_core.errors import UsageError
    from salun_core.gate import Expected
    from salun_core.saliency import SaliencyMask
    from salun_core.tasks import open_inputs, open_model
    from salun_core.tasks.resolve import model_folder

    digests: dict[str, str] = {}
    if forget and not before:
        raise UsageError("--forget needs --before", "the set is resolved against the model's split", "give both")
    if before:
        with model_folder(before, store) as folder:
            original = open_model(folder)
            digests |= {"before": original.digest, "split": original.split.digest}
            digests |= {"dataset": original.split.dataset_digest}
            if forget:
                digests["forget_set"] = open_inputs(folder, forget).forget_set.digest
    if after:
        with model_folder(after, store) as folder:
            digests["after"] = open_model(folder).digest
    if mask:
        digests["mask"] = SaliencyMask.load(mask).digest
    return Expected(**digests)


def _show(decision: GateDecision, out: Path) -> None:
    rows = [
        (item.rule, item.threshold, item.actual, item.margin, "pass" if item.passed else "FAIL")
        for item in decision.verdicts
    ]
    print_table(["rule", "threshold", "actual", "margin", "verdict"], rows)
    typer.echo(f"\n{'PASSED' if decision.passed else 'REFUSED'} by policy {decision.policy}; decision in {out}")


def report(
    evidence: EvidenceFile,
    out: Annotated[Path, typer.Option("--out", help="Report to write (HTML).")],
    decision: Annotated[Path | None, typer.Option("--decision", help="Decision file, from `salun gate`.")] = None,
    line: Annotated[str, typer.Option("--line", help="Name of the model line, for the heading.")] = "local",
    dry_run: DryRun = False,
) -> None:
    """Write the report of evidence: one HTML file without scripts, that needs no network."""
    from salun_core.config import load
    from salun_core.evaluation import Evidence
    from salun_core.gate import GateDecision
    from salun_core.report import ReportContext, write_report

    measured = load(Evidence, evidence)
    judged = load(GateDecision, decision) if decision else None
    if dry_run:
        emit_plan("report", {"would_write": out, "judged": judged is not None})
        return
    write_report(out, measured, judged, ReportContext(model_line=line, created_at=measured.created_at))
    emit_facts({"report": out, "bytes": out.stat().st_size, "judged": judged is not None})
