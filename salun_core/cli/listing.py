"""`salun ls`: the methods, model architectures and data sets that can be named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from salun_core.cli.options import Store
from salun_core.cli.output import emit, print_table

if TYPE_CHECKING:
    from salun_core.methods.config import LoopConfig


def methods() -> None:
    """List the unlearning methods of classifiers, and those of diffusion models too."""
    from salun_core.methods import classification as unlearn
    from salun_core.methods import diffusion

    rows = [
        _method(name, method, method.needs_mask, unlearn.method_config(name), "classifier")
        for name, method in unlearn.METHODS.items()
    ]
    rows += [
        _method(name, method, method.needs_mask, diffusion.generation_config(name), "diffusion")
        for name, method in diffusion.METHODS.items()
    ]
    emit(rows, lambda: print_table(list(rows[0]), [_told(row) for row in rows]))


def _told(row: dict[str, object]) -> list[object]:
    return [f"{value:g}" if isinstance(value, float) else value for value in row.values()]


def _method(name: str, method: object, needs_mask: bool, config: LoopConfig, kind: str) -> dict[str, object]:
    """Describe a method by the first words of its module."""
    import inspect
    import sys

    home = next(module for module in list(sys.modules.values()) if getattr(module, "METHOD", None) is method)
    about = (inspect.getdoc(home) or "").partition(":")[0]
    facts = {"model": kind, "method": name, "needs_mask": needs_mask, "length": _length(config)}
    return facts | {"learning_rate": config.learning_rate, "about": about}


def _length(config: LoopConfig) -> str:
    steps = getattr(config, "steps", None)
    return f"{steps} steps" if steps else f"{config.epochs} epochs"


def models(store: Store = None) -> None:
    """List the model architectures, and the model lines of the store where one is named."""
    from salun_core.models.architectures import CLASSIFIERS
    from salun_core.registry.versions import lines, read_head
    from salun_core.storage import open_store

    rows = [{"model": name, "kind": "architecture"} for name in CLASSIFIERS]
    rows += [{"model": f"{library}:NAME", "kind": "architecture"} for library in ("torchvision", "timm")]
    if store:
        opened = open_store(store)
        heads = {line: read_head(opened, line) for line in lines(opened)}
        rows += [{"model": f"{line}@{head[0].version[:12]}", "kind": "line"} for line, head in heads.items() if head]
    emit(rows, lambda: print_table(["model", "kind"], [list(row.values()) for row in rows]))


def data() -> None:
    """List the ways to name a data set."""
    rows = [
        {"data": "digits", "what": "1,797 handwritten digits of 8 x 8 pixels; comes with scikit-learn"},
        {"data": "fashion-mnist", "what": "70,000 pieces of clothing, 28 x 28 pixels; Debian: dataset-fashion-mnist"},
        {"data": "torchvision:NAME", "what": "a torchvision data set that lies under `root`; none is downloaded"},
        {"data": "FOLDER", "what": "a folder of class folders, or one with train and test inside"},
        {"data": "FILE.parquet", "what": "image and label columns, the Hugging Face layout; or a folder of such files"},
        {"data": "s3://BUCKET/PREFIX", "what": "either of these in a store"},
        {"data": "SPEC.yaml", "what": "a data spec: source, test_source, columns, size, split, augmentation"},
    ]
    emit(rows, lambda: print_table(["data", "what"], [list(row.values()) for row in rows]))


app = typer.Typer(no_args_is_help=True, help="List what can be named: methods, models, data.")
