"""The demo: a real store, a model trained on real images, five deletion requests, two sweeps, and their evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from salun_core.config import load
from salun_core.data import DataSpec, LoadedData, load_data, load_spec
from salun_core.evaluation import Evidence
from salun_core.gate import GateDecision
from salun_core.methods.loop import OnEpoch
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import summarise
from salun_core.steps.demo_line import ACTOR, Filed, Say, collect, free_line, head, look, scrape, sweep, try_rollback
from salun_core.steps.demo_requests import demo_targets, with_writers
from salun_core.steps.publishing import DECISION, EVIDENCE
from salun_core.steps.run_form import DeletionSweepForm
from salun_core.storage import open_store
from salun_core.tasks.classification.training import register_model, train_model, training_config
from salun_core.times import utc_clock

ARCHITECTURE = "resnet8"
_EPOCHS, _DIGITS_EPOCHS = 30, 10
_SMALL = {"train_limit": 2000, "test_limit": 1000, "size": 16}  # so that other data take minutes, not hours
_SWEEPS = ("first", "second")

Epochs = Callable[[str, int], AbstractContextManager[OnEpoch]]


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo made.

    Args:
        line: the model line.
        parent: digest of the version that was trained.
        version: digest of HEAD afterwards: the new version, or the parent if the gate refused.
        evidence: what was measured.
        decision: the gate's answer.
        train_seconds: wall clock of the training.
        requests: the deletion requests by id.
        rollback: how a rollback past the erasure was refused; empty where nothing was erased.
        files: report, evidence, decision, metrics page, by name.
    """

    line: str
    parent: str
    version: str
    evidence: Evidence
    decision: GateDecision
    train_seconds: float
    requests: Mapping[str, Filed]
    rollback: str
    files: Mapping[str, Path]


def demo_spec(data: str | None) -> DataSpec:
    """Return the demo's data: digits, or the user's own, cut to a size that trains in minutes."""
    spec = load_spec(data or "digits")
    if spec.source == "digits":
        return spec
    return spec.model_copy(update={key: value for key, value in _SMALL.items() if getattr(spec, key) is None})


def run_demo(work: Path, store_uri: str, spec: DataSpec, epochs: int | None, say: Say, progress: Epochs) -> DemoOutcome:
    """Train, register, file requests, sweep twice, verify the certificates, and try to roll back.

    Args:
        work: the demo's folder.
        store_uri: of a store that runs.
        spec: the data.
        epochs: of the training; by default enough to know the training data by heart.
        say: called with each line of progress.
        progress: shows the epochs of the training.

    Returns:
        What was made; look at `decision.passed`.

    Raises:
        SalunError: a step failed; the requests are queued again.
    """
    store = open_store(store_uri)
    data = load_data(with_writers(spec, work) if spec.source == "digits" and spec.metadata is None else spec)
    line = free_line(store)
    seconds = _train(work / "model", data, epochs, say, progress)
    parent = register_model(store, line, work / "model", "train", len(data.split.train))
    say(f"published it as the first version of the model line {line}")
    ledger = Ledger(store, utc_clock)
    named = _file_requests(ledger, line, data, say)
    config = DeletionSweepForm(model_line=line, store_uri=store_uri, retrain_reference=True, min_requests=1)
    files: dict[str, Path] = {}
    for which in _SWEEPS:
        sweep(config, work / f"{which}-sweep", which, say)
        files = files or collect(store, line, parent, work)
    requests = {name: look(store, ledger, name, words, work, parent, say) for name, words in named.items()}
    refusal = try_rollback(store_uri, line, parent, say)
    files["metrics.txt"] = scrape(store, work / "metrics.txt", say)
    decision, evidence = load(GateDecision, files[DECISION]), load(Evidence, files[EVIDENCE])
    return DemoOutcome(line, parent, head(store, line).digest, evidence, decision, seconds, requests, refusal, files)


def _train(folder: Path, data: LoadedData, epochs: int | None, say: Say, progress: Epochs) -> float:
    digits = data.spec.source == "digits"
    config = training_config({"epochs": epochs or (_DIGITS_EPOCHS if digits else _EPOCHS)})
    say(f"training {ARCHITECTURE} on {len(data.split.train)} images of {data.spec.source}, {config.epochs} epochs")
    started = time.perf_counter()
    with progress("training", config.epochs) as on_epoch:
        made = train_model(data.spec, ARCHITECTURE, config, folder, on_epoch=on_epoch)
    seconds = time.perf_counter() - started
    say(f"trained in {seconds:.1f} s: {made.train_accuracy:.1%} right in training, {made.test_accuracy:.1%} in test")
    return seconds


def _file_requests(ledger: Ledger, line: str, data: LoadedData, say: Say) -> dict[str, str]:
    """File the requests; returns their ids, and what each names."""
    named = {}
    for name, target in demo_targets(data).items():
        request = f"{line}-{name}"
        ledger.submit(request, line, target, source="demo", actor=ACTOR)
        named[request] = summarise(target)
        say(f"filed the deletion request {request}: {named[request]}")
    return named
