"""Rows of a data set before their images are decoded."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import overload

import numpy as np

from salun_core.digest import canonical_json, canonical_texts, hex_digests
from salun_core.errors import DataError

_PIECE = 1 << 16  # rows whose JSON is made at once
Payload = bytes | np.ndarray  # an encoded image, or pixels uint8 [H, W, C]


@dataclass(frozen=True)
class Shard:
    """Rows that are read together, such as those of one file.

    Args:
        name: of the file, for messages.
        rows: how many it has.
        read: places in it, in ascending order -> their payloads.
    """

    name: str
    rows: int
    read: Callable[[Sequence[int]], Iterator[Payload]]


@dataclass(frozen=True, eq=False)
class Encoded(Sequence[Payload]):
    """Payloads that stay where they are and are read when they are needed.

    Args:
        shards: in the order of the rows.
        held: what must exist as long as the rows, such as a temporary folder.
    """

    shards: Sequence[Shard]
    held: tuple[object, ...] = ()

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.rows for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self.shards else 0

    @overload
    def __getitem__(self, index: int) -> Payload: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Payload]: ...
    def __getitem__(self, index: int | slice) -> Payload | Sequence[Payload]:
        rows = range(len(self))[index]
        return next(self.read([rows])) if isinstance(rows, int) else list(self.read(rows))

    def __iter__(self) -> Iterator[Payload]:
        return self.read(range(len(self)))

    def read(self, rows: Sequence[int]) -> Iterator[Payload]:
        """Yield rows, given in ascending order; each shard is opened once."""
        start = 0
        while start < len(rows):
            number = bisect_right(self._ends, rows[start])
            end = start
            while end < len(rows) and rows[end] < self._ends[number]:
                end += 1
            first = self._ends[number] - self.shards[number].rows
            yield from self.shards[number].read([row - first for row in rows[start:end]])
            start = end

    def place(self, row: int) -> str:
        """Return where a row is, for messages."""
        number = bisect_right(self._ends, row)
        return f"row {row - self._ends[number] + self.shards[number].rows} of {self.shards[number].name}"


def joined_payloads(first: Sequence[Payload], second: Sequence[Payload]) -> Sequence[Payload]:
    """Return payloads followed by others; they stay where they are if either does."""
    if not isinstance(first, Encoded) and not isinstance(second, Encoded):
        return [*first, *second]
    parts = [part if isinstance(part, Encoded) else Encoded([_held(part)]) for part in (first, second)]
    return Encoded([shard for part in parts for shard in part.shards], (*parts[0].held, *parts[1].held))


def _held(payloads: Sequence[Payload]) -> Shard:
    return Shard("the data in memory", len(payloads), lambda rows: (payloads[row] for row in rows))


@dataclass(frozen=True)
class Table:
    """Labelled rows, in the order of the source.

    Args:
        ids: unique sample ids.
        labels: class ids, from 0.
        payloads: encoded images or pixels; `Encoded` if they are not in memory.
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
        hashes = bytearray()
        for label, payload in zip(self.labels, self.payloads, strict=True):
            hashes += row_hash(label, payload)
        return np.frombuffer(bytes(hashes), np.uint8).reshape(-1, 32)

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
        unique = len(self.position) == len(self)  # then ids alone decide, and no keys are made for all rows
        order = sorted(range(len(self)), key=self.ids.__getitem__ if unique else self._sort_key)
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
            payloads=joined_payloads(self.payloads, test.payloads),
            classes=self.classes,
            subjects=[*self.subjects, *test.subjects],
            parts=["train"] * len(self) + ["test"] * len(test),
        )


def row_hash(label: int, payload: Payload) -> bytes:
    """Return the SHA-256 of a row."""
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
