"""`salun audit`: an independent measurement from model folders, weights or predictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salun_core.cli.options import Device, DryRun
from salun_core.cli.output import echo, emit, emit_plan, print_table
from salun_core.errors import GateRefusedError, UsageError

if TYPE_CHECKING:
    from salun_core.audit.predictions import Audited
    from salun_core.audit.statement import AuditEvidence, VerifiedAudit


def audit(
    before: Annotated[Path, typer.Option(metavar="M", help="The original model: a folder, weights, or predictions.")],
    after: Annotated[Path, typer.Option(metavar="M", help="The model after unlearning, of the same kind.")],
    forget: Annotated[
        str, typer.Option(metavar="F", help="What had to be forgotten: ids, one per line, or a target in YAML or JSON.")
    ],
    out: Annotated[Path, typer.Option(help="Evidence to write (audit.json).")],
    report: Annotated[Path | None, typer.Option(help="Report to write (Markdown).")] = None,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", metavar="F", help="Ids that neither model was trained on; for predictions only."),
    ] = None,
    reference: Annotated[
        list[Path], typer.Option(metavar="M", help="A model retrained without the forget set; may be repeated.")
    ] = [],
    shadow: Annotated[
        list[Path], typer.Option(metavar="M", help="A shadow model, trained on half of the samples; may be repeated.")
    ] = [],
    data: Annotated[
        str | None,
        typer.Option(metavar="D", help="Location of the images; for weights, the data that they were trained on."),
    ] = None,
    arch: Annotated[str | None, typer.Option(metavar="A", help="Architecture of weights. Default: inferred.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="PEM", help="Your private key, which signs the evidence.")] = None,
    require: Annotated[
        str, typer.Option(metavar="LEVEL", help="Exit with code 3 below this level: procedure or measured.")
    ] = "procedure",
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the bootstrap, the random forest and the halves of relearn.")
    ] = 0,
    device: Device = "auto",
    dry_run: DryRun = False,
) -> None:
    """Measure from outside whether a classifier forgot.

    It compares models or predictions before and after unlearning. It needs no pipeline and no store. The exit code is 3
    if a test fails; evidence and report are written in both cases. `salun verify` checks the signature of the evidence.
    """
    from salun_core.audit.checks import examine
    from salun_core.audit.statement import evidence_of, failed_figures, file_of, report_of
    from salun_core.certificates.keys import load_signing_key
    from salun_core.storage.local_files import write_whole

    if require not in ("procedure", "measured"):
        raise UsageError(
            f"{require!r} is not a level", "an audit can require one of two levels", "write procedure or measured"
        )
    signer = load_signing_key(key) if key is not None else None  # before the work, so that a wrong key costs nothing
    with _opened(before, after, forget, held_out, reference, shadow, data, arch, device) as audited:
        sizes = {"forget_samples": len(audited.after["forget"]), "held_out_samples": len(audited.after["unseen"])}
        if dry_run:
            emit_plan("audit", {"would_write": out, **sizes, "references": len(reference), "shadows": len(shadow)})
            return
        evidence = evidence_of(audited, examine(audited, seed), {"seed": seed, "require": require}, signer)
    write_whole(out, file_of(evidence, signer))
    if report is not None:
        write_whole(report, report_of(evidence).encode())
    emit(evidence.model_dump(mode="json"), lambda: _show(evidence, out, report))
    refused = evidence.level == "refused"
    if refused or (require == "measured" and evidence.level != "measured"):
        why = "; ".join(failed_figures(evidence)[:3]) if refused else "so many samples cannot decide every test"
        raise GateRefusedError("the audit does not confirm that the model forgot", why, f"read the findings in {out}")


@contextmanager
def _opened(
    before: Path,
    after: Path,
    forget: str,
    held_out: Path | None,
    references: list[Path],
    shadows: list[Path],
    data: str | None,
    arch: str | None,
    device: str,
) -> Iterator[Audited]:
    """Read files of predictions, or load models, whichever are given."""
    from salun_core.audit.predictions import audited_predictions, is_predictions

    kinds = {is_predictions(path.name) for path in (before, after, *references, *shadows)}
    if len(kinds) > 1:
        what = "models and files of predictions are mixed"
        raise UsageError(
            what,
            "an audit compares models with models, or predictions with predictions",
            "give models only, or predictions only",
        )
    if kinds == {True}:
        if arch is not None:  # --data may come from salun.yaml
            raise UsageError("--arch is for weights", "predictions have no architecture", "leave it out")
        yield audited_predictions(before, after, Path(forget), held_out, references, shadows)
        return
    from salun_core.audit.folders import Weights, audited_folders

    if held_out is not None:
        why = "the test part of the data is held out"
        raise UsageError("--held-out is for predictions", why, "leave it out, or set `test_source` in the data spec")
    with audited_folders(before, after, forget, references, shadows, Weights(arch, data), device) as audited:
        yield audited


def _show(evidence: AuditEvidence, out: Path, report: Path | None) -> None:
    show_findings(evidence)
    echo(f"\n{evidence.level.upper()}: {evidence.words}")
    signed = f"signed by key {evidence.auditor[:12]}" if evidence.auditor else "not signed: give --key"
    echo(f"evidence  {out} ({signed})")
    if report is not None:
        echo(f"report    {report}")


def show_findings(evidence: AuditEvidence) -> None:
    """Print a table of all tests."""
    rows = [(f.test, f.value, f.low, f.high, f.required, f.n, f.verdict) for f in evidence.findings]
    print_table(["test", "value", "low", "high", "required", "n", "verdict"], rows)


def show_verified(found: VerifiedAudit, model: Path | None) -> None:
    """Print an audit that `salun verify` checked."""
    evidence = found.evidence
    echo(f"VALID: an audit, signed by a trusted key, from {found.key_source}")
    checked = (
        f"{model} is the model that was audited"
        if found.files is not None
        else ("only the audit was checked: give --model as well, or it may be about another model")
    )
    echo(checked)
    echo(f"\nlevel    {evidence.level}: {evidence.words}")
    echo(f"auditor  key {found.keyid}")
    echo(f"date     {evidence.created_at}\n")
    show_findings(evidence)
