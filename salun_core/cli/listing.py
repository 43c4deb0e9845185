"""`salun ls`: the names of methods, model architectures and data sets."""

from __future__ import annotations

from salun_core.cli.options import OptionalStore
from salun_core.cli.output import emit, emit_rows, print_table

_DATA = {
    "digits": "1,797 handwritten digits of 8 x 8 pixels; part of scikit-learn",
    "fashion-mnist": "70,000 pieces of clothing, 28 x 28 pixels; Debian: dataset-fashion-mnist",
    "torchvision:NAME": "a torchvision data set under `root`; nothing is downloaded",
    "FOLDER": "a folder with a folder per class, or one with train and test inside",
    "FILE.parquet": "image and label columns, the Hugging Face layout; or a folder of such files",
    "s3://BUCKET/PREFIX": "either of these in a store",
    "SPEC.yaml": "a data spec: source, test_source, columns, size, split, augmentation",
}


def methods() -> None:
    """List the unlearning methods."""
    from salun_core.methods.method import resolve_config
    from salun_core.tasks import TASKS

    rows = []
    for task in TASKS.values():
        for name, method in task.methods.items():
            config, model = resolve_config(task.methods, name), task.description.removesuffix(" model")
            steps = getattr(config, "steps", None)
            length = f"{steps} steps" if steps else f"{config.epochs} epochs"
            row = {"model": model, "method": name, "default": name == task.default_method}
            row |= {"needs_mask": method.needs_mask, "length": length, "learning_rate": config.learning_rate}
            rows.append({**row, "about": method.about})
    cells = [[f"{cell:g}" if isinstance(cell, float) else cell for cell in row.values()] for row in rows]
    emit(rows, lambda: print_table(list(rows[0]), cells))


def models(store: OptionalStore = None) -> None:
    """List the model architectures.

    With --store, also list the model lines of the store.
    """
    from salun_core.models.architectures import CLASSIFIERS
    from salun_core.registry.lookup import lines, read_head
    from salun_core.storage import open_store

    names = [*CLASSIFIERS, "torchvision:NAME", "timm:NAME", "package:callable"]
    rows = [{"model": name, "kind": "architecture"} for name in names]
    if store:
        opened = open_store(store)
        heads = {line: read_head(opened, line) for line in lines(opened)}
        rows += [{"model": f"{line}@{head[0].version[:12]}", "kind": "line"} for line, head in heads.items() if head]
    emit_rows(rows)


def data() -> None:
    """List the ways to name a data set."""
    emit_rows([{"data": name, "what": what} for name, what in _DATA.items()])
