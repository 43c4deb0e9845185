"""A classifier of real images forgets a class, single samples and a person, in one sweep of five deletion requests."""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

from examples.demo.stage import DemoOutcome, Progress, ShowEpochs, Stage
from salun_core.data import DataSpec, LoadedData, load_data, load_spec
from salun_core.data.targets import ClassTarget, SamplesTarget, SubjectTarget, Target
from salun_core.steps.run_form import DeletionSweepForm
from salun_core.tasks.classification.training import train_model, training_config

ARCHITECTURE = "resnet8"
SAMPLES, DIGITS, WRITERS = 12, 1797, 43
_EPOCHS, _DIGITS_EPOCHS = 30, 10
_SMALL = {"train_limit": 2000, "test_limit": 1000, "size": 16}  # so that other data take minutes, not hours


def demo_spec(data: str | None) -> DataSpec:
    """Return the demo's data: digits, or the user's own, reduced to a size that trains in minutes."""
    spec = load_spec(data or "digits")
    if spec.source == "digits":
        return spec
    return spec.model_copy(update={key: value for key, value in _SMALL.items() if getattr(spec, key) is None})


def run_demo(
    work: Path, store_uri: str, spec: DataSpec, epochs: int | None, progress: Progress, show_epochs: ShowEpochs
) -> DemoOutcome:
    """Train, publish, file requests, sweep twice, verify the certificates, and try to roll back; see `decision.passed`.

    `epochs` is None for enough to memorise the training data. SalunError: a step failed; the requests are queued again.
    """
    data = load_data(with_writers(spec, work) if spec.source == "digits" and spec.metadata is None else spec)
    stage = Stage(work, store_uri, "demo", progress)
    seconds = _train(work / "model", data, epochs, progress, show_epochs)
    stage.publish(len(data.split.train))
    named = stage.file(demo_targets(data))
    form = DeletionSweepForm(model_line=stage.line, store_uri=store_uri, retrain_reference=True, min_requests=1)
    stage.sweep(form, "first", work / "first-sweep")
    stage.sweep(form, "second", work / "second-sweep")
    outcome = stage.outcome(named, {"train": seconds})
    refusal = stage.try_rollback()
    files = {**outcome.files, "metrics.txt": stage.scrape(work / "metrics.txt")}
    return dataclasses.replace(outcome, files=files, rollback=refusal)


def _train(folder: Path, data: LoadedData, epochs: int | None, progress: Progress, show_epochs: ShowEpochs) -> float:
    digits = data.spec.source == "digits"
    config = training_config({"epochs": epochs or (_DIGITS_EPOCHS if digits else _EPOCHS)})
    progress(f"training {ARCHITECTURE} on {len(data.split.train)} images of {data.spec.source}, {config.epochs} epochs")
    started = time.perf_counter()
    with show_epochs("training", config.epochs) as on_epoch:
        made = train_model(data.spec, ARCHITECTURE, config, folder, on_epoch=on_epoch)
    seconds = time.perf_counter() - started
    progress(
        f"trained in {seconds:.1f} s: accuracy {made.train_accuracy:.1%} in training, {made.test_accuracy:.1%} in test"
    )
    return seconds


def with_writers(spec: DataSpec, folder: Path) -> DataSpec:
    """Return the digits with a table of their writers.

    The data set does not name its 43 writers, so the table assigns the digits to invented ones.
    """
    path = folder / "writers.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "writer"])
        rows.writerows([f"{index:06d}", f"writer-{index % WRITERS:02d}"] for index in range(DIGITS))
    return spec.model_copy(update={"metadata": str(path.resolve()), "subject_column": "writer"})


def demo_targets(data: LoadedData) -> Mapping[str, Target]:
    """Return the targets of five requests: samples twice, a class, a person, and a sample that was not trained on.

    With two classes, no class is forgotten as a whole. More samples take the place of a class or a person that the
    data do not have.
    """
    split, table = data.split, data.table
    classes, labels = list(table.classes), table.labels
    chosen = min(3, len(classes) - 1) if len(classes) > 2 else None
    ids = [sample for sample in split.ids("train") if labels[table.position[sample]] != chosen]
    count = max(1, min(SAMPLES, len(split.train) // 50))
    parts = [
        SamplesTarget(dataset_digest=split.dataset_digest, ids=ids[start : start + count])
        for start in range(0, 4 * count, count)
    ]
    person = next((table.subjects[table.position[sample]] for sample in reversed(ids) if any(table.subjects)), None)
    whole = None if chosen is None else ClassTarget(dataset_digest=split.dataset_digest, class_id=classes[chosen])
    return {
        "samples-a": parts[0],
        "samples-b": parts[1],
        "class": whole or parts[2],
        "person": SubjectTarget(subject_ref=person) if person else parts[3],
        "nothing": SamplesTarget(ids=split.ids("test")[:1]),
    }
