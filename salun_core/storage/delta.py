"""Deltas: a safetensors file stored as its difference from another one, rebuilt bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from salun_core.config import Document
from salun_core.errors import IntegrityError
from salun_core.storage.documents import Digest

MAX_HEADER_BYTES = 100_000_000  # what safetensors itself allows
BLOCK = 1 << 20  # elements held in memory at once; a multiple of 8, so that packed bits of blocks join
METADATA = "__metadata__"
_WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}

_Count = Annotated[int, Field(strict=True, ge=0)]
Raw = NDArray[np.unsignedinteger]


class Span(Document):
    """Where a tensor lies, as the header says it: type, shape, first byte and the byte past its end."""

    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.data_offsets[1] - self.data_offsets[0]

    @property
    def width(self) -> int:
        """Bytes of an element; a type that is not known, or narrower than a byte, counts in bytes."""
        width = _WIDTHS.get(self.dtype, 1)
        return width if self.size % width == 0 else 1

    @property
    def elements(self) -> int:
        """How many elements of that width it has."""
        return self.size // self.width

    def like(self, other: Span | None) -> bool:
        """Return whether another tensor has the same type, shape and size."""
        return other is not None and (self.dtype, self.shape, self.size) == (other.dtype, other.shape, other.size)


def read_spans(header: bytes) -> tuple[dict[str, Span], int]:
    """Read a safetensors header.

    Returns:
        The tensors by name in the order of their bytes, which follow each other without a gap, and their size.

    Raises:
        IntegrityError: it is no such header.
    """
    try:
        document = json.loads(header)
        document.pop(METADATA, None)
        spans = {name: Span.model_validate(fields) for name, fields in document.items()}
    except ValidationError as error:
        raise _damaged(f"a tensor is not described as it must be ({error.error_count()} faults)") from error
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
                raise _damaged(f"its header speaks of {self._data + data} bytes, it has {size}")
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
            IntegrityError: it has no such elements.
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
        """Yield a tensor of the file as unsigned integers of its width, at most `BLOCK` at a time."""
        span = self.spans[name]
        for start in range(0, span.elements, BLOCK):
            yield self.read(name, span.width, start, min(BLOCK, span.elements - start))


def _damaged(why: str) -> IntegrityError:
    return IntegrityError("tensor file is damaged", why, "fetch it again, or restore it from a copy")


MAX_DEPTH = 64
START_BYTES = 1024  # of a delta hold its facts
_HEADER = "header"
_Size = Annotated[int, Field(ge=0, le=2**53 - 1)]
_Kind = Literal["same", "bits", "whole"]


class DeltaFacts(Document):
    """What a delta rebuilds, and from what."""

    format: Literal["salun.delta/v1"] = "salun.delta/v1"
    base: Digest = Field(description="SHA-256 of the file that it changes")
    base_size: _Size = Field(description="size of that file in bytes")
    sha256: Digest = Field(description="SHA-256 of the file that it rebuilds")
    size: _Size = Field(description="size of that file in bytes")
    depth: int = Field(ge=1, le=MAX_DEPTH, description="how many deltas lay one upon another when it was written")


@dataclass(frozen=True)
class _Part:
    name: str
    span: Span
    kind: _Kind
    changed: int = 0

    def entries(self) -> list[tuple[str, int]]:
        """Return what the delta holds of the tensor: names and sizes in bytes."""
        if self.kind == "bits":
            return [(f"bits:{self.name}", _packed(self.span)), (f"values:{self.name}", self.changed * self.span.width)]
        return [(f"whole:{self.name}", self.span.size)] if self.kind == "whole" else []


def _packed(span: Span) -> int:
    return (span.elements + 7) // 8


def write_delta(path: Path, target: Path, base: Path, facts: DeltaFacts, limit: float) -> bool:
    """Write the delta that makes one safetensors file from another, unless it is too large to be worth it.

    Args:
        path: the delta; what is there is replaced.
        target: the file that it shall rebuild.
        base: the file that it changes.
        facts: what is written into it about both.
        limit: its largest size in bytes.

    Returns:
        Whether it was written.

    Raises:
        IntegrityError: one of the two is no safetensors file.
        OSError: a file cannot be read or written.
    """
    with TensorFile(target) as new, TensorFile(base) as old:
        parts = [_plan(new, old, name) for name in new.spans]
        header = _delta_header(len(new.header), parts, facts)
        size = len(header) + len(new.header) + sum(size for part in parts for _, size in part.entries())
        if size > limit:
            return False
        with path.open("wb") as sink:
            sink.write(header)
            sink.write(new.header)
            for part in parts:
                _write_part(sink, new, old, part)
    return True


def _plan(new: TensorFile, old: TensorFile, name: str) -> _Part:
    span = new.spans[name]
    if not span.like(old.spans.get(name)):
        return _Part(name, span, "whole")
    changed = sum(int(np.count_nonzero(differs)) for _, differs in _differences(new, old, name))
    if not changed:
        return _Part(name, span, "same")
    sparse = _packed(span) + changed * span.width < span.size
    return _Part(name, span, "bits", changed) if sparse else _Part(name, span, "whole")


def _differences(new: TensorFile, old: TensorFile, name: str) -> Iterator[tuple[Raw, NDArray[np.bool_]]]:
    for block, before in zip(new.blocks(name), old.blocks(name), strict=True):
        yield block, block != before


def _delta_header(length: int, parts: list[_Part], facts: DeltaFacts) -> bytes:
    entries = [(_HEADER, length), *(entry for part in parts for entry in part.entries())]
    document: dict[str, object] = {METADATA: {key: str(value) for key, value in facts.model_dump().items()}}
    at = 0
    for name, size in entries:
        document[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_part(sink: BinaryIO, new: TensorFile, old: TensorFile, part: _Part) -> None:
    if part.kind == "whole":
        for block in new.blocks(part.name):
            sink.write(block.tobytes())
    elif part.kind == "bits":
        for _, differs in _differences(new, old, part.name):
            sink.write(np.packbits(differs, bitorder="little").tobytes())
        for block, differs in _differences(new, old, part.name):
            sink.write(block[differs].tobytes())


def rebuild(delta: Path, base: Path) -> Iterator[bytes]:
    """Yield the bytes that a delta makes of its base; whoever takes them checks their digest.

    Raises:
        IntegrityError: the delta or the base is damaged, or the base is another.
        OSError: a file cannot be read.
    """
    with TensorFile(delta) as new, TensorFile(base) as old:
        length = new.spans[_HEADER].size if _HEADER in new.spans else 0
        header = new.read(_HEADER, 1, 0, length).tobytes()
        yield len(header).to_bytes(8, "little") + header
        for name, span in read_spans(header)[0].items():
            if f"whole:{name}" in new.spans:
                yield from _same(new, f"whole:{name}", span)
            elif not span.like(old.spans.get(name)):
                raise _damaged_delta(f"the base has no {name[:80]!r} of its type and shape")
            elif f"bits:{name}" in new.spans:
                yield from _patched(new, old, name, span)
            else:
                yield from _same(old, name, span)


def write_rebuilt(delta: Path, base: Path, sink: BinaryIO | None = None) -> str:
    """Rebuild a file into a sink, or nowhere, and return the SHA-256 of what came out.

    Raises:
        IntegrityError: the delta or the base is damaged, or the base is another.
        OSError: a file cannot be read or written.
    """
    hasher = hashlib.sha256()
    for piece in rebuild(delta, base):
        hasher.update(piece)
        if sink:
            sink.write(piece)
    return hasher.hexdigest()


def _same(file: TensorFile, name: str, span: Span) -> Iterator[bytes]:
    if file.spans[name].size != span.size:
        raise _damaged_delta(f"{name[:80]!r} has another size")
    for block in file.blocks(name):
        yield block.tobytes()


def _patched(new: TensorFile, old: TensorFile, name: str, span: Span) -> Iterator[bytes]:
    bits, values, taken = f"bits:{name}", f"values:{name}", 0
    if new.spans[bits].size != _packed(span):
        raise _damaged_delta(f"{bits[:80]!r} has another size")
    for number, before in enumerate(old.blocks(name)):
        packed = new.read(bits, 1, number * BLOCK // 8, (len(before) + 7) // 8)
        flags = np.unpackbits(packed.astype(np.uint8, copy=False), bitorder="little").astype(np.bool_)
        differs, spare = flags[: len(before)], flags[len(before) :]
        if spare.any():
            raise _damaged_delta(f"{bits[:80]!r} has bits past its end")
        count = int(np.count_nonzero(differs))
        block = before.copy()
        block[differs] = new.read(values, span.width, taken, count)
        taken += count
        yield block.tobytes()
    if values not in new.spans or new.spans[values].size != taken * span.width:
        raise _damaged_delta(f"{values[:80]!r} does not fit its bits")


def parse_facts(start: bytes, source: str) -> DeltaFacts:
    """Read the facts from the first `START_BYTES` of a delta.

    Args:
        start: its first bytes.
        source: its key, for the message.

    Raises:
        IntegrityError: it is no delta, or is damaged.
    """
    before = f'{{"{METADATA}":'
    text = start[8:].decode("utf-8", errors="replace")
    try:
        if not text.startswith(before):
            raise ValueError("it does not begin with its metadata")
        return DeltaFacts.model_validate(json.JSONDecoder().raw_decode(text, len(before))[0])
    except (ValueError, ValidationError, RecursionError) as error:
        why = f"{error.error_count()} faults in its metadata" if isinstance(error, ValidationError) else str(error)
        raise IntegrityError(f"{source} is no delta", why[:200], "restore it, or stage the version again") from error


def _damaged_delta(why: str) -> IntegrityError:
    return IntegrityError("delta is damaged", why, "restore it, or stage the version again")
