"""Folders of class folders (ImageFolder)."""

from __future__ import annotations

from pathlib import Path

from salun_core.data.metadata import subjects_of
from salun_core.data.spec import DataSpec
from salun_core.data.table import Table
from salun_core.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
MAX_IMAGE_BYTES = 64 * 1024 * 1024


def read_folder(spec: DataSpec, folder: Path) -> Table:
    """Read a folder of class folders (ImageFolder); ids are the paths below it.

    Raises:
        DataError: there is no class folder, or no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder.name} is no data set", "it is neither a folder nor a parquet file", "check `source`")
    classes = spec.classes or sorted(item.name for item in folder.iterdir() if item.is_dir())
    if not classes:
        raise DataError(
            f"{folder.name} has no class folders", "an image folder has one folder a class", "check the path"
        )
    paths = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not paths:
        raise DataError(
            f"{folder.name} holds no images", f"looked for {', '.join(sorted(IMAGE_SUFFIXES))}", "check the path"
        )
    ids = [path.relative_to(folder).as_posix() for path, _ in paths]
    subjects = subjects_of(spec)
    return Table(
        ids=ids,
        labels=[label for _, label in paths],
        payloads=[read_image(path) for path, _ in paths],
        classes=classes,
        subjects=[subjects.get(sample) for sample in ids],
    )


def read_image(path: Path) -> bytes:
    """Return the bytes of an image file, still encoded.

    Raises:
        DataError: it is absurdly large.
    """
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise DataError(f"image {path.name} is too large", f"over {MAX_IMAGE_BYTES} bytes", "remove or shrink it")
    return path.read_bytes()
