"""Step 4: measure the model before and after, and write evidence and report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from salun_core.data import ForgetSet, ImageSet
from salun_core.errors import ModelError, UsageError
from salun_core.evaluation import Evidence, Splits, evaluate_classifier
from salun_core.evaluation.evidence import Forgotten, Measured, RunFacts
from salun_core.evaluation.optional_metrics import parse_optional_metrics, require_reference
from salun_core.methods.classification import method_config, pick_device, unlearn
from salun_core.methods.classification.training import fresh_classifier
from salun_core.models import LoadedModel, load_model
from salun_core.models.checkpoint import model_digest
from salun_core.report import ReportContext, write_report
from salun_core.saliency import SaliencyMask
from salun_core.steps.observe import RunRef, observed, record_evidence
from salun_core.steps.run_facts import read_run
from salun_core.steps.used_mask import used_mask
from salun_core.storage.local_files import write_whole
from salun_core.tasks import open_inputs, open_model
from salun_core.tasks.classification.inputs import Inputs
from salun_core.tasks.classification.optional_metrics import further_evidence

if TYPE_CHECKING:
    from salun_core.models.diffusers_folder import LoadedDiffusion


@dataclass(frozen=True)
class Reference:
    """What to compare with beside the model before.

    Args:
        folder: of a model that was retrained without the forget set.
        retrain: retrain one here, by the recipe of the model card.
        overrides: what differs from that recipe.
    """

    folder: Path | None
    retrain: bool
    overrides: Mapping[str, Any]


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
    store_uri: str | None = None,
    device: str = "auto",
    extra_metrics: str = "",
) -> Evidence:
    """Evaluate an unlearned model against the original, and against a retrained one where asked for.

    Args:
        before: folder of the original model.
        after: folder of the unlearned model.
        forget_manifest_uri: address of the forget targets.
        evidence_out: JSON file to write.
        report_out: HTML file to write.
        mask: mask file; weights outside it are compared bit by bit. A run whose settings were searched for left
            its own beside the model, which must agree with this one.
        reference: folder of a model that was retrained without the forget set.
        retrain_reference: retrain one here, by the recipe of the model card.
        reference_overrides: what differs from that recipe.
        model_line: for the metrics and the report.
        data: data set spec, where the data lie elsewhere than the model card says.
        run: the run of the deletion ledger that it belongs to.
        store_uri: store of the classifier that judges generated images; by default the run's.
        device: auto, cpu, cuda or cuda:N.
        extra_metrics: measurements that are off by default, such as `lira=16,relearn,probe`; of classifiers only.

    Returns:
        The evidence.

    Raises:
        ModelError: the two models are of different architectures or splits.
        IntegrityError: the mask is not the one that the run used.
        UsageError: a measurement is unknown, or lacks what it needs.
    """
    with observed("evaluate", model_line, run) as metrics:
        asked = parse_optional_metrics(extra_metrics)
        inputs = open_inputs(before, forget_manifest_uri, data)
        candidate = open_model(after)
        check_pair(inputs.original, candidate, inputs.forget_set)
        facts = read_run(after, candidate.card.method)
        used = used_mask(after, mask, facts, inputs.original.digest, inputs.forget_set.digest)
        wish = Reference(reference, retrain_reference, reference_overrides or {})
        if isinstance(inputs, Inputs):
            assert isinstance(candidate, LoadedModel)
            evidence = _classifier(inputs, candidate, facts, used, wish, device, asked)
        else:
            _refuse_further(asked)
            from salun_core.tasks.diffusion.evaluation import evaluate_images

            store = store_uri or (run.store_uri if run else "")
            evidence = evaluate_images(inputs, candidate, facts, used, wish, store or None, pick_device(device))
        write_evidence(evidence_out, evidence)
        write_report(report_out, evidence, None, ReportContext(model_line=model_line, created_at=evidence.created_at))
        record_evidence(metrics, evidence)
        return evidence


def _classifier(
    inputs: Inputs,
    candidate: LoadedModel,
    facts: RunFacts,
    used: SaliencyMask | None,
    wish: Reference,
    device: str,
    asked: Mapping[str, int],
) -> Evidence:
    require_reference(asked, wish.retrain or wish.folder is not None)
    chosen = pick_device(device)
    started = time.perf_counter()
    retrained = _reference(inputs, wish, device)
    if wish.retrain:
        facts = facts.model_copy(update={"seconds": {**facts.seconds, "reference": time.perf_counter() - started}})
    test = _of_known_classes(inputs)
    splits = Splits(*(images.to(chosen) for images in (inputs.forget, inputs.retain, test)))
    models = {"before": inputs.original.model.to(chosen), "after": candidate.model.to(chosen)}
    models |= {"reference": retrained.to(chosen)} if retrained else {}
    evidence = evaluate_classifier(
        models["before"],
        models["after"],
        splits,
        _measured(inputs, candidate, retrained, used),
        forgotten(inputs.forget_set, len(inputs.original.split.train)),
        models.get("reference"),
        used,
        inputs.original.card.classes,
        facts,
    )
    return further_evidence(evidence, asked, inputs, models, test, used, chosen) if asked else evidence


def _refuse_further(asked: Mapping[str, int]) -> None:
    if asked:
        raise UsageError(f"{', '.join(asked)} cannot be measured", "they are for classifiers", "leave them out")


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


def check_pair(
    original: LoadedModel | LoadedDiffusion, candidate: LoadedModel | LoadedDiffusion, forget_set: ForgetSet
) -> None:
    """Check that two models can be compared: one architecture, and one split but for what was forgotten.

    Raises:
        ModelError: they are of different architectures or splits.
    """
    before, after = original.card.architecture, candidate.card.architecture
    if before != after:
        raise ModelError(
            "the two models differ in architecture", f"{before} and {after}", "compare a model with its own child"
        )
    split = original.split
    if candidate.split.digest not in (split.digest, split.without(forget_set.samples).digest):
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


def _reference(inputs: Inputs, wish: Reference, device: str) -> nn.Module | None:
    if wish.folder is not None:
        return load_model(wish.folder).model
    if not wish.retrain:
        return None
    card = inputs.original.card
    config = method_config("retrain", {**card.training, **wish.overrides, "device": device, "batch_norm": "update"})
    result = unlearn(
        inputs.original.model,
        "retrain",
        forget=inputs.forget,
        retain=inputs.retain,
        config=config,
        fresh=lambda: fresh_classifier(card.architecture, inputs.retain, len(card.classes), config.seed),
    )
    return result.model.cpu().eval()
