"""The split manifest: assigns samples to training, validation and test. All later runs use the same one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field

from salun_core.config import Document
from salun_core.data.spec import DataSpec
from salun_core.data.table import Table
from salun_core.digest import digest_json
from salun_core.errors import DataError, IntegrityError, UsageError

SplitName = Literal["train", "validation", "test"]


class SplitManifest(Document):
    """Sample ids with the SHA-256 of each row, by split; every artifact made from it carries its digest."""

    format: Literal["salun.split/v1"] = "salun.split/v1"
    dataset_digest: str = Field(description="SHA-256 over ids, row digests and labels of the whole data set")
    train: dict[str, str] = Field(description="sample id -> SHA-256 of its row")
    validation: dict[str, str] = Field(description="sample id -> SHA-256 of its row")
    test: dict[str, str] = Field(description="sample id -> SHA-256 of its row")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest's canonical JSON."""
        return digest_json(self.model_dump(mode="json"))

    def ids(self, split: SplitName) -> list[str]:
        """Return the sample ids of a split in the order of their row digests, so that any slice is a random sample."""
        rows: dict[str, str] = getattr(self, split)
        return sorted(rows, key=lambda sample: (rows[sample], sample))

    def without(self, ids: Collection[str]) -> SplitManifest:
        """Return the split without these forgotten training samples, so that no later run retains them.

        Args:
            ids: sample ids; those outside the training split are ignored.
        """
        gone = set(ids)
        train = {sample: row for sample, row in self.train.items() if sample not in gone}
        return SplitManifest(
            dataset_digest=self.dataset_digest, train=train, validation=self.validation, test=self.test
        )

    def check(self, table: Table) -> None:
        """Check that the data match those of the split.

        Raises:
            IntegrityError: a sample is missing, or its bytes or label changed.
        """
        rows = {**self.train, **self.validation, **self.test}
        missing = [sample for sample in rows if sample not in table.position]
        if missing:
            raise IntegrityError(
                "the data do not match the split manifest",
                f"{len(missing)} of {len(rows)} samples are missing",
                "use the data set that the model was trained on",
            )
        digests = table.row_digests
        changed = sum(digests[table.position[sample]] != digest for sample, digest in rows.items())
        if changed:
            raise IntegrityError(
                "the data do not match the split manifest",
                f"{changed} of {len(rows)} samples have other bytes or another label",
                "use the data set that the model was trained on",
            )


def make_split(table: Table, spec: DataSpec) -> SplitManifest:
    """Split a table into train, validation and test, each stratified by class.

    Args:
        table: all rows.
        spec: fractions, limits and seed.

    Returns:
        The manifest.

    Raises:
        DataError: a split would be empty.
        UsageError: ids are not unique.
    """
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

    def rows(indices: Sequence[int]) -> dict[str, str]:
        return dict(sorted((table.ids[index], table.row_digests[index]) for index in indices))

    return SplitManifest(dataset_digest=table.digest, train=rows(train), validation=rows(validation), test=rows(test))


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
