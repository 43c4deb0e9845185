"""Finds what earlier releases left in Kubeflow's own store: weights, masks, sample ids and evidence.

The steps of this release write only references, measures and reports there; their files lie in our store, where a
purge reaches them. Earlier releases wrote everything to the pipeline root, as
`PIPELINE/RUN/TASK/EXECUTION/OUTPUT[/FILE]`, and Kubeflow keeps it.

Other teams have pipelines under the same root. So only outputs below a pipeline named `salun-*` are looked at, whether
or not the store knows the run. There, the burden of proof is reversed: an output is harmless only if each S3 version of
each of its files is. A name is no proof of that, the content is.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from salun_core.storage.erase import StoredVersion, Upload, unfinished_uploads, upload_bytes, versions_under
from salun_core.storage.s3 import S3Store
from salun_core.sweeps.context import in_parallel
from salun_core.times import as_utc

SMALL = 256 * 1024
"""Bytes that a reference, a decision or a note may have; a reference names each file of a model."""
OUR_PIPELINES = "salun-"
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
DEEPEST = 5
"""The last place of a run's id in a key: a pipeline's name may be `namespace/<n>/pipeline/<p>`."""
_LOG = "executor-logs"  # of Kubeflow's launcher
_MEASURES = frozenset({"metrics", "classification"})
_HARMLESS = frozenset({"salun.reference/v1", "salun.decision/v1", "salun.outcome/v1"})
_REPORT = (
    b"content=\"default-src 'none'; style-src 'unsafe-inline'"  # in the head of each report since the first release
)
_REPORT_HEAD = 1024
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".pkl"})
_FILES = {
    "split.parquet": "training samples",
    "split.json": "training samples",
    "forget.json": "forget set",
    "evidence.json": "evidence",
    "model.json": "model",  # the card
}
_FORMATS = {
    "salun.split/v1": "training samples",
    "salun.forget-set/v1": "forget set",
    "salun.evidence/v1": "evidence",
    "salun.model/v1": "model",
}
_OUTPUTS = {
    **dict.fromkeys(("model", "before", "after", "unlearned"), "model"),
    "mask": "mask",
    "sums": "sums of a shard",
    "evidence": "evidence",
}
_BINARY = "binary data"
_OTHER = "other data"
UNFINISHED = "unfinished upload"


@dataclass(frozen=True, order=True)
class ArtifactPlace:
    """Where an output of one of our pipelines lies: pipeline, run, task, and the output with its execution.

    Args:
        pipeline: name of the pipeline.
        run: Kubeflow's id of the run.
        task: name of the task; empty for a file directly below the run.
        execution: Kubeflow's id of the task's execution; empty in older releases of Kubeflow.
        output: name of the output.
    """

    pipeline: str
    run: str
    task: str
    execution: str
    output: str


@dataclass(frozen=True)
class KeptArtifact:
    """An output that must not stay in Kubeflow's store.

    Args:
        place: where it lies.
        kind: what it is, such as "model" or "mask"; no text of the artifact.
        keys: of all its files, below the pipeline root.
        versions: how many S3 versions of them hold bytes.
        size: bytes of all these versions.
        upload: the unfinished multipart upload that it is, if it is one.
    """

    place: ArtifactPlace
    kind: str
    keys: tuple[str, ...]
    versions: int
    size: int
    upload: Upload | None = None


@dataclass(frozen=True)
class RootScan:
    """What lies under a pipeline root.

    Args:
        kept: outputs that must not stay, sorted by place.
        harmless: how many other outputs our pipelines have there.
        others: how many objects belong to other pipelines and programs.
    """

    kept: Sequence[KeptArtifact]
    harmless: int
    others: int


def find_place(key: str) -> ArtifactPlace | None:
    """Return where a key lies, or None if it does not belong to a run of one of our pipelines.

    Only the first id in a key is taken for that of the run: a task or an output of another team may have any name.

    Args:
        key: below the pipeline root.

    Example:
        >>> run, execution = "5f0c2b0e-6a4f-4a38-9d0c-7a8f9c1d2e3f", "0b0c2b0e-6a4f-4a38-9d0c-7a8f9c1d2e3f"
        >>> place = find_place(f"salun-unlearning/{run}/unlearn/{execution}/unlearned/model.safetensors")
        >>> (place.pipeline, place.task, place.output)
        ('salun-unlearning', 'unlearn', 'unlearned')
        >>> find_place(f"faces/{run}/salun-unlearning/{execution}/model/model.safetensors") is None
        True
    """
    parts = key.split("/")
    at = next((at for at, part in enumerate(parts[1:DEEPEST], 1) if UUID.fullmatch(part)), None)
    if at is None or not parts[at - 1].startswith(OUR_PIPELINES):
        return None
    pipeline, run, rest = parts[at - 1], parts[at], parts[at + 1 :]
    task, rest = ("", rest) if len(rest) < 2 else (rest[0], rest[1:])
    execution, rest = (rest[0], rest[1:]) if rest and UUID.fullmatch(rest[0]) else ("", rest)
    # Below other folders than Kubeflow's own, an id after the task is what tells a run from a folder of anybody.
    whole = at == 1 or parts[at - 2] == "pipeline" or execution
    return ArtifactPlace(pipeline, run, task, execution, rest[0]) if whole and rest else None


def scan_pipeline_root(root: S3Store, now: datetime) -> RootScan:
    """Look at every output of our pipelines under a pipeline root. Read-only.

    Args:
        root: the pipeline root.
        now: the time, with its time zone; uploads that began later are not listed.

    Raises:
        StoreError: the store is unreachable or refuses the credentials.
    """
    outputs: dict[ArtifactPlace, list[StoredVersion]] = {}
    others = 0
    for version in versions_under(root):  # page by page: nothing of other teams' keys is kept in memory
        place = find_place(version.key)
        if place is None:
            others += version.latest and not version.marker
        elif version.size:  # delete markers and empty files hold nothing
            outputs.setdefault(place, []).append(version)
    places = sorted(outputs)
    kinds = in_parallel(lambda place: _kind_of(root, place, outputs[place]), places)
    kept = [
        KeptArtifact(place, kind, _keys(outputs[place]), len(outputs[place]), sum(item.size for item in outputs[place]))
        for place, kind in zip(places, kinds, strict=True)
        if kind
    ]
    found = sorted([*kept, *_uploads(root, now)], key=lambda item: (item.place, item.kind))
    return RootScan(found, len(places) - len(kept), others)


def _keys(versions: Sequence[StoredVersion]) -> tuple[str, ...]:
    return tuple(sorted({item.key for item in versions}))


def _uploads(root: S3Store, now: datetime) -> Iterator[KeptArtifact]:
    """Yield what a killed launcher left: the parts of an upload hold bytes, and no listing of objects shows them."""
    for upload in unfinished_uploads(root, as_utc(now)):
        if place := find_place(upload.key):
            size = upload_bytes(root, upload)
            yield KeptArtifact(place, UNFINISHED, (upload.key,), 1, size, upload)


def _kind_of(root: S3Store, place: ArtifactPlace, versions: Sequence[StoredVersion]) -> str | None:
    """Return what an output is, or None if each version of each of its files is harmless."""
    kinds = [kind for item in versions if (kind := _kind_by_name(item.key))]
    for item in versions if not kinds else ():
        start = root.read_start(item.key, SMALL, item.version)
        if start and (kind := classify_content(place.output, start, item.size)):
            kinds.append(kind)
            break
    return _OUTPUTS.get(place.output, kinds[0]) if kinds else None


def _kind_by_name(key: str) -> str | None:
    path = PurePosixPath(key)
    return "weights" if path.suffix.lower() in _WEIGHTS else _FILES.get(path.name)


def classify_content(output: str, start: bytes, size: int) -> str | None:
    """Return what a file is, or None if it is a reference, a measure, a report or a small note of ours.

    Args:
        output: name of the output that it belongs to.
        start: its first bytes; all of it, if it has not more than `SMALL`.
        size: its size in bytes.

    Example:
        >>> classify_content("mask", b'{"format": "salun.reference/v1", "kind": "mask"}', 48) is None
        True
        >>> classify_content("notes", b'{"ids": ["sample-1"]}', 21)
        'other data'
    """
    try:
        # The start may end within a character, so this decoder does not insist on the last one.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start).lstrip()
    except UnicodeDecodeError:
        return _BINARY
    if "\0" in text:  # such as the header of a safetensors file
        return _BINARY
    if text[:15].lower() == "<!doctype html>" and _REPORT in start[:_REPORT_HEAD]:
        return None
    if output == _LOG:
        return None
    if size > SMALL:
        return _OTHER
    return _classify_small(output, text)


def _classify_small(output: str, text: str) -> str | None:
    if text[:1] not in {"{", "["}:
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return _OTHER
    name = str(document.get("format", "")) if isinstance(document, dict) else ""
    if name in _FORMATS:
        return _FORMATS[name]
    return None if name in _HARMLESS or output in _MEASURES else _OTHER
