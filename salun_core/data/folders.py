"""Image folders: one folder per class, and Tiny-ImageNet as it is published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from salun_core.data.parquet import subjects_of
from salun_core.data.spec import DataSpec
from salun_core.data.table import Table
from salun_core.errors import DataError, unknown_name

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


WNIDS, WORDS, ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"


def is_tiny_imagenet(folder: Path) -> bool:
    """Whether a folder is laid out as the published Tiny-ImageNet is."""
    return (folder / WNIDS).is_file() and (folder / ANNOTATIONS).is_file()


def read_tiny_imagenet(spec: DataSpec, folder: Path) -> Table:
    """Read both parts; ids are `train/WNID/images/NAME` and `test/images/NAME`.

    Classes are in the order of their WordNet ids, as image folders are, and are called by the first word of
    `words.txt`, or by the WordNet id where that file is missing or two classes share the word.

    Args:
        spec: its `classes` names the classes to take, by WordNet id or name; all by default.
        folder: holds `wnids.txt`, `train/` and `val/`.

    Raises:
        DataError: a part is missing or has no images, or an annotation or class is not known.
    """
    wnids = sorted(set(_lines(folder / WNIDS)))
    names = _names(folder, wnids)
    if spec.classes:
        wnids = [_wnid(name, names) for name in spec.classes]
    parts = [_rows(folder / part, _images(folder, part), wnids) for part in ("train", "val")]
    train, test = (_table(spec, rows, [names[wnid] for wnid in wnids]) for rows in parts)
    return train.joined(test)


Row = tuple[str, Path, int]


def _images(folder: Path, part: str) -> list[tuple[Path, str]]:
    """Return the images of a part with their WordNet ids."""
    if part == "train":
        found = sorted((folder / part).glob("*/images/*"))
        return [(path, path.parts[-3]) for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    rows = [line.split("\t") for line in _lines(folder / ANNOTATIONS)]
    bad = next((index for index, row in enumerate(rows) if len(row) < 2 or "/" in row[0]), None)
    if bad is not None:
        raise DataError(
            f"{ANNOTATIONS} is damaged", f"line {bad + 1} has no image and class apart by a tab", "unpack it again"
        )
    return [(folder / part / "images" / row[0], row[1]) for row in sorted(rows)]


def _rows(part: Path, images: Sequence[tuple[Path, str]], wnids: Sequence[str]) -> list[Row]:
    by_wnid = {wnid: label for label, wnid in enumerate(wnids)}
    rows = [(path.relative_to(part).as_posix(), path, by_wnid[wnid]) for path, wnid in images if wnid in by_wnid]
    missing = next((name for name, path, _ in rows if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"Tiny-ImageNet lacks {part.name}/{missing}", f"{ANNOTATIONS} names it", "unpack it again")
    if not rows:
        raise DataError(
            f"Tiny-ImageNet has no images in {part.name}",
            f"none of its {len(wnids)} classes has one",
            "unpack it again",
        )
    return rows


def _table(spec: DataSpec, rows: Sequence[Row], classes: Sequence[str]) -> Table:
    subjects = subjects_of(spec)
    return Table(
        ids=[name for name, _, _ in rows],
        labels=[label for _, _, label in rows],
        payloads=[read_image(path) for _, path, _ in rows],
        classes=classes,
        subjects=[subjects.get(name) for name, _, _ in rows],
    )


def _names(folder: Path, wnids: Sequence[str]) -> dict[str, str]:
    """Return what each class is called."""
    rows = [line.split("\t", 1) for line in _lines(folder / WORDS)] if (folder / WORDS).is_file() else []
    words = {row[0]: row[1].split(",")[0].strip() for row in rows if len(row) == 2}
    first = [words.get(wnid, "") for wnid in wnids]
    return {wnid: word if word and first.count(word) == 1 else wnid for wnid, word in zip(wnids, first, strict=True)}


def _wnid(name: str, names: dict[str, str]) -> str:
    found = [wnid for wnid, word in names.items() if name in (wnid, word)]
    if not found:
        raise unknown_name("class", name, names.values())
    return found[0]


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path.name}", str(error), "unpack Tiny-ImageNet again") from error
