import contextlib
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from salun_core.digest import sha256_bytes, sha256_file
from salun_core.errors import IntegrityError, StoreError, UsageError
from salun_core.registry.lookup import read_version
from salun_core.registry.versions import fetch_version, publish, publish_head, stage_version
from salun_core.storage import blobs
from salun_core.storage import delta as delta_module
from salun_core.storage import delta as tensor_file
from salun_core.storage import keys as names
from salun_core.storage.blobs import (
    blob_size,
    chain_of,
    delta_facts,
    fetch_blob,
    full_copy_every,
    materialise,
    put_blob,
    put_sparse,
    stored_size,
)
from salun_core.storage.delta import (
    MAX_DEPTH,
    START_BYTES,
    DeltaFacts,
    TensorFile,
    parse_facts,
    write_delta,
    write_rebuilt,
)
from salun_core.storage.s3 import S3Store
from tests.folder_model import TEXT, UNET, VAE, contents, write_folder

WEIGHTS = "model.safetensors"
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
def test_every_bit_comes_back(tmp_path_factory, files, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "BLOCK", block)
        patch.setattr(delta_module, "BLOCK", block)
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
    start = delta_module.delta_header({}, facts)[:START_BYTES]
    assert parse_facts(start, "delta") == facts


def test_no_flipped_bit_and_no_cut_gives_other_bytes(tmp_path):
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
def test_what_is_no_delta_is_refused(start):
    with pytest.raises(IntegrityError, match="is not a valid delta"):
        parse_facts(start, "deltas/x")


@pytest.mark.parametrize(("text", "number"), [(None, 8), ("", 8), ("1", 1), (" 12 ", 12), ("64", 64)])
def test_the_setting(monkeypatch, text, number):
    monkeypatch.delenv("SALUN_FULL_COPY_EVERY", raising=False)
    if text is not None:
        monkeypatch.setenv("SALUN_FULL_COPY_EVERY", text)
    assert full_copy_every() == number


@pytest.mark.parametrize("text", ["0", "-1", "65", "8.0", "eight", "٨", "9" * 5000])
def test_a_wrong_setting_is_refused(monkeypatch, text):
    monkeypatch.setenv("SALUN_FULL_COPY_EVERY", text)
    with pytest.raises(UsageError, match="SALUN_FULL_COPY_EVERY"):
        full_copy_every()


# in the store


@pytest.fixture
def weights(tmp_path):
    """Make a weight file; each call changes a third of the elements of the last one, or all."""
    rng, state, count = np.random.default_rng(0), {}, itertools.count()

    def make(share=0.33):
        for name, shape in {"conv": (64, 33), "bias": (10,), "empty": (0,)}.items():
            fresh = rng.standard_normal(shape).astype(np.float32)
            state[name] = np.where(rng.random(shape) < share, fresh, state.get(name, fresh))
        folder = tmp_path / f"model-{next(count)}"
        folder.mkdir()
        save_file({**state, "steps": np.array(7)}, folder / WEIGHTS)
        return folder / WEIGHTS

    return make


def overwrite(store, key, data):
    store._client.put_object(Bucket="salun", Key=f"{store.uri.removeprefix('s3://salun/')}/{key}", Body=data)


def stored_chain(store, weights, length, full_every=8):
    """Store a file and `length` children, each on the one before."""
    paths = [weights()]
    put_blob(store, paths[0])
    for _ in range(length):
        paths.append(weights())
        put_sparse(store, paths[-1], paths[-2], sha256_file(paths[-2]), full_every)
    return paths, [sha256_file(path) for path in paths]


@pytest.mark.s3
def test_the_start_of_an_object_is_read(store):
    overwrite(store, "long", b"0123456789")
    overwrite(store, "empty", b"")
    assert [store.read_start("long", size) for size in (1, 4, 10, 99)] == [b"0", b"0123", b"0123456789", b"0123456789"]
    assert store.read_start("empty", 4) == b""
    assert store.read_start("none", 4) is None


@pytest.mark.s3
def test_a_chain_of_versions_has_a_full_copy_every_so_often(store, weights, tmp_path):
    """k = 3: whole, delta, delta, whole; each version comes back bit by bit."""
    paths, versions = [weights()], []
    fields = {"line": "mnist", "method": "salun"}
    head, _ = publish(store, fields, {WEIGHTS: paths[0]})
    versions.append(head.version)
    for _ in range(3):
        paths.append(weights())
        staged, _ = stage_version(
            store, {**fields, "parent": versions[-1]}, {WEIGHTS: paths[-1]}, {WEIGHTS: paths[-2]}, full_every=3
        )
        publish_head(store, "mnist", staged, versions[-1], None)
        versions.append(staged)
    digests = [sha256_file(path) for path in paths]
    assert [len(chain_of(store, digest)[0]) for digest in digests] == [0, 1, 2, 0]
    assert [blob_size(store, digest) is not None for digest in digests] == [True, False, False, True]
    assert [dependants(store, digest) for digest in digests] == [[digests[1]], [digests[2]], [], []]
    for number, (version, path) in enumerate(zip(versions, paths, strict=True)):
        fetch_version(store, "mnist", version, tmp_path / f"out-{number}")
        assert [file.name for file in (tmp_path / f"out-{number}").iterdir()] == [WEIGHTS]
        assert (tmp_path / f"out-{number}" / WEIGHTS).read_bytes() == path.read_bytes()
        assert read_version(store, "mnist", version).files[WEIGHTS].size == path.stat().st_size
    sizes = [store_size(store, digest) for digest in digests]
    assert all(delta < 0.5 * whole for delta, whole in zip(sizes[1:3], [sizes[0]] * 2, strict=True))


@pytest.mark.s3
def test_of_a_folder_only_what_changed_is_stored_again_and_as_a_difference(store, tmp_path):
    before, after = write_folder(tmp_path / "before"), write_folder(tmp_path / "after", 4000)
    fields = {"line": "sd", "method": "salun"}
    head, parent = publish(store, fields, before)
    held = {entry.key for entry in store.list("blobs/")}
    base = {name: before[name] for name in (UNET, VAE, TEXT)}
    digest, manifest = stage_version(store, {**fields, "parent": head.version}, after, base)
    publish_head(store, "sd", digest, head.version, None)
    assert {entry.key for entry in store.list("blobs/")} == held
    assert [entry.key for entry in store.list("deltas/")] == [names.delta_key(manifest.files[UNET].sha256)]
    assert [facts.base for facts in chain_of(store, manifest.files[UNET].sha256)[0]] == [parent.files[UNET].sha256]
    fetch_version(store, "sd", digest, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "after")
    with pytest.raises(IntegrityError, match="parent's file"):  # of the same name, but of another version
        stage_version(store, {**fields, "parent": head.version}, write_folder(tmp_path / "x", 9), {UNET: after[UNET]})


def dependants(store, digest):
    """Return the digests of the files that are stored as deltas to one."""
    found = [delta_facts(store, entry.key.rpartition("/")[2]) for entry in store.list("deltas/")]
    return [facts.sha256 for facts in found if facts.base == digest]


def store_size(store, digest):
    keys = {names.blob_key(digest), names.delta_key(digest)}
    return sum(entry.size for entry in [*store.list("blobs/"), *store.list("deltas/")] if entry.key in keys)


@pytest.mark.s3
def test_what_is_stored_already_is_left_alone(store, weights):
    (first, second), (base, child) = stored_chain(store, weights, 1)
    before = list(store.list(""))
    assert put_sparse(store, second, first, base, 8).sha256 == child
    assert put_sparse(store, first, second, child, 8).sha256 == base
    assert list(store.list("")) == before


@pytest.mark.s3
def test_a_race_makes_no_circle(store, weights):
    """The parent's file appears, and the child's delta upon it, after we saw that the parent's is not stored."""
    (first, second), (base, child) = stored_chain(store, weights, 1)

    class Late(S3Store):
        seen = False

        def list(self, prefix):
            Late.seen = Late.seen or prefix.endswith(child)
            return super().list(prefix) if Late.seen or not prefix.endswith(base) else iter(())

    put_sparse(Late("salun", store.uri.removeprefix("s3://salun/")), first, second, child, 8)
    assert Late.seen
    assert [entry.key for entry in store.list("deltas/")] == [names.delta_key(child)]


@pytest.mark.s3
def test_what_is_not_worth_it_is_stored_whole(store, weights, tmp_path):
    first, changed, third = weights(), weights(share=0.99), weights()
    base = put_blob(store, first).sha256
    other = tmp_path / "other"
    other.write_bytes(b"no tensors at all")
    for path, base_path, digest, full_every in [
        (changed, first, base, 8),  # nearly all is new
        (third, changed, sha256_file(changed), 1),  # never sparse
        (other, first, base, 8),  # nothing to compare
    ]:
        blob = put_sparse(store, path, base_path, digest, full_every)
        assert blob_size(store, blob.sha256) == path.stat().st_size
    fourth, fifth = weights(), weights()
    put_sparse(store, fifth, fourth, sha256_file(fourth), 8)  # its base is not in the store
    assert blob_size(store, sha256_file(fifth)) is not None
    assert list(store.list("deltas/")) == []


@pytest.mark.s3
def test_a_base_that_is_another_file_is_refused(store, weights):
    first, second, third = weights(), weights(), weights()
    base = put_blob(store, first).sha256
    with pytest.raises(IntegrityError, match="parent's file does not match"):
        put_sparse(store, third, second, base, 8)
    with pytest.raises(StoreError, match="cannot read"):
        put_sparse(store, third, first.with_name("none"), base, 8)
    assert list(store.list("deltas/")) == []


@pytest.mark.s3
def test_a_damaged_delta_or_base_is_refused(store, weights, tmp_path):
    _, (base, child) = stored_chain(store, weights, 1)
    out = tmp_path / "out" / "file"
    out.parent.mkdir()
    for key in (names.delta_key(child), names.blob_key(base)):
        good = store.read_start(key, 10**6)
        for place in (60, len(good) // 2):
            for bad in (good[:place], good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]):
                overwrite(store, key, bad)
                with pytest.raises(IntegrityError):
                    fetch_blob(store, child, out)
        overwrite(store, key, good)
    assert list(out.parent.iterdir()) == []
    with pytest.raises(IntegrityError, match="expected 5 bytes"):
        fetch_blob(store, child, out, 5)
    fetch_blob(store, child, out)
    assert sha256_file(out) == child


@pytest.mark.s3
def test_a_delta_of_another_file_is_refused(store, weights, tmp_path):
    _, (_, child) = stored_chain(store, weights, 1)
    overwrite(store, names.delta_key("0" * 64), store.read_start(names.delta_key(child), 10**6))
    with pytest.raises(IntegrityError, match="does not match its digest"):
        fetch_blob(store, "0" * 64, tmp_path / "out")


@pytest.mark.s3
def test_deltas_in_a_circle_are_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr(blobs, "MAX_DEPTH", 4)
    one, two = "1" * 64, "2" * 64
    for digest, base in ((one, two), (two, one)):
        facts = DeltaFacts(base=base, base_size=9, sha256=digest, size=9, depth=1)
        overwrite(store, names.delta_key(digest), delta_module.delta_header({}, facts))
    with pytest.raises(IntegrityError, match="more than 4 deltas"):
        fetch_blob(store, one, tmp_path / "out")


@pytest.mark.s3
def test_a_version_whose_base_is_gone_is_refused_and_can_be_staged_again(store, weights, tmp_path):
    first, second = weights(), weights()
    fields = {"line": "mnist", "method": "salun"}
    head, _ = publish(store, fields, {WEIGHTS: first})
    child = {**fields, "parent": head.version, "created_at": "2026-01-01T00:00:00+00:00"}
    staged, manifest = stage_version(store, child, {WEIGHTS: second}, {WEIGHTS: first})
    base, digest = sha256_file(first), manifest.files[WEIGHTS].sha256
    store.delete(names.blob_key(base))
    for act in (
        lambda: stored_size(store, digest),
        lambda: fetch_version(store, "mnist", staged, tmp_path / "out"),
        lambda: publish_head(store, "mnist", staged, head.version, None),
        lambda: materialise(store, digest),
    ):
        with pytest.raises(IntegrityError) as caught:
            act()
        assert f"restore {names.blob_key(base)}" in caught.value.remedy
    assert stage_version(store, child, {WEIGHTS: second}, {WEIGHTS: first})[0] == staged  # whole, this time
    assert publish_head(store, "mnist", staged, head.version, None).version == staged
    fetch_version(store, "mnist", staged, tmp_path / "out")


@pytest.mark.s3
def test_a_base_may_go_once_its_dependants_are_whole(store, weights, tmp_path):
    paths, digests = stored_chain(store, weights, 2)
    for digest in dependants(store, digests[0]):
        materialise(store, digest)
        materialise(store, digest)
    assert dependants(store, digests[0]) == []
    assert delta_facts(store, digests[1]) is None
    store.delete(names.blob_key(digests[0]))
    for number in (1, 2):
        fetch_blob(store, digests[number], tmp_path / f"out-{number}")
        assert (tmp_path / f"out-{number}").read_bytes() == paths[number].read_bytes()
    with pytest.raises(StoreError, match="not in the store"):
        materialise(store, digests[0])


@pytest.mark.s3
def test_after_a_kill_between_the_whole_file_and_its_delta_the_whole_one_is_used(store, weights, tmp_path):
    paths, (base, child) = stored_chain(store, weights, 1)
    put_blob(store, paths[1])
    store.delete(names.blob_key(base))
    assert stored_size(store, child) == paths[1].stat().st_size
    fetch_blob(store, child, tmp_path / "out")
    materialise(store, child)
    assert list(store.list("deltas/")) == []
    assert sha256_file(tmp_path / "out") == child


@pytest.mark.s3
def test_a_purge_during_a_fetch_does_no_harm(store, weights, tmp_path):
    """The dependant becomes whole, and its base goes, when the fetch has just decided to rebuild it."""
    paths, (base, child) = stored_chain(store, weights, 1)

    class Purged(S3Store):
        purged = False

        def download(self, key, path):
            if not Purged.purged:
                Purged.purged = True
                materialise(store, child)
                store.delete(names.blob_key(base))
            super().download(key, path)

    fetch_blob(Purged("salun", store.uri.removeprefix("s3://salun/")), child, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == paths[1].read_bytes()
