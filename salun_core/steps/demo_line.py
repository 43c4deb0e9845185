"""What the demos share: sweeps of a line's requests, and the files and certificates that they leave."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from salun_core.certificates.verify import verify_certificate
from salun_core.errors import ConflictError, GateRefusedError, SalunError
from salun_core.registry.lookup import Version, lines, read_head, read_version
from salun_core.registry.versions import fetch_version
from salun_core.requests.gauges import GaugeReader
from salun_core.requests.ledger import Ledger
from salun_core.requests.schema import RequestState, Status
from salun_core.steps.local_pipeline import find_checkout, last_error, run_pipeline
from salun_core.steps.publishing import DECISION, EVIDENCE, REPORT
from salun_core.steps.run_form import DeletionSweepForm
from salun_core.steps.sweep import sweep_once
from salun_core.storage import FileStore, open_store
from salun_core.storage.blobs import fetch_blob
from salun_core.storage.keys import certificate_key
from salun_core.storage.local_files import write_whole
from salun_core.sweeps.rollback import rollback
from salun_core.telemetry.exporter import Exporter, serving
from salun_core.times import utc_clock

ACTOR = "demo"

Say = Callable[[str], None]


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


def free_line(store: FileStore, name: str = "demo") -> str:
    """Return the first of `name`, `name-2`, ... that is no model line yet."""
    taken = lines(store)
    wanted = [name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2)]
    return next(line for line in wanted if line not in taken)


def sweep(config: DeletionSweepForm, folder: Path, which: str, say: Say) -> None:
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
    given = config.model_dump(mode="json", exclude={"purge", "dry_run", "method_config"}, exclude_unset=True)
    arguments = {"pipeline": "deletion-sweep", **given, "method_config": json.dumps(config.method_config)}
    arguments = {name: value if isinstance(value, bool) else str(value) for name, value in arguments.items()}
    code = run_pipeline(checkout, arguments, folder, lambda step: say(f"step {step}"))
    if code not in (0, GateRefusedError.exit_code):
        log = folder / "pipeline.log"
        raise SalunError(f"the {which} sweep failed", last_error(log), f"read {log}")


def head(store: FileStore, line: str) -> Version:
    """Return the version that is HEAD of a line."""
    found = read_head(store, line)
    assert found is not None
    return Version(found[0].version, read_version(store, line, found[0].version))


def collect(store: FileStore, line: str, parent: str, work: Path) -> dict[str, Path]:
    """Copy evidence, decision and report from where the run left them into the demo's folder."""
    newest, files = head(store, line), {name: work / name for name in (EVIDENCE, DECISION, REPORT)}
    if newest.digest != parent:
        for name, path in files.items():
            fetch_blob(store, newest.manifest.files[name].sha256, path, newest.manifest.files[name].size)
        return files
    refused = [entry for entry in store.list("runs/") if entry.key.endswith(f"/{DECISION}")]
    if not refused:
        raise SalunError("the sweep left no verdict", "it published nothing and was not refused", f"see {work}")
    last = max(refused, key=lambda entry: entry.modified).key
    for name, path in files.items():
        store.download(last.replace(DECISION, name), path)
    return files


def look(store: FileStore, ledger: Ledger, name: str, words: str, work: Path, parent: str, say: Say) -> Filed:
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


def scrape(store: FileStore, path: Path, say: Say) -> Path:
    """Serve the exporter's page for a moment, and keep what a scrape gets."""
    exporter = Exporter(GaugeReader(store, utc_clock).take, interval=60)
    exporter.refresh()
    with serving(exporter, port=0) as url, urllib.request.urlopen(url) as answer:  # noqa: S310 - our own loopback
        write_whole(path, answer.read())
    say(f"scraped the exporter at {url}")
    return path


def try_rollback(store_uri: str, line: str, parent: str, say: Say) -> str:
    """Try what must be refused: to bring the version from before the erasure back."""
    if head(open_store(store_uri), line).digest == parent:
        return ""
    try:
        rollback(store_uri, f"{line}@{parent}", ACTOR, "the demo tries it")
    except ConflictError as error:
        say(f"a rollback was refused: {error.what}")
        return error.what
    raise SalunError("a rollback past an erasure was not refused", "the demo expected a refusal", "report it")
