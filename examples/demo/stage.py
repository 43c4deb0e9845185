"""What both demos need: a store of their own, sweeps of a model line, and the evidence and certificates they leave."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lab.seaweedfs import embedded_s3
from salun_core.certificates.keys import SIGNING_VARIABLE, VERIFY_VARIABLE, create_key
from salun_core.certificates.verify import verify_certificate
from salun_core.config import load
from salun_core.data.targets import Target
from salun_core.errors import ConflictError, GateRefusedError, SalunError, UsageError
from salun_core.evaluation import Evidence
from salun_core.gate import DECISION, GateDecision
from salun_core.methods.loop import OnEpoch
from salun_core.registry.lookup import Version, lines, read_head, read_version
from salun_core.registry.versions import fetch_version
from salun_core.requests.gauges import GaugeReader
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import RequestState, Status, summarise
from salun_core.steps.outcome import EVIDENCE, REPORT
from salun_core.steps.run_form import DeletionSweepForm
from salun_core.steps.sweep import sweep_once
from salun_core.storage import FileStore, open_store
from salun_core.storage.blobs import fetch_blob
from salun_core.storage.keys import certificate_key
from salun_core.storage.local_files import write_whole
from salun_core.sweeps.rollback import rollback
from salun_core.tasks import register_model
from salun_core.telemetry.exporter import Exporter, serving
from salun_core.times import utc_clock

ACTOR = "demo"
ENVIRONMENT = "s3.env"
STORE_VARIABLE = "SALUN_STORE_URI"
_MARKER = ".salun-demo"
_ACCOUNT = ("AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE")

Progress = Callable[[str], None]
ShowEpochs = Callable[[str, int], AbstractContextManager[OnEpoch]]
"""(name, epochs) -> a context that shows the progress of a training."""


@dataclass(frozen=True)
class Filed:
    """One of the demo's requests, with its target in words; the certificate was verified with the model folder."""

    target: str
    state: RequestState
    certificate: Path | None


@dataclass(frozen=True)
class DemoOutcome:
    """The outcome of a demo.

    `version` is the digest of HEAD afterwards: the new version, or the parent if the gate refused. `seconds` are by
    part, `requests` by id. `rollback` is the refusal of a rollback past the erasure; empty if nothing was erased or it
    was not tried.
    """

    line: str
    parent: str
    version: str
    evidence: Evidence
    decision: GateDecision
    seconds: Mapping[str, float]
    requests: Mapping[str, Filed]
    files: Mapping[str, Path]
    rollback: str = ""


@contextmanager
def demo_store(work: Path, port: int | None, fresh: bool, must_exist: bool = False) -> Iterator[str]:
    """Run an S3 server on loopback for the duration of the block, and yield the address of the store.

    Its variables are set in this process, and written to `s3.env` in the folder for use in another shell. `fresh`
    begins with an empty folder; `must_exist` refuses a folder without an earlier demo. UsageError: the folder holds
    something else, or another demo runs there.
    """
    with _owned(work, fresh, must_exist), embedded_s3(work / "store", port=port) as server:
        variables = {**server.environ, STORE_VARIABLE: server.uri, **_keys(work / "keys")}
        with _environment(variables), _written(work / ENVIRONMENT, variables):
            yield server.uri


def _keys(folder: Path) -> dict[str, str]:
    """Create the demo's signing key if it does not exist, and return the variables that name its files."""
    private, public = (folder.resolve() / f"salun.{ending}" for ending in ("pem", "pub"))
    if not private.is_file():
        create_key(folder / "salun")
    return {SIGNING_VARIABLE: str(private), VERIFY_VARIABLE: str(public)}


@contextmanager
def _owned(work: Path, fresh: bool, must_exist: bool) -> Iterator[None]:
    """Lock the folder for one demo, and empty it if asked. A folder without the demo's marker is refused."""
    if work.exists() and (not work.is_dir() or any(work.iterdir())) and not (work / _MARKER).is_file():
        raise UsageError(f"{work} is not a folder of the demo", "it holds something else", "give another --work-dir")
    if must_exist and not (work / "store").is_dir():
        raise UsageError(f"there is no demo in {work}", "no demo ran there", "run `salun demo` first")
    work.mkdir(parents=True, exist_ok=True)
    with (work / _MARKER).open("w") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            remedy = "wait for it, or give another --work-dir"
            raise UsageError(f"{work} is in use", "another demo runs there", remedy) from error
        if fresh:
            for item in work.iterdir():
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                elif item.name != _MARKER:
                    item.unlink()
        yield


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Direct this process and its children to the store, and away from the user's own account."""
    changed = {**variables, "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    before = {name: os.environ.pop(name, None) for name in (*changed, *_ACCOUNT)}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _written(path: Path, variables: Mapping[str, str]) -> Iterator[None]:
    """Keep the variables in a file that only its owner can read, until the server ends."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@dataclass
class Stage:
    """A demo's model line in a running store; `name` is the first words of its name if that is taken."""

    work: Path
    store_uri: str
    name: str
    progress: Progress
    store: FileStore = field(init=False)
    ledger: Ledger = field(init=False)
    line: str = field(init=False)
    parent: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.store = open_store(self.store_uri)
        self.ledger = Ledger(self.store, utc_clock)
        self.line = free_line(self.store, self.name)

    def publish(self, count: int) -> None:
        """Publish the trained model, with its number of training samples, as the first version of the line."""
        self.parent = register_model(self.store, self.line, self.work / "model", "train", count)
        self.progress(f"published it as the first version of the model line {self.line}")

    def file(self, targets: Mapping[str, Target]) -> dict[str, str]:
        """File a deletion request for each target; returns the targets in words by request id."""
        named = {f"{self.line}-{name}": target for name, target in targets.items()}
        for request, target in named.items():
            self.ledger.submit(request, self.line, target, source="demo", actor=ACTOR)
            self.progress(f"filed the deletion request {request}: {summarise(target)}")
        return {request: summarise(target) for request, target in named.items()}

    def sweep(self, form: DeletionSweepForm, which: str, folder: Path) -> None:
        """Run the compiled pipeline, or the same steps in this process if kfp is not installed.

        A refusal of the gate is not a failure.
        """
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
        if not has_kfp():
            self.progress(f"{which} sweep, in this process, because kfp is not installed")
            done = sweep_once(form, folder, lambda step: self.progress(f"step {step}"))
            self.progress(f"{which} sweep: {done.claimed.reason}")
            if done.error is not None and not isinstance(done.error, GateRefusedError):
                raise done.error
            return
        from pipelines.local import run_compiled
        from pipelines.packages import load_package

        self.progress(f"{which} sweep: running the compiled pipeline with kfp.local")
        given = form.model_dump(exclude_unset=True)
        arguments = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in given.items()}
        run = run_compiled(load_package("deletion-sweep").path, arguments, folder, self.progress)
        if run.exit_code not in (0, GateRefusedError.exit_code):
            raise SalunError(f"the {which} sweep failed", run.error, f"read {folder / 'run.log'}")

    def outcome(self, named: Mapping[str, str], seconds: Mapping[str, float]) -> DemoOutcome:
        """Collect evidence, decision and report, and verify the certificates.

        `named` has the targets in words by request id.
        """
        files = self._collect()
        return DemoOutcome(
            self.line,
            self.parent,
            self.head().digest,
            load(Evidence, files[EVIDENCE]),
            load(GateDecision, files[DECISION]),
            seconds,
            {request: self._verify(request, target) for request, target in named.items()},
            files,
        )

    def head(self) -> Version:
        """Return the version that is HEAD of the line."""
        found = read_head(self.store, self.line)
        assert found is not None
        return Version(found[0].version, read_version(self.store, self.line, found[0].version))

    def _collect(self) -> dict[str, Path]:
        """Copy evidence, decision and report of the run into the demo's folder."""
        newest, files = self.head(), {name: self.work / name for name in (EVIDENCE, DECISION, REPORT)}
        if newest.digest != self.parent:
            for name, path in files.items():
                fetch_blob(self.store, newest.manifest.files[name].sha256, path, newest.manifest.files[name].size)
            return files
        refused = [entry for entry in self.store.list("runs/") if entry.key.endswith(f"/{DECISION}")]
        if not refused:
            raise SalunError(
                "the sweep left no decision", "it published nothing and was not refused", f"see {self.work}"
            )
        last = max(refused, key=lambda entry: entry.modified).key
        for name, path in files.items():
            self.store.download(last.replace(DECISION, name), path)
        return files

    def _verify(self, request: str, target: str) -> Filed:
        """Fetch a request's certificate and verify it with the folder of the certified model."""
        state, stored = self.ledger.state(request), self.store.get(certificate_key(request))
        if state.status is not Status.COMPLETED or stored is None:
            return Filed(target, state, None)
        path = self.work / "certificates" / f"{request}.json"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, stored.data)
        version = verify_certificate(path).certificate.predicate.model.version
        folder = self.work / "model" if version == self.parent else self.work / "versions" / version[:12]
        if version != self.parent:
            fetch_version(self.store, self.line, version, folder)
        checked = verify_certificate(path, folder)
        assert state.last is not None
        self.progress(
            f"verified {request}: {state.last.outcome}, {checked.files} files of the model are the certified ones"
        )
        return Filed(target, state, path)

    def scrape(self, path: Path) -> Path:
        """Serve the exporter's page once, and write the response of a scrape to a file."""
        exporter = Exporter(GaugeReader(self.store, utc_clock).take, interval=60)
        exporter.refresh()
        with serving(exporter, port=0) as url, urllib.request.urlopen(url) as answer:  # noqa: S310 - our own loopback
            write_whole(path, answer.read())
        self.progress(f"scraped the exporter at {url}")
        return path

    def try_rollback(self) -> str:
        """Try to roll back past the erasure, which must be refused; returns the refusal."""
        if self.head().digest == self.parent:
            return ""
        try:
            rollback(self.store_uri, f"{self.line}@{self.parent}", ACTOR, "the demo tries it")
        except ConflictError as error:
            self.progress(f"a rollback was refused: {error.what}")
            return error.what
        raise SalunError("a rollback past an erasure was not refused", "the demo expects a refusal", "report it")


def free_line(store: FileStore, name: str) -> str:
    """Return the first of `name`, `name-2`, ... that is not a model line yet."""
    taken = lines(store)
    wanted = [name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2)]
    return next(line for line in wanted if line not in taken)


def has_kfp() -> bool:
    """Whether kfp is installed, which runs the compiled pipeline."""
    return importlib.util.find_spec("kfp") is not None
