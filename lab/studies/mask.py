"""Compares the cost of selecting a mask with the usual procedure, on ResNet-18's 11.2 M weights.

    python -m lab.studies.mask

The usual procedure, restated here: join all scores, sort all of them twice (order, then rank), and make one int64 mask
of the whole model for each of ten densities. This library makes one packed mask for one density; the ten are shown as
well. Each variant runs in its own process to measure its peak memory. Prints a table and writes
lab/results/mask.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lab.studies.compared import report
from salun_core.models import build_classifier
from salun_core.saliency import SaliencyMask

DENSITIES = [tenth / 10 for tenth in range(1, 11)]


def scores() -> dict[str, torch.Tensor]:
    """Return random scores of ResNet-18's shapes."""
    torch.manual_seed(0)
    model = build_classifier("resnet18", 10)
    return {name: torch.rand(parameter.shape) for name, parameter in model.named_parameters()}


def usual(values: dict[str, torch.Tensor], densities: list[float], folder: Path) -> None:
    """Sort twice, make int64 masks, save each."""
    for density in densities:
        flat = torch.cat([score.flatten() for score in values.values()])
        ranks = torch.argsort(torch.argsort(flat, descending=True))
        kept, start, masks = int(len(flat) * density), 0, {}
        for name, score in values.items():
            part = ranks[start : start + score.numel()].reshape(score.shape)
            masks[name] = (part < kept).to(torch.int64)
            start += score.numel()
        torch.save(masks, folder / f"{density}.pt")


def ours(values: dict[str, torch.Tensor], densities: list[float], folder: Path) -> None:
    """Select radix-wise, pack to bits, save each."""
    for density in densities:
        SaliencyMask.from_scores(values, density).save(folder / f"{density}.safetensors")


VARIANTS = {
    "usual, ten densities": (usual, DENSITIES),
    "usual, one density": (usual, [0.5]),
    "ours, ten densities": (ours, DENSITIES),
    "ours, one density": (ours, [0.5]),
}


def child(variant: str) -> None:
    """Run one variant and print CPU seconds, added peak memory in MB and bytes per file."""
    torch.set_num_threads(1)
    function, densities = VARIANTS[variant]
    values = scores()
    before = resource.getrusage(resource.RUSAGE_SELF)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        function(values, densities, Path(folder))
        seconds = time.process_time() - started
        size = statistics.mean(file.stat().st_size for file in Path(folder).iterdir())
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu_s": seconds, "peak_mb": (after.ru_maxrss - before.ru_maxrss) / 1024, "file_bytes": size}))


def comparisons(rows: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Return the ratios and their targets: the usual procedure against the one mask that is used."""
    usual, one = rows["usual, ten densities"], rows["ours, one density"]
    return [
        {
            "what": "threshold and masks, CPU s (ten masks against the one that is used)",
            "usual": f"{usual['cpu_s']:.1f}",
            "ours": f"{one['cpu_s']:.2f}",
            "ratio": f"{usual['cpu_s'] / one['cpu_s']:.0f} x less",
            "target": "50 x less",
        },
        {
            "what": "added peak memory, MB",
            "usual": f"{usual['peak_mb']:.0f}",
            "ours": f"{one['peak_mb']:.0f}",
            "ratio": f"{one['peak_mb'] / usual['peak_mb']:.2f} x",
            "target": "at most 0.6 x",
        },
        {
            "what": "mask file, MB",
            "usual": f"{usual['file_bytes'] / 1e6:.1f}",
            "ours": f"{one['file_bytes'] / 1e6:.2f}",
            "ratio": f"{usual['file_bytes'] / one['file_bytes']:.1f} x smaller",
            "target": "64 x smaller",
        },
    ]


def main() -> None:
    """Measure every variant in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    rounds = 1 if arguments.quick else arguments.rounds
    for _ in range(rounds):
        for name, found in runs.items():
            command = [sys.executable, os.path.abspath(__file__), "--child", name]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    rows = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    print("| procedure | CPU, s | added peak memory, MB | mask file, MB |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['cpu_s']:.2f} | {row['peak_mb']:.0f} | {row['file_bytes'] / 1e6:.2f} |")
    report("mask", rows, comparisons(rows), threads=1, quick=arguments.quick, rounds=rounds)
    return None


if __name__ == "__main__":
    main()
