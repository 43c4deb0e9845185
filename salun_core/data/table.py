"""Rows of a data set before their images are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from salun_core.digest import digest_json, sha256_bytes
from salun_core.errors import DataError

Payload = bytes | np.ndarray  # an encoded image, or pixels uint8 [H, W, C]


@dataclass(frozen=True)
class Table:
    """Labelled rows, in the order of the source.

    Args:
        ids: unique sample ids.
        labels: class ids, from 0.
        payloads: encoded images or pixels.
        classes: class names by id.
        subjects: the person each row belongs to, or None where the source does not say.
        parts: `train` or `test` for each row; all `train` where the source has no split of its own.
    """

    ids: Sequence[str]
    labels: Sequence[int]
    payloads: Sequence[Payload]
    classes: Sequence[str]
    subjects: Sequence[str | None] = field(default_factory=list)
    parts: Sequence[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def position(self) -> dict[str, int]:
        """Index of each id."""
        return {sample: index for index, sample in enumerate(self.ids)}

    @cached_property
    def row_digests(self) -> list[str]:
        """SHA-256 of each row: its label, then its encoded image or its pixels."""
        return [_row_digest(label, payload) for label, payload in zip(self.labels, self.payloads, strict=True)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids, row digests and labels of all rows, and the class names."""
        rows = sorted(zip(self.ids, self.row_digests, self.labels, strict=True))
        return digest_json({"classes": list(self.classes), "rows": [list(row) for row in rows]})

    def joined(self, test: Table) -> Table:
        """Return this table as the training part with another as the test part.

        Raises:
            DataError: their classes differ, or one has a test part already.
        """
        if "test" in (*self.parts, *test.parts):
            raise DataError(
                "the data have two test sets",
                "`source` or `test_source` brings one of its own",
                "name only one part each",
            )
        if list(self.classes) != list(test.classes):
            raise DataError(
                "training and test data have different classes",
                f"{len(self.classes)} against {len(test.classes)}: {_first_difference(self.classes, test.classes)}",
                "give both the same class names, or list them under `classes`",
            )
        return Table(
            ids=[f"train/{sample}" for sample in self.ids] + [f"test/{sample}" for sample in test.ids],
            labels=[*self.labels, *test.labels],
            payloads=[*self.payloads, *test.payloads],
            classes=self.classes,
            subjects=[*self.subjects, *test.subjects],
            parts=["train"] * len(self) + ["test"] * len(test),
        )


def check_labels(labels: Sequence[int], num_classes: int, name: str, shown: Sequence[object] = ()) -> None:
    """Check that every label is the id of a class.

    Args:
        labels: class ids.
        num_classes: they must be below it, and not below 0.
        name: of the source, for the message.
        shown: the labels as the source has them, where they were others.

    Raises:
        DataError: one is not; the message names the first.
    """
    bad = [index for index, label in enumerate(labels) if not 0 <= label < num_classes]
    if bad:
        first = (shown or labels)[bad[0]]
        raise DataError(
            f"{name} has labels outside its {num_classes} classes",
            f"{len(bad)} rows, the first is row {bad[0]} with label {first!r}",
            "give a part of the data that has labels"
            if first == -1
            else "correct them, or list all classes in the spec",
        )


def _row_digest(label: int, payload: Payload) -> str:
    data = payload if isinstance(payload, bytes) else np.ascontiguousarray(payload).tobytes()
    return sha256_bytes(f"{label}\n".encode() + data)


def _first_difference(left: Sequence[str], right: Sequence[str]) -> str:
    missing = sorted(set(left) ^ set(right))
    return f"{missing[0]!r} is only in one" if missing else "their order differs"
