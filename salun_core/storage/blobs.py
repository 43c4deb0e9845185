"""Content-addressed files: the key is the SHA-256, so that a second upload is harmless.

A file is stored whole (`blobs/`), or sparse: as its delta to another file (`deltas/`, see `delta`). A child of
ResNet-18 at density 0.5 takes 23.8 MB sparse and 44.7 MB whole. `fetch_blob` hides the difference; if both forms
exist, the whole one is read.

A delta needs its base. A full copy comes every few versions, so that chains stay short; `materialise` turns a delta
into a whole file before a purge deletes the base.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from salun_core.digest import check_digest, sha256_file
from salun_core.errors import IntegrityError, StoreError, UsageError
from salun_core.storage.delta import MAX_DEPTH, START_BYTES, DeltaFacts, parse_facts, write_delta, write_rebuilt
from salun_core.storage.keys import blob_key, delta_key
from salun_core.storage.local_files import disk_error
from salun_core.storage.objects import FileStore, ObjectStore

FULL_COPY_VARIABLE = "SALUN_FULL_COPY_EVERY"
FULL_COPY_EVERY = 8
WORTH_IT = 0.8  # of the whole file's size; a larger delta does not justify that the file depends on another one


@dataclass(frozen=True)
class Blob:
    """A stored file: SHA-256 (64 hex digits) and size in bytes."""

    sha256: str
    size: int


def blob_size(store: ObjectStore, digest: str) -> int | None:
    """Return the size in bytes of a file that is stored whole, or None."""
    key = blob_key(digest)
    return next((entry.size for entry in store.list(key) if entry.key == key), None)


def delta_facts(store: FileStore, digest: str) -> DeltaFacts | None:
    """Return the facts of the delta that rebuilds a file, or None if there is no delta.

    Raises:
        IntegrityError: it is damaged, or the delta of another file.
    """
    key = delta_key(digest)
    start = store.read_start(key, START_BYTES)
    if start is None:
        return None
    facts = parse_facts(start, key)
    check_digest(f"the file that {key} rebuilds", digest, facts.sha256)
    return facts


def chain_of(store: FileStore, digest: str) -> tuple[list[DeltaFacts], int | None]:
    """Return the deltas that a file depends on, down to the next file that is stored whole.

    Returns:
        The deltas from the file down, empty if the file is stored whole or not at all; and the file's size in bytes,
        or None if it is not stored.

    Raises:
        IntegrityError: a delta is damaged, or its base is missing.
    """
    chain: list[DeltaFacts] = []
    while True:
        wanted = chain[-1].base if chain else digest
        size = blob_size(store, wanted)
        facts = delta_facts(store, wanted) if size is None else None
        if size is None and facts is None:
            size = blob_size(store, wanted)  # a purge may have made the delta whole between the two reads
        found = facts.size if facts else size
        if chain and found is None:
            raise IntegrityError(
                f"file {digest[:12]}… cannot be rebuilt",
                f"it is stored as its difference to {wanted[:12]}…, which is missing",
                f"restore {blob_key(wanted)} from a copy, or stage the version again",
            )
        if chain and found != chain[-1].base_size:
            raise IntegrityError(
                f"file {wanted[:12]}… has another size",
                f"{chain[-1].sha256[:12]}… is a delta to {chain[-1].base_size} bytes, the store holds {found}",
                "restore the damaged file from a copy",
            )
        if facts is None:
            return chain, chain[0].size if chain else size
        if len(chain) == MAX_DEPTH:
            raise IntegrityError(
                f"file {digest[:12]}… depends on more than {MAX_DEPTH} deltas",
                "they form a circle, or another program wrote them",
                "stage the version again",
            )
        chain.append(facts)


def stored_size(store: FileStore, digest: str) -> int | None:
    """Return the size in bytes of a stored file, whole or sparse, or None if it is not stored.

    Raises:
        IntegrityError: its delta is damaged, or the base of the delta is missing.
    """
    return chain_of(store, digest)[1]


def describe(path: Path) -> Blob:
    """Return the digest and size of a local file.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        return Blob(sha256_file(path), path.stat().st_size)
    except OSError as error:
        raise disk_error(f"cannot read {path.name}", path, error) from error


def put_blob(store: FileStore, path: Path) -> Blob:
    """Upload a file under its digest, unless it is stored whole with the same size.

    Raises:
        StoreError: the file cannot be read, or the store is unreachable or refuses the credentials.
    """
    blob = describe(path)
    if blob_size(store, blob.sha256) != blob.size:
        store.upload(path, blob_key(blob.sha256))
    return blob


def full_copy_every() -> int:
    """Return how many versions share one full copy: `SALUN_FULL_COPY_EVERY`, by default 8; 1 stores every file whole.

    Raises:
        UsageError: it is not a number from 1 to 64.
    """
    text = os.environ.get(FULL_COPY_VARIABLE, "").strip()
    if not text:
        return FULL_COPY_EVERY
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= MAX_DEPTH):
        raise UsageError(
            f"{FULL_COPY_VARIABLE}={text[:20]!r} is not valid",
            f"it must be a number from 1 (every version is a full copy) to {MAX_DEPTH}",
            f"set it to {FULL_COPY_EVERY}, or unset it",
        )
    return int(text)


def put_sparse(store: FileStore, path: Path, base_path: Path, base: str, full_every: int) -> Blob:
    """Store a file as its delta to a stored one, or whole if that is not worth it.

    A file that is stored already, in either form, stays as it is. A delta is stored only after a trial rebuild gave
    the same digest.

    Args:
        store: where to.
        path: the file.
        base_path: a local copy of the other file.
        base: SHA-256 of the other file.
        full_every: a chain of this length begins with a full copy; 1 stores every file whole.

    Raises:
        IntegrityError: the local copy of the other file does not match its digest.
        StoreError: a file cannot be read, or the store is unreachable or refuses the credentials.
    """
    blob = describe(path)
    with suppress(IntegrityError):  # a delta that cannot be rebuilt is replaced
        if stored_size(store, blob.sha256) == blob.size:
            return blob
    facts = _facts(store, blob, base, full_every)
    if facts is None:
        return put_blob(store, path)
    check_digest("the parent's file", base, describe(base_path).sha256)
    try:
        with tempfile.TemporaryDirectory(prefix="salun-delta-") as folder, suppress(IntegrityError):  # not safetensors
            delta = Path(folder) / "delta"
            small = write_delta(delta, path, base_path, facts, WORTH_IT * blob.size)
            if small and write_rebuilt(delta, base_path) == blob.sha256:
                store.upload(delta, delta_key(blob.sha256))
                return blob
    except OSError as error:
        raise disk_error(f"cannot store {path.name} as a difference", path, error) from error
    return put_blob(store, path)


def _facts(store: FileStore, blob: Blob, base: str, full_every: int) -> DeltaFacts | None:
    """Describe the delta to a base, or return None if the file must be stored whole."""
    try:
        chain, size = chain_of(store, base)
    except IntegrityError:
        return None
    below = {base, *(facts.base for facts in chain)}
    if size is None or len(chain) + 1 >= full_every or blob.sha256 in below:  # never in a circle
        return None
    return DeltaFacts(base=base, base_size=size, sha256=blob.sha256, size=blob.size, depth=len(chain) + 1)


def materialise(store: FileStore, digest: str) -> None:
    """Replace a delta by the whole file. It may be repeated: a kill leaves the delta, or both forms.

    Raises:
        IntegrityError: the file cannot be rebuilt.
        StoreError: the file is not stored, or the store or the disk fails.
    """
    facts = delta_facts(store, digest)
    if facts is None:
        if stored_size(store, digest) is None:
            raise StoreError(f"file {digest[:12]}… is not in the store", "it was deleted", "restore it from a copy")
        return
    with tempfile.TemporaryDirectory(prefix="salun-whole-") as folder:
        whole = Path(folder) / "whole"
        fetch_blob(store, digest, whole, facts.size)
        put_blob(store, whole)
    store.delete(delta_key(digest))


def fetch_blob(
    store: FileStore,
    digest: str,
    path: Path,
    size: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Download a file, or rebuild it; it appears only after its bytes were found to match.

    Args:
        store: where it is stored.
        digest: its SHA-256.
        path: the file to write, in an existing folder.
        size: its size in bytes if known: another size is refused before the download.
        on_bytes: called with the number of bytes that arrived since the last call, from several threads.

    Raises:
        IntegrityError: the bytes do not match, or a base is damaged or missing.
        StoreError: it is not stored, the disk is full, or the store is unreachable.
    """
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.unverified")
    try:
        chain, found = chain_of(store, digest)
        if size is not None and found not in {None, size}:
            raise IntegrityError(
                f"blob {digest[:12]}… has another size",
                f"expected {size} bytes, found {found}",
                "restore it from a copy, or upload the version again",
            )
        try:
            _assemble(store, digest, part, chain, on_bytes)
        except StoreError:
            now, _ = chain_of(store, digest)  # a purge may have replaced a delta by the whole file meanwhile
            if now == chain:
                raise
            _assemble(store, digest, part, now, on_bytes)
        os.replace(part, path)
    except OSError as error:
        raise disk_error(f"cannot write {path.name}", path, error) from error
    finally:
        part.unlink(missing_ok=True)


def _assemble(
    store: FileStore,
    digest: str,
    part: Path,
    chain: list[DeltaFacts],
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Download the whole file at the end of a chain, and apply the deltas to it, from the last to the first."""
    whole = chain[-1].base if chain else digest
    store.download(blob_key(whole), part, on_bytes)
    check_digest(f"blob {whole[:12]}…", whole, sha256_file(part))
    for facts in reversed(chain):
        with tempfile.TemporaryDirectory(prefix=".delta.", dir=part.parent) as folder:
            delta, target = Path(folder) / "delta", Path(folder) / "target"
            store.download(delta_key(facts.sha256), delta, on_bytes)
            with target.open("wb") as sink:
                rebuilt = write_rebuilt(delta, part, sink)
            check_digest(f"file {facts.sha256[:12]}…, rebuilt from its delta,", facts.sha256, rebuilt)
            os.replace(target, part)
