"""Folders and parquet files that a first user brings along: small, empty, huge, unreadable, oddly named, hostile."""

import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from salun_core.data import DataSpec, load_data
from salun_core.data import parquet as parquet_files
from salun_core.data.decode import decode
from salun_core.data.parquet import read_parquet
from salun_core.data.split import make_split
from salun_core.data.table import Table
from salun_core.errors import DataError, unknown_name


def png(colour=0):
    file = io.BytesIO()
    Image.new("L", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def folder_of(root, names, count=5):
    """Write a few images for each class."""
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(png(number))
    return root


def load(folder):
    return load_data(DataSpec(source=str(folder)))


class TestSmallAndHugeFolders:
    @pytest.mark.parametrize(
        ("names", "found"), [(["cat"], "1 image in 1 class"), (["a", "b"], "2 images in 2 classes")]
    )
    def test_too_few_images_are_counted_and_the_way_out_is_named(self, tmp_path, names, found):
        with pytest.raises(DataError, match=f"no test data: {found}.*test_source"):
            load(folder_of(tmp_path / "data", names, count=1))

    def test_a_folder_of_loose_images_is_told_from_an_empty_one(self, tmp_path):
        (tmp_path / "1.png").write_bytes(png())
        with pytest.raises(DataError, match="no class folders: the images lie in the folder itself"):
            load(tmp_path)

    def test_a_table_of_30000_classes_is_split_in_seconds(self):
        classes = [f"class-{index:05d}" for index in range(30_000)]
        labels = [index // 2 for index in range(60_000)]
        table = Table.numbered([b"x"] * len(labels), labels, classes)
        started = time.process_time()
        split = make_split(table, DataSpec(source="x", test_fraction=0.5, validation_fraction=0.0))
        assert (len(split.train), len(split.test)) == (30_000, 30_000)
        assert time.process_time() - started < 20  # a scan of all rows for each class takes ten minutes

    def test_an_unknown_class_of_30000_is_answered_in_a_line(self):
        error = str(unknown_name("class", "class-0001", [f"class-{index:05d}" for index in range(30_000)]))
        assert len(error) < 300
        assert "did you mean 'class-" in error
        assert "and 29995 more" in error


class TestUnreadableFiles:
    @pytest.mark.parametrize(
        ("content", "why"),
        [(b"", "it is empty"), (b"<html>", "it is not a JPEG, PNG, BMP, PPM, WEBP, TIFF or GIF image")],
    )
    def test_a_file_that_is_not_an_image(self, tmp_path, content, why):
        folder_of(tmp_path, ["a", "b"])
        (tmp_path / "b" / "2.png").write_bytes(content)
        with pytest.raises(DataError, match=f"image b/2.png is corrupt: {why}"):
            load(tmp_path).pixels(["a/1.png", "b/2.png"])

    @pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere.png")])
    def test_a_pipe_or_a_broken_link_is_not_left_out_silently(self, tmp_path, make):
        folder_of(tmp_path, ["a", "b"])
        (tmp_path / "b" / "2.png").unlink()
        make(tmp_path / "b" / "2.png")
        with pytest.raises(DataError, match=r"cannot read image b/2\.png: it is not a file") as caught:
            load(tmp_path)
        assert "2.png" not in str(caught.value.for_pods())

    @pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
    def test_a_file_without_permission_is_named(self):
        with tempfile.TemporaryDirectory() as name:
            folder = folder_of(Path(name) / "data", ["a", "b"])
            Path(name).chmod(0o755)
            (folder / "b" / "2.png").chmod(0)
            os.seteuid(65534)
            try:
                with pytest.raises(DataError, match=r"cannot read image b/2\.png: Permission denied") as caught:
                    load(folder)
            finally:
                os.seteuid(0)
        assert "2.png" not in str(caught.value.for_pods())


class TestLinks:
    def test_a_link_to_a_file_outside_is_refused(self, tmp_path):
        folder = folder_of(tmp_path / "data", ["a", "b"])
        (tmp_path / "outside.png").write_bytes(png())
        (folder / "b" / "2.png").unlink()
        (folder / "b" / "2.png").symlink_to("../../outside.png")
        with pytest.raises(DataError, match=r"b/2\.png leads out of the data: it is a link") as caught:
            load(folder)
        assert "2.png" not in str(caught.value.for_pods())

    @pytest.mark.parametrize("link", ["c", "b/more"])
    def test_a_link_to_a_folder_outside_is_refused(self, tmp_path, link):
        folder = folder_of(tmp_path / "data", ["a", "b"])
        folder_of(tmp_path, ["outside"])
        (folder / link).symlink_to(tmp_path / "outside")
        with pytest.raises(DataError, match=f"{link} leads out of the data"):
            load(folder)

    def test_a_link_within_the_folder_and_a_linked_folder_are_read(self, tmp_path):
        folder = folder_of(tmp_path / "data", ["a", "b"])
        (folder / "b" / "9.png").symlink_to("1.png")
        (tmp_path / "alias").symlink_to(folder)
        assert "b/9.png" in load(tmp_path / "alias").table.position


class TestNames:
    def test_spaces_unicode_and_leading_dashes_are_names_like_others(self, tmp_path):
        names = ["- x", "--help", "a b", "größe", "日本"]
        table = load(folder_of(tmp_path, names)).table
        assert list(table.classes) == names
        assert "--help/1.png" in table.position

    @pytest.mark.parametrize("name", [b"caf\xe9/1.txt", b"caf\xe9/1.png", b"a/caf\xe9.png"])
    def test_a_name_that_is_not_utf_8_is_refused_by_name(self, tmp_path, name):
        folder_of(tmp_path, ["a", "b"])
        path = os.fsencode(tmp_path) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png())
        with pytest.raises(DataError, match=r"caf\\udce9.* is not UTF-8"):
            load(tmp_path)


class TestParquetThatExpands:
    def repeated(self, path, size, rows):
        """Write one value and so many references to it, as dictionary encoding does; a few hundred bytes."""
        values = pyarrow.array([b"\0" * size], pyarrow.binary())
        images = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int32)), values)
        table = pyarrow.table({"image": images, "label": np.arange(rows) % 2})
        pyarrow.parquet.write_table(table, path, compression="zstd")
        return path

    def test_one_value_that_is_repeated_is_refused_before_it_is_copied(self, tmp_path):
        path = self.repeated(tmp_path / "a.parquet", 1 << 20, 8000)
        assert path.stat().st_size < 50_000
        with pytest.raises(DataError, match=r"a\.parquet expands too far: .* kB would become 8\.4 GB"):
            read_parquet(DataSpec(source=str(path)), path)

    @pytest.mark.parametrize("kind", ["binary", "fixed", "struct", "list"])
    def test_each_kind_of_column_is_measured(self, tmp_path, monkeypatch, kind):
        monkeypatch.setattr(parquet_files, "EXPANDED_BYTES", 1 << 20)
        zeros, rows = b"\0" * 4096, 2000
        images = {
            "binary": pyarrow.array([zeros] * rows, pyarrow.binary()),
            "fixed": pyarrow.array([zeros] * rows, pyarrow.binary(len(zeros))),
            "struct": pyarrow.array([{"bytes": zeros, "path": None}] * rows),
            "list": pyarrow.array([[zeros]] * rows),
        }[kind]
        for name, dictionary in (("plain", False), ("dictionary", True)):
            path = tmp_path / f"{name}.parquet"
            table = pyarrow.table({"image": images, "label": [0, 1] * (rows // 2)})
            pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=dictionary)
            with pytest.raises(DataError, match="expands too far"):
                read_parquet(DataSpec(source=str(path)), path)

    def test_many_empty_rows_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(parquet_files, "EXPANDED_BYTES", 1 << 20)
        path = self.repeated(tmp_path / "a.parquet", 1, 200_000)
        with pytest.raises(DataError, match="expands too far"):
            read_parquet(DataSpec(source=str(path)), path)

    def test_other_columns_are_not_read_and_images_that_do_not_shrink_are(self, tmp_path, monkeypatch):
        monkeypatch.setattr(parquet_files, "EXPANDED_BYTES", 1 << 16)
        generator = np.random.default_rng(0)
        images = [generator.bytes(2000) for _ in range(100)]
        table = pyarrow.table({"image": images, "label": [0, 1] * 50, "image.bomb": [b"\0" * (1 << 20)] * 100})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
        assert list(read_parquet(DataSpec(source="x"), tmp_path / "a.parquet").payloads) == images


def test_a_corrupt_image_tells_no_address_of_memory():
    with pytest.raises(DataError) as caught:
        decode([b"GIF89a"], ["x"], None, 1)
    assert "0x" not in str(caught.value)
