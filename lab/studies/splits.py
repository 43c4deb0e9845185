"""Measures what a split costs by its number of rows, in Parquet and as JSON.

    python -m lab.studies.splits

Generated rows of 28-character ids, 80 % training. Each action runs in its own process, which first opens the split
unless it writes it. The table shows the processor seconds of the action alone and the peak memory of its process.

- write: rows to a file
- read: a file to a split whose rows are checked and whose digest is known
- resolve: 1,000 ids to the digests of those in training
- subtract: the split without 1,000 ids, with its digest
- membership: which of 1,000 ids are in the split without 1,000 others

The JSON is written and read as one object, up to a million rows. Writes
lab/results/splits.json, from which `make generated` makes the table in docs/research/speed.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from salun_core.config import unique_keys
from salun_core.data.rows import GROUP_ROWS, PARTS, Columns, Group, Rows
from salun_core.data.split import SPLIT, SplitManifest, read_split
from salun_core.digest import digest_json, sha256_bytes

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
ACTIONS = ("write", "read", "resolve", "subtract", "membership")
JSON, JSON_LIMIT = "split.json", 1_000_000
FEW = 1_000
DATA_SET = sha256_bytes(b"")


def name_of(row: int) -> str:
    """Return the id of a row; ids are sorted by their rows."""
    return f"train/n014{row:08d}/image.JPEG"


def generated(size: int) -> SplitManifest:
    """Return a split whose rows are made when they are read, so that writing is measured alone."""
    counts = np.zeros(len(PARTS), np.int64)

    def read(number: int) -> Group:
        first, last = number * GROUP_ROWS, min(size, (number + 1) * GROUP_ROWS)
        rng = np.random.default_rng(number)
        parts = rng.choice(len(PARTS), last - first, p=[0.8, 0.1, 0.1]).astype(np.int8)
        digests = rng.integers(0, 256, (last - first, 32), np.uint8)
        return Group(pyarrow.array([name_of(row) for row in range(first, last)]), parts, digests)

    groups = -(-size // GROUP_ROWS)
    for number in range(groups):
        counts += np.bincount(read(number).parts, minlength=len(PARTS))
    columns = Columns([name_of(number * GROUP_ROWS) for number in range(groups)], counts.tolist(), read)
    rows = dict(zip(PARTS, (Rows(columns, part) for part in range(len(PARTS))), strict=True))
    return SplitManifest(dataset_digest=DATA_SET, **rows)


def drawn(size: int, seed: int) -> list[str]:
    """Return some ids, of all parts."""
    return [name_of(row) for row in np.random.default_rng(seed).choice(size, min(FEW, size), replace=False).tolist()]


def parquet_work(action: str, size: int, folder: Path) -> Callable[[], object]:
    """Return an action on the Parquet file."""
    if action == "write":
        split = generated(size)
        return lambda: split.write(folder / SPLIT)
    if action == "read":
        return lambda: read_split(folder).digest
    split, names, others = read_split(folder), drawn(size, 1), drawn(size, 2)
    if action == "resolve":
        return lambda: split.train.find(names)
    if action == "subtract":
        return lambda: split.without(names).digest
    child = split.without(others)
    return lambda: child.train.find(names)


def json_work(action: str, size: int, folder: Path) -> Callable[[], object]:
    """Return the same action on dictionaries."""
    path = folder / JSON
    if action == "write":
        document = generated(size).model_dump(mode="json")
        return lambda: path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    if action == "read":
        return lambda: digest_json(json.loads(path.read_text(), object_pairs_hook=unique_keys))
    document = json.loads(path.read_text(), object_pairs_hook=unique_keys)
    train, names, others = document["train"], drawn(size, 1), set(drawn(size, 2))

    def without(gone: set[str]) -> dict[str, str]:
        return {sample: row for sample, row in train.items() if sample not in gone}

    if action == "resolve":
        return lambda: set(names) & train.keys()
    if action == "subtract":
        return lambda: digest_json(document | {"train": without(set(names))})
    child = without(others)
    return lambda: set(names) & child.keys()


def child(form: str, action: str, size: int, folder: Path) -> None:
    """Do one action and print its cost."""
    work = {"parquet": parquet_work, "json": json_work}[form](action, size, folder)
    started = time.process_time()
    work()
    seconds = time.process_time() - started
    name = SPLIT if form == "parquet" else JSON
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_s": seconds, "peak_mb": peak, "bytes": (folder / name).stat().st_size}))


def measured(form: str, action: str, size: int, folder: Path) -> dict[str, Any]:
    """Run one action in its own process."""
    command = [sys.executable, __file__, "--child", form, action, str(size), str(folder)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{form} {size:>10,} {action:<10} {found['cpu_s']:8.2f} s {found['peak_mb']:6.0f} MB", flush=True)
    return found


def main() -> None:
    """Measure every action at every size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of rows")
    parser.add_argument("--child", nargs=4)
    arguments = parser.parse_args()
    if arguments.child:
        form, action, size, folder = arguments.child
        return child(form, action, int(size), Path(folder))
    rows = []
    for size in arguments.sizes:
        for form in ("parquet", "json") if size <= JSON_LIMIT else ("parquet",):
            with tempfile.TemporaryDirectory() as folder:
                costs = {action: measured(form, action, size, Path(folder)) for action in ACTIONS}
            rows.append({"form": form, "rows": size, "costs": costs})
    document = {"pyarrow": pyarrow.__version__, "ids": FEW, "rows": rows}
    target = Path(__file__).parents[1] / "results" / "splits.json"
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return None


if __name__ == "__main__":
    main()
