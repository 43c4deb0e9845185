"""Step 5: apply the gate, and publish the model only if it passes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from salun_core.config import load
from salun_core.digest import check_digest
from salun_core.errors import ConflictError, IntegrityError
from salun_core.evaluation import Evidence
from salun_core.gate import DECISION, Expected, GateDecision, decide
from salun_core.registry.lookup import Version, ancestry, read_file, read_version
from salun_core.registry.manifest import Lineage, VersionManifest, weights_digest
from salun_core.registry.versions import publish_head, stage_version
from salun_core.report import Ancestor, ReportContext, write_report
from salun_core.steps.context import RunContext, record_assurance, record_evidence
from salun_core.steps.evaluation import write_evidence
from salun_core.steps.outcome import EVIDENCE, REPORT
from salun_core.storage import FileStore
from salun_core.storage.documents import parse_stored
from salun_core.storage.keys import run_key
from salun_core.storage.local_files import write_whole
from salun_core.storage.objects import ObjectStore
from salun_core.sweeps.runs import RunStatus
from salun_core.tasks.masks import used_mask
from salun_core.tasks.resolve import AUTO, read_policy

_GATED = "judged-evidence.json"  # the evidence with the figure of the line's last full training
_KEPT = "TA"  # of all metrics this one alone is measured on the same samples for every version


def with_origin(store: ObjectStore, line: str, parent: str, measured: Evidence) -> Evidence:
    """Return evidence in which the test accuracy also says what the last full training had.

    The first child of that training was measured together with it, and carries the figure. `parent` is the version that
    the candidate was made from. IntegrityError if a version on the way, or its evidence, is missing or damaged.
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
    if EVIDENCE not in manifest.files:
        return None
    data = read_file(store, Version(manifest.digest, manifest), EVIDENCE)
    found = parse_stored(Evidence, data, EVIDENCE).metrics.get(_KEPT)
    return found.before if found else None


@dataclass(frozen=True)
class Published:
    """What the step did: the digest of the new HEAD, and the decision, which passed."""

    version: str
    decision: GateDecision


def gate_and_publish(
    context: RunContext,
    after: Path,
    evidence: Path,
    report: Path,
    *,
    parent: str,
    policy_uri: str = AUTO,
    mask: Path | None = None,
) -> Published:
    """Apply the gate and publish. A refusal leaves the line as it was and stores decision and report of the run.

    `parent` is the digest of the version that the original model was fetched as; ConflictError if HEAD is another one.
    `report` is the HTML file to write; evidence and decision are written to its folder.

    The step may die at any point and be run again by the same run:
    - before HEAD moved, the staged version is invisible, and the next attempt stages the same one;
    - after HEAD moved, `_published_before` finds the version and returns it, also if a twin of this step moved it.
    """
    with context.observed("gate_publish") as metrics:
        store, line, inputs = context.store, context.model_line, context.inputs
        manifest = read_version(store, line, parent)
        check_digest("the model before", model_of(manifest), inputs.original.digest)
        measured = with_origin(store, line, parent, load(Evidence, evidence))
        candidate = context.candidate(after)
        check_digest("the split of the model after", inputs.kept_split.digest, candidate.split.digest)
        if left := len(candidate.split.train.find(inputs.forget_set.samples)):  # whatever the digest was said to be
            raise IntegrityError(
                "the split of the model after names forgotten samples", f"{left} of them", "submit a new run"
            )
        used = used_mask(after, mask, measured.run, inputs)
        expected = Expected(
            before=inputs.original.digest,
            after=candidate.digest,
            split=inputs.split.digest,
            dataset=inputs.split.dataset_digest,
            forget_set=inputs.forget_set.digest,
            mask=used.digest if used else None,
        )
        policy = read_policy(policy_uri, measured)
        context.require_claimed(policy.digest)  # the inputs are loaded once: what is checked here is what is published
        decision = decide(measured, policy, expected)
        record_evidence(metrics, measured, decision)
        record_assurance(metrics, measured.run.method, decision)
        write_report(report, measured, decision, report_context(store, line, parent, measured))
        files = {EVIDENCE: report.with_name(_GATED), DECISION: report.with_name(DECISION), REPORT: report}
        write_evidence(files[EVIDENCE], measured)
        write_decision(files[DECISION], decision)
        if context.run:  # neither weights nor sample ids are in these files; a version has its own copy of them
            for name in (REPORT,) if decision.passed else files:
                store.upload(files[name], run_key(context.run, name))
        where = f"{store.uri}/{run_key(context.run, DECISION)}" if context.run else str(files[DECISION])
        decision.require(where)
        context.advance(RunStatus.GATED, "gate_publish")
        version = _published_before(context, parent, candidate.digest)
        try:
            version = version or _publish(
                context, manifest, parent, measured, files | context.task.version_files(after)
            )
        except ConflictError:  # a twin of this step was faster: its version has another time, and another digest
            version = _published_before(context, parent, candidate.digest)
            if version is None:
                raise
        context.advance(RunStatus.PUBLISHED, "gate_publish")
        lineage = read_version(store, line, version).lineage
        metrics.record("salun_unlearning_debt_ratio", lineage.debt)
        metrics.record("salun_runs_since_training", lineage.runs_since_training)
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
    method = run.tuning.method if run.tuning and run.tuning.method else run.method
    options = [f"--model-line {line}", f"--method {method}", *density, f"--seed {run.seed or 0}"]
    return " ".join(["python -m pipelines run", *options, "--forget-manifest-uri …"])


def _published_before(context: RunContext, parent: str, model: str) -> str | None:
    """Return what an earlier attempt of this run published before it died."""
    if not context.run:
        return None
    for item in ancestry(context.store, context.model_line):
        if (item.manifest.run, item.manifest.parent) == (context.run, parent) and model_of(item.manifest) == model:
            return item.digest
    return None


def _publish(
    context: RunContext, parent_manifest: VersionManifest, parent: str, measured: Evidence, files: dict[str, Path]
) -> str:
    retrained = measured.run.method == "retrain"
    lineage = parent_manifest.lineage.after_run(measured.forgotten.count)
    if retrained:
        lineage = Lineage(trained_on=measured.forgotten.train_count - measured.forgotten.count)
    fields = {
        "line": context.model_line,
        "parent": parent,
        "run": context.run or None,
        "method": measured.run.method,
        "forget_set_digest": measured.measured.forget_set,
        "forget_count": measured.forgotten.count,
        "retrained": retrained,
        "lineage": lineage,
    }
    version, _ = stage_version(context.store, fields, files)
    publish_head(context.store, context.model_line, version, parent, context.run or None, files)
    return version
