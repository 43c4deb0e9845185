"""Sample ids with the SHA-256 of each row: sorted columns, in memory or in a Parquet file, read in groups of rows.

Large data have more columns, their row index: where each row is in the files of the data.

A mapping of ten million ids takes gigabytes as Python objects. As columns it takes a hundred bytes a row in memory, and
a few megabytes from a file, because every operation needs one group at a time.
"""

from __future__ import annotations

import json
from binascii import hexlify
from bisect import bisect_left, bisect_right
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from salun_core.config import parse
from salun_core.data.index import WHERE, Layout, where_fault
from salun_core.data.parquet import EXPANDED_BYTES, claimed_bytes, expanded_bytes, readable
from salun_core.digest import canonical_json, hex_digests, is_digest
from salun_core.errors import DataError, IntegrityError, UsageError

GROUP_ROWS = 1 << 16  # three to five megabytes in memory; a file has so many in each group but the last
PARTS = ("train", "validation", "test")  # by the number in the column `part`
_FORMAT, _INDEXED = "salun.split/v2", "salun.split/v3"
_KEY = b"salun"  # of the file's metadata
_CACHED = 2  # groups of a large file that stay decoded: two mappings may be iterated over side by side
_KEPT_BYTES = 250_000_000  # of groups that all stay decoded, which saves reading them for each operation


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive rows, sorted by id.

    Args:
        ids: arrow strings [N].
        parts: int8 [N], places in `PARTS`.
        digests: uint8 [N, 32].
        where: of an index, `WHERE` [N].
        subjects: of an index, arrow strings [N]; None if no row has a person.
    """

    ids: Any
    parts: np.ndarray
    digests: np.ndarray
    where: np.ndarray | None = None
    subjects: Any = None

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        arrays = (self.ids, self.parts, self.digests, self.where, self.subjects)
        return sum(array.nbytes for array in arrays if array is not None)

    def select(self, index: np.ndarray | slice) -> Group:
        """Return the rows at these positions, or those that a mask is true for."""
        import pyarrow

        def selected(texts: Any) -> Any:  # noqa: ANN401 - pyarrow has no types
            if texts is None or isinstance(index, slice):
                return texts if texts is None else texts[index]
            return texts.filter(index) if index.dtype == bool else texts.take(pyarrow.array(index))

        where = None if self.where is None else self.where[index]
        return Group(selected(self.ids), self.parts[index], self.digests[index], where, selected(self.subjects))

    @classmethod
    def joined(cls, groups: Sequence[Group]) -> Group:
        """Return groups, at least one, as one."""
        import pyarrow

        if len(groups) == 1:
            return groups[0]
        indexed, named = groups[0].where is not None, groups[0].subjects is not None
        return cls(
            pyarrow.concat_arrays([group.ids for group in groups]),
            np.concatenate([group.parts for group in groups]),
            np.concatenate([group.digests for group in groups]),
            np.concatenate([group.where for group in groups]) if indexed else None,
            pyarrow.concat_arrays([group.subjects for group in groups]) if named else None,
        )

    def place(self, name: str) -> int | None:
        """Return the position of an id by binary search; None if it is not there."""
        place = bisect_left(range(len(self)), name, key=lambda index: cast(str, self.ids[index].as_py()))
        return place if place < len(self) and self.ids[place].as_py() == name else None

    def contained(self, names: Sequence[str]) -> np.ndarray:
        """Return which ids are among these names, as a mask [N]."""
        import pyarrow
        import pyarrow.compute

        mask = pyarrow.compute.is_in(self.ids, pyarrow.array(names, pyarrow.string()))
        return cast(np.ndarray, mask.to_numpy(zero_copy_only=False))

    def json(self) -> bytes | memoryview:
        """Return the rows as members of a JSON object, in canonical form (RFC 8785), joined by commas."""
        import pyarrow
        import pyarrow.compute

        data, offsets = string_buffers(self.ids)
        if bool(((data < 0x20) | (data == ord('"')) | (data == ord("\\"))).any()):  # these need an escape
            pairs = zip(self.ids.to_pylist(), hex_digests(self.digests.tobytes()), strict=True)
            return b",".join(canonical_json(name) + f':"{digest}"'.encode() for name, digest in pairs)
        texts = hex_texts(self.digests)
        members = pyarrow.compute.binary_join_element_wise('"', self.ids, '":"', texts, '",', "")
        data, offsets = string_buffers(members)
        return data[:-1].data


def string_buffers(array: Any) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN401 - pyarrow has no types
    """Return the bytes of arrow strings as uint8, and their offsets as int32 [N + 1], the first one 0."""
    if not len(array):
        return np.empty(0, np.uint8), np.zeros(1, np.int32)
    _, places, data = array.buffers()
    offsets = np.frombuffer(places, dtype=np.int32)[array.offset : array.offset + len(array) + 1]
    whole = np.frombuffer(data, dtype=np.uint8) if data is not None else np.empty(0, np.uint8)
    return whole[offsets[0] : offsets[-1]], offsets - offsets[0]


def hex_texts(digests: np.ndarray) -> Any:  # noqa: ANN401 - pyarrow has no types
    """Return digests, uint8 [N, 32], in hex as arrow strings."""
    import pyarrow

    offsets = np.arange(len(digests) + 1, dtype=np.int32) * 64
    return pyarrow.StringArray.from_buffers(
        len(digests), pyarrow.py_buffer(offsets), pyarrow.py_buffer(hexlify(digests.tobytes()))
    )


@dataclass(frozen=True, eq=False)
class Columns:
    """Rows sorted by id, in groups.

    Args:
        starts: the first id of each group.
        counts: number of rows by part.
        read: returns a group by its number.
        layout: what the index was made from; None without one.
    """

    starts: Sequence[str]
    counts: Sequence[int]
    read: Callable[[int], Group]
    layout: Layout | None = None

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        parts: np.ndarray,
        digests: np.ndarray,
        index: tuple[Layout, np.ndarray, Sequence[str | None] | None] | None = None,
    ) -> Columns:
        """Sort rows by id and hold them in memory; raises ValueError if an id occurs twice or is not text.

        `parts` is int8 [N] with places in `PARTS`, and `digests` uint8 [N, 32]. `index` has the layout, `WHERE` [N],
        and the person of each row, if any is known.
        """
        import pyarrow
        import pyarrow.compute

        try:  # in chunks: one array of strings holds at most two gigabytes
            names = pyarrow.chunked_array(
                [ids[start : start + GROUP_ROWS] for start in range(0, len(ids), GROUP_ROWS)], pyarrow.string()
            )
        except (UnicodeEncodeError, pyarrow.ArrowException) as error:
            raise ValueError("a sample id is not text") from error
        layout, where, persons = index or (None, None, None)
        subjects = None if persons is None else pyarrow.chunked_array([persons], pyarrow.string())
        order = pyarrow.compute.sort_indices(names).to_numpy()
        groups = []
        for start in range(0, len(order), GROUP_ROWS):
            rows = order[start : start + GROUP_ROWS]
            place = pyarrow.array(rows)
            groups.append(
                Group(
                    names.take(place).combine_chunks(),
                    parts[rows],
                    digests[rows],
                    None if where is None else where[rows],
                    None if subjects is None else subjects.take(place).combine_chunks(),
                )
            )
        columns = cls(
            [group.ids[0].as_py() for group in groups],
            np.bincount(parts, minlength=len(PARTS)).tolist(),
            groups.__getitem__,
            layout,
        )
        last = None
        for group in groups:
            fault = order_fault(last, group)
            if fault:
                raise ValueError(fault)
            last = group.ids[-1].as_py()
        return columns

    @cached_property
    def beyond_plane_zero(self) -> bool:
        """Whether an id has a character above U+FFFF, which UTF-8 begins with a byte from 0xF0 on."""
        groups = map(self.read, range(len(self.starts)))
        return any(bool((string_buffers(group.ids)[0] >= 0xF0).any()) for group in groups)

    def group_of(self, name: str) -> int:
        """Return the number of the group that holds an id if any does; -1 if it is before the first one."""
        return bisect_right(self.starts, name) - 1

    def inside(self, names: Sequence[str], number: int) -> Sequence[str]:
        """Return those of some sorted names that may be in a group."""
        first = bisect_left(names, self.starts[number])
        behind = bisect_left(names, self.starts[number + 1]) if number + 1 < len(self.starts) else len(names)
        return names[first:behind]


def order_fault(last: str | None, group: Group) -> str:
    """Return what is wrong with the order of a group's ids, in words; empty if they are unique and sorted.

    `last` is the last id of the group before; None for the first group.
    """
    import pyarrow.compute

    first = group.ids[0].as_py()
    before, after = group.ids[:-1], group.ids[1:]
    if last == first or pyarrow.compute.any(pyarrow.compute.equal(before, after)).as_py():
        return "a sample id occurs twice"
    if (last is not None and last > first) or pyarrow.compute.any(pyarrow.compute.greater(before, after)).as_py():
        return "its sample ids are not sorted"
    return ""


class _Items(ItemsView[str, str]):
    """The pairs of a mapping, read group by group instead of by one search for each id."""

    _mapping: Rows

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for group in self._mapping.groups():
            yield from zip(group.ids.to_pylist(), hex_digests(group.digests.tobytes()), strict=True)


class Rows(Mapping[str, str]):
    """One part of a split: sample id -> SHA-256 of its row, sorted by id.

    `columns` holds the rows of all parts; `part` is a place in `PARTS`. The mapping lacks the sorted ids in `removed`,
    which were forgotten.
    """

    def __init__(self, columns: Columns, part: int, removed: Sequence[str] = ()) -> None:
        self.columns, self._part, self._removed = columns, part, removed

    @classmethod
    def of(cls, rows: Mapping[str, str]) -> Rows:
        """Hold a mapping as columns; raises ValueError if a digest is not a SHA-256 or an id is not text."""
        if not all(is_digest(digest) for digest in rows.values()):
            raise ValueError("a row digest is not a SHA-256 in lower-case hex")
        digests = np.frombuffer(bytes.fromhex("".join(rows.values())), dtype=np.uint8).reshape(-1, 32)
        return cls(Columns.of(list(rows), np.zeros(len(rows), np.int8), digests), 0)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Accept a mapping of text to text, and write one."""
        plain = core_schema.no_info_after_validator_function(cls.of, handler.generate_schema(dict[str, str]))
        return core_schema.no_info_wrap_validator_function(
            lambda value, inner: value if isinstance(value, cls) else inner(value),
            plain,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda rows: dict(rows.items()), return_schema=core_schema.dict_schema()
            ),
        )

    def __len__(self) -> int:
        return self.columns.counts[self._part] - len(self._removed)

    def __iter__(self) -> Iterator[str]:
        for group in self.groups():
            yield from group.ids.to_pylist()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._digest(name) is not None

    def __getitem__(self, name: str) -> str:
        digest = self._digest(name)
        if digest is None:
            raise KeyError(name)
        return digest

    def _digest(self, name: str) -> str | None:
        number = self.columns.group_of(name)
        group = self.columns.read(number) if number >= 0 else None
        place = group.place(name) if group else None
        if group is None or place is None or group.parts[place] != self._part:
            return None
        gone = bisect_left(self._removed, name)
        if gone < len(self._removed) and self._removed[gone] == name:
            return None
        return str(group.digests[place].tobytes().hex())

    def items(self) -> ItemsView[str, str]:
        """Return the pairs, sorted by id."""
        return _Items(self)

    def __repr__(self) -> str:
        return f"<{len(self)} rows>"  # the ids of samples belong in no log

    @property
    def has_subjects(self) -> bool:
        """Whether the index of these rows has persons."""
        return len(self.columns.starts) > 0 and self.columns.read(0).subjects is not None

    def groups(self) -> Iterator[Group]:
        """Yield the rows of this part in order."""
        for number in range(len(self.columns.starts)):
            group = self.columns.read(number)
            yield group.select(self.mask(number, group))

    def mask(self, number: int, group: Group) -> np.ndarray:
        """Return which rows of a group of the columns this part has, as a mask [N]."""
        mask: np.ndarray = group.parts == self._part
        gone = self.columns.inside(self._removed, number)
        return mask & ~group.contained(gone) if gone else mask

    def find(self, names: Iterable[str]) -> dict[str, str]:
        """Return the digests of those names that are in this part, sorted; each group is read at most once."""
        found: dict[str, str] = {}
        for hit in self._hits(names):
            found.update(zip(hit.ids.to_pylist(), hex_digests(hit.digests.tobytes()), strict=True))
        return found

    def only(self, names: Iterable[str]) -> Rows:
        """Return those names that are in this part, with their index, as columns of their own in memory."""
        groups = list(self._hits(names))
        counts = [sum(map(len, groups)) if part == self._part else 0 for part in range(len(PARTS))]
        starts = [group.ids[0].as_py() for group in groups]
        return Rows(Columns(starts, counts, groups.__getitem__, self.columns.layout), self._part)

    def _hits(self, names: Iterable[str]) -> Iterator[Group]:
        """Yield the rows of some names by group, without empty groups; each group is read at most once."""
        wanted = sorted(set(filter(_is_text, names)))
        for number in sorted({number for name in wanted if (number := self.columns.group_of(name)) >= 0}):
            group = self.columns.read(number)
            hits = group.contained(self.columns.inside(wanted, number))
            hit = group.select(hits & self.mask(number, group))
            if len(hit):
                yield hit

    def without(self, names: Iterable[str]) -> Rows:
        """Return this part without some ids, as the same columns and a list of removals; other names are ignored."""
        return Rows(self.columns, self._part, sorted({*self._removed, *self.find(names)}))

    def shuffled(self) -> list[str]:
        """Return the ids in the order of their digests, which is that of the rows' content."""
        import pyarrow

        groups = list(self.groups())
        if not groups:
            return []
        digests = np.concatenate([group.digests for group in groups])
        names = pyarrow.chunked_array([group.ids for group in groups])
        return cast(list[str], names.take(pyarrow.array(digest_order(digests))).to_pylist())

    def json(self) -> Iterator[bytes | memoryview]:
        """Yield the canonical JSON (RFC 8785) of this part in pieces."""
        yield b"{"
        empty = True
        for group in self._canonical_groups():
            if len(group):
                if not empty:
                    yield b","
                yield group.json()
                empty = False
        yield b"}"

    def _canonical_groups(self) -> Iterator[Group]:
        """Yield the rows in RFC 8785's order, by UTF-16, which is another one if an id has a character above U+FFFF."""
        import pyarrow

        if not self.columns.beyond_plane_zero:
            for number in range(len(self.columns.starts)):
                group = self.columns.read(number)
                yield Group(group.ids, group.parts, group.digests).select(self.mask(number, group))
            return
        pairs = sorted(self.items(), key=lambda pair: pair[0].encode("utf-16-be"))
        for start in range(0, len(pairs), GROUP_ROWS):
            ids, digests = zip(*pairs[start : start + GROUP_ROWS], strict=True)
            values = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
            yield Group(pyarrow.array(ids, pyarrow.string()), np.zeros(len(ids), np.int8), values)


def _is_text(name: str) -> bool:
    """Return whether a name is text; one that stands for bytes that are not UTF-8 is in no split."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def digest_order(digests: np.ndarray) -> np.ndarray:
    """Return the stable order of digests, uint8 [N, 32], as int64 [N]."""
    words = digests.view(">u8")
    order = np.argsort(words[:, 0], kind="stable")
    first = words[order, 0]
    if bool((first[1:] == first[:-1]).any()):  # two rows of the same content, or one chance in billions
        order = np.lexsort([words[:, place] for place in (3, 2, 1, 0)])
    return order


def joined(parts: Sequence[Rows]) -> list[Rows]:
    """Return parts, in the order of `PARTS`, that share their columns; if they do already, nothing is read.

    Raises ValueError if an id is in two parts.
    """
    if all(rows.columns is parts[0].columns for rows in parts):
        return list(parts)
    ids: list[str] = []
    numbers, digests = [np.empty(0, np.int8)], [np.empty((0, 32), np.uint8)]
    for number, rows in enumerate(parts):
        for group in rows.groups():
            ids += group.ids.to_pylist()
            numbers.append(np.full(len(group), number, np.int8))
            digests.append(group.digests)
    try:
        columns = Columns.of(ids, np.concatenate(numbers), np.concatenate(digests))
    except ValueError as error:
        raise ValueError("a sample id is in two parts") from error
    return [Rows(columns, number) for number in range(len(parts))]


def _schema(indexed: bool = False, subjects: bool = False) -> Any:  # noqa: ANN401 - pyarrow has no types
    import pyarrow

    fields = [("id", pyarrow.string()), ("part", pyarrow.int8()), ("sha256", pyarrow.binary(32))]
    if indexed:
        fields += [(name, pyarrow.from_numpy_dtype(WHERE[name])) for name in WHERE.names or ()]
    found = [pyarrow.field(name, kind, nullable=False) for name, kind in fields]
    return pyarrow.schema([*found, *([pyarrow.field("subject", pyarrow.string())] if subjects else [])])


def write_rows(path: Path, dataset_digest: str, parts: Sequence[Rows]) -> None:
    """Write the rows of a split to a Parquet file. The same rows give the same file, whatever was removed before.

    The parts are in the order of `PARTS` and share their columns. The file is replaced at the end, because the rows may
    be read from it.
    """
    import pyarrow
    import pyarrow.parquet

    layout = parts[0].columns.layout
    named = layout is not None and any(rows.has_subjects for rows in parts)
    note: dict[str, Any] = {"format": _INDEXED if layout else _FORMAT, "dataset_digest": dataset_digest}
    if layout:
        note["layout"] = layout.model_dump()
    schema = _schema(layout is not None, named)
    part = path.with_name(f".{path.name}.part")
    packed = [name for name in ("place", "size") if layout]  # neighbours differ by little
    with (
        part.open("wb") as file,  # the system's error, if the disk is full
        pyarrow.parquet.ParquetWriter(  # digests do not shrink
            file,
            schema.with_metadata({_KEY: canonical_json(note)}),
            use_dictionary=False,
            compression={name: "none" if name == "sha256" else "zstd" for name in schema.names},
            write_statistics=False,  # they would repeat ids in the footer
            **({"column_encoding": dict.fromkeys(packed, "DELTA_BINARY_PACKED")} if packed else {}),
            write_page_checksum=layout is not None,  # the digest of a split does not cover its index
        ) as writer,
    ):
        for group in whole(parts):
            digests = pyarrow.FixedSizeBinaryArray.from_buffers(
                pyarrow.binary(32), len(group), [None, pyarrow.py_buffer(np.ascontiguousarray(group.digests))]
            )
            arrays = [group.ids, pyarrow.array(group.parts), digests]
            if group.where is not None:
                arrays += [pyarrow.array(np.ascontiguousarray(group.where[name])) for name in WHERE.names or ()]
            arrays += [group.subjects] if named else []
            table = pyarrow.Table.from_arrays(arrays, schema=writer.schema)
            writer.write_table(table, row_group_size=GROUP_ROWS)
    part.replace(path)


def whole(parts: Sequence[Rows]) -> Iterator[Group]:
    """Yield the rows of all parts, in the order of `PARTS`, in groups of `GROUP_ROWS`, the last one smaller."""
    columns, waiting = parts[0].columns, []
    for number in range(len(columns.starts)):
        group = columns.read(number)
        waiting.append(group.select(np.logical_or.reduce([rows.mask(number, group) for rows in parts])))
        if sum(map(len, waiting)) < GROUP_ROWS and number + 1 < len(columns.starts):
            continue
        whole = Group.joined(waiting)
        last = number + 1 == len(columns.starts)
        end = len(whole) if last else len(whole) // GROUP_ROWS * GROUP_ROWS
        for start in range(0, end, GROUP_ROWS):
            yield whole.select(slice(start, min(start + GROUP_ROWS, end)))
        waiting = [whole.select(slice(end, len(whole)))]


def open_rows(source: Path | bytes, name: str) -> tuple[str, list[Rows]]:
    """Open the Parquet file of a split, check every row, and return the data set's digest and the parts.

    The file is read, not mapped: mapped pages would count as memory of the process, and a file that is cut while it is
    in use would kill the process instead of raising an error. Groups are read again when they are needed; the file may
    be deleted meanwhile. Raises IntegrityError if it is damaged, too large in memory, or has ids that repeat or are not
    sorted.
    """
    with _intact(name):
        return _opened(source, name)


@contextmanager
def _intact(name: str) -> Iterator[None]:
    try:
        with readable(name):
            yield
    except DataError as error:
        raise _damaged(name, error.why) from error


def _opened(source: Path | bytes, name: str) -> tuple[str, list[Rows]]:
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.BufferReader(source) if isinstance(source, bytes) else pyarrow.OSFile(str(source))
    opened = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    schema = opened.schema_arrow.remove_metadata()
    indexed, named = len(schema) > len(_schema()), "subject" in schema.names
    if not schema.equals(_schema(indexed, named)):
        raise _damaged(name, "its columns are not those of a split: id, part, sha256, and those of an index")
    dataset_digest, layout = _noted(opened.schema_arrow.metadata or {}, name, indexed)
    texts = ["id", "subject"] if named else ["id"]
    cautious = pyarrow.parquet.ParquetFile(
        file, metadata=opened.metadata, read_dictionary=texts, page_checksum_verification=True
    )
    starts, counts, last, kept, size = [], np.zeros(len(PARTS), np.int64), None, list[Group](), 0
    groups = range(opened.metadata.num_row_groups)
    small = claimed_bytes(opened.metadata, groups) <= _KEPT_BYTES
    for number in groups:
        group = _checked(cautious, number, name, layout)
        fault = order_fault(last, group)
        if fault:
            raise _damaged(name, fault)
        starts.append(group.ids[0].as_py())
        last = group.ids[-1].as_py()
        counts += np.bincount(group.parts, minlength=len(PARTS))
        size += group.nbytes
        kept = [*kept, group] if small and size <= _KEPT_BYTES else []

    @lru_cache(_CACHED)
    def read(number: int) -> Group:
        with _intact(name):
            return _as_group(opened.read_row_group(number, use_threads=False))

    columns = Columns(starts, counts.tolist(), kept.__getitem__ if kept else read, layout)
    return dataset_digest, [Rows(columns, number) for number in range(len(PARTS))]


def _noted(metadata: Mapping[bytes, bytes], name: str, indexed: bool) -> tuple[str, Layout | None]:
    """Return the digest of the data set and the layout of the index from the metadata of a file."""
    try:
        note = json.loads(metadata[_KEY])
        digest, written = note["dataset_digest"], note["format"]
        layout = parse(Layout, note["layout"], name) if indexed else None
    except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        raise _damaged(name, "its metadata do not describe a split") from error
    expected = _INDEXED if indexed else _FORMAT
    if written != expected or not isinstance(digest, str):
        raise _damaged(name, f"its format is not {expected}")
    return digest, layout


def _checked(opened: Any, number: int, name: str, layout: Layout | None) -> Group:  # noqa: ANN401 - pyarrow has no types
    """Read a group, and check all of it but the order of its ids.

    A few bytes can describe gigabytes. The footer is measured before anything is read, and ids are read as a dictionary
    and measured before a value is copied; see `parquet.arrow_table`.
    """
    rows = opened.metadata.row_group(number).num_rows
    if not 0 < rows <= GROUP_ROWS:
        raise _damaged(name, f"a group has {rows} rows, not 1 to {GROUP_ROWS}")
    if claimed_bytes(opened.metadata, [number]) > EXPANDED_BYTES:
        raise _damaged(name, f"a group of {rows} rows expands too far")
    table = opened.read_row_group(number, use_threads=False)
    if sum(expanded_bytes(chunk) for column in table.columns for chunk in column.chunks) > EXPANDED_BYTES:
        raise _damaged(name, f"a group of {rows} rows expands too far")
    if any(table.column(column).null_count for column in table.column_names if column != "subject"):
        raise _damaged(name, "a value is missing")
    group = _as_group(table)
    group.ids.validate(full=True)  # that they are UTF-8
    if group.subjects is not None:
        group.subjects.validate(full=True)
    if layout is not None and group.where is not None and (fault := where_fault(layout, group.where)):
        raise _damaged(name, fault)
    if len(group) != rows or not bool(((group.parts >= 0) & (group.parts < len(PARTS))).all()):
        raise _damaged(name, f"a part is not one of {', '.join(PARTS)}")
    return group


def _as_group(table: Any) -> Group:  # noqa: ANN401 - pyarrow has no types
    import pyarrow

    columns = {name: pyarrow.concat_arrays(table.column(name).chunks) for name in table.column_names}
    for name in {"id", "subject"} & columns.keys():
        if pyarrow.types.is_dictionary(columns[name].type):
            columns[name] = columns[name].dictionary_decode()
    digests = columns["sha256"]
    values = np.frombuffer(digests.buffers()[1], dtype=np.uint8)
    values = values[digests.offset * 32 : (digests.offset + len(digests)) * 32].reshape(-1, 32)
    where = None
    if "place" in columns:
        where = np.empty(len(digests), WHERE)
        for name in WHERE.names or ():
            where[name] = columns[name].to_numpy()
    return Group(columns["id"], columns["part"].to_numpy(), values, where, columns.get("subject"))


def _damaged(name: str, why: str) -> IntegrityError:
    return IntegrityError(f"{name} is damaged", why, "fetch the model again: salun model pull LINE --out DIR")
