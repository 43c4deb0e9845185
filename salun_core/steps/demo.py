"""The demo: a real store, a model trained on real images, deletion requests, the compiled pipeline, the verdict."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from salun_core.config import load
from salun_core.data import DataSpec, LoadedData, load_data, load_spec
from salun_core.data.forget import ClassTarget, SamplesTarget, Target
from salun_core.errors import GateRefusedError, SalunError
from salun_core.evaluation import Evidence
from salun_core.gate import GateDecision
from salun_core.requests.batching import seal_batch
from salun_core.requests.deadlines import utc_clock
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import Outcome, Status, summarise
from salun_core.steps.local_pipeline import find_checkout, last_error, run_pipeline
from salun_core.steps.publishing import DECISION, EVIDENCE, REPORT
from salun_core.steps.run import RunConfig, new_run_id, run_all
from salun_core.steps.training import register_model, train_model, training_config
from salun_core.storage import FileStore, open_store
from salun_core.storage.blobs import fetch_blob
from salun_core.storage.names import scratch_key
from salun_core.storage.versions import lines, read_head, read_version
from salun_core.unlearn.loop import OnEpoch

ARCHITECTURE, ACTOR, SAMPLES = "resnet8", "demo", 24
_EPOCHS, _DIGITS_EPOCHS = 30, 10
_SMALL = {"train_limit": 2000, "test_limit": 1000, "size": 16}  # so that other data take minutes, not hours

Say = Callable[[str], None]
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
        requests: ids of the deletion requests, and what each names.
        files: report, evidence, decision and mask, by name.
    """

    line: str
    parent: str
    version: str
    evidence: Evidence
    decision: GateDecision
    train_seconds: float
    requests: dict[str, str]
    files: dict[str, Path]


def demo_spec(data: str | None) -> DataSpec:
    """Return the demo's data: digits, or the user's own, cut to a size that trains in minutes."""
    spec = load_spec(data or "digits")
    if spec.source == "digits":
        return spec
    return spec.model_copy(update={key: value for key, value in _SMALL.items() if getattr(spec, key) is None})


def run_demo(work: Path, store_uri: str, spec: DataSpec, epochs: int | None, say: Say, progress: Epochs) -> DemoOutcome:
    """Train, register, file requests, run the pipeline, and settle the requests.

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
    store, run, data = open_store(store_uri), new_run_id(), load_data(spec)
    line = _free_line(store)
    seconds = _train(work / "model", data, epochs, say, progress)
    parent = register_model(store, line, work / "model", "train", len(data.split.train))
    say(f"published it as the first version of the model line {line}")
    ledger = Ledger(store, utc_clock)
    requests = _file_requests(ledger, line, data, say)
    sealed = seal_batch(store, [ledger.get(request) for request in requests], run)
    config = RunConfig(model_line=line, forget_manifest_uri=sealed.uri, store_uri=store_uri, retrain_reference=True)
    known = _refusals(store)
    with _claimed(ledger, requests, run):
        _execute(config, work / "run", run, say)
        files = _collect(store, line, parent, known, work)
    decision, evidence = load(GateDecision, files[DECISION]), load(Evidence, files[EVIDENCE])
    _settle(ledger, requests, run, decision)
    store.delete(scratch_key(run, "forget.json"))
    found = read_head(store, line)
    assert found is not None
    return DemoOutcome(line, parent, found[0].version, evidence, decision, seconds, requests, files)


def _free_line(store: FileStore) -> str:
    taken = lines(store)
    return next(name for number in range(1, len(taken) + 2) if (name := _line_name(number)) not in taken)


def _line_name(number: int) -> str:
    return "demo" if number == 1 else f"demo-{number}"


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
    """File two requests; returns their ids, and what each names."""
    requests = {}
    for name, target in _targets(data).items():
        request = f"{line}-{name}"
        ledger.submit(request, line, target, source="demo", actor=ACTOR)
        requests[request] = summarise(target)
        say(f"filed the deletion request {request}: {requests[request]}")
    return requests


def _targets(data: LoadedData) -> dict[str, Target]:
    """A whole class, and some samples of the others; of two classes only samples, or one would be left."""
    digest, classes = data.split.dataset_digest, list(data.table.classes)
    ids = data.split.ids("train")
    count = max(1, min(SAMPLES, len(ids) // 20))
    if len(classes) < 3:
        parts = {"first": ids[:count], "second": ids[count : 2 * count]}
        return {name: SamplesTarget(dataset_digest=digest, ids=part) for name, part in parts.items()}
    chosen = min(3, len(classes) - 1)
    others = [sample for sample in ids if data.table.labels[data.table.position[sample]] != chosen]
    return {
        "class": ClassTarget(dataset_digest=digest, class_id=classes[chosen]),
        "samples": SamplesTarget(dataset_digest=digest, ids=others[:count]),
    }


@contextmanager
def _claimed(ledger: Ledger, requests: Iterable[str], run: str) -> Iterator[None]:
    """Put the requests in progress; whatever ends the block early queues them again."""
    for request in requests:
        ledger.move(request, Status.IN_PROGRESS, ACTOR, "claimed", run=run)
    try:
        yield
    except BaseException as error:
        for request in requests:
            with suppress(SalunError):  # the first failure is the one to tell
                ledger.move(request, Status.QUEUED, ACTOR, f"run ended by {type(error).__name__}", run=run)
        raise


def _settle(ledger: Ledger, requests: Iterable[str], run: str, decision: GateDecision) -> None:
    for request in requests:
        if decision.passed:
            ledger.move(request, Status.COMPLETED, ACTOR, "published", run=run, outcome=Outcome.UNLEARNED)
        else:
            ledger.move(request, Status.QUEUED, ACTOR, "the gate refused", run=run)


def _execute(config: RunConfig, folder: Path, run: str, say: Say) -> None:
    """Run the compiled pipeline, or the same steps in this process where its files are not at hand."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
    folder.mkdir(parents=True)
    checkout = find_checkout()
    if checkout is None:
        say("the pipeline's files are not here, or kfp is not installed: running its steps in this process")
        with suppress(GateRefusedError):  # the decision says so
            run_all(config, folder, lambda step: say(f"step {step}"), run)
        return
    say("running the compiled pipeline with kfp.local")
    arguments = config.model_dump(mode="json", exclude={"method_config"})
    code = run_pipeline(checkout, arguments, folder, lambda step: say(f"step {step}"))
    if code:
        say(f"the pipeline ended with exit code {code}")


def _refusals(store: FileStore) -> set[str]:
    return {entry.key for entry in store.list("runs/") if entry.key.endswith(f"/{DECISION}")}


def _collect(store: FileStore, line: str, parent: str, known: set[str], work: Path) -> dict[str, Path]:
    """Copy evidence, decision, report and mask from where the run left them into the demo's folder."""
    found = read_head(store, line)
    files = {name: work / name for name in (EVIDENCE, DECISION, REPORT)}
    if found and found[0].version != parent:
        manifest = read_version(store, line, found[0].version)
        for name, path in files.items():
            fetch_blob(store, manifest.files[name].sha256, path, manifest.files[name].size)
    elif refused := sorted(_refusals(store) - known):
        for name, path in files.items():
            store.download(refused[-1].replace(DECISION, name), path)
    else:
        log = work / "run" / "pipeline.log"
        raise SalunError("the pipeline failed", last_error(log), f"read {log}")
    masks = [path for path in (work / "run").rglob("mask*") if path.is_file()]
    if masks:
        files["mask.safetensors"] = work / "mask.safetensors"
        shutil.copyfile(masks[0], files["mask.safetensors"])
    return files
