"""Takes stock of a store for the rules of retention: reads everything, changes nothing."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from datetime import datetime

from salun_core.data.forget import RedactedTarget
from salun_core.requests.artifacts import parse_artifact, run_folder
from salun_core.requests.books import in_parallel
from salun_core.requests.deadlines import as_utc, utc_clock
from salun_core.requests.reading import read_all
from salun_core.requests.runs import RunLog
from salun_core.requests.schema import RequestState
from salun_core.requests.stock import Artifact, RequestFacts, RunFacts, Stock, kind_of_key
from salun_core.requests.superseded import moment
from salun_core.storage.blobs import delta_facts
from salun_core.storage.erase import StoredKey, inventory, unfinished_uploads, upload_bytes
from salun_core.storage.lease import holder_of
from salun_core.storage.lineage import Head, VersionManifest
from salun_core.storage.lookup import read_head, read_version
from salun_core.storage.s3 import S3Store


def take_stock(store: S3Store, now: datetime, pipeline_root: S3Store | None = None) -> Stock:
    """Read what a plan is made from.

    Args:
        store: the store of model lines.
        now: the time, with its time zone.
        pipeline_root: where Kubeflow keeps the files of the runs.

    Raises:
        IntegrityError: a manifest, a delta, a lease or a request is damaged: nobody can tell what is needed.
        StoreError: the store cannot be reached or refuses us.
    """
    keys = inventory(store)
    live: dict[str, list[tuple[StoredKey, Mapping[str, str]]]] = {}
    for item in (item for item in keys if item.live):
        kind, names = kind_of_key(item.key)
        live.setdefault(kind, []).append((item, names))
    versions = [(names["line"], names["digest"]) for _, names in live.get("manifest", [])]
    manifests = dict(zip(versions, in_parallel(lambda item: read_version(store, *item), versions), strict=True))
    runs = {**_of_manifests(manifests), **_runs(store, live)}
    artifacts, foreign = take_artifacts(pipeline_root, runs) if pipeline_root else ([], 0)
    return Stock(
        keys=keys,
        heads=_heads(store, live),
        manifests=manifests,
        bases=_bases(store, [names["digest"] for _, names in live.get("delta", [])]),
        holders=_holders(store, [names["line"] for _, names in live.get("lease", [])]),
        runs=runs,
        requests={state.request.id: _request(state) for state in read_all(store)},
        uploads=[(upload, upload_bytes(store, upload)) for upload in unfinished_uploads(store, as_utc(now))],
        artifacts=artifacts,
        foreign_runs=foreign,
    )


def _heads(store: S3Store, live: Mapping[str, Sequence[tuple[StoredKey, Mapping[str, str]]]]) -> dict[str, Head]:
    found = {names["line"]: read_head(store, names["line"]) for _, names in live.get("head", [])}
    return {line: head[0] for line, head in found.items() if head}


def _bases(store: S3Store, digests: Sequence[str]) -> dict[str, str]:
    facts = in_parallel(lambda digest: delta_facts(store, digest), digests)
    return {item.sha256: item.base for item in facts if item}


def _holders(store: S3Store, lines: Sequence[str]) -> dict[str, str]:
    found = {line: holder_of(store, line) for line in lines}
    return {line: holder for line, holder in found.items() if holder}


def _request(state: RequestState) -> RequestFacts:
    last, target = state.last, state.request.target
    redacted = isinstance(target, RedactedTarget)
    return RequestFacts(
        line=state.request.model_line,
        status=state.status,
        at=moment(last.at) if last else None,
        run=last.run if last else None,
        outcome=last.outcome if last else None,
        redacted=redacted,
        hashed=isinstance(target, RedactedTarget) and target.salt is not None,
    )


def _of_manifests(manifests: Mapping[tuple[str, str], VersionManifest]) -> dict[str, RunFacts]:
    """Return the runs that no log tells of, but a version does: those that no request asked for."""
    return {
        item.run: RunFacts(item.line, item.parent, (), None, moment(item.created_at))
        for item in manifests.values()
        if item.run
    }


def _runs(store: S3Store, live: Mapping[str, Sequence[tuple[StoredKey, Mapping[str, str]]]]) -> dict[str, RunFacts]:
    files: dict[str, list[StoredKey]] = {}
    marks: dict[str, set[str]] = {}
    for kind in ("record", "mark", "report", "run event", "mask", "candidate"):
        for item, names in live.get(kind, []):
            files.setdefault(names["run"], []).append(item)
            if kind == "mark":
                marks.setdefault(names["run"], set()).add(names["mark"])
    found = in_parallel(lambda run: _run(store, run, files[run], frozenset(marks.get(run, ()))), sorted(files))
    return dict(zip(sorted(files), found, strict=True))


def _run(store: S3Store, run: str, files: Sequence[StoredKey], marks: frozenset[str]) -> RunFacts:
    log = RunLog(store, utc_clock)
    record, last = log.read(run), log.last(run)
    at = last.at if last else record.created_at if record else None
    return RunFacts(
        line=record.line if record else None,
        parent=record.parent if record else None,
        members=tuple(member.id for member in record.members) if record else (),
        status=last.to_status if last else None,
        at=moment(at) if at else max(item.modified for item in files),
        marks=marks,
    )


def take_artifacts(root: S3Store, runs: Container[str]) -> tuple[list[Artifact], int]:
    """Return the files of known runs under Kubeflow's pipeline root, and how many other runs lie there.

    Args:
        root: the pipeline root.
        runs: the ids of the runs that are known.
    """
    found: list[Artifact] = []
    foreign: set[str] = set()
    for item in inventory(root):
        place = parse_artifact(item.key, runs)
        if place:
            found.append(Artifact(*place, item))
        else:
            foreign.add(run_folder(item.key))
    return found, len(foreign)
