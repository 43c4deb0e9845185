"""Measures the memory of training and of forgetting 20 images by the number of rows, streamed and in memory.

    python benchmarks/streaming.py

Generated bitmaps of 8 x 8 pixels in Parquet files of 100,000 rows, and a network of two layers, so that most of the
cost is that of the data. Each action runs in its own process.

- train: one epoch, with the split, the accuracies and the model folder
- forget: a request for 20 images: the data are loaded and checked, then mask, one epoch of `salun` on all images, and
  the evaluation on all images

The table shows processor seconds and the peak memory of the process. Both sources must give the same weights. Writes
benchmarks/results/streaming.json, which keeps the rows of other sizes and sources. `make generated` makes the table in
docs/research/speed.md from it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
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
import pyarrow.parquet
import torch
from PIL import Image
from torch import nn

from salun_core.data import DataSpec
from salun_core.data.targets import SamplesTarget
from salun_core.evaluation.evidence import RunFacts
from salun_core.methods.classification import method_config
from salun_core.methods.distributed import SINGLE_PROCESS
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask
from salun_core.tasks import inputs_of, task_of
from salun_core.tasks.classification.training import train_model, training_config
from salun_core.tasks.task import Candidate, EvaluationOptions

SIZES = (20_000, 100_000, 1_000_000)
SOURCES = {"memory": "100", "stream": "0"}  # values of SALUN_IMAGE_MEMORY, in gigabytes
FILE_ROWS, GROUP_ROWS, CLASSES = 100_000, 1_000, 10
FORGOTTEN = 20
NETWORK = "benchmarks.streaming:small"
TRAINING = {"epochs": 1, "batch_size": 256, "learning_rate": 0.05, "device": "cpu"}
FORGETTING = {"recipe": "fixed", "epochs": 1, "batch_size": 256, "device": "cpu"}


def small(num_classes: int) -> nn.Module:
    """Return a network of two layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    )


def write_data(folder: Path, size: int) -> None:
    """Write images of noise around the brightness of their class."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "BMP")
    header = np.frombuffer(file.getvalue()[: -8 * 8 * 3], np.uint8)
    for start in range(0, size, FILE_ROWS):
        count = min(FILE_ROWS, size - start)
        labels = rng.integers(0, CLASSES, count)
        pixels = (rng.integers(0, 128, (count, 8 * 8 * 3)) + 12 * labels[:, None]).astype(np.uint8)
        images = np.hstack([np.tile(header, (count, 1)), pixels])
        rows = pyarrow.FixedSizeBinaryArray.from_buffers(
            pyarrow.binary(images.shape[1]), count, [None, pyarrow.py_buffer(images.tobytes())]
        )
        table = pyarrow.table({"image": rows.cast(pyarrow.binary()), "label": labels})
        path = folder / f"part-{start // FILE_ROWS:04d}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=GROUP_ROWS)


def train(folder: Path) -> str:
    """Train a model and return its digest."""
    spec = DataSpec(source=str(folder / "data"), augment="crop-flip")
    return train_model(spec, NETWORK, training_config(TRAINING), folder / os.environ["SALUN_IMAGE_MEMORY"]).digest


def forget(folder: Path) -> str:
    """Forget some images, evaluate the result, and return its digest."""
    place = folder / os.environ["SALUN_IMAGE_MEMORY"]
    task, cpu = task_of(place), torch.device("cpu")
    model = task.load(place)
    inputs = inputs_of(task, model, [SamplesTarget(ids=model.split.ids("train")[:FORGOTTEN])])
    config = method_config("salun", FORGETTING)
    mask = SaliencyMask.from_scores(task.score(inputs, config, cpu, SINGLE_PROCESS).values, 0.5)
    result = task.unlearn(inputs, "salun", config, mask)
    task.evaluate(inputs, Candidate(model, RunFacts(), mask), EvaluationOptions(device=cpu))
    return model_digest(result.model)


ACTIONS: dict[str, Callable[[Path], str]] = {"train": train, "forget": forget}


def measured(source: str, action: str, size: int, folder: Path) -> dict[str, Any]:
    """Run one action in its own process."""
    command = [sys.executable, __file__, "--child", action, str(folder)]
    environment = {**os.environ, "SALUN_IMAGE_MEMORY": SOURCES[source], "SALUN_PLUGINS": NETWORK}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found: dict[str, Any] = json.loads(output)
    print(f"{size:>10,} {source:<7} {action:<7} {found['cpu_s']:8.1f} s {found['peak_mb']:6.0f} MB", flush=True)
    return found


def main() -> None:
    """Measure every action at every size from both sources."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of rows")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--child", nargs=2)
    arguments = parser.parse_args()
    if arguments.child:
        digest = ACTIONS[arguments.child[0]](Path(arguments.child[1]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"digest": digest, "cpu_s": time.process_time(), "peak_mb": peak}))
        return
    target = Path(__file__).parent / "results" / "streaming.json"
    rows = {row["rows"]: row["costs"] for row in json.loads(target.read_text())["rows"]} if target.is_file() else {}
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_data(folder / "data", size)
            costs = {
                source: {action: measured(source, action, size, folder) for action in ACTIONS}
                for source in arguments.sources
            }
        digests = [{action: cost.pop("digest") for action, cost in of_source.items()} for of_source in costs.values()]
        if digests[0] != digests[-1]:
            raise SystemExit(f"the sources give different weights at {size} rows")
        rows[size] = rows.get(size, {}) | costs
        document = {
            "torch": torch.__version__,
            "pyarrow": pyarrow.__version__,
            "forgotten": FORGOTTEN,
            "rows": [{"rows": size, "costs": rows[size]} for size in sorted(rows)],
        }
        target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
