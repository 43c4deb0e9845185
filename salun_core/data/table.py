"""Rows of a data set before their images are decoded."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from salun_core.digest import canonical_json, canonical_texts, hex_digests
from salun_core.errors import DataError, IntegrityError

_PIECE = 1 << 16  # rows whose JSON is made at once
_FEW = 20  # times as many texts are searched for the names, instead of the other way round
Payload = bytes | np.ndarray  # an encoded image, or pixels uint8 [H, W, C]


@dataclass(frozen=True)
class Origin:
    """What the rows of a shard are read from again, by one row.

    Args:
        kind: Parquet or Arrow file, tar archive, or a folder of images that their ids name.
        path: the file or the folder; relative to the source in an index.
        size: of the file, in bytes.
        column: of the images.
        spans: of a tar: offset and size of each image, int64 [N, 2].
        of: field of the data spec that names the source.
        prefix: of the ids in a joined table.
    """

    kind: Literal["parquet", "arrow", "tar", "images"]
    path: Path
    size: int = 0
    column: str = ""
    spans: np.ndarray | None = None
    of: Literal["source", "test_source"] = "source"
    prefix: Literal["", "train/", "test/"] = ""


@dataclass(frozen=True)
class Shard:
    """Rows that are read together, such as those of one file; `read` maps places, in ascending order, to payloads.

    `origin` is None if they are read from memory. `places` has the number of each row in the file, if others lie
    between them.
    """

    name: str
    rows: int
    read: Callable[[Sequence[int]], Iterator[Payload]]
    origin: Origin | None = None
    places: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Encoded(Sequence[Payload]):
    """Payloads that stay where they are and are read when they are needed.

    `held` must exist as long as the rows, such as a temporary folder.
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
        shard = self.shards[number]
        place = row - self._ends[number] + shard.rows
        return f"row {place if shard.places is None else int(shard.places[place])} of {shard.name}"

    def prefixed(self, prefix: Literal["train/", "test/"]) -> Encoded:
        """Return the same rows, whose ids got a prefix."""
        shards = [
            replace(shard, origin=replace(shard.origin, prefix=prefix)) if shard.origin else shard
            for shard in self.shards
        ]
        return replace(self, shards=shards)


def joined_payloads(first: Sequence[Payload], second: Sequence[Payload]) -> Sequence[Payload]:
    """Return payloads followed by others; they stay where they are if either does."""
    if not isinstance(first, Encoded) and not isinstance(second, Encoded):
        return [*first, *second]
    return _chained(*(part if isinstance(part, Encoded) else Encoded([_held(part)]) for part in (first, second)))


def _chained(first: Encoded, second: Encoded) -> Encoded:
    return Encoded([*first.shards, *second.shards], (*first.held, *second.held))


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
        stored: where the rows are in files, also if they were read into memory; None for other sources.
        others: reads the rows of the data that the table lacks, because no part of the split has them.
    """

    ids: Sequence[str]
    labels: Sequence[int]
    payloads: Sequence[Payload]
    classes: Sequence[str]
    subjects: Sequence[str | None] = ()
    parts: Sequence[str] = ()
    stored: Encoded | None = None
    others: Callable[[], Table] | None = None

    @classmethod
    def numbered(cls, payloads: Sequence[Payload], labels: Sequence[int], classes: Sequence[str]) -> Table:
        """Build a table of rows without names; ids are their positions in six digits."""
        return cls([f"{index:06d}" for index in range(len(labels))], labels, payloads, classes)

    def with_subjects(self, subjects: Mapping[str, str]) -> Table:
        """Return the table with the subject of each row, from a mapping by sample id."""
        return replace(self, subjects=[subjects.get(sample) for sample in self.ids])

    def __post_init__(self) -> None:
        if not self.subjects:
            object.__setattr__(self, "subjects", _Unknown(len(self.ids)))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def indexed(self) -> bool:
        """Whether the rows were found by an index, and none of them has been read."""
        return isinstance(self.ids, Texts)

    def rows_of(self, names: Sequence[str]) -> np.ndarray:
        """Return the index of each id, int64 [N]; -1 for an id that the table lacks."""
        if isinstance(self.ids, Texts):
            return self.ids.find(names)
        return np.array([self.position.get(name, -1) for name in names], np.int64)

    def labels_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the labels of rows, int64 [N]."""
        if isinstance(self.labels, array):
            labels: np.ndarray = np.frombuffer(self.labels, np.int64)[rows]
            return labels
        return np.array([self.labels[row] for row in rows.tolist()], np.int64)

    def name_of(self, row: int) -> str:
        """Return the id of a row, with its place if it is in a file, for messages."""
        place = f" ({self.payloads.place(row)})" if isinstance(self.payloads, Encoded) else ""
        return f"{self.ids[row]}{place}"

    def check_row(self, row: int, payload: Payload) -> None:
        """Raise IntegrityError if a row that was read later than the table has another digest."""
        if row_hash(self.labels[row], payload) != self.row_hashes[row].tobytes():
            raise IntegrityError(
                f"image {self.name_of(row)} changed",
                "its bytes or its label are not those that its digest was made of",
                "do not change the data during a run, restore what changed, and run it again",
                public="an image of the data changed",
            )

    def known(self, names: Sequence[str]) -> set[str]:
        """Return which ids the data have, whether or not a part of the split has them."""
        found = {name for name, row in zip(names, self.rows_of(names).tolist(), strict=True) if row >= 0}
        if self._rest is not None and len(found) < len(set(names)):
            found |= self._rest.known(names)
        return found

    @property
    def has_subjects(self) -> bool:
        """Whether the person of a row may be known."""
        return isinstance(self.subjects, Texts) or any(self.subjects)

    def knows_subject(self, subject: str) -> bool:
        """Return whether the data have a row of a person, whether or not a part of the split has it."""
        return subject in self.subjects or (self._rest is not None and self._rest.knows_subject(subject))

    @cached_property
    def _rest(self) -> Table | None:
        return self.others() if self.others else None

    def of_class(self, label: int) -> list[str]:
        """Return the ids of a class."""
        if isinstance(self.ids, Texts):
            return self.ids.where(self.labels_at(np.arange(len(self))) == label)
        return [sample for sample, other in zip(self.ids, self.labels, strict=True) if other == label]

    def of_subject(self, subject: str) -> list[str]:
        """Return the ids of a person."""
        if isinstance(self.ids, Texts) and isinstance(self.subjects, Texts):
            return self.ids.where(self.subjects.equal(subject))
        return [sample for sample, other in zip(self.ids, self.subjects, strict=True) if other == subject]

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
        """Return a table with this one as the training part and another as the test part; classes must be equal."""
        if "test" in (*self.parts, *test.parts):
            raise DataError(
                "the data have two test sets",
                "`source` or `test_source` already contains one",
                "let each of them name one part",
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
            stored=_chained(self.stored.prefixed("train/"), test.stored.prefixed("test/"))
            if self.stored and test.stored
            else None,
        )


class _Unknown(Sequence[None]):
    """As many unknown subjects as there are rows, without a list of them."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, index: int) -> None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[None]: ...
    def __getitem__(self, index: int | slice) -> Sequence[None] | None:
        found = range(self._rows)[index]
        return None if isinstance(found, int) else _Unknown(len(found))

    def __iter__(self) -> Iterator[None]:
        return repeat(None, self._rows)

    def __contains__(self, name: object) -> bool:
        return name is None and self._rows > 0


class Texts(Sequence[Any]):
    """Texts in arrow's columns (strings in chunks, [N]), which take a tenth of the memory of Python's; null is None."""

    def __init__(self, array: Any) -> None:  # noqa: ANN401 - pyarrow has no types
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int | slice) -> Any:  # noqa: ANN401 - text, or some of them
        return Texts(self._array[index]) if isinstance(index, slice) else self._array[index].as_py()

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._array.chunks:
            yield from chunk.to_pylist()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.equal(name).any())

    def equal(self, name: str) -> np.ndarray:
        """Return which texts are the given one, as a mask [N]."""
        import pyarrow.compute

        mask: np.ndarray = pyarrow.compute.equal(self._array, name).fill_null(False).to_numpy()  # noqa: FBT003
        return mask

    def where(self, mask: np.ndarray) -> list[Any]:
        """Return the texts that a mask [N] is true for."""
        return list(Texts(self._array.filter(mask)))

    def find(self, names: Sequence[str]) -> np.ndarray:
        """Return the place of each name, int64 [M], -1 if it is not there."""
        import pyarrow
        import pyarrow.compute

        try:
            wanted = pyarrow.array(names, pyarrow.string())
        except (UnicodeEncodeError, pyarrow.ArrowException):  # a name that stands for bytes that are not UTF-8
            if len(names) == 1:
                return np.array([-1])
            return np.concatenate([self.find([name]) for name in names])
        if len(names) * _FEW > len(self):
            places = pyarrow.compute.index_in(wanted, value_set=self._array)
            return np.asarray(places.fill_null(-1).to_numpy(), np.int64)
        hits = np.flatnonzero(pyarrow.compute.is_in(self._array, value_set=wanted).to_numpy())
        found = dict(zip(Texts(self._array.take(pyarrow.array(hits))), hits.tolist(), strict=True))
        return np.array([found.get(name, -1) for name in names], np.int64)


def row_hash(label: int, payload: Payload) -> bytes:
    """Return the SHA-256 of a row."""
    data = payload if isinstance(payload, bytes) else payload.tobytes()
    return hashlib.sha256(f"{label}\n".encode() + data).digest()


def check_labels(labels: Sequence[int], num_classes: int, name: str, shown: Sequence[object] = ()) -> None:
    """Raise DataError for the first label that is not from 0 to `num_classes` - 1.

    `shown` has the labels as the source stores them, for the message; default: `labels`.
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
