"""Measures the effect of each difference from the published code and writes docs/research/deviations.md.

    python -m lab.studies.deviations --data ../shared/data/cifar10 [--seeds 3] [--only order,split]
    python -m lab.studies.deviations --render-only [--check]

CIFAR-10, 4,500 training and 2,000 test images scaled to 16 x 16, ResNet-8 for 30 epochs without augmentation; a random
tenth is forgotten; 13 minutes of CPU. Prints a table, and writes lab/results/deviations.json. A cell that
was measured before is not measured again, so that a killed run resumes (cells are under lab/out/).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lab.studies.deviations.effects import table
from lab.studies.deviations.measures import MEASURES, Measured
from lab.studies.deviations.page import PAGE, RESULT, filled
from lab.studies.deviations.stage import (
    ARCHITECTURE,
    BASE,
    DENSITY,
    FORGET,
    POOL,
    RATE,
    SHARED,
    TEST,
    TRAIN,
    Stage,
    images_of,
)
from salun_core.digest import digest_json


def collected(found: list[Measured]) -> dict[str, Any]:
    """Collect the seeds of one difference: lists by variant and metric, and by fact."""
    cells = {
        name: {metric: [each.cells[name][metric] for each in found] for metric in values}
        for name, values in found[0].cells.items()
    }
    return {"cells": cells, "facts": {name: [each.facts[name] for each in found] for name in found[0].facts}}


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen differences on every seed."""
    pool, test = images_of(arguments.data, arguments.side)
    setting = {
        "architecture": ARCHITECTURE,
        "side": arguments.side,
        "pool": POOL,
        "train": TRAIN,
        "forget": FORGET,
        "test": TEST,
        "base": BASE,
        "unlearning": SHARED | {"learning_rate": RATE, "density": DENSITY},
    }
    cells = arguments.cells / digest_json(setting)[:12]
    names = arguments.only.split(",") if arguments.only else list(MEASURES)
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for seed in range(arguments.seeds):
        stage = Stage(pool, test, seed, cells)
        for name in names:
            found[name].append(MEASURES[name](stage))
    return {
        "setting": setting,
        "seeds": arguments.seeds,
        "deviations": {name: collected(values) for name, values in found.items()},
    }


def rendered(check: bool) -> None:
    """Write the effects into the page, or check that it has them."""
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before, json.loads(RESULT.read_text()))
    if check and before != after:
        sys.exit(f"{PAGE.name} is out of step with {RESULT.name}: run python -m lab.studies.deviations --render-only")
    PAGE.write_text(after, encoding="utf-8")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet of CIFAR-10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--side", type=int, default=16, help="pixels to scale the images to")
    parser.add_argument("--only", help="differences to measure, separated by commas; then nothing is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", type=Path, default=Path("lab/out/deviations"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--render-only", action="store_true", help="write the page from the last result")
    parser.add_argument("--check", action="store_true", help="with --render-only: change nothing, fail if out of date")
    arguments = parser.parse_args()
    if arguments.render_only:
        return rendered(arguments.check)
    if arguments.data is None:
        parser.error("--data is needed: the folder of CIFAR-10's parquet files")
    torch.set_num_threads(arguments.threads)
    document = measured(arguments)
    print(table(document))
    if not arguments.only:
        arguments.out.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return None


if __name__ == "__main__":
    main()
