"""Image folders: one folder per class, and the published layout of Tiny-ImageNet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from salun_core.data.decode import fits_memory
from salun_core.data.parquet import subjects_of
from salun_core.data.spec import DataSpec
from salun_core.data.table import Encoded, Origin, Payload, Shard, Table
from salun_core.errors import DataError, unknown_name

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
MAX_IMAGE_BYTES = 64 * 1024 * 1024  # limit for one encoded image, above any photograph; all images are held in memory
_WNIDS, _WORDS, _ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"

_Row = tuple[str, int]  # sample id, which is the path in its folder, and label


def read_folder(spec: DataSpec, folder: Path) -> Table:
    """Read a folder of class folders (ImageFolder); ids are the paths relative to it.

    Nothing is left out silently: a file that is named like an image and cannot be read is an error. So is a link out of
    the folder, because a user who may add files to it must not read others with the rights of this process.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder.name} is not a data set", "it is neither a folder nor a parquet file", "check `source`"
        )
    classes = spec.classes or sorted(item.name for item in folder.iterdir() if item.is_dir())
    if not classes:
        loose = any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
        why = "the images lie in the folder itself" if loose else "it is empty, or has only other files"
        raise DataError(f"{folder.name} has no class folders", why, "give a folder that has one folder per class")
    rows = [(sample, label) for label, name in enumerate(classes) for sample in _images(folder, folder / name)]
    if not rows:
        raise DataError(
            f"{folder.name} holds no images", f"looked for {', '.join(sorted(IMAGE_SUFFIXES))}", "check the path"
        )
    return _table(spec, folder, rows, classes)


def _images(folder: Path, place: Path) -> Iterator[str]:
    """Yield the id of what is named like an image in a class folder, sorted; refuse links out of the data."""
    for path in (place, *sorted(place.rglob("*"))):  # which does not follow links to folders
        sample = path.relative_to(folder).as_posix()
        if any("\ud800" <= letter <= "\udfff" for letter in sample):  # stands for a byte that is not UTF-8
            text = f"the name {ascii(sample)} is not UTF-8"
            raise DataError(text, "ids are stored as text", "rename it", public="a name in the data is not UTF-8")
        if path.is_symlink():
            check_inside(folder, sample)
        if path is not place and path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
            yield sample


def check_inside(folder: Path, sample: str) -> None:
    """Raise DataError if a path leads out of the folder."""
    if not Path(os.path.realpath(folder / sample)).is_relative_to(os.path.realpath(folder)):
        raise DataError(
            f"{sample} leads out of the data",
            "it is a link to a place outside the folder",
            "copy what it leads to, or remove the link",
            public="a link in the data leads out of them",
        )


def _table(spec: DataSpec, folder: Path, rows: Sequence[_Row], classes: Sequence[str]) -> Table:
    ids, labels = zip(*rows, strict=True)
    shard = Shard(folder.name, len(ids), partial(read_images, folder, ids), Origin("images", folder))
    stored = Encoded([shard])
    payloads: Sequence[Payload] = stored
    if fits_memory(spec, len(ids), sum(_size(folder / sample) for sample in ids), lambda: stored[0]):
        payloads = list(stored)
    return Table(ids, labels, payloads, classes, stored=stored).with_subjects(subjects_of(spec))


def read_images(folder: Path, ids: Sequence[str], places: Sequence[int]) -> Iterator[bytes]:
    """Yield the images at some places of `ids`, which are paths in a folder."""
    return (_read_image(folder / ids[place], ids[place]) for place in places)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # reading it reports the fault
        return 0


def _read_image(path: Path, sample: str) -> bytes:
    remedy, public = "replace it, or take it out of the data", "an image of the data cannot be read"
    if not path.is_file():  # reading a pipe would wait for ever
        raise DataError(f"cannot read image {sample}", "it is not a file, or a broken link", remedy, public=public)
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise DataError(
                f"image {sample} is too large", f"over {MAX_IMAGE_BYTES} bytes", "remove or shrink it", public=public
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read image {sample}", error.strerror or str(error), remedy, public=public) from error


def is_tiny_imagenet(folder: Path) -> bool:
    """Whether a folder has the layout of the published Tiny-ImageNet."""
    return (folder / _WNIDS).is_file() and (folder / _ANNOTATIONS).is_file()


def read_tiny_imagenet(spec: DataSpec, folder: Path) -> Table:
    """Read both parts; ids are `train/WNID/images/NAME` and `test/images/NAME`.

    Classes are in the order of their WordNet ids, as in image folders. The first word in `words.txt` names a class, or
    its WordNet id if the file is missing or two classes share the word. `classes` of the spec selects the classes to
    read, by WordNet id or name.
    """
    wnids = sorted(set(_lines(folder / _WNIDS)))
    names = _class_names(folder, wnids)
    if spec.classes:
        wnids = [_wnid(name, names) for name in spec.classes]
    rows = {part: _rows(folder / part, _annotated(folder, part), wnids) for part in ("train", "val")}
    classes = [names[wnid] for wnid in wnids]
    train, test = (_table(spec, folder / part, rows[part], classes) for part in rows)
    return train.joined(test)


def _annotated(folder: Path, part: str) -> list[tuple[Path, str]]:
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
    rows = [(path.relative_to(part).as_posix(), labels[wnid]) for path, wnid in images if wnid in labels]
    missing = next((name for name, _ in rows if not (part / name).is_file()), None)
    if missing is not None:
        raise DataError(f"Tiny-ImageNet lacks {part.name}/{missing}", f"{_ANNOTATIONS} names it", "unpack it again")
    if not rows:
        why = f"none of its {len(wnids)} classes has one"
        raise DataError(f"Tiny-ImageNet has no images in {part.name}", why, "unpack it again")
    return rows


def _class_names(folder: Path, wnids: Sequence[str]) -> dict[str, str]:
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
