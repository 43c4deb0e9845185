"""Step 4: measure the model before and after, and write evidence and report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from salun_core import plugins
from salun_core.errors import ModelError, UsageError
from salun_core.evaluation import Evidence
from salun_core.evaluation.evidence import EVALUATED, most_evaluated
from salun_core.evaluation.optional_metrics import parse_optional_metrics
from salun_core.methods.config import pick_device
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup
from salun_core.report import ReportContext, write_report
from salun_core.steps.context import RunContext, record_evidence
from salun_core.storage.local_files import write_whole
from salun_core.tasks.masks import used_mask
from salun_core.tasks.run_facts import read_run_facts
from salun_core.tasks.task import Candidate, EvaluationOptions, Model
from salun_core.telemetry.push import StepMetrics


def evaluate(
    context: RunContext,
    after: Path,
    evidence_out: Path,
    report_out: Path,
    *,
    mask: Path | None = None,
    reference: Path | None = None,
    retrain_reference: bool = False,
    extra_metrics: str = "",
    evaluation_samples: str = str(EVALUATED),
) -> Evidence:
    """Evaluate an unlearned model against the original, and against a retrained one if that is asked for.

    It writes JSON and HTML. Weights outside the mask are compared bit by bit; a run whose settings were searched for
    has its own mask in the model folder, which must agree with this one (IntegrityError). A reference is a folder, or
    is retrained here by the recipe on the model card. The context's store holds the classifier for generated images.
    `extra_metrics` are off by default, such as `lira=16,relearn,probe`.
    """
    with context.observed("evaluate") as metrics:
        most = most_evaluated(evaluation_samples)
        asked = _Asked(after, evidence_out, report_out, mask, reference, retrain_reference, extra_metrics, most)
        evidence = _evaluated(context, asked, metrics, SINGLE_PROCESS)
        assert evidence is not None
        return evidence


def evaluate_together(
    context: RunContext,
    after: Path,
    evidence_out: Path,
    report_out: Path,
    *,
    mask: Path | None = None,
    reference: Path | None = None,
    retrain_reference: bool = False,
    extra_metrics: str = "",
    evaluation_samples: str = str(EVALUATED),
) -> Evidence | None:
    """Evaluate as `evaluate` does, in all processes that torchrun started; without torchrun in this one.

    Each process computes its share of a classifier's outputs, and of the training of a reference. The first one
    measures the rest alone, and writes; the others end before that and return None. If one fails, all that still work
    end with its exit code (PeerError). IntegrityError if they have different models or forget sets.
    """
    with context.distributed("evaluate") as (metrics, group):
        most = most_evaluated(evaluation_samples)
        asked = _Asked(after, evidence_out, report_out, mask, reference, retrain_reference, extra_metrics, most)
        return _evaluated(context, asked, metrics, group)


@dataclass(frozen=True)
class _Asked:
    """Arguments of `evaluate`."""

    after: Path
    evidence_out: Path
    report_out: Path
    mask: Path | None
    reference: Path | None
    retrain_reference: bool
    extra_metrics: str
    samples: int | None


def _evaluated(context: RunContext, asked: _Asked, metrics: StepMetrics, group: ProcessGroup) -> Evidence | None:
    extra = parse_optional_metrics(asked.extra_metrics)
    task, inputs = context.task, context.inputs
    if extra and not task.optional_metrics:
        raise UsageError(
            f"{', '.join(extra)} cannot be measured", f"a {task.description} has no extra metrics", "leave it out"
        )
    model = context.candidate(asked.after)
    check_pair(context, model)
    context.require_same_inputs(group)
    group.require_same("model after", model.digest)
    facts = read_run_facts(asked.after, model.card.method)
    candidate = Candidate(model, facts, used_mask(asked.after, asked.mask, facts, inputs))
    device, store = pick_device(context.device), context.store_uri or None
    options = EvaluationOptions(device, asked.reference, asked.retrain_reference, extra, store, group, asked.samples)
    if not group.main:
        task.contribute(inputs, candidate, options)
        return None
    evidence: Evidence = task.evaluate(inputs, candidate, options)
    if facts.method == "retrain" and asked.retrain_reference and asked.reference is None:
        same = evidence.measured.reference == evidence.measured.after
        integrity = evidence.integrity.model_copy(update={"repeated": same})
        evidence = evidence.model_copy(update={"integrity": integrity})
    kinds: tuple[plugins.Kind, ...] = ("metric", "attack")
    used = [record for kind in kinds for record in plugins.loaded(kind, *extra)]
    used += plugins.loaded("architecture", model.card.architecture)
    used += plugins.loaded("method", facts.method) if "seeds" in extra else []  # it was run again here
    evidence = evidence.model_copy(update={"plugins": used or None})
    write_evidence(asked.evidence_out, evidence)
    report = ReportContext(model_line=context.model_line, created_at=evidence.created_at)
    write_report(asked.report_out, evidence, None, report)
    record_evidence(metrics, evidence)
    return evidence


def check_pair(context: RunContext, candidate: Model) -> None:
    """Check that a model can be compared with the original: one architecture, and one split but for the forget set.

    ModelError if not.
    """
    inputs = context.inputs
    before, after = inputs.original.card.architecture, candidate.card.architecture
    if before != after:
        raise ModelError(
            "the two models differ in architecture",
            f"{before} and {after}",
            "compare a model with a version unlearned from it",
        )
    if candidate.split.digest not in (inputs.split.digest, inputs.kept_split.digest):
        raise ModelError("the two models have different splits", "their figures cannot be compared", "use one split")


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write evidence as JSON."""
    text = json.dumps(evidence.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
    write_whole(path, f"{text}\n".encode())
