"""The spec of a data set: source, columns, size and split."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from salun_core.config import Document, load
from salun_core.errors import UsageError, unknown_name

BUILTIN = ("digits", "fashion-mnist")


class DataSpec(Document):
    """A data set of labelled images."""

    source: str = Field(
        description="`digits`, `fashion-mnist`, `torchvision:NAME`, a folder of class folders, a parquet or tar file "
        "or a folder of them; local or s3://"
    )
    test_source: str | None = Field(default=None, description="test data of the same layout; else a share of `source`")
    image_column: str = Field(default="image", description="parquet: encoded bytes, or a struct with `bytes`")
    label_column: str = Field(default="label", description="parquet: class id or class name")
    subject_column: str | None = Field(default=None, description="column that names the person a row belongs to")
    metadata: str | None = Field(
        default=None,
        description="table (.csv or .parquet) with `file_name` and further columns, for folders of images and `digits`",
    )
    classes: list[str] = Field(default=[], description="class names by id; else read from the data")
    size: int | None = Field(
        default=None, ge=4, le=1024, description="side in pixels to resize to; else all must agree"
    )
    channels: Literal[1, 3] | None = Field(default=None, description="else as the first image has")
    augment: Literal["none", "crop", "crop-flip"] = Field(
        default="none", description="what leaves a training image's class unchanged"
    )
    train_limit: int | None = Field(default=None, ge=1, description="use this many training rows, drawn by class")
    test_limit: int | None = Field(default=None, ge=1, description="use this many test rows, drawn by class")
    validation_fraction: float = Field(default=0.1, ge=0, lt=1, description="share of the training rows held out")
    test_fraction: float = Field(default=0.2, gt=0, lt=1, description="share for the test split without test_source")
    split_seed: int = Field(default=0, ge=0, description="of the split")
    root: str | None = Field(default=None, description="torchvision and `fashion-mnist`: the folder of the files")

    @property
    def brings_test_data(self) -> bool:
        """Whether the data have their own test part instead of a share of the training data."""
        of_torchvision = self.source.startswith("torchvision:") and not self.source.endswith("FakeData")
        return self.test_source is not None or self.source == "fashion-mnist" or of_torchvision


def load_spec(text: str) -> DataSpec:
    """Read a data set spec from a value of the command line; an error lists all faults of a file.

    The text is a YAML or JSON file, a data folder, a parquet file, a name of `BUILTIN`, `torchvision:NAME` or an s3://
    URI.
    """
    path = Path(text)
    if path.suffix in {".yaml", ".yml", ".json"}:
        return relative_to(load(DataSpec, path), path.parent)
    if text in BUILTIN or text.startswith(("torchvision:", "s3://")):
        return DataSpec(source=text)
    if path.is_dir() or path.suffix in {".parquet", ".tar"}:
        if not path.exists():
            raise UsageError(f"there is no data at {text}", "the path does not exist", "check it")
        return _of_folder(path)
    if "/" not in text and "." not in text:
        raise unknown_name("data set", text, [*BUILTIN, "torchvision:CIFAR10", "a folder", "a parquet file"])
    raise UsageError(f"there is no data at {text}", "the path does not exist", "check it, or give a YAML file")


def relocated_spec(spec: DataSpec, data: str | None) -> DataSpec:
    """Return a model's data spec; if the data were moved, only the paths come from the spec `data`."""
    if data is None:
        return spec
    moved = load_spec(data)
    places = ("source", "test_source", "metadata", "root", "subject_column")
    changes = {name: getattr(moved, name) for name in places if getattr(moved, name) is not None}
    return spec.model_copy(update=changes)


def _of_folder(path: Path) -> DataSpec:
    """Return the spec of a folder; a folder with `train` and `test` (or `val`) has its own split."""
    if (path / "val" / "val_annotations.txt").is_file():  # Tiny-ImageNet; some of its images are grey
        return DataSpec(source=str(path.resolve()), channels=3)
    if path.is_dir():
        for suffix in ("", ".parquet", ".tar"):
            for test in ("test", "val"):
                train, held_out = path / f"train{suffix}", path / f"{test}{suffix}"
                if train.exists() and held_out.exists():
                    return DataSpec(source=str(train.resolve()), test_source=str(held_out.resolve()))
    return DataSpec(source=str(path.resolve()))


def relative_to(spec: DataSpec, folder: Path) -> DataSpec:
    """Return the spec with its local paths, which are relative to `folder`, resolved."""

    def absolute(text: str | None) -> str | None:
        if text is None or text in BUILTIN or text.startswith(("torchvision:", "s3://")):
            return text
        return str((folder / text).resolve())

    changed = {name: absolute(getattr(spec, name)) for name in ("source", "test_source", "metadata", "root")}
    return spec.model_copy(update=changed)
