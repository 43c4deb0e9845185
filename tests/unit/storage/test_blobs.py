"""Files in the store, on a real server."""

import pytest

from salun_core.digest import sha256_bytes
from salun_core.errors import IntegrityError, StoreError
from salun_core.registry.versions import fetch_version, publish
from salun_core.storage import keys as names
from salun_core.storage.blobs import fetch_blob, put_blob
from tests.support.folder_model import UNET, contents, write_folder


def overwrite(store, key, data):
    store._client.put_object(Bucket="salun", Key=f"{store.uri.removeprefix('s3://salun/')}/{key}", Body=data)


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
def test_another_size_is_refused_before_the_download(store, tmp_path):
    (tmp_path / "source").write_bytes(b"weights")
    blob = put_blob(store, tmp_path / "source")
    with pytest.raises(IntegrityError, match="expected 5 bytes, found 7"):
        fetch_blob(store, blob.sha256, tmp_path / "target", 5)


@pytest.mark.s3
@pytest.mark.parametrize("size", [7, None])
def test_a_missing_blob_is_reported(store, tmp_path, size):
    with pytest.raises(StoreError, match="does not exist"):
        fetch_blob(store, "0" * 64, tmp_path / "target", size)
    with pytest.raises(StoreError, match="No such file"):
        put_blob(store, tmp_path / "none")


@pytest.mark.s3
def test_only_changed_files_of_a_folder_are_stored_again(store, tmp_path):
    before, after = write_folder(tmp_path / "before"), write_folder(tmp_path / "after", 4000)
    fields = {"line": "sd", "method": "salun"}
    head, _ = publish(store, fields, before)
    held = {entry.key for entry in store.list("blobs/")}
    child, manifest = publish(store, {**fields, "parent": head.version}, after)
    assert {entry.key for entry in store.list("blobs/")} - held == {names.blob_key(manifest.files[UNET].sha256)}
    fetch_version(store, "sd", child.version, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "after")
