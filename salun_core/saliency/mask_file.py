"""The file of a mask: safetensors with one uint8 tensor of packed bits per parameter, provenance in the metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from salun_core.digest import canonical_json
from salun_core.errors import IntegrityError, SalunError, UsageError
from salun_core.storage.local_files import write_whole

FORMAT = "salun.mask/v1"
_FAULTS = (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError, OverflowError)
"""Exceptions of safetensors, JSON and numpy for damaged files and metadata."""
Shapes = dict[str, tuple[int, ...]]


def content_digest(shapes: Shapes, bits: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 over names, shapes and packed bits, in hex."""
    hasher = hashlib.sha256(canonical_json({name: list(shape) for name, shape in shapes.items()}))
    for name in sorted(bits):
        hasher.update(bits[name].tobytes())
    return hasher.hexdigest()


def write(path: Path, shapes: Shapes, bits: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> None:
    """Write a mask file atomically; the metadata preserve the order of `shapes`, and `bits` are packed, uint8."""
    metadata = {
        **facts,
        "format": FORMAT,
        "digest": content_digest(shapes, bits),
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
    }
    write_whole(path, serialise(dict(bits), metadata=metadata))


def read(path: Path) -> tuple[Shapes, dict[str, np.ndarray], int, dict[str, str]]:
    """Read and check a mask file; return (shapes, bits, k, facts).

    Raises IntegrityError if it is not a mask or is damaged.
    """
    if not path.is_file():
        raise UsageError(f"there is no mask {path}", "the file does not exist", "compute one with `salun mask`")
    try:
        with safe_open(str(path), framework="numpy") as file:
            facts = dict(file.metadata() or {})
            shapes, k = _header(facts)
            if set(file.keys()) != set(shapes):
                raise _damaged(f"{len(set(file.keys()) ^ set(shapes))} parameter names do not match its shapes")
            for name, shape in shapes.items():  # check sizes before any tensor is read into memory
                if tuple(file.get_slice(name).get_shape()) != ((math.prod(shape) + 7) // 8,):
                    raise _damaged(f"{name} has the wrong number of bytes")
            bits = {name: file.get_tensor(name) for name in shapes}
    except SalunError:
        raise
    except _FAULTS as error:
        raise _damaged(str(error)) from error
    _check_bits(shapes, bits, k)
    if facts.get("digest") != content_digest(shapes, bits):
        raise _damaged("its content does not match its digest")
    for key in ("format", "shapes", "k", "density", "digest"):
        facts.pop(key, None)
    return shapes, bits, k, facts


def _header(facts: dict[str, str]) -> tuple[Shapes, int]:
    if facts.get("format") != FORMAT:
        raise IntegrityError(
            "not a saliency mask", f"its format is {facts.get('format')!r}", f"give a file of format {FORMAT}"
        )
    shapes = {str(name): tuple(int(side) for side in shape) for name, shape in json.loads(facts["shapes"]).items()}
    if any(side < 0 for shape in shapes.values() for side in shape):
        raise _damaged("a shape is negative")
    return shapes, int(facts["k"])


def _check_bits(shapes: Shapes, bits: dict[str, np.ndarray], k: int) -> None:
    for name, packed in bits.items():
        spare = -math.prod(shapes[name]) % 8  # padding bits must be 0, so that equal masks have equal digests
        if packed.dtype != np.uint8 or (spare and packed[-1] >> (8 - spare)):
            raise _damaged(f"{name} has bits past its end")
    found = sum(int(np.bitwise_count(packed).sum()) for packed in bits.values())
    if found != k or k == 0:
        raise _damaged(f"it has {found} salient weights, and its metadata declare {k}")


def _damaged(why: str) -> IntegrityError:
    return IntegrityError("mask file is damaged", why, "compute it again with `salun mask`")
