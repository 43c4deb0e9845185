"""References: what the artifacts of a pipeline hold in place of weights, masks and evidence.

Kubeflow uploads every artifact to a store of its own and keeps it, where a purge cannot reach. So a step puts its files
under `scratch/RUN/` of our store, and passes on a small JSON document: address, digests, sizes and counts. The next
step downloads them and verifies every byte.

No weight and no sample id is in a reference, and nothing that can be tested against one. Whoever knows the data set
could compute the digest of the forget set, or of the remaining split, for each single sample, and compare. So the
digests of a reference are keyed: the key is in `scratch/RUN/`, and is deleted with the files.

The name of a file's folder carries its digest. So two attempts of a step, or a step that was given up and wakes up,
never write to the same key, and a reference names what it was made for or nothing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field

from salun_core.config import Document
from salun_core.digest import check_digest, digest_json, hmac_file
from salun_core.errors import ConflictError, IntegrityError
from salun_core.storage import FileStore
from salun_core.storage.documents import Count, Digest, FileName, parse_stored
from salun_core.storage.keys import scratch_key, scratch_prefix
from salun_core.storage.local_files import list_tree

Fact = str | int | float
KEY_FILE = "digest.key"


class Kind(StrEnum):
    """What a reference stands for."""

    INPUTS = "inputs"
    MASK = "mask"
    MODEL = "model"
    EVIDENCE = "evidence"
    DECISION = "decision"
    NOTHING = "nothing"


class RunFile(Document):
    """A file of a run."""

    hmac: Digest = Field(description="HMAC-SHA256 of the file with the key of the run")
    size: Count = Field(description="size in bytes")


class Reference(Document):
    """Files of a run in our store, by address and digest."""

    format: Literal["salun.reference/v1"] = "salun.reference/v1"
    kind: Kind = Field(description="what it stands for; nothing, if the run ended before")
    uri: str = Field(default="", max_length=1200, description="the folder in the store")
    files: dict[FileName, RunFile] = Field(default={}, description="its files by name, with `/` between folders")
    facts: dict[str, Fact] = Field(default={}, description="counts and settings that the lineage view shows")
    made_from: list[Reference] = Field(default=[], description="what it was made from, each with its own past")

    @property
    def digest(self) -> str:
        """One digest of all its files: SHA-256 of the canonical JSON of `{name: HMAC}`."""
        return digest_json({name: entry.hmac for name, entry in self.files.items()})

    @property
    def metadata(self) -> dict[str, Fact]:
        """What the artifact shows in the user interface."""
        if not self.files:
            return dict(self.facts)
        size = sum(entry.size for entry in self.files.values())
        return {"address": self.uri, "digest": self.digest, "bytes": size, **self.facts}

    def find(self, kind: Kind) -> Reference:
        """Return the nearest reference of a kind: this one, or one that it was made from.

        IntegrityError if there is none.
        """
        found = next((item for item in self._line() if item.kind is kind), None)
        if found is None:
            raise IntegrityError(
                f"the artifact names no {kind}", "it is of another step, or was changed", "submit a new run"
            )
        return found

    def _line(self) -> Iterator[Reference]:
        yield self
        for item in self.made_from:
            yield from item._line()


def read_reference(path: str | Path) -> Reference:
    """Read the file of an artifact; IntegrityError if it does not exist or is not a reference."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise IntegrityError(
            "an artifact of the run is missing", str(error.strerror), "check Kubeflow's store; submit a new run"
        ) from error
    return parse_stored(Reference, data, "an artifact of the run")


def write_reference(reference: Reference, path: str | Path) -> dict[str, Fact]:
    """Write the file of an artifact, and return its metadata."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    document = reference.model_dump(mode="json", exclude_defaults=True) | {"format": reference.format}
    Path(path).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return reference.metadata


class Scratch:
    """The files of one run in our store, which a purge disposes of."""

    def __init__(self, store: FileStore, run: str) -> None:
        self._store, self._run = store, run
        self._prefix = f"{store.uri}/{scratch_prefix(run)}"

    def put(
        self,
        kind: Kind,
        path: Path,
        made_from: Sequence[Reference] = (),
        facts: Mapping[str, Fact] | None = None,
    ) -> Reference:
        """Upload a file, or all files of a folder; `kind` is also the first folder of its keys.

        `facts` are for the lineage view and must contain no sample id. StoreError: the store is unreachable, or a file
        cannot be read.
        """
        names = sorted(list_tree(path).files) if path.is_dir() else [path.name]
        paths = {name: path / name if path.is_dir() else path for name in names}
        key = self._key() or self._new_key()
        files = {name: RunFile(hmac=hmac_file(file, key), size=file.stat().st_size) for name, file in paths.items()}
        folder = f"{kind}/{digest_json({name: entry.hmac for name, entry in files.items()})[:16]}"
        for name, file in paths.items():
            self._store.upload(file, scratch_key(self._run, f"{folder}/{name}"))
        uri = f"{self._prefix}{folder}"
        return Reference(kind=kind, uri=uri, files=files, facts=dict(facts or {}), made_from=list(made_from))

    def exists(self) -> bool:
        """Return whether the run has any files: settling deletes them, and so does a purge."""
        return any(True for _ in self._store.list(scratch_prefix(self._run)))

    def get(self, reference: Reference, folder: Path, without: Collection[str] = ()) -> Path:
        """Download the files of a reference of this run, but those in `without`, into a new folder, and verify them.

        IntegrityError: the address is not of this run, or a file is not the one that was put.
        """
        if not reference.uri.startswith(self._prefix):
            raise IntegrityError(
                "an artifact of the run names another place", "its files are not those of this run", "submit a new run"
            )
        place = reference.uri.removeprefix(self._prefix)
        key = self._key() or b""  # without a key the files are gone too
        for name, entry in reference.files.items():
            if name in without:
                continue
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._store.download(scratch_key(self._run, f"{place}/{name}"), path)
            check_digest(f"{name} of the run", entry.hmac, hmac_file(path, key))
        return folder

    def _key(self) -> bytes | None:
        stored = self._store.get(scratch_key(self._run, KEY_FILE))
        return stored.data if stored else None

    def _new_key(self) -> bytes:
        """Create the key of the run; a step that was given up may do so at the same time, and then one of them wins."""
        with suppress(ConflictError):
            self._store.put_new(scratch_key(self._run, KEY_FILE), secrets.token_bytes(32))
        key = self._key()
        if key is None:
            raise IntegrityError("the key of the run is gone", "the run was settled meanwhile", "submit a new run")
        return key
