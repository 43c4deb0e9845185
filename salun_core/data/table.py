"""Rows of a data set before their images are decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        subjects: person of each row, or None if unknown; empty if all are unknown.
        parts: `train` or `test` for each row; empty if the source has no split of its own.
    """

    ids: Sequence[str]
    labels: Sequence[int]
    payloads: Sequence[Payload]
    classes: Sequence[str]
    subjects: Sequence[str | None] = ()
    parts: Sequence[str] = ()

    @classmethod
    def numbered(cls, payloads: Sequence[Payload], labels: Sequence[int], classes: Sequence[str]) -> Table:
        """Build a table of rows without names; ids are their positions in six digits."""
        return cls([f"{index:06d}" for index in range(len(labels))], labels, payloads, classes)

    def with_subjects(self, subjects: Mapping[str, str]) -> Table:
        """Return the table with the subject of each row, from a mapping by sample id."""
        return replace(self, subjects=[subjects.get(sample) for sample in self.ids])

    def __post_init__(self) -> None:
        if not self.subjects:
            object.__setattr__(self, "subjects", [None] * len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def position(self) -> dict[str, int]:
        """Index of each id."""
        return {sample: index for index, sample in enumerate(self.ids)}

    @cached_property
    def row_digests(self) -> list[str]:
        """SHA-256 of each row: its label, then its encoded image or its pixels."""
        return [
            sha256_bytes(f"{label}\n".encode() + (payload if isinstance(payload, bytes) else payload.tobytes()))
            for label, payload in zip(self.labels, self.payloads, strict=True)
        ]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids, row digests and labels of all rows, and the class names."""
        rows = sorted(zip(self.ids, self.row_digests, self.labels, strict=True))
        return digest_json({"classes": list(self.classes), "rows": [list(row) for row in rows]})

    def joined(self, test: Table) -> Table:
        """Return a table with this one as the training part and another as the test part.

        Raises:
            DataError: the classes differ, or one table already has a test part.
        """
        if "test" in (*self.parts, *test.parts):
            raise DataError(
                "the data have two test sets",
                "`source` or `test_source` already contains one",
                "let each name one part only",
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
        num_classes: exclusive upper bound of the ids; the lower bound is 0.
        name: name of the source, for the message.
        shown: labels as the source stores them, for the message; default: `labels`.

    Raises:
        DataError: a label is out of range; the message names the first one.
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


def _first_difference(left: Sequence[str], right: Sequence[str]) -> str:
    missing = sorted(set(left) ^ set(right))
    return f"{missing[0]!r} is only in one" if missing else "their order differs"
