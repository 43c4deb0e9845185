"""The split manifest: assigns samples to training, validation and test. All later runs use the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Never, Self

import numpy as np
from pydantic import Field, model_validator

from salun_core.config import MAX_DOCUMENT_BYTES, Document
from salun_core.data.index import Layout, layout_of, where_of
from salun_core.data.rows import PARTS, Columns, Rows, joined, open_rows, write_rows
from salun_core.data.spec import DataSpec
from salun_core.data.table import Table
from salun_core.digest import canonical_json, digest_json
from salun_core.errors import DataError, IntegrityError, UsageError
from salun_core.registry.lookup import Version, read_file
from salun_core.storage.blobs import fetch_blob
from salun_core.storage.documents import Digest
from salun_core.storage.local_files import temporary_folder
from salun_core.storage.objects import FileStore

SplitName = Literal["train", "validation", "test"]
SPLIT = "split.parquet"  # the file in a model folder


class SplitManifest(Document):
    """Sample ids with the SHA-256 of each row, by split; every artifact made from it carries its digest.

    Model folders hold it as Parquet; the digest is that of this JSON.
    """

    format: Literal["salun.split/v1"] = "salun.split/v1"
    dataset_digest: str = Field(description="SHA-256 over ids, row digests and labels of the whole data set")
    train: Rows = Field(description="sample id -> SHA-256 of its row")
    validation: Rows = Field(description="sample id -> SHA-256 of its row")
    test: Rows = Field(description="sample id -> SHA-256 of its row")

    @model_validator(mode="after")
    def _one_table(self) -> Self:
        parts = joined([self.train, self.validation, self.test])
        self.__dict__.update(zip(PARTS, parts, strict=True))  # the fields are frozen for all others
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest's canonical JSON (RFC 8785), which is made and digested in pieces."""
        state = hashlib.sha256(b'{"dataset_digest":' + canonical_json(self.dataset_digest))
        state.update(b',"format":' + canonical_json(self.format))
        for name in sorted(PARTS):
            state.update(f',"{name}":'.encode())
            for piece in getattr(self, name).json():
                state.update(piece)
        state.update(b"}")
        return state.hexdigest()

    @property
    def layout(self) -> Layout | None:
        """What its row index was made from; None if it has none."""
        return self.train.columns.layout

    def ids(self, split: SplitName) -> list[str]:
        """Return the sample ids of a split in the order of their row digests, so that any slice is a random sample."""
        rows: Rows = getattr(self, split)
        return rows.shuffled()

    def without(self, ids: Collection[str]) -> SplitManifest:
        """Return the split without these forgotten training samples, so that no later run retains them.

        Ids outside the training split are ignored.
        """
        return SplitManifest(
            dataset_digest=self.dataset_digest,
            train=self.train.without(ids),
            validation=self.validation,
            test=self.test,
        )

    def excerpt(self, ids: Collection[str]) -> SplitExcerpt:
        """Return the rows of a forget set, for steps that need no others.

        Ids outside the training split are ignored.
        """
        train = self.train.only(ids)
        return SplitExcerpt(
            dataset_digest=self.dataset_digest,
            train=train,
            validation=Rows(train.columns, PARTS.index("validation")),
            test=Rows(train.columns, PARTS.index("test")),
            pinned=PinnedSplit(digest=self.digest, kept_digest=self.without(ids).digest),
        )

    def rows_digest(self, ids: Collection[str]) -> str:
        """Return the SHA-256 of the canonical JSON of `{id: row digest}` of some training samples."""
        return digest_json(self.train.find(ids))

    def write(self, path: Path) -> None:
        """Write the split as Parquet. The file has no trace of what `without` removed."""
        write_rows(path, self.dataset_digest, [self.train, self.validation, self.test])

    def check(self, table: Table) -> None:
        """Raise IntegrityError if the data lack a sample of the split, or its bytes or label changed."""
        found = [_compared(rows, table) for rows in (self.train, self.validation, self.test)]
        missing, changed = (sum(counts) for counts in zip(*found, strict=True))
        if missing or changed:
            count = len(self.train) + len(self.validation) + len(self.test)
            why = "are missing" if missing else "have other bytes or another label"
            raise IntegrityError(
                "the data do not match the split manifest",
                f"{missing or changed} of {count} samples {why}",
                "use the data set that the model was trained on",
            )


class PinnedSplit(Document):
    """The digests of a split, before and after a run, as the first step of the run found them."""

    digest: Digest = Field(description="of the split of the model before")
    kept_digest: Digest = Field(description="of that split without the forget set")


class SplitExcerpt(SplitManifest):
    """The forget set's rows of a split, which stand for it in steps that need no others.

    The first step of a run reads and verifies the whole split, and makes the excerpt. Later steps read a few kilobytes
    instead of all rows. Whatever needs the other rows is an error.
    """

    pinned: PinnedSplit = Field(description="digests of the whole split")

    @cached_property
    def digest(self) -> str:
        """The digest of the whole split."""
        return self.pinned.digest

    def ids(self, split: SplitName) -> Never:
        """Refuse: an excerpt has no whole part."""
        raise self._partial()

    def excerpt(self, ids: Collection[str]) -> Never:
        """Refuse: the digests of another excerpt are not known."""
        raise self._partial()

    def without(self, ids: Collection[str]) -> SplitExcerpt:
        """Return the split without the whole forget set, of which only the digest is known."""
        self.require(ids)
        kept = PinnedSplit(digest=self.pinned.kept_digest, kept_digest=self.pinned.kept_digest)
        fields = {"validation": self.validation, "test": self.test, "dataset_digest": self.dataset_digest}
        return SplitExcerpt(**fields, train=self.train.without(ids), pinned=kept)

    def require(self, ids: Collection[str]) -> None:
        """Raise IntegrityError unless the excerpt has exactly the rows of a forget set."""
        if len(self.train.find(ids)) != len(set(ids)) or len(self.train) != len(set(ids)):
            raise IntegrityError(
                "the rows of the run are not those of its forget set", "the file was changed", "submit a new run"
            )

    def _partial(self) -> IntegrityError:
        return IntegrityError("a step needs the whole split", "it has the forget set's rows alone", "report this error")


def _compared(rows: Rows, table: Table) -> tuple[int, int]:
    """Return how many rows a table lacks, and how many differ in it."""
    missing = changed = 0
    for group in rows.groups():
        places = np.array([table.position.get(sample, -1) for sample in group.ids.to_pylist()], np.int64)
        known = places >= 0
        missing += int((~known).sum())
        changed += int((table.row_hashes[places[known]] != group.digests[known]).any(axis=1).sum())
    return missing, changed


def read_split(folder: Path) -> SplitManifest:
    """Read the split of a model folder; raises IntegrityError if the file is damaged."""
    require_split([SPLIT] if (folder / SPLIT).is_file() else [])
    return _of_parquet(folder / SPLIT, str(folder / SPLIT))


def read_excerpt(path: Path, pinned: PinnedSplit) -> SplitExcerpt:
    """Read an excerpt that `SplitExcerpt.write` wrote; raises IntegrityError if the file is damaged."""
    dataset, (train, validation, test) = open_rows(path, path.name)
    return SplitExcerpt(dataset_digest=dataset, train=train, validation=validation, test=test, pinned=pinned)


def stored_split(store: FileStore, version: Version) -> SplitManifest:
    """Read the split of a version in the store; one that is larger than a document is read from a temporary file.

    Raises IntegrityError if the file is gone or damaged.
    """
    require_split(version.manifest.files)
    entry = version.manifest.files[SPLIT]
    if entry.size <= MAX_DOCUMENT_BYTES:
        return _of_parquet(read_file(store, version, SPLIT), SPLIT)
    with temporary_folder("salun-split-") as folder:  # an open file stays readable when its name is gone
        fetch_blob(store, entry.sha256, folder / SPLIT, entry.size)
        return _of_parquet(folder / SPLIT, SPLIT)


def require_split(names: Collection[str]) -> None:
    """Raise UsageError unless the split is among the files of a model."""
    if SPLIT not in names:
        raise UsageError("a model has no split", f"it lacks {SPLIT}", "fetch it again, or import it with its data")


def _of_parquet(source: Path | bytes, name: str) -> SplitManifest:
    digest, (train, validation, test) = open_rows(source, name)
    return SplitManifest(dataset_digest=digest, train=train, validation=validation, test=test)


def make_split(table: Table, spec: DataSpec) -> SplitManifest:
    """Split a table into train, validation and test, each stratified by class; an empty one raises DataError."""
    if len(set(table.ids)) != len(table):
        raise UsageError("sample ids are not unique", "two rows share one", "rename one of the images")
    rng = np.random.default_rng(spec.split_seed)
    train = [index for index in range(len(table)) if not table.parts or table.parts[index] == "train"]
    test = [index for index in range(len(table)) if table.parts and table.parts[index] == "test"]
    if not test:
        test, train = _draw(table, train, spec.test_fraction, rng)
    train = _limit(table, train, spec.train_limit, rng)
    test = _limit(table, test, spec.test_limit, rng)
    validation, train = _draw(table, train, spec.validation_fraction, rng)
    if not train or not test:
        kind, found, classes = ("training" if test else "test"), len(table), len(set(table.labels))
        counts = f"{found} image{'s' * (found != 1)} in {classes} class{'es' * (classes != 1)}"
        raise DataError(
            f"the split leaves no {kind} data",
            f"{counts}; each class gives a share of its images to each part, rounded",
            "add images, change the fractions and limits of the data spec, or name test data (`test_source`)",
        )

    kept = np.array([*train, *validation, *test], np.int64)
    parts = np.repeat(np.arange(len(PARTS), dtype=np.int8), [len(train), len(validation), len(test)])
    layout = layout_of(table, spec)
    index = None
    if layout is not None:
        persons = [table.subjects[place] for place in kept] if any(table.subjects) and not spec.metadata else None
        index = layout, where_of(table)[kept], persons
    columns = Columns.of([table.ids[place] for place in kept], parts, table.row_hashes[kept], index)
    rows = dict(zip(PARTS, (Rows(columns, part) for part in range(len(PARTS))), strict=True))
    return SplitManifest(dataset_digest=table.digest, **rows)


def _draw(
    table: Table, indices: Sequence[int], fraction: float, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Draw a share of each class and return (drawn, rest)."""
    drawn: list[int] = []
    by_label: dict[int, list[int]] = {}
    for index in indices:
        by_label.setdefault(table.labels[index], []).append(index)
    for label in range(len(table.classes)):
        members = by_label.get(label, [])
        count = round(fraction * len(members))
        drawn += [members[position] for position in rng.permutation(len(members))[:count]]
    chosen = set(drawn)
    return drawn, [index for index in indices if index not in chosen]


def _limit(table: Table, indices: list[int], limit: int | None, rng: np.random.Generator) -> list[int]:
    if limit is None or limit >= len(indices):
        return indices
    return _draw(table, indices, limit / len(indices), rng)[0]
