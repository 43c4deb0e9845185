"""Files in the store, whole and sparse, on a real server."""

import itertools

import numpy as np
import pytest
from safetensors.numpy import save_file

from salun_core.digest import sha256_bytes, sha256_file
from salun_core.errors import IntegrityError, StoreError, UsageError
from salun_core.registry.lookup import read_version
from salun_core.registry.versions import fetch_version, publish, publish_head, stage_version
from salun_core.storage import blobs
from salun_core.storage import delta as delta_format
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
    DeltaFacts,
)
from salun_core.storage.s3 import S3Store
from tests.support.folder_model import TEXT, UNET, VAE, contents, write_folder

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(("text", "number"), [(None, 8), ("", 8), ("1", 1), (" 12 ", 12), ("64", 64)])
def test_full_copy_every_reads_the_environment(monkeypatch, text, number):
    monkeypatch.delenv("SALUN_FULL_COPY_EVERY", raising=False)
    if text is not None:
        monkeypatch.setenv("SALUN_FULL_COPY_EVERY", text)
    assert full_copy_every() == number


@pytest.mark.parametrize("text", ["0", "-1", "65", "8.0", "eight", "٨", "9" * 5000])
def test_a_wrong_full_copy_every_is_refused(monkeypatch, text):
    monkeypatch.setenv("SALUN_FULL_COPY_EVERY", text)
    with pytest.raises(UsageError, match="SALUN_FULL_COPY_EVERY"):
        full_copy_every()


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
def test_a_blob_is_uploaded_once_and_fetched(store, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"weights")
    blob = put_blob(store, source)
    assert (blob.sha256, blob.size) == (sha256_bytes(b"weights"), 7)
    before = next(iter(store.list("blobs/")))
    overwrite(store, names.blob_key(blob.sha256), b"weightz")
    put_blob(store, source)  # it is there with that size: not sent again
    assert store.get(names.blob_key(blob.sha256)).data == b"weightz"
    overwrite(store, names.blob_key(blob.sha256), b"cut")
    put_blob(store, source)  # another size: mended
    fetch_blob(store, blob.sha256, target)
    assert target.read_bytes() == b"weights"
    assert before.key == f"blobs/sha256/{blob.sha256}"


@pytest.mark.s3
@pytest.mark.parametrize("damaged", [b"weighTs", b"weight", b"", b"weights and more"])
@pytest.mark.parametrize("size", [7, None])
def test_a_damaged_blob_never_appears(store, tmp_path, damaged, size):
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.write_bytes(b"weights")
    folder.mkdir()
    blob = put_blob(store, source)
    overwrite(store, names.blob_key(blob.sha256), damaged)
    with pytest.raises(IntegrityError):
        fetch_blob(store, blob.sha256, folder / "target", size)
    assert list(folder.iterdir()) == []


@pytest.mark.s3
def test_a_missing_blob_is_reported(store, tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        fetch_blob(store, "0" * 64, tmp_path / "target")
    with pytest.raises(StoreError, match="No such file"):
        put_blob(store, tmp_path / "none")


@pytest.mark.s3
def test_a_chain_of_versions_has_regular_full_copies(store, weights, tmp_path):
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
def test_only_changed_files_of_a_folder_are_stored_again_and_sparse(store, tmp_path):
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
def test_stored_files_are_not_stored_again(store, weights):
    (first, second), (base, child) = stored_chain(store, weights, 1)
    before = list(store.list(""))
    assert put_sparse(store, second, first, base, 8).sha256 == child
    assert put_sparse(store, first, second, child, 8).sha256 == base
    assert list(store.list("")) == before


@pytest.mark.s3
def test_a_race_creates_no_circle_of_deltas(store, weights):
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
def test_files_that_do_not_shrink_are_stored_whole(store, weights, tmp_path):
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
        overwrite(store, names.delta_key(digest), delta_format.delta_header({}, facts))
    with pytest.raises(IntegrityError, match="more than 4 deltas"):
        fetch_blob(store, one, tmp_path / "out")


@pytest.mark.s3
def test_a_version_without_its_base_is_refused_and_can_be_staged_again(store, weights, tmp_path):
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
        remedies = (f"restore {names.blob_key(base)}", "stage the version again")  # a publish can still do the second
        assert any(remedy in caught.value.remedy for remedy in remedies)
    assert stage_version(store, child, {WEIGHTS: second}, {WEIGHTS: first})[0] == staged  # whole, this time
    assert publish_head(store, "mnist", staged, head.version, None).version == staged
    fetch_version(store, "mnist", staged, tmp_path / "out")


@pytest.mark.s3
def test_a_base_can_be_deleted_after_its_dependants_are_whole(store, weights, tmp_path):
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
def test_if_both_forms_exist_the_whole_one_is_read(store, weights, tmp_path):
    paths, (base, child) = stored_chain(store, weights, 1)
    put_blob(store, paths[1])
    store.delete(names.blob_key(base))
    assert stored_size(store, child) == paths[1].stat().st_size
    fetch_blob(store, child, tmp_path / "out")
    materialise(store, child)
    assert list(store.list("deltas/")) == []
    assert sha256_file(tmp_path / "out") == child


@pytest.mark.s3
def test_a_purge_during_a_fetch_is_harmless(store, weights, tmp_path):
    """The dependant becomes whole, and its base goes, when the fetch has just decided to rebuild it."""
    paths, (base, child) = stored_chain(store, weights, 1)

    class Purged(S3Store):
        purged = False

        def download(self, key, path, on_bytes=None):
            if not Purged.purged:
                Purged.purged = True
                materialise(store, child)
                store.delete(names.blob_key(base))
            super().download(key, path)

    fetch_blob(Purged("salun", store.uri.removeprefix("s3://salun/")), child, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == paths[1].read_bytes()
