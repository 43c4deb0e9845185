"""Step 5: apply the gate, and publish the model only if it passes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from salun_core.config import load
from salun_core.digest import check_digest
from salun_core.evaluation import Evidence
from salun_core.gate import Expected, GateDecision, decide
from salun_core.registry.lookup import Version, ancestry, read_file, read_version
from salun_core.registry.manifest import VersionManifest, weight_files, weights_digest
from salun_core.registry.versions import publish_head, stage_version
from salun_core.report import Ancestor, ReportContext, write_report
from salun_core.steps.evaluation import write_evidence
from salun_core.steps.observe import RunRef, observed, record_evidence
from salun_core.steps.used_mask import used_mask
from salun_core.storage import FileStore, open_store
from salun_core.storage.blobs import full_copy_every
from salun_core.storage.documents import parse_stored
from salun_core.storage.keys import run_key
from salun_core.storage.local_files import write_whole
from salun_core.storage.objects import ObjectStore
from salun_core.sweeps.runs import RunStatus
from salun_core.tasks import kept_split, open_inputs, open_model, version_files
from salun_core.tasks.resolve import AUTO, read_policy
from salun_core.telemetry.push import StepMetrics

ORIGIN_EVIDENCE = "evidence.json"
_KEPT = "TA"  # of all metrics this one alone is measured on the same samples for every version


def with_origin(store: ObjectStore, line: str, parent: str, measured: Evidence) -> Evidence:
    """Return evidence in which the test accuracy also says what the last full training had.

    The first child of that training was measured together with it, and carries the figure.

    Args:
        store: where the line is.
        line: the model line.
        parent: the version that the candidate was made from.
        measured: the evidence.

    Raises:
        IntegrityError: a version on the way, or its evidence, is missing or damaged.
    """
    metric = measured.metrics.get(_KEPT)
    if metric is None:
        return measured
    child, manifest = None, read_version(store, line, parent)
    while manifest.lineage.runs_since_training and manifest.parent:
        child, manifest = manifest, read_version(store, line, manifest.parent)
    origin = metric.before if child is None else _before(store, child)
    metrics = {**measured.metrics, _KEPT: metric.model_copy(update={"origin": origin})}
    return measured.model_copy(update={"metrics": metrics})


def _before(store: ObjectStore, manifest: VersionManifest) -> float | None:
    """Return the test accuracy of a version's parent, from the version's own evidence; None where it has none."""
    if ORIGIN_EVIDENCE not in manifest.files:
        return None
    data = read_file(store, Version(manifest.digest, manifest), ORIGIN_EVIDENCE)
    found = parse_stored(Evidence, data, ORIGIN_EVIDENCE).metrics.get(_KEPT)
    return found.before if found else None


EVIDENCE, DECISION, REPORT = "evidence.json", "decision.json", "report.html"
_JUDGED = "judged-evidence.json"  # what was measured, and the line's last full training beside it


@dataclass(frozen=True)
class Published:
    """What the step did.

    Args:
        version: digest of the new HEAD.
        decision: the gate's answer; it passed.
    """

    version: str
    decision: GateDecision


def gate_and_publish(
    before: Path,
    after: Path,
    evidence: Path,
    report: Path,
    forget_manifest_uri: str,
    *,
    store_uri: str,
    model_line: str,
    parent: str,
    policy_uri: str = AUTO,
    mask: Path | None = None,
    run: str | None = None,
) -> Published:
    """Judge and publish. A refusal leaves the line as it was and writes decision and report under `runs/<run>/`.

    The same run may try again: what it published already it finds and returns.

    Args:
        before: folder of the original model.
        after: folder of the unlearned model.
        evidence: file from the evaluation.
        report: HTML file to write, with the verdict.
        forget_manifest_uri: address of the forget targets.
        store_uri: `s3://bucket/prefix`.
        model_line: name of the line.
        parent: digest of the version that `before` was fetched as.
        policy_uri: name of a policy that ships, a file, an s3:// address, or auto: by the kind of model.
        mask: mask file that was used.
        run: id of the run.

    Returns:
        What was published.

    Raises:
        GateRefusedError: the gate refused.
        ConflictError: HEAD is not `parent` any more.
        IntegrityError: `before` is not the parent's model, or the model after would retain a forgotten sample later.
    """
    ours = RunRef(store_uri, run or "")
    with observed("gate_publish", model_line, ours) as metrics:
        store = open_store(store_uri)
        inputs = open_inputs(before, forget_manifest_uri)
        manifest = read_version(store, model_line, parent)
        check_digest("the model before", model_of(manifest), inputs.original.digest)
        measured = with_origin(store, model_line, parent, load(Evidence, evidence))
        candidate = open_model(after)
        kept = kept_split(inputs)
        check_digest("the split of the model after, without what was forgotten", kept.digest, candidate.split.digest)
        split = inputs.original.split
        digests = inputs.original.digest, inputs.forget_set.digest
        used = used_mask(after, mask, measured.run, *digests)
        expected = Expected(
            before=inputs.original.digest,
            after=candidate.digest,
            split=split.digest,
            dataset=split.dataset_digest,
            forget_set=inputs.forget_set.digest,
            mask=used.digest if used else None,
        )
        decision = decide(measured, read_policy(policy_uri, measured), expected)
        record_evidence(metrics, measured, decision)
        context = report_context(store, model_line, parent, measured)
        write_report(report, measured, decision, context)
        decision_file, judged = report.with_name(DECISION), report.with_name(_JUDGED)
        write_decision(decision_file, decision)
        write_evidence(judged, measured)
        files = {EVIDENCE: judged, DECISION: decision_file, REPORT: report}
        if not decision.passed and run:
            _keep(store, run, files)
        decision.require()
        ours.advance(RunStatus.GATED, "gate_publish")
        files |= version_files(after)
        version = _published_before(store, model_line, parent, candidate.digest, run)
        version = version or _publish(store, model_line, manifest, parent, measured, files, run, before)
        ours.advance(RunStatus.PUBLISHED, "gate_publish")
        _record_debt(metrics, read_version(store, model_line, version))
        return Published(version, decision)


def write_decision(path: Path, decision: GateDecision) -> None:
    """Write a decision as JSON."""
    text = json.dumps(decision.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


def model_of(manifest: VersionManifest) -> str:
    """Return the digest of a version's model, from those of its files."""
    return weights_digest({name: entry.sha256 for name, entry in manifest.files.items()})


def report_context(store: FileStore, line: str, parent: str, measured: Evidence) -> ReportContext:
    """Collect what the report tells of the line."""
    past = list(reversed(ancestry(store, line)))
    return ReportContext(
        model_line=line,
        parent=parent,
        lineage=[
            Ancestor(
                version=item.digest,
                method=item.manifest.method,
                forgotten=item.manifest.forget_count,
                published_at=item.manifest.created_at,
                full_training=item.manifest.retrained,
            )
            for item in past
        ],
        reproduce=_command(line, measured),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _command(line: str, measured: Evidence) -> str:
    run = measured.run
    density = [f"--density {run.density:g}"] if run.density is not None and run.tuning is None else []
    density += [f"--tune --tune-budget {run.tuning.budget}"] if run.tuning else []
    options = [f"--model-line {line}", f"--method {run.method}", *density, f"--seed {run.seed or 0}"]
    return " ".join(["python -m pipelines run", *options, "--forget-manifest-uri …"])


def _keep(store: FileStore, run: str, files: dict[str, Path]) -> None:
    """Keep the evidence of a refused run; it holds neither weights nor sample ids."""
    for name, path in files.items():
        store.upload(path, run_key(run, name))


def _published_before(store: FileStore, line: str, parent: str, model: str, run: str | None) -> str | None:
    """Find what an earlier attempt of this very run published before it was lost."""
    if run is None:
        return None
    ours = [item for item in ancestry(store, line) if (item.manifest.run, item.manifest.parent) == (run, parent)]
    return next((item.digest for item in ours if model_of(item.manifest) == model), None)


def _publish(
    store: FileStore,
    line: str,
    parent_manifest: VersionManifest,
    parent: str,
    measured: Evidence,
    files: dict[str, Path],
    run: str | None,
    before: Path,
) -> str:
    retrained = measured.run.method == "retrain"
    lineage = parent_manifest.lineage.after_run(measured.forgotten.count)
    if retrained:
        kept = measured.forgotten.train_count - measured.forgotten.count
        lineage = type(lineage)(trained_on=kept)
    fields = {
        "line": line,
        "parent": parent,
        "run": run,
        "method": measured.run.method,
        "forget_set_digest": measured.measured.forget_set,
        "forget_count": measured.forgotten.count,
        "retrained": retrained,
        "lineage": lineage,
    }
    base = {name: before / name for name in weight_files(files) if (before / name).is_file()}
    version, _ = stage_version(store, fields, files, base, full_copy_every())
    publish_head(store, line, version, parent, run)
    return version


def _record_debt(metrics: StepMetrics, manifest: VersionManifest) -> None:
    metrics.record("salun_unlearning_debt_ratio", manifest.lineage.debt)
    metrics.record("salun_runs_since_training", manifest.lineage.runs_since_training)
