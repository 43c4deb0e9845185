"""Rows of a data set before their images are decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from salun_core.digest import canonical_json, canonical_texts, hex_digests
from salun_core.errors import DataError

_PIECE = 1 << 16  # rows whose JSON is made at once
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
    def row_hashes(self) -> np.ndarray:
        """SHA-256 of each row, its label, then its encoded image or its pixels: uint8 [N, 32]."""
        return np.frombuffer(b"".join(map(_hash, self.labels, self.payloads)), np.uint8).reshape(-1, 32)

    @property
    def row_digests(self) -> list[str]:
        """The SHA-256 of each row in hex."""
        return hex_digests(self.row_hashes.tobytes())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids, row digests and labels of all rows, and the class names.

        It is that of the canonical JSON of `{"classes": [...], "rows": [[id, digest, label], ...]}` with sorted rows,
        which is made and digested in pieces.
        """
        state = hashlib.sha256(b'{"classes":' + canonical_json(list(self.classes)) + b',"rows":[')
        order = sorted(range(len(self)), key=self._sort_key)
        for start in range(0, len(order), _PIECE):
            index = order[start : start + _PIECE]
            digests = hex_digests(self.row_hashes[index].tobytes())
            rows: list[list[str | int]] = [
                [self.ids[place], digest, self.labels[place]] for place, digest in zip(index, digests, strict=True)
            ]
            state.update((b"," if start else b"") + canonical_texts(rows)[1:-1])
        state.update(b"]}")
        return state.hexdigest()

    def _sort_key(self, place: int) -> tuple[str, bytes, int]:
        return self.ids[place], self.row_hashes[place].tobytes(), self.labels[place]

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


def _hash(label: int, payload: Payload) -> bytes:
    data = payload if isinstance(payload, bytes) else payload.tobytes()
    return hashlib.sha256(f"{label}\n".encode() + data).digest()


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
