"""Content-addressed files: the key is the SHA-256, so that a second upload is harmless.

A file lies in the store whole (`blobs/`), or as its difference to another file (`deltas/`; see `delta`). Whoever
fetches it sees no difference; where both are there, the whole one is used.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

from salun_core.digest import check_digest, sha256_file
from salun_core.errors import IntegrityError, StoreError
from salun_core.storage.delta import MAX_DEPTH, START_BYTES, DeltaFacts, parse_facts, write_rebuilt
from salun_core.storage.keys import blob_key, delta_key
from salun_core.storage.local_files import disk_error
from salun_core.storage.objects import FileStore, ObjectStore


@dataclass(frozen=True)
class Blob:
    """A stored file: SHA-256 (64 hex digits) and size in bytes."""

    sha256: str
    size: int


def blob_size(store: ObjectStore, digest: str) -> int | None:
    """Return the size in bytes of a file that is stored whole, or None where it is not."""
    key = blob_key(digest)
    return next((entry.size for entry in store.list(key) if entry.key == key), None)


def delta_facts(store: FileStore, digest: str) -> DeltaFacts | None:
    """Return what the delta of a file says of itself, or None where there is no delta.

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
    """Return what a file rests on: its deltas down to the next file that is stored whole.

    Returns:
        The deltas from the file down, none where it is stored whole or not at all; and the size in bytes that it has
        when it is fetched, or None where there is no such file.

    Raises:
        IntegrityError: a delta is damaged, or the file that it needs is gone.
    """
    chain: list[DeltaFacts] = []
    while True:
        wanted = chain[-1].base if chain else digest
        size = blob_size(store, wanted)
        found = delta_facts(store, wanted) if size is None else None
        if size is None and found is None:
            size = blob_size(store, wanted)  # a purge may have made the delta whole just now
        if found is None and size is None and chain:
            raise _base_gone(digest, wanted)
        _check_base_size(chain, found.size if found else size)
        if found is None:
            return chain, chain[0].size if chain else size
        if len(chain) == MAX_DEPTH:
            raise _too_deep(digest)
        chain.append(found)


def _too_deep(digest: str) -> IntegrityError:
    return IntegrityError(
        f"file {digest[:12]}… rests on more than {MAX_DEPTH} deltas",
        "they go in a circle, or something else wrote them",
        "stage the version again",
    )


def _base_gone(digest: str, base: str) -> IntegrityError:
    return IntegrityError(
        f"file {digest[:12]}… cannot be rebuilt",
        f"it is stored as its difference to {base[:12]}…, which is gone",
        f"restore {blob_key(base)} from a copy, or stage the version again",
    )


def _check_base_size(chain: list[DeltaFacts], size: int | None) -> None:
    if chain and chain[-1].base_size != size:
        raise IntegrityError(
            f"file {chain[-1].base[:12]}… has another size",
            f"{chain[-1].sha256[:12]}… was stored as its difference to {chain[-1].base_size} bytes, found {size}",
            "the copy in the store is damaged: restore it",
        )


def stored_size(store: FileStore, digest: str) -> int | None:
    """Return the size in bytes that a stored file has when it is fetched, or None where there is none.

    Raises:
        IntegrityError: its delta is damaged, or what the delta needs is gone.
    """
    return chain_of(store, digest)[1]


def put_blob(store: FileStore, path: Path) -> Blob:
    """Upload a file under its digest, unless it is there with the same size.

    Raises:
        StoreError: the file cannot be read, or the store cannot be reached or refuses us.
    """
    blob = describe(path)
    if blob_size(store, blob.sha256) != blob.size:
        store.upload(path, blob_key(blob.sha256))
    return blob


def describe(path: Path) -> Blob:
    """Return the digest and size of a local file.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        return Blob(sha256_file(path), path.stat().st_size)
    except OSError as error:
        raise disk_error(f"cannot read {path.name}", path, error) from error


def fetch_blob(store: FileStore, digest: str, path: Path, size: int | None = None) -> None:
    """Download a file, or rebuild it; it appears only after its bytes were found to match.

    Args:
        store: where it lies.
        digest: its SHA-256.
        path: the file to write; its folder exists.
        size: its size in bytes where that is known: another size is refused before the download.

    Raises:
        IntegrityError: the bytes do not match, or a file that it rests on is damaged or gone.
        StoreError: it is not there, the disk is full, or the store cannot be reached.
    """
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.unverified")
    try:
        _fetch(store, digest, part, size)
        os.replace(part, path)
    except OSError as error:
        raise disk_error(f"cannot write {path.name}", path, error) from error
    finally:
        part.unlink(missing_ok=True)


def _fetch(store: FileStore, digest: str, part: Path, size: int | None) -> None:
    chain, found = chain_of(store, digest)
    if size is not None and found not in {None, size}:
        raise IntegrityError(
            f"blob {digest[:12]}… has another size",
            f"expected {size} bytes, found {found}",
            "the copy in the store is damaged: restore it, or upload the version again",
        )
    try:
        _assemble(store, digest, part, chain)
    except StoreError:
        now, _ = chain_of(store, digest)  # a purge may have put a whole file in the place of a delta meanwhile
        if now == chain:
            raise
        _assemble(store, digest, part, now)


def _assemble(store: FileStore, digest: str, part: Path, chain: list[DeltaFacts]) -> None:
    whole = chain[-1].base if chain else digest
    store.download(blob_key(whole), part)
    check_digest(f"blob {whole[:12]}…", whole, sha256_file(part))
    for facts in reversed(chain):
        _apply(store, facts, part)


def _apply(store: FileStore, facts: DeltaFacts, part: Path) -> None:
    """Turn the base that lies in a file into what its delta makes of it."""
    with tempfile.TemporaryDirectory(prefix=".delta.", dir=part.parent) as folder:
        delta, target = Path(folder) / "delta", Path(folder) / "target"
        store.download(delta_key(facts.sha256), delta)
        with target.open("wb") as sink:
            digest = write_rebuilt(delta, part, sink)
        check_digest(f"file {facts.sha256[:12]}…, rebuilt from its delta,", facts.sha256, digest)
        os.replace(target, part)
