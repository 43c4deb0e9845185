"""The demo: a real store, a model trained on real images, five deletion requests, two sweeps, and their evidence."""

from __future__ import annotations

import shutil
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from salun_core.config import load
from salun_core.data import DataSpec, LoadedData, load_data, load_spec
from salun_core.errors import ConflictError, GateRefusedError, SalunError
from salun_core.evaluation import Evidence
from salun_core.gate import GateDecision
from salun_core.requests.deadlines import utc_clock
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import RequestState, Status, summarise
from salun_core.steps.demo_requests import demo_targets, with_writers
from salun_core.steps.gauges import GaugeReader
from salun_core.steps.local_pipeline import find_checkout, last_error, run_pipeline
from salun_core.steps.publishing import DECISION, EVIDENCE, REPORT
from salun_core.steps.rollback import rollback
from salun_core.steps.sweep import SweepConfig, sweep_once
from salun_core.steps.training import register_model, train_model, training_config
from salun_core.steps.verification import verify_certificate
from salun_core.storage import FileStore, open_store
from salun_core.storage.blobs import fetch_blob
from salun_core.storage.local import write_whole
from salun_core.storage.lookup import Version, lines, read_head, read_version
from salun_core.storage.names import certificate_key
from salun_core.storage.versions import fetch_version
from salun_core.telemetry.exporter import Exporter, serving
from salun_core.unlearn.loop import OnEpoch

ARCHITECTURE, ACTOR = "resnet8", "demo"
_EPOCHS, _DIGITS_EPOCHS = 30, 10
_SMALL = {"train_limit": 2000, "test_limit": 1000, "size": 16}  # so that other data take minutes, not hours
_SWEEPS = ("first", "second")

Say = Callable[[str], None]
Epochs = Callable[[str, int], AbstractContextManager[OnEpoch]]


@dataclass(frozen=True)
class Filed:
    """One of the demo's requests.

    Args:
        names: what it names, in words.
        state: where it stands at the end.
        certificate: file of its certificate, verified with the model folder; None where it has none yet.
    """

    names: str
    state: RequestState
    certificate: Path | None


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
    line = _free_line(store)
    seconds = _train(work / "model", data, epochs, say, progress)
    parent = register_model(store, line, work / "model", "train", len(data.split.train))
    say(f"published it as the first version of the model line {line}")
    ledger = Ledger(store, utc_clock)
    named = _file_requests(ledger, line, data, say)
    config = SweepConfig(model_line=line, store_uri=store_uri, retrain_reference=True, min_requests=1)
    files: dict[str, Path] = {}
    for which in _SWEEPS:
        _sweep(config, work / f"{which}-sweep", which, say)
        files = files or _collect(store, line, parent, work)
    requests = {name: _look(store, ledger, name, words, work, parent, say) for name, words in named.items()}
    refusal = _try_rollback(store_uri, line, parent, say)
    files["metrics.txt"] = _scrape(store, work / "metrics.txt", say)
    decision, evidence = load(GateDecision, files[DECISION]), load(Evidence, files[EVIDENCE])
    return DemoOutcome(line, parent, _head(store, line).digest, evidence, decision, seconds, requests, refusal, files)


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
    """File the requests; returns their ids, and what each names."""
    named = {}
    for name, target in demo_targets(data).items():
        request = f"{line}-{name}"
        ledger.submit(request, line, target, source="demo", actor=ACTOR)
        named[request] = summarise(target)
        say(f"filed the deletion request {request}: {named[request]}")
    return named


def _sweep(config: SweepConfig, folder: Path, which: str, say: Say) -> None:
    """Run the compiled pipeline, or the same steps in this process where its files are not at hand."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
    folder.mkdir(parents=True)
    checkout = find_checkout()
    if checkout is None:
        say(f"{which} sweep, in this process: kfp is not installed, or the pipeline's files are not here")
        done = sweep_once(config, folder, lambda step: say(f"step {step}"))
        say(f"{which} sweep: {done.claimed.reason}")
        if done.error is not None and not isinstance(done.error, GateRefusedError):
            raise done.error
        return
    say(f"{which} sweep: running the compiled pipeline with kfp.local")
    given = {"model_line", "store_uri", "retrain_reference", "min_requests"}
    arguments = {"pipeline": "deletion-sweep", **config.model_dump(mode="json", include=given)}
    arguments = {name: value if isinstance(value, bool) else str(value) for name, value in arguments.items()}
    code = run_pipeline(checkout, arguments, folder, lambda step: say(f"step {step}"))
    if code not in (0, GateRefusedError.exit_code):
        log = folder / "pipeline.log"
        raise SalunError(f"the {which} sweep failed", last_error(log), f"read {log}")


def _head(store: FileStore, line: str) -> Version:
    found = read_head(store, line)
    assert found is not None
    return Version(found[0].version, read_version(store, line, found[0].version))


def _collect(store: FileStore, line: str, parent: str, work: Path) -> dict[str, Path]:
    """Copy evidence, decision and report from where the run left them into the demo's folder."""
    head, files = _head(store, line), {name: work / name for name in (EVIDENCE, DECISION, REPORT)}
    if head.digest != parent:
        for name, path in files.items():
            fetch_blob(store, head.manifest.files[name].sha256, path, head.manifest.files[name].size)
        return files
    refused = [entry for entry in store.list("runs/") if entry.key.endswith(f"/{DECISION}")]
    if not refused:
        raise SalunError("the sweep left no verdict", "it published nothing and was not refused", f"see {work}")
    last = max(refused, key=lambda entry: entry.modified).key
    for name, path in files.items():
        store.download(last.replace(DECISION, name), path)
    return files


def _look(store: FileStore, ledger: Ledger, name: str, words: str, work: Path, parent: str, say: Say) -> Filed:
    """Fetch a request's certificate and verify it with the folder of the model that it is about."""
    state = ledger.state(name)
    stored = store.get(certificate_key(name))
    if state.status is not Status.COMPLETED or stored is None:
        return Filed(words, state, None)
    path = work / "certificates" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, stored.data)
    version = verify_certificate(path).certificate.predicate.model.version
    folder = work / "model" if version == parent else work / "versions" / version[:12]
    if version != parent:
        fetch_version(store, state.request.model_line, version, folder)
    checked = verify_certificate(path, folder)
    assert state.last is not None
    say(f"verified {name}: {state.last.outcome}, {checked.files} files of the model are what was signed")
    return Filed(words, state, path)


def _scrape(store: FileStore, path: Path, say: Say) -> Path:
    """Serve the exporter's page for a moment, and keep what a scrape gets."""
    exporter = Exporter(GaugeReader(store, utc_clock).take, interval=60)
    exporter.refresh()
    with serving(exporter, port=0) as url, urllib.request.urlopen(url) as answer:  # noqa: S310 - our own loopback
        write_whole(path, answer.read())
    say(f"scraped the exporter at {url}")
    return path


def _try_rollback(store_uri: str, line: str, parent: str, say: Say) -> str:
    """Try what must be refused: to bring the version from before the erasure back."""
    if _head(open_store(store_uri), line).digest == parent:
        return ""
    try:
        rollback(store_uri, f"{line}@{parent}", ACTOR, "the demo tries it")
    except ConflictError as error:
        say(f"a rollback was refused: {error.what}")
        return error.what
    raise SalunError("a rollback past an erasure was not refused", "the demo expected a refusal", "report it")
