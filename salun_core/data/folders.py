"""Image folders: one folder per class, and the published layout of Tiny-ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from salun_core.data.parquet import subjects_of
from salun_core.data.spec import DataSpec
from salun_core.data.table import Table
from salun_core.errors import DataError, unknown_name

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
MAX_IMAGE_BYTES = 64 * 1024 * 1024  # limit for one encoded image, above any photograph; all images are held in memory
_WNIDS, _WORDS, _ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"

_Row = tuple[str, Path, int]  # sample id, file, label


def read_folder(spec: DataSpec, folder: Path) -> Table:
    """Read a folder of class folders (ImageFolder); ids are the paths relative to it.

    Raises:
        DataError: the path is not a folder, or has no class folder or no image.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder.name} is not a data set", "it is neither a folder nor a parquet file", "check `source`"
        )
    classes = spec.classes or sorted(item.name for item in folder.iterdir() if item.is_dir())
    if not classes:
        raise DataError(
            f"{folder.name} has no class folders", "an image folder has one folder per class", "check the path"
        )
    rows = [
        (path.relative_to(folder).as_posix(), path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    if not rows:
        raise DataError(
            f"{folder.name} holds no images", f"looked for {', '.join(sorted(IMAGE_SUFFIXES))}", "check the path"
        )
    return _table(spec, rows, classes)


def _table(spec: DataSpec, rows: Sequence[_Row], classes: Sequence[str]) -> Table:
    ids, paths, labels = zip(*rows, strict=True)
    return Table(ids, labels, [_read_image(path) for path in paths], classes).with_subjects(subjects_of(spec))


def _read_image(path: Path) -> bytes:
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise DataError(
            f"image {path.name} is too large",
            f"over {MAX_IMAGE_BYTES} bytes",
            "remove or shrink it",
            public="an image of the data is too large",
        )
    return path.read_bytes()


def is_tiny_imagenet(folder: Path) -> bool:
    """Whether a folder has the layout of the published Tiny-ImageNet."""
    return (folder / _WNIDS).is_file() and (folder / _ANNOTATIONS).is_file()


def read_tiny_imagenet(spec: DataSpec, folder: Path) -> Table:
    """Read both parts; ids are `train/WNID/images/NAME` and `test/images/NAME`.

    Classes are in the order of their WordNet ids, as in image folders. The first word in `words.txt` names a class, or
    its WordNet id if the file is missing or two classes share the word.

    Args:
        spec: its `classes` selects the classes to read, by WordNet id or name; default: all.
        folder: holds `wnids.txt`, `train/` and `val/`.

    Raises:
        DataError: a part is missing or has no images, or an annotation is damaged.
        UsageError: an unknown class.
    """
    wnids = sorted(set(_lines(folder / _WNIDS)))
    names = _class_names(folder, wnids)
    if spec.classes:
        wnids = [_wnid(name, names) for name in spec.classes]
    parts = [_rows(folder / part, _images(folder, part), wnids) for part in ("train", "val")]
    train, test = (_table(spec, rows, [names[wnid] for wnid in wnids]) for rows in parts)
    return train.joined(test)


def _images(folder: Path, part: str) -> list[tuple[Path, str]]:
    """Return the images of a part with their WordNet ids: from folder names in `train`, from annotations in `val`."""
    if part == "train":
        found = sorted((folder / part).glob("*/images/*"))
        return [(path, path.parts[-3]) for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    rows = [line.split("\t") for line in _lines(folder / _ANNOTATIONS)]
    for index, row in enumerate(rows, 1):
        if len(row) < 2 or "/" in row[0]:
            why = f"line {index} does not hold an image and a class, separated by a tab"
            raise DataError(f"{_ANNOTATIONS} is damaged", why, "unpack it again")
    return [(folder / part / "images" / row[0], row[1]) for row in sorted(rows)]


def _rows(part: Path, images: Sequence[tuple[Path, str]], wnids: Sequence[str]) -> list[_Row]:
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    rows = [(path.relative_to(part).as_posix(), path, labels[wnid]) for path, wnid in images if wnid in labels]
    missing = next((name for name, path, _ in rows if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"Tiny-ImageNet lacks {part.name}/{missing}", f"{_ANNOTATIONS} names it", "unpack it again")
    if not rows:
        why = f"none of its {len(wnids)} classes has one"
        raise DataError(f"Tiny-ImageNet has no images in {part.name}", why, "unpack it again")
    return rows


def _class_names(folder: Path, wnids: Sequence[str]) -> dict[str, str]:
    """Return the class names by WordNet id."""
    rows = [line.split("\t", 1) for line in _lines(folder / _WORDS)] if (folder / _WORDS).is_file() else []
    words = {row[0]: row[1].split(",")[0].strip() for row in rows if len(row) == 2}
    first = [words.get(wnid, "") for wnid in wnids]
    return {wnid: word if word and first.count(word) == 1 else wnid for wnid, word in zip(wnids, first, strict=True)}


def _wnid(name: str, names: dict[str, str]) -> str:
    for wnid, word in names.items():
        if name in (wnid, word):
            return wnid
    raise unknown_name("class", name, names.values())


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path.name}", str(error), "unpack Tiny-ImageNet again") from error
