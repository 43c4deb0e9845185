"""No bytes make `SaliencyMask.load` do anything but return a whole mask or raise a `SalunError`."""

import json
import os
import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as serialise

from salun_core.errors import IntegrityError, SalunError, UsageError
from salun_core.saliency import SaliencyMask
from salun_core.saliency.mask_file import FORMAT, content_digest

SCORES = {
    "conv.weight": torch.arange(54.0).reshape(2, 3, 3, 3).sin(),
    "conv.bias": torch.tensor([0.3, -0.2]),
    "scale": torch.tensor(0.5),
    "none": torch.empty(0, 4),
    "fc.weight": torch.arange(40.0).reshape(5, 8).cos(),
}
MASK = SaliencyMask.from_scores(SCORES, 0.37, {"model_digest": "a" * 64, "forget_set_digest": "b" * 64})


def load_bytes(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"
        path.write_bytes(data)
        return SaliencyMask.load(path)


def file_bytes(mask=MASK):
    with tempfile.TemporaryDirectory() as folder:
        mask.save(Path(folder) / "m")
        return (Path(folder) / "m").read_bytes()


WHOLE = file_bytes()


def metadata_of(mask=MASK, **changes):
    facts = {
        "format": FORMAT,
        "k": str(mask.k),
        "digest": mask.digest,
        "shapes": json.dumps({name: list(shape) for name, shape in mask.shapes.items()}),
    }
    return {key: value for key, value in {**facts, **changes}.items() if value is not None}


@given(scores=st.sampled_from([SCORES, {"w": torch.tensor(1.0)}]), density=st.floats(0.001, 1.0))
def test_round_trip_keeps_bits_facts_and_order(scores, density):
    mask = SaliencyMask.from_scores(scores, density, {"model_digest": "c" * 64, "note": "naïve ünïcode"})
    again = load_bytes(file_bytes(mask))
    assert again == mask
    assert list(again.shapes.items()) == list(mask.shapes.items())
    assert (again.k, again.facts) == (mask.k, mask.facts)
    assert all(torch.equal(again.tensor(name), mask.tensor(name)) for name in scores)


@settings(max_examples=600)
@given(place=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
def test_any_byte_changed_is_refused_or_leaves_the_same_mask(place, value):
    data = bytearray(WHOLE)
    data[place] = value
    try:
        mask = load_bytes(bytes(data))
    except IntegrityError:
        return
    assert mask == MASK
    assert mask.shapes == MASK.shapes


def test_every_single_bit_flip_of_the_masks_bits_is_refused():
    start = 8 + struct.unpack("<Q", WHOLE[:8])[0]
    for place in range(start, len(WHOLE)):
        for bit in range(8):
            data = bytearray(WHOLE)
            data[place] ^= 1 << bit
            with pytest.raises(IntegrityError):
                load_bytes(bytes(data))


def test_bits_moved_within_a_byte_are_refused():
    start = 8 + struct.unpack("<Q", WHOLE[:8])[0]
    moved = 0
    for place in range(start, len(WHOLE)):
        byte = WHOLE[place]
        rotated = (byte << 1 | byte >> 7) & 0xFF
        if rotated != byte:  # the number of salient weights stays the same
            with pytest.raises(IntegrityError):
                load_bytes(WHOLE[:place] + bytes([rotated]) + WHOLE[place + 1 :])
            moved += 1
    assert moved > 5


def test_every_truncation_and_any_tail_is_refused():
    for length in range(len(WHOLE)):
        with pytest.raises(IntegrityError):
            load_bytes(WHOLE[:length])
    for tail in (b"\0", b"x" * 9):
        with pytest.raises(IntegrityError):
            load_bytes(WHOLE + tail)


@settings(max_examples=300)
@given(data=st.binary(max_size=400))
def test_random_bytes_are_refused(data):
    with pytest.raises(IntegrityError):
        load_bytes(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)
tensor_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "I64", "F32", "BF16", "F64", "BOOL", "F8_E4M3", "F4", "C64", "XX"]),
        "shape": st.lists(st.integers(-1, 2**65), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 2**65), max_size=3) | json_values,
    }
)


@settings(max_examples=500)
@given(
    header=st.dictionaries(st.sampled_from([*SCORES, "x"]), tensor_entries | json_values, max_size=4),
    metadata=st.none() | st.dictionaries(st.sampled_from(["format", "k", "shapes", "digest"]), st.text(), max_size=4),
    size=st.none() | st.integers(0, 2**64 - 1),
    body=st.binary(max_size=64),
)
def test_invented_headers_are_refused(header, metadata, size, body):
    if metadata is not None:
        header = {**header, "__metadata__": metadata}
    text = json.dumps(header).encode()
    with pytest.raises(IntegrityError):
        load_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


@settings(max_examples=300)
@given(
    shapes=st.dictionaries(
        st.sampled_from([*SCORES, "x"]),
        st.lists(st.integers(-2, 80) | st.integers(2**31, 2**90), max_size=3) | json_values,
        max_size=5,
    )
    | json_values,
    k=st.text(max_size=6) | st.integers(-3, 120).map(str) | st.just("9" * 6000),
)
def test_invented_shapes_over_real_tensors_give_only_salun_errors(shapes, k):
    try:
        mask = load_bytes(serialise(dict(MASK.bits), metadata=metadata_of(shapes=json.dumps(shapes), k=k)))
    except SalunError:
        return
    assert mask == MASK


@pytest.mark.parametrize("dtype", [np.int8, np.float32, np.int64, np.bool_])
def test_bits_of_another_type_are_refused(dtype):
    bits = {name: packed.astype(dtype) for name, packed in MASK.bits.items()}
    with pytest.raises(IntegrityError):
        load_bytes(serialise(bits, metadata=metadata_of()))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "salun.mask/v2"},
        {"format": None},
        {"k": str(MASK.k + 1)},
        {"k": None},
        {"k": "many"},
        {"digest": None},
        {"digest": "0" * 64},
        {"shapes": None},
        {"shapes": "[" * 100_000},
        {"shapes": '{"conv.weight": [Infinity]}'},
        {"shapes": '{"conv.weight": [-1, -54]}'},
    ],
)
def test_wrong_metadata_are_refused(changes):
    with pytest.raises(IntegrityError):
        load_bytes(serialise(dict(MASK.bits), metadata=metadata_of(**changes)))


def test_a_mask_that_keeps_nothing_is_refused():
    empty = {name: np.zeros_like(packed) for name, packed in MASK.bits.items()}
    digest = content_digest(MASK.shapes, empty)
    with pytest.raises(IntegrityError, match="0 salient"):
        load_bytes(serialise(empty, metadata=metadata_of(k="0", digest=digest)))


def test_padding_bits_are_refused_even_with_the_right_digest_and_count():
    bits = {name: packed.copy() for name, packed in MASK.bits.items()}
    bits["conv.bias"][-1] |= 0x80
    changes = {"k": str(MASK.k + 1), "digest": content_digest(MASK.shapes, bits)}
    with pytest.raises(IntegrityError, match="past its end"):
        load_bytes(serialise(bits, metadata=metadata_of(**changes)))


@pytest.mark.parametrize("change", ["missing", "extra", "longer", "reshaped"])
def test_names_and_sizes_must_match(change):
    bits = {name: packed.copy() for name, packed in MASK.bits.items()}
    if change == "missing":
        del bits["scale"]
    elif change == "extra":
        bits["other"] = np.zeros(1, dtype=np.uint8)
    elif change == "longer":
        bits["fc.weight"] = np.append(bits["fc.weight"], np.uint8(0))
    else:
        bits["fc.weight"] = bits["fc.weight"].reshape(1, -1)
    with pytest.raises(IntegrityError):
        load_bytes(serialise(bits, metadata=metadata_of()))


class Trap:
    def __reduce__(self):
        return os.system, ("touch escaped",)


@pytest.mark.parametrize("write", [pickle.dumps, lambda value: _torch_bytes(value)])
def test_a_pickle_is_refused_and_not_run(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IntegrityError):
        load_bytes(write(Trap()))
    assert not (tmp_path / "escaped").exists()


def _torch_bytes(value):
    with tempfile.TemporaryDirectory() as folder:
        torch.save(value, Path(folder) / "x.pt")
        return (Path(folder) / "x.pt").read_bytes()


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_path_without_a_file_is_a_usage_error(tmp_path, name):
    with pytest.raises(UsageError, match="there is no mask"):
        SaliencyMask.load(tmp_path / name)
