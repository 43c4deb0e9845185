"""The file format of a delta: a safetensors file stored as its difference from another one, rebuilt bit for bit.

A delta is a safetensors file itself. Its metadata are `DeltaFacts`; it holds the header of the file that it rebuilds
(`header`), and for each tensor either nothing (it is the base's), a bit for each element with the changed elements
(`bits:<name>`, `values:<name>`), or the whole tensor (`whole:<name>`). Elements are compared as integers, so that NaN
payloads and signed zeros count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from salun_core.config import Document
from salun_core.errors import IntegrityError
from salun_core.storage.documents import Digest

MAX_DEPTH = 64
START_BYTES = 1024  # the first bytes of a delta hold its facts, so that reading them needs no download
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors
BLOCK = 1 << 20  # elements held in memory at once; a multiple of 8, so that packed bits of blocks join
METADATA = "__metadata__"
_HEADER = "header"
_WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
}

_Count = Annotated[int, Field(strict=True, ge=0)]
_Size = Annotated[int, Field(ge=0, le=2**53 - 1)]
Raw = NDArray[np.unsignedinteger]


class DeltaFacts(Document):
    """What a delta rebuilds, and from what."""

    format: Literal["salun.delta/v1"] = "salun.delta/v1"
    base: Digest = Field(description="SHA-256 of the file that it changes")
    base_size: _Size = Field(description="size of that file in bytes")
    sha256: Digest = Field(description="SHA-256 of the file that it rebuilds")
    size: _Size = Field(description="size of that file in bytes")
    depth: int = Field(ge=1, le=MAX_DEPTH, description="how many deltas lay one upon another when it was written")


class Span(Document):
    """A tensor as the header describes it: type, shape, first byte and the byte past its end."""

    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.data_offsets[1] - self.data_offsets[0]

    @property
    def width(self) -> int:
        """Bytes of an element; 1 for a type that is unknown or narrower than a byte."""
        width = _WIDTHS.get(self.dtype, 1)
        return width if self.size % width == 0 else 1

    @property
    def elements(self) -> int:
        """How many elements of that width it has."""
        return self.size // self.width

    @property
    def packed(self) -> int:
        """Bytes of one bit for each element."""
        return (self.elements + 7) // 8

    def like(self, other: Span | None) -> bool:
        """Return whether another tensor has the same type, shape and size."""
        return other is not None and (self.dtype, self.shape, self.size) == (other.dtype, other.shape, other.size)


def _damaged(why: str) -> IntegrityError:
    return IntegrityError("tensor file is damaged", why, "restore it from a copy, or stage the version again")


def read_spans(header: bytes) -> tuple[dict[str, Span], int]:
    """Read a safetensors header.

    Returns:
        The tensors by name in the order of their bytes, which follow each other without a gap, and their size.

    Raises:
        IntegrityError: it is not a valid header.
    """
    try:
        document = json.loads(header)
        document.pop(METADATA, None)
        spans = {name: Span.model_validate(fields) for name, fields in document.items()}
    except ValidationError as error:
        raise _damaged(f"the description of a tensor has {error.error_count()} faults") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(str(error)[:200]) from error
    ordered, at = dict(sorted(spans.items(), key=lambda item: item[1].data_offsets)), 0
    for span in ordered.values():
        if span.data_offsets[0] != at or span.size < 0:
            raise _damaged("its tensors overlap or leave a gap")
        at = span.data_offsets[1]
    return ordered, at


class TensorFile:
    """An open safetensors file whose sizes were checked; use it as a context manager.

    Args:
        path: the file.

    Raises:
        IntegrityError: its header is damaged, or does not fit its size.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")
        try:
            size = path.stat().st_size
            length = int.from_bytes(self._file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged("its header is longer than the file")
            self.header = self._file.read(length)
            self._data = 8 + length
            self.spans, data = read_spans(self.header)
            if self._data + data != size:
                raise _damaged(f"its header describes {self._data + data} bytes, the file has {size}")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, width: int, start: int, count: int) -> Raw:
        """Return elements of a tensor as unsigned integers of `width` bytes, [count].

        Raises:
            IntegrityError: the file does not have them.
        """
        span = self.spans.get(name)
        if span is None or (start + count) * width > span.size:
            raise _damaged(f"{name[:80]!r} is missing or too short")
        self._file.seek(self._data + span.data_offsets[0] + start * width)
        data = self._file.read(count * width)
        if len(data) != count * width:
            raise _damaged("it was cut while it was read")
        return np.frombuffer(data, dtype=f"<u{width}")

    def blocks(self, name: str) -> Iterator[Raw]:
        """Yield a tensor as unsigned integers of its width, at most `BLOCK` at a time."""
        span = self.spans[name]
        for start in range(0, span.elements, BLOCK):
            yield self.read(name, span.width, start, min(BLOCK, span.elements - start))


def write_delta(path: Path, target: Path, base: Path, facts: DeltaFacts, limit: float) -> bool:
    """Write the delta that makes one safetensors file from another, unless it is larger than a limit.

    Args:
        path: the delta; an existing file is replaced.
        target: the file to rebuild.
        base: the file that the delta changes.
        facts: what is written into the delta about both.
        limit: its largest size in bytes.

    Returns:
        Whether it was written.

    Raises:
        IntegrityError: one of the two is not a safetensors file.
        OSError: a file cannot be read or written.
    """
    with TensorFile(target) as new, TensorFile(base) as old:
        changed = {name: _count_changed(new, old, name) for name in new.spans}
        entries = {_HEADER: len(new.header)}
        for name, span in new.spans.items():
            if changed[name] is None:
                entries[f"whole:{name}"] = span.size
            elif changed[name]:
                entries |= {f"bits:{name}": span.packed, f"values:{name}": (changed[name] or 0) * span.width}
        header = delta_header(entries, facts)
        if len(header) + sum(entries.values()) > limit:
            return False
        with path.open("wb") as sink:
            sink.write(header)
            sink.write(new.header)
            for name in new.spans:
                if changed[name] is None:
                    sink.writelines(block.tobytes() for block in new.blocks(name))
                elif changed[name]:
                    for _, differs in _differences(new, old, name):
                        sink.write(np.packbits(differs, bitorder="little").tobytes())
                    for block, differs in _differences(new, old, name):
                        sink.write(block[differs].tobytes())
    return True


def _count_changed(new: TensorFile, old: TensorFile, name: str) -> int | None:
    """Return how many elements of a tensor differ, or None if storing it whole is smaller."""
    span = new.spans[name]
    if not span.like(old.spans.get(name)):
        return None
    changed = sum(int(np.count_nonzero(differs)) for _, differs in _differences(new, old, name))
    return changed if not changed or span.packed + changed * span.width < span.size else None


def _differences(new: TensorFile, old: TensorFile, name: str) -> Iterator[tuple[Raw, NDArray[np.bool_]]]:
    for block, before in zip(new.blocks(name), old.blocks(name), strict=True):
        yield block, block != before


def delta_header(entries: dict[str, int], facts: DeltaFacts) -> bytes:
    """Return the header of a delta, its length included.

    Args:
        entries: names and sizes in bytes of what the delta holds, in order.
        facts: its metadata, which come first (`START_BYTES`).
    """
    document: dict[str, object] = {METADATA: {key: str(value) for key, value in facts.model_dump().items()}}
    at = 0
    for name, size in entries.items():
        document[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data
    return len(text).to_bytes(8, "little") + text


def write_rebuilt(delta: Path, base: Path, sink: BinaryIO | None = None) -> str:
    """Rebuild a file into a sink, or nowhere, and return the SHA-256 of the result; the caller checks it.

    Raises:
        IntegrityError: the delta or the base is damaged, or the base is another file.
        OSError: a file cannot be read or written.
    """
    hasher = hashlib.sha256()
    for piece in _rebuild(delta, base):
        hasher.update(piece)
        if sink:
            sink.write(piece)
    return hasher.hexdigest()


def _rebuild(delta: Path, base: Path) -> Iterator[bytes]:
    with TensorFile(delta) as new, TensorFile(base) as old:
        length = new.spans[_HEADER].size if _HEADER in new.spans else 0
        header = new.read(_HEADER, 1, 0, length).tobytes()
        yield len(header).to_bytes(8, "little") + header
        for name, span in read_spans(header)[0].items():
            if f"whole:{name}" in new.spans:
                yield from _same(new, f"whole:{name}", span)
            elif not span.like(old.spans.get(name)):
                raise _damaged(f"the base has no {name[:80]!r} of its type and shape")
            elif f"bits:{name}" in new.spans:
                yield from _patched(new, old, name, span)
            else:
                yield from _same(old, name, span)


def _same(file: TensorFile, name: str, span: Span) -> Iterator[bytes]:
    if file.spans[name].size != span.size:
        raise _damaged(f"{name[:80]!r} has another size")
    for block in file.blocks(name):
        yield block.tobytes()


def _patched(new: TensorFile, old: TensorFile, name: str, span: Span) -> Iterator[bytes]:
    bits, values, taken = f"bits:{name}", f"values:{name}", 0
    if new.spans[bits].size != span.packed:
        raise _damaged(f"{bits[:80]!r} has another size")
    for number, before in enumerate(old.blocks(name)):
        packed = new.read(bits, 1, number * BLOCK // 8, (len(before) + 7) // 8)
        flags = np.unpackbits(packed.astype(np.uint8, copy=False), bitorder="little").astype(np.bool_)
        differs, spare = flags[: len(before)], flags[len(before) :]
        if spare.any():
            raise _damaged(f"{bits[:80]!r} has bits past its end")
        count = int(np.count_nonzero(differs))
        block = before.copy()
        block[differs] = new.read(values, span.width, taken, count)
        taken += count
        yield block.tobytes()
    if values not in new.spans or new.spans[values].size != taken * span.width:
        raise _damaged(f"{values[:80]!r} does not fit its bits")


def parse_facts(start: bytes, source: str) -> DeltaFacts:
    """Read the facts from the first `START_BYTES` of a delta.

    Args:
        start: its first bytes.
        source: its key, for the message.

    Raises:
        IntegrityError: it is not a delta, or is damaged.
    """
    before = f'{{"{METADATA}":'
    text = start[8:].decode("utf-8", errors="replace")
    try:
        if not text.startswith(before):
            raise ValueError("it does not begin with its metadata")
        return DeltaFacts.model_validate(json.JSONDecoder().raw_decode(text, len(before))[0])
    except (ValueError, ValidationError, RecursionError) as error:
        why = f"{error.error_count()} faults in its metadata" if isinstance(error, ValidationError) else str(error)
        raise IntegrityError(
            f"{source} is not a valid delta", why[:200], "restore it, or stage the version again"
        ) from error
