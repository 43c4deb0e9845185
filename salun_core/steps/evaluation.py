"""Step 4: measure the model before and after, and write evidence and report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from salun_core.data import ForgetSet, ImageSet
from salun_core.errors import ModelError
from salun_core.evaluation import Evidence, Splits, evaluate_classifier
from salun_core.evaluation.evidence import Forgotten, Measured
from salun_core.models import LoadedModel, load_model
from salun_core.models.checkpoint import model_digest
from salun_core.report import ReportContext, write_report
from salun_core.saliency import SaliencyMask
from salun_core.steps.inputs import Inputs, load_inputs
from salun_core.steps.observe import RunRef, observed
from salun_core.steps.unlearning import read_run
from salun_core.storage.local import write_whole
from salun_core.unlearn import method_config, pick_device, unlearn
from salun_core.unlearn.training import fresh_classifier


def evaluate(
    before: Path,
    after: Path,
    forget_manifest_uri: str,
    evidence_out: Path,
    report_out: Path,
    *,
    mask: Path | None = None,
    reference: Path | None = None,
    retrain_reference: bool = False,
    reference_overrides: Mapping[str, Any] | None = None,
    model_line: str = "local",
    data: str | None = None,
    run: RunRef | None = None,
    device: str = "auto",
) -> Evidence:
    """Evaluate an unlearned model against the original, and against a retrained one where asked for.

    Args:
        before: folder of the original model.
        after: folder of the unlearned model.
        forget_manifest_uri: address of the forget targets.
        evidence_out: JSON file to write.
        report_out: HTML file to write.
        mask: mask file; weights outside it are compared bit by bit.
        reference: folder of a model that was retrained without the forget set.
        retrain_reference: retrain one here, by the recipe of the model card.
        reference_overrides: what differs from that recipe.
        model_line: for the metrics and the report.
        data: data set spec, where the data lie elsewhere than the model card says.
        run: the run of the deletion ledger that it belongs to.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        The evidence.

    Raises:
        ModelError: the two models are of different architectures or splits.
    """
    with observed("evaluate", model_line, run) as metrics:
        inputs = load_inputs(before, forget_manifest_uri, data)
        candidate = load_model(after)
        check_pair(inputs.original, candidate, inputs.forget_set)
        chosen = pick_device(device)
        facts = read_run(after, candidate)
        started = time.perf_counter()
        retrained = _reference(inputs, reference, retrain_reference, reference_overrides or {}, device)
        if retrain_reference:
            facts = facts.model_copy(update={"seconds": {**facts.seconds, "reference": time.perf_counter() - started}})
        used = SaliencyMask.load(mask) if mask and facts.density is not None else None
        test = _of_known_classes(inputs)
        splits = Splits(*(images.to(chosen) for images in (inputs.forget, inputs.retain, test)))
        evidence = evaluate_classifier(
            inputs.original.model.to(chosen),
            candidate.model.to(chosen),
            splits,
            _measured(inputs, candidate, retrained, used),
            forgotten(inputs.forget_set, len(inputs.original.split.train)),
            retrained.to(chosen) if retrained else None,
            used,
            inputs.original.card.classes,
            facts,
        )
        write_evidence(evidence_out, evidence)
        write_report(report_out, evidence, None, ReportContext(model_line=model_line, created_at=evidence.created_at))
        metrics.record_evidence(evidence)
        return evidence


def _of_known_classes(inputs: Inputs) -> ImageSet:
    """Return the test split without the classes that an earlier run forgot: the model is meant to miss these."""
    images = inputs.data.images("test", inputs.original.normalisation)
    table = inputs.data.table
    known = {table.labels[table.position[sample]] for sample in inputs.original.split.train}
    return images.select([index for index, label in enumerate(images.labels.tolist()) if label in known])


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write evidence as JSON."""
    text = json.dumps(evidence.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


def forgotten(forget_set: ForgetSet, train_count: int) -> Forgotten:
    """Describe a forget set without naming a sample."""
    return Forgotten(
        count=len(forget_set.ids), train_count=train_count, kinds=forget_set.kinds, classes=forget_set.classes
    )


def check_pair(original: LoadedModel, candidate: LoadedModel, forget_set: ForgetSet) -> None:
    """Check that two models can be compared: one architecture, and one split but for what was forgotten.

    Raises:
        ModelError: they are of different architectures or splits.
    """
    if original.card.architecture != candidate.card.architecture:
        raise ModelError(
            "the two models differ in architecture",
            f"{original.card.architecture} and {candidate.card.architecture}",
            "compare a model with its own child",
        )
    if candidate.split.digest not in (original.split.digest, original.split.without(forget_set.ids).digest):
        raise ModelError("the two models are of different splits", "their figures cannot be compared", "use one split")


def _measured(
    inputs: Inputs, candidate: LoadedModel, retrained: nn.Module | None, mask: SaliencyMask | None
) -> Measured:
    return Measured(
        before=inputs.original.digest,
        after=candidate.digest,
        reference=model_digest(retrained) if retrained else None,
        dataset=inputs.original.split.dataset_digest,
        split=inputs.original.split.digest,
        forget_set=inputs.forget_set.digest,
        mask=mask.digest if mask else None,
    )


def _reference(
    inputs: Inputs, folder: Path | None, retrain: bool, overrides: Mapping[str, Any], device: str
) -> nn.Module | None:
    if folder is not None:
        return load_model(folder).model
    if not retrain:
        return None
    card = inputs.original.card
    config = method_config("retrain", {**card.training, **overrides, "device": device, "batch_norm": "update"})
    result = unlearn(
        inputs.original.model,
        "retrain",
        forget=inputs.forget,
        retain=inputs.retain,
        config=config,
        fresh=lambda: fresh_classifier(card.architecture, inputs.retain, len(card.classes), config.seed),
    )
    return result.model.cpu().eval()
