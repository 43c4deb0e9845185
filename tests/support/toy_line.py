"""A toy model line for the ledger's tests: the model is the set of the sample ids that it has forgotten.

Everything around it is real: the store, the ledger, leases, claiming, publishing and settling.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from salun_core.certificates.issue import CertificateInput
from salun_core.data.targets import RedactedTarget, SamplesTarget
from salun_core.digest import canonical_json, digest_json
from salun_core.errors import UsageError
from salun_core.gate import DECISION
from salun_core.methods.recipe import Recipe
from salun_core.registry.lookup import Version, read_head, read_version
from salun_core.registry.versions import publish_head, stage_version
from salun_core.requests.resolve import Resolved
from salun_core.requests.schema import DeletionRequest
from salun_core.storage import FileStore
from salun_core.storage.keys import blob_key, certificate_key, run_key, scratch_key
from salun_core.sweeps.claim import Claim, claim
from salun_core.sweeps.context import SweepContext
from salun_core.sweeps.policy import SweepPolicy
from salun_core.sweeps.runs import RunRecord, RunStatus
from salun_core.tasks.line import OpenLine
from salun_core.times import utc_clock
from tests.support.decisions import passed, refused

LINE = "toy"
MODEL = "forgotten.json"
SAMPLES = 1000
RECIPES = [Recipe(method="salun"), Recipe(method="salun", density=0.75), Recipe(method="retrain", density=1.0)]


def policy(**settings: object) -> SweepPolicy:
    """Return a sweep policy under which every waiting request is due."""
    return SweepPolicy(**{"recipes": RECIPES, "min_requests": 1, "lease_seconds": 60, **settings})


def sample(number: int) -> str:
    return f"sample-{number}"


def target(*numbers: int) -> SamplesTarget:
    return SamplesTarget(ids=[sample(number) for number in numbers])


def forgotten(store: FileStore, version: Version) -> set[str]:
    stored = store.get(blob_key(version.manifest.files[MODEL].sha256))
    assert stored is not None
    return set(json.loads(stored.data))


def head(store: FileStore, line: str = LINE) -> Version:
    found = read_head(store, line)
    assert found is not None
    return Version(found[0].version, read_version(store, line, found[0].version))


def begin(store: FileStore, line: str = LINE) -> str:
    """Publish the first version: it knows all samples."""
    return publish(store, line, None, set(), None, 0)


def publish(
    store: FileStore,
    line: str,
    parent: str | None,
    gone: set[str],
    run: str | None,
    count: int,
    method: str = "salun",
    forget_set_digest: str | None = None,
) -> str:
    """Stage a version that has forgotten some samples, and make it HEAD if its parent still is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL
        path.write_bytes(canonical_json(sorted(gone)))
        files = {MODEL: path}
        if run is not None:  # a decision has the level of the run
            files[DECISION] = Path(folder) / DECISION
            files[DECISION].write_text(passed(margin=0.1, n=count, power=0.25).model_dump_json())
        fields = {
            "line": line,
            "parent": parent,
            "run": run,
            "method": method if parent else "train",
            "forget_count": count,
            "retrained": method == "retrain",
            "forget_set_digest": forget_set_digest,
        }
        version, _ = stage_version(store, fields, files)
    publish_head(store, line, version, parent, run)
    return version


_EVERYTHING = dict.fromkeys(map(sample, range(SAMPLES)))  # in order, and quick to look up


@dataclass(frozen=True)
class ToyResolver:
    """Resolves samples against what a version has not forgotten yet."""

    gone: frozenset[str]

    @property
    def train_count(self) -> int:
        return SAMPLES - len(self.gone)

    def resolve(self, request: DeletionRequest) -> Resolved:
        named = self._names(request)
        ids = sorted({name for name in named if name not in self.gone})
        return Resolved(ids, digest_json(ids), len(named))

    def freeze_forget_set(self, requests: Sequence[DeletionRequest]) -> bytes:
        return canonical_json(sorted({name for request in requests for name in self.resolve(request).ids}))

    @staticmethod
    def _names(request: DeletionRequest) -> list[str]:
        wanted = request.target
        if isinstance(wanted, SamplesTarget):
            return [name for name in wanted.ids or () if name in _EVERYTHING]
        if isinstance(wanted, RedactedTarget) and wanted.salt:
            return [name for name in _EVERYTHING if _hash(wanted.salt, name) in set(wanted.hashes)]
        raise UsageError("the toy knows samples only", "", "")


def _hash(salt: str, name: str) -> str:
    return hmac.new(bytes.fromhex(salt), f"samples\0{name}".encode(), hashlib.sha256).hexdigest()


class ToyCertifier:
    """Writes a certificate once for each request and version; `issued` counts the new ones."""

    def __init__(self, store: FileStore) -> None:
        self._store = store

    def certify(self, facts: CertificateInput) -> str:
        body = {"request": facts.request.id, "version": facts.version.digest, "outcome": facts.outcome}
        data, key = canonical_json(body), certificate_key(facts.request.id)
        stored = self._store.get(key)
        if stored is None:
            self._store.put_new(key, data)
        elif stored.data != data:
            self._store.put_if(key, data, stored.etag)
        return digest_json(body)


def run_record(run: str, parent: str, created_at: str, **changes: object) -> RunRecord:
    """Return a record of a run with one member that was not claimed."""
    member = {
        "id": "r-1",
        "event": 2,
        "attempt": 1,
        "forget_digest": "a" * 64,
        "salt": "0" * 32,
        "found": 3,
        "named": 3,
    }
    fields = {"run": run, "line": LINE, "parent": parent, "epoch": 1, "created_at": created_at, "method": "salun"}
    rest = {"density": 0.5, "work_key": "b" * 64, "members": [member], "forget_sha256": "f" * 64}
    rest |= {"levels": policy().levels, "max_attempts": 10}
    return RunRecord.model_validate({**fields, **rest, "forget_count": 3, "train_count": 20, **changes})


def sweep_context(store: FileStore, clock=utc_clock) -> SweepContext:
    return SweepContext(store, clock, ToyCertifier(store))


def resolver_of(store: FileStore):
    return lambda line: ToyResolver(frozenset(forgotten(store, line.version)))


def claim_next(context: SweepContext, run: str, line: str = LINE, **settings: object) -> Claim:
    return claim(context, OpenLine(context.store, line), run, policy(**settings), resolver_of(context.store))


def erase(
    context: SweepContext, record: RunRecord, poison: frozenset[str] = frozenset(), at_last: bool = False
) -> str | None:
    """Do what the unlearning pipeline does: read the frozen set, decide, publish; None if the gate refused.

    Args:
        context: the sweep context.
        record: the run.
        poison: samples that no recipe can forget (or only the last one).
        at_last: whether the last recipe can.
    """
    store = context.store
    stored = store.get(scratch_key(record.run, "forget.json"))
    assert stored is not None
    ids = set(json.loads(stored.data))
    for status in (RunStatus.MASKING, RunStatus.UNLEARNING, RunStatus.EVALUATING):
        context.runs.advance(record.run, status, "toy", "goes on")
    parent = Version(record.parent, read_version(store, record.line, record.parent))
    if ids & poison and not (at_last and record.rung == len(RECIPES) - 1):
        store.put_new(run_key(record.run, DECISION), refused().model_dump_json().encode())
        return None
    context.runs.advance(record.run, RunStatus.GATED, "toy", "passed")
    gone = forgotten(store, parent) | ids
    version = publish(store, record.line, record.parent, gone, record.run, len(ids), record.method)
    context.runs.advance(record.run, RunStatus.PUBLISHED, "toy", "published")
    return version


def erase_late(context: SweepContext, record: RunRecord) -> None:
    """Publish as a worker would that slept while its run was settled: its last look at the log is all that it does."""
    context.runs.advance(record.run, RunStatus.GATED, "toy", "passed")
    publish(context.store, record.line, record.parent, set(), record.run, 1)
