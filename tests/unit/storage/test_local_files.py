import os
from pathlib import Path

import pytest

from salun_core.storage.local_files import list_tree
from tests.support.folder_model import files_in, write_folder


def test_all_files_are_listed_by_their_relative_names(tmp_path):
    files = write_folder(tmp_path)
    (tmp_path / "unet" / ".hidden").write_bytes(b"")
    found = list_tree(tmp_path)
    assert found.files == {*files, "unet/.hidden"} == set(files_in(tmp_path))
    assert found.strange == ()


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("config.json"), lambda path: path.symlink_to("nowhere")]
)
@pytest.mark.parametrize("name", ["more", "unet/more", "a/b/c/more"])
def test_links_and_pipes_are_strange(tmp_path, make, name):
    files = write_folder(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    make(tmp_path / name)
    assert (list_tree(tmp_path).files, list_tree(tmp_path).strange) == (files.keys(), (name,))


def test_a_link_to_a_folder_is_not_followed(tmp_path):
    write_folder(tmp_path / "model")
    (tmp_path / "model" / "unet").rename(tmp_path / "kept")
    (tmp_path / "model" / "unet").symlink_to(tmp_path / "kept")
    found = list_tree(tmp_path / "model")
    assert found.strange == ("unet",)
    assert not any(name.startswith("unet/") for name in found.files)


def test_a_folder_that_is_empty_or_too_deep_is_strange(tmp_path):
    for name in ("empty", "a/b/c/d", "a/b/empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a/b/c/file").write_bytes(b"")
    (tmp_path / "a/b/c/d/file").write_bytes(b"")
    found = list_tree(tmp_path)
    assert (found.files, found.strange) == ({"a/b/c/file"}, ("a/b/c/d", "a/b/empty/", "empty/"))


def test_a_missing_folder_raises_the_system_error():
    with pytest.raises(FileNotFoundError):
        list_tree(Path("/nowhere/at/all"))
