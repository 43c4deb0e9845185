"""`salun ls`: the methods, model architectures and data sets that can be named."""

from __future__ import annotations

import typer

from salun_core.cli.options import Store
from salun_core.cli.output import emit, print_table


def methods() -> None:
    """List the unlearning methods."""
    import inspect
    import sys

    from salun_core.unlearn import METHODS, method_config

    rows = []
    for name, method in METHODS.items():
        about = (inspect.getdoc(sys.modules[f"salun_core.unlearn.{name}"]) or "").partition(":")[0]
        config = method_config(name)
        rows.append(
            {"method": name, "needs_mask": method.needs_mask, "epochs": config.epochs}
            | {"learning_rate": config.learning_rate, "about": about}
        )
    emit(rows, lambda: print_table(list(rows[0]), [list(row.values()) for row in rows]))


def models(store: Store = None) -> None:
    """List the model architectures, and the model lines of the store where one is named."""
    from salun_core.models.registry import CLASSIFIERS
    from salun_core.storage import open_store
    from salun_core.storage.versions import lines, read_head

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
        {"data": "torchvision:NAME", "what": "a torchvision data set that lies under `root`; none is downloaded"},
        {"data": "FOLDER", "what": "a folder of class folders, or one with train and test inside"},
        {"data": "FILE.parquet", "what": "image and label columns, the Hugging Face layout; or a folder of such files"},
        {"data": "s3://BUCKET/PREFIX", "what": "either of these in a store"},
        {"data": "SPEC.yaml", "what": "a data spec: source, test_source, columns, size, split, augmentation"},
    ]
    emit(rows, lambda: print_table(["data", "what"], [list(row.values()) for row in rows]))


app = typer.Typer(no_args_is_help=True, help="List what can be named: methods, models, data.")
