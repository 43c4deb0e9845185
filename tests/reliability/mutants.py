"""Seeded defects: each takes one safeguard out of the product, in one process, for the time of a block."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

from salun_core.config import parse
from salun_core.digest import canonical_json, sha256_bytes
from salun_core.errors import ConflictError
from salun_core.registry import versions
from salun_core.registry.lookup import Version, read_head
from salun_core.registry.manifest import Head, VersionManifest
from salun_core.storage import leases as lease
from salun_core.storage.keys import head_key, scratch_key
from salun_core.storage.s3 import S3Store
from salun_core.sweeps import claim as claiming
from salun_core.sweeps import settle as settling
from salun_core.sweeps.runs import RunStatus
from salun_core.times import utc_now
from tests.support import toy_line as toy


@contextmanager
def seeded(name: str | None) -> Iterator[None]:
    """Seed a defect by its name; None leaves the product as it is."""
    with ExitStack() as stack:
        for change in MUTANTS[name] if name else ():
            stack.enter_context(change())
        yield


def _without_condition(matches: Callable[[str], bool]) -> Callable[[], object]:
    real = S3Store.try_put

    def put(self, key, data, etag=None, writer=""):
        if not matches(key):
            return real(self, key, data, etag, writer)
        client, bucket, prefix = self.native
        return client.put_object(Bucket=bucket, Key=prefix + key, Body=data, Metadata={"salun-writer": writer})["ETag"]

    return lambda: patch.object(S3Store, "try_put", put)


def _no_read_back():
    def settle(self, key, data, etag, writer, unclear):
        raise unclear or ConflictError(f"{key} exists already", "it holds other content", "")

    return patch.object(S3Store, "_settle", settle)


def _swap_retried():
    real = versions._swap

    def swap(store, head, parent, etag):
        try:
            return real(store, head, parent, etag)
        except ConflictError:
            return real(store, head, parent, read_head(store, head.line)[1])

    return patch.object(versions, "_swap", swap)


def _pointer_first():
    def publish(store, line, parent, gone, run, count, method="salun"):
        data = canonical_json(sorted(gone))
        fields = {"line": line, "parent": parent, "run": run, "method": method, "forget_count": count}
        fields |= {"created_at": utc_now(), "files": {toy.MODEL: {"sha256": sha256_bytes(data), "size": len(data)}}}
        version = parse(VersionManifest, fields, "manifest").digest
        old, etag = read_head(store, line)
        moved = {"line": line, "version": version, "sequence": old.sequence + 1, "published_at": utc_now(), "run": run}
        store.put_if(head_key(line), parse(Head, moved, "HEAD").model_dump_json().encode(), etag)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / toy.MODEL
            path.write_bytes(data)
            versions.stage_version(store, {key: fields[key] for key in fields if key != "files"}, {toy.MODEL: path})
        return version

    return patch.object(toy, "publish", publish)


def _local_clock():
    def free(held, stored):
        ahead = datetime.now(UTC) + timedelta(hours=1)
        return held.released or ahead - stored.modified > timedelta(seconds=held.seconds)

    return patch.object(lease, "_free", free)


def _event_first():
    real = toy.publish

    def erase(context, record, *_, **__):
        sealed = json.loads(context.store.get(scratch_key(record.run, "forget.json")).data)
        head = toy.head(context.store, record.line)
        for member in record.members:
            state = context.ledger.state(member.id)
            settling.complete(context, state, member, Version("f" * 64, head.manifest), record)
        gone = toy.forgotten(context.store, head) | set(sealed)
        return real(context.store, record.line, record.parent, gone, record.run, len(sealed), record.method)

    return patch.object(toy, "erase", erase)


def _by_its_word(module):
    def published_by(context, record):
        ended = context.runs.status(record.run) is RunStatus.PUBLISHED
        return settling_published_by(context, record) if ended else None

    return lambda: patch.object(module, "published_by", published_by)


settling_published_by = settling.published_by
MUTANTS: Mapping[str, Sequence[Callable[[], object]]] = {
    "HEAD is put without its condition": [_without_condition(lambda key: key.endswith("HEAD.json"))],
    "the swap is retried on a conflict": [
        _swap_retried,
        lambda: patch.object(versions, "_check_parent", lambda *_: None),
    ],
    "nobody checks the parent": [lambda: patch.object(versions, "_check_parent", lambda *_: None)],
    "the pointer goes before the files": [_pointer_first],
    "events are put without their condition": [_without_condition(lambda key: "/events/" in key)],
    "a refused write is not read back": [_no_read_back],
    "a lease runs out by the worker's clock": [_local_clock],
    "the event goes before the state": [_event_first],
    "a run is settled by its word": [_by_its_word(settling), _by_its_word(claiming)],
}
"""What was changed, and how."""
