"""Weight files are compared bit by bit, and damaged ones are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from salun_core.errors import IntegrityError
from salun_core.registry import differences
from salun_core.registry.differences import compare

WEIGHTS = "model.safetensors"


def folder(path: Path, tensors):
    """Write a model folder of (dtype, shape, raw bytes) by name, put together by hand."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    return written(path, json.dumps(header).encode(), b"".join(raw for *_, raw in tensors.values()))


def written(path, header, data):
    path.mkdir(exist_ok=True)
    (path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data)
    return str(path)


def diff(a, b):
    return compare(None, a, b, lambda run: [])


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_types_that_numpy_lacks_nans_and_signed_zeros_are_compared_by_bits(tmp_path, monkeypatch, block):
    monkeypatch.setattr(differences, "_BLOCK", block)
    floats = np.array([0x7FC00001, 0x00000000, 0x80000000, 0x7FC00003, 0x3F800000], "<u4")
    changed = np.array([0x7FC00002, 0x80000000, 0x80000000, 0x7FC00003, 0x3F800000], "<u4")
    halves = np.array([0x3F80, 0x4000, 0x4040, 0x4080], "<u2")
    moved = np.array([0x3F80, 0x4001, 0x4040, 0x4080], "<u2")
    old = {"z.w": ("BF16", [4], halves.tobytes()), "a.w": ("F32", [5], floats.tobytes()), "n.w": ("F32", [0], b"")}
    new = {"z.w": ("BF16", [4], moved.tobytes()), "a.w": ("F32", [5], changed.tobytes()), "n.w": ("F32", [0], b"")}
    old["b.w"], new["b.w"] = ("F8_E4M3", [3], b"abc"), ("F8_E4M3", [3], b"abd")
    old["t.w"], new["t.w"] = ("F16", [2], b"abcd"), ("BF16", [2], b"abcd")
    found = diff(folder(tmp_path / "a", old), folder(tmp_path / "b", new))
    counts = [(item.name, item.values, item.changed, item.distance) for item in found.layers]
    assert counts == [("z", 4, 1, None), ("a", 5, 2, None), ("n", 0, 0, None), ("b", 3, 1, None)]
    assert (found.gone, found.new) == (["t.w"], ["t.w"])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,-4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999999]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,"4"]}}',
        b'{"w":{"dtype":"F32","shape":[1]}}',
        b'{"w":{"dtype":1,"shape":[1],"data_offsets":[0,4]}}',
        b'{"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[4],"data_offsets":[2,4]}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    good = folder(tmp_path / "good", {"w": ("F32", [1], b"1234")})
    bad = written(tmp_path / "bad", header, b"1234")
    with pytest.raises(IntegrityError, match=f"{WEIGHTS} is damaged"):
        diff(good, bad)
    (tmp_path / "bad" / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + header)
    with pytest.raises(IntegrityError, match=f"{WEIGHTS} is damaged"):
        diff(bad, good)
