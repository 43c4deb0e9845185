"""Compares the number of augmented training images per second with images that are opened one by one.

    python -m lab.studies.loading

The usual procedure, restated here: a data set makes a PIL image of each sample's pixels and applies torchvision's
RandomCrop(32, padding 4), RandomHorizontalFlip, ToTensor and Normalize; a DataLoader collects batches of 256, in this
process or in two workers. This library decodes all pixels once into one uint8 tensor, and crops, mirrors and scales
each batch as a whole. Both crop by the same rule, in a random order, to normalised float32; their random draws differ.

Random pixels of CIFAR-10's size. Wall-clock seconds of one epoch; the procedures alternate, and the table shows medians
after a warm-up. A worker's start counts as part of its epoch, as in training. Writes
lab/results/loading.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lab.studies.compared import report
from salun_core.data.decode import decode
from salun_core.data.images import ImageSet, Normalisation

BATCH, SIDE, TARGET_RATIO = 256, 32, 20
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class OneByOne(Dataset[tuple[Tensor, int]]):
    """The usual data set: uint8 pixels [N, 32, 32, 3], converted to PIL images on access."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIDE, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), 0


def epoch_seconds(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> float:
    """Go through all batches; return wall-clock seconds."""
    started, seen = time.perf_counter(), 0
    for images, labels in batches:
        assert images.shape[1:] == (3, SIDE, SIDE)
        assert images.dtype == torch.float32
        seen += len(labels)
    assert seen == count
    return time.perf_counter() - started


def measure(count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return seconds and images per second of each procedure."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    slow = OneByOne(pixels)
    started = time.perf_counter()
    stored = decode(list(pixels), [str(number) for number in range(count)], None, None)
    once = time.perf_counter() - started
    ours = ImageSet(stored, torch.zeros(count, dtype=torch.int64), Normalisation(MEAN, STD), "crop-flip")
    generator = torch.Generator().manual_seed(0)
    epochs: dict[str, Callable[[], Iterable[tuple[Tensor, Tensor]]]] = {
        "one by one": lambda: DataLoader(slow, BATCH, shuffle=True),
        "one by one, 2 workers": lambda: DataLoader(slow, BATCH, shuffle=True, num_workers=2),
        "ours": lambda: ours.batches(BATCH, generator, augment=True),
    }
    times: dict[str, list[float]] = {name: [] for name in epochs}
    for turn in range(rounds + 1):
        for name, epoch in epochs.items():
            seconds = [epoch_seconds(epoch(), count) for _ in range(5 if name == "ours" else 1)]
            if turn:
                times[name].append(statistics.median(seconds))
    rows = {name: {"seconds": statistics.median(found)} for name, found in times.items()}
    for row in rows.values():
        row["images_per_s"] = count / row["seconds"]
    rows["ours"]["decoded_once_s"] = once
    return rows


def comparisons(rows: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Return the ratios and their targets."""
    ours = rows["ours"]["images_per_s"]
    return [
        {
            "what": f"augmented images a second, against {name}",
            "usual": f"{rows[name]['images_per_s']:,.0f}",
            "ours": f"{ours:,.0f}",
            "ratio": f"{ours / rows[name]['images_per_s']:.0f} x as many",
            "target": f"{TARGET_RATIO} x as many",
        }
        for name in ("one by one", "one by one, 2 workers")
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="2,560 images, two rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count, rounds = (2560, 2) if arguments.quick else (10_000, arguments.rounds)
    rows = measure(count, rounds)
    print("| procedure | s an epoch | images a second |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['seconds']:.3f} | {row['images_per_s']:,.0f} |")
    print(f"\nDecoded once before: {rows['ours']['decoded_once_s']:.2f} s")
    report(
        "loading",
        rows,
        comparisons(rows),
        threads=arguments.threads,
        quick=arguments.quick,
        rounds=rounds,
        images=count,
        batch=BATCH,
    )


if __name__ == "__main__":
    main()
