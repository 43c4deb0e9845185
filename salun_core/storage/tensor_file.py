"""Reads a safetensors file as raw bytes, block by block: no float is ever looked at, so every bit survives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from salun_core.config import Document
from salun_core.errors import IntegrityError

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
