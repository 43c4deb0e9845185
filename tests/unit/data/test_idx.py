"""Fashion-MNIST from idx files: read strictly, found in the right place, and fetched where it is not there."""

import gzip
import os
import shutil
import struct
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from salun_core.data import DataSpec, load_data, load_spec
from salun_core.data import published as idx
from salun_core.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[3]
NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
THREE = struct.pack(">HBB3I", 0, 8, 3, 2, 1, 3) + bytes(range(6))


def encode(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_all(folder, train=40, test=20, packed=True, seed=0):
    """Four files of random images of 5 x 4 pixels; returns their arrays by name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, arrays = np.random.default_rng(seed), {}
    for name in NAMES:
        count = train if name.startswith("train") else test
        shape = (count, 5, 4) if "images" in name else (count,)
        pixels = rng.integers(0, 256, shape) if "images" in name else np.arange(count) % 10
        arrays[name] = pixels.astype(np.uint8)
        data = encode(arrays[name])
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return arrays


@pytest.mark.parametrize("packed", [True, False])
def test_both_parts_are_read_with_their_own_split(tmp_path, packed):
    arrays = write_all(tmp_path, packed=packed)
    data = load_data(DataSpec(source="fashion-mnist", root=str(tmp_path), validation_fraction=0.25))
    assert (len(data.split.train), len(data.split.validation), len(data.split.test)) == (30, 10, 20)
    assert all(sample.startswith("test/") for sample in data.split.test)
    for part, name in (("train", NAMES[0]), ("test", NAMES[2])):
        images = data.images(part)
        places = [int(sample.removeprefix(f"{part}/")) for sample in images.ids]
        assert np.array_equal(images.images.numpy()[:, 0], arrays[name][places])
        assert images.labels.tolist() == [place % 10 for place in places]
    assert data.table.classes[9] == "ankle boot"
    assert len(data.table.classes) == 10


def test_an_idx_file_of_known_bytes(tmp_path):
    for name, data in (("a", THREE), ("a.gz", gzip.compress(THREE, mtime=0))):
        (tmp_path / name).write_bytes(data)
    assert idx.read_idx(tmp_path / "a", axes=3).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert idx.read_idx(tmp_path / "a.gz", axes=3).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


PACKED = gzip.compress(THREE, mtime=0)


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a", b"", "not an idx file"),
        ("a", THREE[:3], "not an idx file"),
        ("a", THREE[:15], "ends within its header"),
        ("a", THREE[:-1], "declares 6 bytes of values, and it holds only 5"),
        ("a", THREE + b"x", "it holds more"),
        ("a", b"\0\0\x09\x03" + THREE[4:], "not an idx file of unsigned bytes with 3 axes"),
        ("a", b"\0\0\x08\x01" + THREE[4:], "with 3 axes"),
        ("a", b"\1" + THREE[1:], "not an idx file"),
        ("a", PACKED, "not an idx file"),
        ("a", struct.pack(">HBB3I", 0, 8, 3, 0, 28, 28), "declares 0 bytes"),
        ("a", struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3), "declares 79228162458924105385300197375 bytes"),
        ("a.gz", THREE, "Not a gzipped file"),
        ("a.gz", PACKED[:-9], "ended before the end-of-stream"),
        ("a.gz", PACKED[:-8] + b"\0" * 8, "CRC check failed"),
        ("a.gz", PACKED[:10] + b"\xff" + PACKED[11:], "Error -3 while decompressing"),
        ("a.gz", PACKED + PACKED, "it holds more"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, name, data, why):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"cannot read {name}: .*{why}.*apt-get install dataset-fashion-mnist"):
        idx.read_idx(tmp_path / name, axes=3)


def test_a_file_is_not_unpacked_beyond_the_size_in_its_header(tmp_path):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(THREE + bytes(200 * 2**20), 1, mtime=0))
    tracemalloc.start()
    with pytest.raises(DataError, match="it holds more"):
        idx.read_idx(tmp_path / "bomb.gz", axes=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_files_above_the_size_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "MAX_IDX_BYTES", 40)
    for name, count in (("a", 6), ("b", 25), ("c", 41)):
        (tmp_path / name).write_bytes(encode(np.zeros((count, 1, 1), dtype=np.uint8)))
    assert idx.read_idx(tmp_path / "a", axes=3).shape == (6, 1, 1)
    (tmp_path / "c.gz").write_bytes(gzip.compress(encode(np.zeros((41, 1, 1), dtype=np.uint8))))
    for name, why in (("b", "it has over 40 bytes"), ("c.gz", "declares 41 bytes of values; 1 to 40 are supported")):
        with pytest.raises(DataError, match=why):
            idx.read_idx(tmp_path / name, axes=3)


@pytest.mark.parametrize(
    ("labels", "why"),
    [(np.zeros(39), "39 labels for 40 images"), (np.full(40, 10), "label 10, and there are 10 classes")],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, why):
    write_all(tmp_path, packed=False)
    (tmp_path / NAMES[1]).write_bytes(encode(labels.astype(np.uint8)))
    with pytest.raises(DataError, match=f"cannot read {NAMES[1]}: {why}"):
        idx.fashion_mnist(str(tmp_path), train=True)
    assert len(idx.fashion_mnist(str(tmp_path), train=False)[1]) == 20


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """A working directory, and folders in place of the variable's and the system's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(idx.DATASETS_VARIABLE, str(tmp_path / "named"))
    monkeypatch.setattr(idx, "HOMES", (*idx.HOMES[:-1], tmp_path / "system"))
    return [tmp_path / name / "fashion-mnist" for name in ("system", ".salun/datasets", "named")] + [tmp_path / "root"]


def test_the_first_folder_with_all_files_is_read(homes):
    for count, folder in enumerate(homes, 1):
        write_all(folder, train=count)
        root = str(folder) if folder.name == "root" else None
        assert len(idx.fashion_mnist(root, train=True)[1]) == count
    (homes[2] / f"{NAMES[3]}.gz").unlink()
    assert len(idx.fashion_mnist(None, train=True)[1]) == 2
    assert idx.HOMES[0] == Path(".salun/datasets")


def test_missing_files_are_reported_with_the_way_to_get_them(homes):
    with pytest.raises(DataError, match=r"Fashion-MNIST was not found.*apt-get install .*, or set `root`") as caught:
        load_data(load_spec("fashion-mnist"))
    assert all(str(folder) in str(caught.value) for folder in (homes[0], ".salun/datasets/fashion-mnist", homes[2]))
    write_all(homes[0])
    with pytest.raises(DataError, match="Fashion-MNIST was not found"):
        load_data(DataSpec(source="fashion-mnist", root="elsewhere"))


def test_paths_in_a_spec_file_are_relative_to_it(tmp_path):
    write_all(tmp_path / "clothes")
    (tmp_path / "spec.yaml").write_text(
        "source: fashion-mnist\nroot: clothes\ntrain_limit: 10\nsize: 4\nvalidation_fraction: 0\n"
    )
    data = load_data(load_spec(str(tmp_path / "spec.yaml")))
    assert data.images("train").images.shape == (10, 1, 4, 4)
    with pytest.raises(UsageError, match="did you mean 'fashion-mnist'"):
        load_spec("fashion-mnst")


def test_the_real_fashion_mnist():
    try:
        images, labels = idx.fashion_mnist(None, train=False)
    except DataError as error:
        pytest.skip(str(error))
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10
    trousers, bags = images[labels == 1], images[labels == 8]
    assert trousers[:, 14, :4].mean() < 5 < 100 < bags[:, 18, 10:18].mean()  # narrow, and broad


@pytest.fixture
def fetch(tmp_path):
    """Run a copy of .ci/datasets in a repository of its own, with some commands in place of the machine's."""
    script = tmp_path / "repository" / ".ci" / "datasets"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "datasets", script)
    (tmp_path / "bin").mkdir()

    def run(*arguments, **variables):
        path = variables.pop("path", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        environment = {"PATH": path, "SYSTEM_DATASETS": str(tmp_path / "system"), **variables}
        return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, timeout=30)

    return run


def command(folder, name, text):
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin" / name).chmod(0o755)


def test_existing_data_are_not_downloaded(fetch, tmp_path):
    command(tmp_path, "apt-get", "exit 9")
    write_all(tmp_path / "named" / "fashion-mnist")
    done = fetch("--require", SALUN_DATASETS=str(tmp_path / "named"))
    assert (done.returncode, done.stdout) == (0, f"datasets: fashion-mnist is in {tmp_path}/named/fashion-mnist\n")


def test_a_failed_download_is_skipped_unless_required(fetch, tmp_path):
    command(tmp_path, "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    done = fetch()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "skipped: dataset-fashion-mnist (apt-get: E: Unable to locate package)\n"
    required = fetch("--require")
    assert (required.returncode, required.stdout) == (1, "")
    assert "To fix it: apt-get install dataset-fashion-mnist" in required.stderr
    for name in ("bash", "dirname", "realpath"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin" / "apt-get").unlink()
    assert "there is no apt-get" in fetch(path=str(tmp_path / "bin")).stdout
    assert fetch("--wrong").returncode == 2


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb, which packs and unpacks the package")
def test_without_root_the_package_is_unpacked_into_the_working_directory(fetch, tmp_path, monkeypatch):
    package = tmp_path / "package"
    arrays = write_all(package / "usr" / "share" / "datasets" / "fashion-mnist")
    (package / "DEBIAN").mkdir()
    (package / "DEBIAN" / "control").write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: x\n"
    )
    subprocess.run(["dpkg-deb", "--build", package, tmp_path / "x.deb"], check=True, capture_output=True)
    command(tmp_path, "id", "echo 1000")
    command(tmp_path, "apt-get", f'[ "$1" = download ] && cp {tmp_path}/x.deb ./dataset-fashion-mnist_1_all.deb')
    done = fetch("--require")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "datasets: unpacked dataset-fashion-mnist into .salun/datasets/fashion-mnist\n"
    assert "fashion-mnist is in .salun/datasets" in fetch().stdout
    assert [path.name for path in (tmp_path / "repository/.salun/datasets").iterdir()] == ["fashion-mnist"]
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.delenv(idx.DATASETS_VARIABLE, raising=False)
    assert np.array_equal(idx.fashion_mnist(None, train=False)[0], arrays[NAMES[2]])


def test_root_installs_the_package(fetch, tmp_path):
    write_all(tmp_path / "made" / "fashion-mnist")
    command(tmp_path, "id", "echo 0")
    command(tmp_path, "apt-get", f'[ "$1 $2" = "install -y" ] && mv {tmp_path}/made {tmp_path}/system')
    assert fetch("--require").stdout == "datasets: installed dataset-fashion-mnist\n"
    assert f"fashion-mnist is in {tmp_path}/system" in fetch().stdout
