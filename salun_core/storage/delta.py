"""The delta: a safetensors file stored as what differs from another one, from which it is rebuilt bit by bit.

It is a safetensors file itself. Its metadata come first in its header and say what it rebuilds (`DeltaFacts`); the
tensor `header` holds the raw header of the file; and for each of the file's tensors there is

- nothing, where the base has the same bits;
- `bits:<name>` (one bit an element, little bit order, set where the bits differ) and `values:<name>` (the new ones);
- `whole:<name>`, where type or shape differ, or where that is shorter.
"""

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
from salun_core.storage.lineage import Digest
from salun_core.storage.tensor_file import BLOCK, METADATA, Raw, Span, TensorFile, read_spans

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
                raise _damaged(f"the base has no {name[:80]!r} of its type and shape")
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
        raise _damaged(f"{name[:80]!r} has another size")
    for block in file.blocks(name):
        yield block.tobytes()


def _patched(new: TensorFile, old: TensorFile, name: str, span: Span) -> Iterator[bytes]:
    bits, values, taken = f"bits:{name}", f"values:{name}", 0
    if new.spans[bits].size != _packed(span):
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


def _damaged(why: str) -> IntegrityError:
    return IntegrityError("delta is damaged", why, "restore it, or stage the version again")
