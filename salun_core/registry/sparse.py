"""Sparse versions: a child's weights are stored as their difference to the parent's, about half the bytes.

A full copy comes every so many versions. A file that others rest on may be purged only after they were made whole:
see `materialise`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from salun_core.digest import check_digest
from salun_core.errors import IntegrityError, StoreError, UsageError
from salun_core.storage.blobs import Blob, chain_of, delta_facts, describe, fetch_blob, put_blob, stored_size
from salun_core.storage.delta import MAX_DEPTH, DeltaFacts, write_delta, write_rebuilt
from salun_core.storage.keys import delta_key
from salun_core.storage.local_files import disk_error
from salun_core.storage.objects import FileStore

FULL_COPY_VARIABLE = "SALUN_FULL_COPY_EVERY"
FULL_COPY_EVERY = 8
WORTH_IT = 0.8  # of the whole file's size; a larger delta is not worth resting on another file


def full_copy_every() -> int:
    """Return how many versions share one full copy: `SALUN_FULL_COPY_EVERY`, 8 unless it is set; 1 is never sparse.

    Raises:
        UsageError: it is no number from 1 to 64.
    """
    text = os.environ.get(FULL_COPY_VARIABLE, "").strip()
    if not text:
        return FULL_COPY_EVERY
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= MAX_DEPTH):
        raise UsageError(
            f"{FULL_COPY_VARIABLE}={text[:20]!r} is not valid",
            f"it is a number from 1 (every version is a full copy) to {MAX_DEPTH}",
            f"set it to {FULL_COPY_EVERY}, or unset it",
        )
    return int(text)


def put_sparse(store: FileStore, path: Path, base_path: Path, base_sha256: str, full_every: int) -> Blob:
    """Store a file as its difference to a stored one, or whole where that is not worth it.

    What is stored already, in either form, is left as it is. Nothing is stored as a difference before it was rebuilt
    here and gave the same digest.

    Args:
        store: where to.
        path: the file.
        base_path: the local copy of the other file.
        base_sha256: its digest.
        full_every: a chain of this length begins with a full copy; 1 stores every file whole.

    Raises:
        IntegrityError: the local copy of the other file does not match its digest.
        StoreError: a file cannot be read, or the store cannot be reached or refuses us.
    """
    blob = describe(path)
    if _stored(store, blob):
        return blob
    facts = _facts(store, blob, base_sha256, full_every)
    if facts is None or not _put_delta(store, path, base_path, facts):
        return put_blob(store, path)
    return blob


def _stored(store: FileStore, blob: Blob) -> bool:
    try:
        return stored_size(store, blob.sha256) == blob.size
    except IntegrityError:  # its delta is of no use (any more): it is stored anew
        return False


def _facts(store: FileStore, blob: Blob, base: str, full_every: int) -> DeltaFacts | None:
    """Describe the delta to a base, or return None where the file is better stored whole."""
    try:
        chain, size = chain_of(store, base)
    except IntegrityError:
        return None
    below = {base, *(facts.base for facts in chain)}
    if size is None or len(chain) + 1 >= full_every or blob.sha256 in below:  # never in a circle
        return None
    return DeltaFacts(base=base, base_size=size, sha256=blob.sha256, size=blob.size, depth=len(chain) + 1)


def _put_delta(store: FileStore, path: Path, base_path: Path, facts: DeltaFacts) -> bool:
    check_digest("the parent's file", facts.base, describe(base_path).sha256)
    try:
        with tempfile.TemporaryDirectory(prefix="salun-delta-") as folder:
            delta = Path(folder) / "delta"
            if not _written(delta, path, base_path, facts):
                return False
            store.upload(delta, delta_key(facts.sha256))
    except OSError as error:
        raise disk_error(f"cannot store {path.name} as a difference", path, error) from error
    return True


def _written(delta: Path, path: Path, base_path: Path, facts: DeltaFacts) -> bool:
    try:
        written = write_delta(delta, path, base_path, facts, WORTH_IT * facts.size)
        return written and write_rebuilt(delta, base_path) == facts.sha256
    except IntegrityError:  # not a safetensors file, so nothing to compare
        return False


def materialise(store: FileStore, sha256: str) -> None:
    """Store a file whole in the place of its delta; it may be repeated, and a kill leaves both or one.

    Raises:
        IntegrityError: the file cannot be rebuilt.
        StoreError: there is no such file, or the store or the disk fails.
    """
    facts = delta_facts(store, sha256)
    if facts is None:
        if stored_size(store, sha256) is None:
            raise StoreError(f"file {sha256[:12]}… is not in the store", "it was removed", "restore it from a copy")
        return
    with tempfile.TemporaryDirectory(prefix="salun-whole-") as folder:
        whole = Path(folder) / "whole"
        fetch_blob(store, sha256, whole, facts.size)
        put_blob(store, whole)
    store.delete(delta_key(sha256))
