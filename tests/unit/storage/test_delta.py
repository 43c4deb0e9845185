"""The file format of a delta: every bit comes back, and damage is refused."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from salun_core.digest import sha256_bytes
from salun_core.errors import IntegrityError
from salun_core.storage import delta
from salun_core.storage.delta import (
    MAX_DEPTH,
    START_BYTES,
    DeltaFacts,
    TensorFile,
    parse_facts,
    write_delta,
    write_rebuilt,
)

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F4": 1}


def safetensors(tensors, metadata=None):
    """Bytes of a safetensors file of (dtype, shape, raw bytes) by name, put together by hand."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(raw for *_, raw in tensors.values())


def round_trip(folder, child, base, limit=float("inf")):
    """Write the delta, rebuild from it, and return (the bytes that came out, the delta's size)."""
    paths = [folder / name for name in ("child", "base", "delta", "out")]
    paths[0].write_bytes(child)
    paths[1].write_bytes(base)
    facts = DeltaFacts(
        base=sha256_bytes(base), base_size=len(base), sha256=sha256_bytes(child), size=len(child), depth=1
    )
    assert write_delta(paths[2], paths[0], paths[1], facts, limit)
    with paths[3].open("wb") as sink:
        assert write_rebuilt(paths[2], paths[1], sink) == facts.sha256
    return paths[3].read_bytes(), paths[2].stat().st_size


@st.composite
def parent_and_child(draw):
    """Two files whose tensors differ in some elements, in type, in shape, or in being there."""
    parent, child = {}, {}
    for name in draw(st.lists(st.text(min_size=1, max_size=4), max_size=4, unique=True)):
        dtype, count = draw(st.sampled_from(sorted(WIDTHS))), draw(st.integers(0, 40))
        size = count * WIDTHS[dtype] // (2 if dtype == "F4" else 1)
        before = draw(st.binary(min_size=size, max_size=size))
        after = bytearray(before)
        for place in draw(st.lists(st.integers(0, size - 1), max_size=size)) if size else ():
            after[place] = draw(st.integers(0, 255))
        kind = draw(st.sampled_from(["kept", "kept", "kept", "reshaped", "retyped", "new", "gone"]))
        if kind != "new":
            parent[name] = (dtype, (count,), before)
        if kind != "gone":
            retyped = {"F16": "BF16", "U8": "BOOL"}.get(dtype, dtype) if kind == "retyped" else dtype
            shape = (1, count) if kind == "reshaped" else (count,)
            child[name] = (retyped, shape, bytes(after))
    return safetensors(parent, draw(st.none() | st.just({"format": "pt"}))), safetensors(child)


@given(parent_and_child(), st.sampled_from([8, 16, 1 << 20]))
def test_a_rebuilt_file_is_identical(tmp_path_factory, files, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "BLOCK", block)
        base, child = files
        assert round_trip(tmp_path_factory.mktemp("delta"), child, base)[0] == child


def test_nan_payloads_and_signed_zeros_are_differences(tmp_path):
    before = np.array([0x7FC00001, 0x00000000, 0x80000000, 0x7F800001, 0xFFC00000, 0x3F800000] * 20, "<u4")
    after = np.array([0x7FC00002, 0x80000000, 0x80000000, 0x7F800001, 0x7FC00000, 0x3F800000] * 20, "<u4")
    base, child = (safetensors({"w": ("F32", (120,), values.tobytes())}) for values in (before, after))
    assert round_trip(tmp_path, child, base)[0] == child
    with safe_open(str(tmp_path / "delta"), framework="numpy") as file:
        assert file.get_tensor("values:w").tobytes() == after[before != after].tobytes()
        assert np.unpackbits(file.get_tensor("bits:w"), bitorder="little").tolist() == (before != after).tolist()


def test_the_delta_is_a_safetensors_file_of_the_expected_size(tmp_path):
    weights = np.arange(10_000, dtype="<u4")
    changed = weights.copy()
    changed[::2] += 1
    names_of = ("changed", "same", "shape", "all")
    base = safetensors({name: ("F32", (100, 100), weights.tobytes()) for name in names_of})
    child = safetensors(
        {
            "changed": ("F32", (100, 100), changed.tobytes()),
            "same": ("F32", (100, 100), weights.tobytes()),
            "shape": ("F32", (10_000,), weights.tobytes()),
            "all": ("F32", (100, 100), (weights + 1).tobytes()),
            "empty": ("F32", (0, 3), b""),
        }
    )
    _, size = round_trip(tmp_path, child, base)
    assert 20_000 + 1_250 + 80_000 < size < 20_000 + 1_250 + 80_000 + 2_000
    with safe_open(str(tmp_path / "delta"), framework="numpy") as file:
        parts = {"header", "bits:changed", "values:changed", "whole:shape", "whole:all", "whole:empty"}
        assert set(file.keys()) == parts
        facts = DeltaFacts.model_validate(file.metadata())
    assert facts == parse_facts((tmp_path / "delta").read_bytes()[:START_BYTES], "delta")
    assert facts.sha256 == sha256_bytes(child)
    assert not write_delta(tmp_path / "none", tmp_path / "child", tmp_path / "base", facts, size - 1)
    assert not (tmp_path / "none").exists()


def test_the_longest_facts_fit_the_start_of_a_delta():
    most = 2**53 - 1
    facts = DeltaFacts(base="f" * 64, base_size=most, sha256="f" * 64, size=most, depth=MAX_DEPTH)
    start = delta.delta_header({}, facts)[:START_BYTES]
    assert parse_facts(start, "delta") == facts


def test_flipped_bits_and_cuts_are_detected(tmp_path):
    """A flip is refused, or meets something that the result does not rest on (the depth that is written down)."""
    before = np.arange(30, dtype="<u2")
    after = before.copy()
    after[::3] += 7
    base, child = (
        safetensors({"w": ("F16", (30,), values.tobytes()), "b": ("U8", (1,), b"a")}) for values in (before, after)
    )
    round_trip(tmp_path, child, base)
    good = (tmp_path / "delta").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    damaged = tmp_path / "damaged"
    for place, bit in [(place, place % 8) for place in range(0, header, 3)] + [
        (place, bit) for place in range(header, len(good)) for bit in range(8)
    ]:
        damaged.write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
        with contextlib.suppress(IntegrityError):
            assert write_rebuilt(damaged, tmp_path / "base") != sha256_bytes(child) or place < header
    for place in range(0, len(good), 7):
        damaged.write_bytes(good[:place])
        with pytest.raises(IntegrityError):
            write_rebuilt(damaged, tmp_path / "base")


@pytest.mark.parametrize(
    ("bits", "values", "why"),
    [
        (b"\x01", b"\x07\x00\x08", "does not fit its bits"),
        (b"\x01", b"", "missing or too short"),
        (b"\x01\x00", b"\x07\x00", "has another size"),
        (b"\x09", b"\x07\x00\x07\x00", "past its end"),
    ],
)
def test_bits_and_values_that_do_not_fit_are_refused(tmp_path, bits, values, why):
    base = safetensors({"w": ("F16", (3,), b"abcdef")})
    length = int.from_bytes(base[:8], "little")
    parts = {"header": base[8 : 8 + length], "bits:w": bits, "values:w": values}
    (tmp_path / "base").write_bytes(base)
    (tmp_path / "delta").write_bytes(safetensors({name: ("U8", (len(raw),), raw) for name, raw in parts.items()}))
    with pytest.raises(IntegrityError, match=why):
        write_rebuilt(tmp_path / "delta", tmp_path / "base")


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
def test_a_wrong_header_is_refused(tmp_path, header):
    path = tmp_path / "file"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(IntegrityError, match="damaged"):
        TensorFile(path)
    path.write_bytes((2**62).to_bytes(8, "little") + header)
    with pytest.raises(IntegrityError, match="longer than the file"):
        TensorFile(path)


@pytest.mark.parametrize("start", [b"", b"12345678{}", b'12345678{"__metadata__":[]}', b'12345678{"__metadata__":{"a"'])
def test_a_file_that_is_not_a_delta_is_refused(start):
    with pytest.raises(IntegrityError, match="is not a valid delta"):
        parse_facts(start, "deltas/x")
