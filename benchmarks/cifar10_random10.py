"""Forgets a random 10 % of a CIFAR-10 subset with every method, each at its best of an equal grid, over seeds.

    python benchmarks/cifar10_random10.py --data ../shared/data/cifar10

Prints the table (Markdown) and writes it with all cells to benchmarks/results/cifar10-random10.json. A cell that was
measured before is not measured again: a killed run goes on where it stopped (cells lie under benchmarks/out/).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from salun_core.data import DataSpec, ImageSet, load_data
from salun_core.data.table import Table
from salun_core.evaluation.classifier import metric_shares
from salun_core.evaluation.membership import attack_roc
from salun_core.evaluation.outputs import outputs_of
from salun_core.saliency import SaliencyMask, saliency_scores
from salun_core.unlearn import METHODS, UnlearnConfig, unlearn
from salun_core.unlearn.training import fresh_classifier, train_classifier

ARCHITECTURE, CLASSES = "resnet8", 10
TRAIN, TEST, FORGET = 4500, 2000, 450
BASE: dict[str, Any] = {
    "epochs": 30,
    "learning_rate": 0.1,
    "schedule": "cosine",
    "batch_size": 64,
    "batch_norm": "update",
    "augment": False,
}
SHARED: dict[str, Any] = {"epochs": 5, "batch_size": 128, "batch_norm": "update", "augment": False}
GRID = [{"learning_rate": rate} for rate in (0.005, 0.01, 0.02, 0.04)]  # the same for every method
MASKED = [{**settings, "density": 0.5} for settings in GRID]
GRIDS: dict[str, list[dict[str, Any]]] = {
    "FT": GRID,
    "GA": GRID,
    "RL": GRID,
    "SalUn": MASKED,
    "SalUn, random mask": MASKED,
}
NAMES = {
    "FT": "finetune",
    "GA": "gradient_ascent",
    "RL": "random_label",
    "SalUn": "salun",
    "SalUn, random mask": "salun",
}
METRICS = ("UA", "RA", "TA", "MIA")


class Bench:
    """One seed: its base model, its forget set, its retrained reference, its cells."""

    def __init__(self, train: ImageSet, test: ImageSet, seed: int, out: Path) -> None:
        self.test, self.seed, self.out = test, seed, out / f"seed{seed}"
        self.out.mkdir(parents=True, exist_ok=True)
        order = np.random.default_rng(seed).permutation(len(train))
        self.forget, self.retain = train.select(order[:FORGET]), train.select(order[FORGET:])
        self.base, self.base_seconds = self._trained("base", train)
        self.reference, self.reference_seconds = self._trained("retrain", self.retain)
        self.expected = self._metrics(self.reference)
        self.scores: dict[str, torch.Tensor] | None = None

    def _trained(self, name: str, images: ImageSet) -> tuple[nn.Module, float]:
        path, facts = self.out / f"{name}.safetensors", self.out / f"{name}.json"
        if not facts.exists():
            started = time.perf_counter()
            config = UnlearnConfig(**BASE, seed=self.seed)
            model, history = train_classifier(
                ARCHITECTURE, images, CLASSES, config, on_epoch=_progress(f"seed {self.seed} {name}")
            )
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
            facts.write_text(json.dumps({"seconds": time.perf_counter() - started, "loss": history[-1].losses}))
        model = fresh_classifier(ARCHITECTURE, images, CLASSES, self.seed)
        model.load_state_dict(load_file(path))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.eval(), json.loads(facts.read_text())["seconds"]

    def mask(self, method: str, density: float) -> tuple[SaliencyMask, float]:
        """Return the mask of a cell and the seconds that the saliency pass took."""
        started = time.perf_counter()
        if self.scores is None:
            self.scores = saliency_scores(self.base, self.forget.batches(64), torch.nn.functional.cross_entropy)
        mask = SaliencyMask.from_scores(self.scores, density)
        if method != "SalUn":
            mask = SaliencyMask.random(self.scores, density, self.seed)
        return mask, time.perf_counter() - started

    def cell(self, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics of one method at one configuration, measured or read."""
        label = "-".join(f"{value}" for value in settings.values())
        path = self.out / f"{method.replace(' ', '_').replace(',', '')}-{label}.json"
        if path.exists():
            return dict(json.loads(path.read_text()))
        overrides = {key: value for key, value in settings.items() if key != "density"} | SHARED | {"seed": self.seed}
        mask, mask_seconds = self.mask(method, settings["density"]) if "density" in settings else (None, 0.0)
        result = unlearn(self.base, NAMES[method], forget=self.forget, retain=self.retain, config=overrides, mask=mask)
        row = self.measure(result.model) | {"seconds": result.seconds + mask_seconds, "settings": dict(settings)}
        path.write_text(json.dumps(row))
        print(f"seed {self.seed} {method} {label}: gap {100 * row['gap']:.2f}", flush=True)
        return row

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Return UA, RA, TA, MIA and the average gap to the retrained model, as ratios."""
        row = self._metrics(model)
        row["gap"] = statistics.mean(abs(row[name] - self.expected[name]) for name in METRICS)
        return row

    def _metrics(self, model: nn.Module) -> dict[str, Any]:
        splits = {"forget": self.forget, "retain": self.retain, "test": self.test}
        outputs = {name: outputs_of(model, images) for name, images in splits.items()}
        shares = metric_shares(outputs)
        roc = attack_roc(outputs["forget"], outputs["test"])
        return {name: float(shares[name].mean()) for name in METRICS} | {"attack_auc": roc.auc if roc else None}


def by_content(images: ImageSet, table: Table) -> ImageSet:
    """Order images by the digest of their bytes, so that a draw by position does not hang on names or files."""
    digests = {sample: hashlib.sha256(bytes(table.payloads[table.position[sample]])).digest() for sample in images.ids}
    return images.select(sorted(range(len(images)), key=lambda index: (digests[images.ids[index]], images.ids[index])))


def _progress(name: str) -> Any:  # noqa: ANN401 - a callback
    return lambda record: print(f"{name} epoch {record.epoch}: {record.losses}", flush=True)


def best_of(cells: Mapping[str, list[dict[str, Any]]]) -> tuple[str, list[dict[str, Any]]]:
    """Pick the configuration whose mean gap over the seeds is smallest."""
    return min(cells.items(), key=lambda item: statistics.mean(cell["gap"] for cell in item[1]))


def rows_of(benches: list[Bench]) -> Iterator[dict[str, Any]]:
    """Yield one row a method: the values of each seed at its best configuration."""
    yield _row("original", "-", [bench.measure(bench.base) | {"seconds": 0.0} for bench in benches])
    reference = [bench.measure(bench.reference) | {"seconds": bench.reference_seconds} for bench in benches]
    yield _row("Retrain", "as the base", reference)
    for method, grid in GRIDS.items():
        cells = {json.dumps(settings): [bench.cell(method, settings) for bench in benches] for settings in grid}
        settings, best = best_of(cells)
        yield _row(method, ", ".join(f"{key} {value}" for key, value in json.loads(settings).items()), best)


def _row(method: str, settings: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    values = {name: [cell[name] for cell in cells] for name in (*METRICS, "gap", "attack_auc", "seconds")}
    return {"method": method, "settings": settings, "values": values}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Render the table: mean ± standard deviation over the seeds, in percent."""
    names = ["method", "best of its grid", *METRICS, "average gap", "seconds"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        shown = [_cell(row["values"][name], 100) for name in (*METRICS, "gap")]
        seconds = f"{statistics.mean(row['values']['seconds']):.0f}"
        lines.append("| " + " | ".join([row["method"], row["settings"], *shown, seconds]) + " |")
    return "\n".join(lines)


def _cell(values: list[float], scale: float) -> str:
    spread = statistics.stdev(values) * scale if len(values) > 1 else 0.0
    return f"{statistics.mean(values) * scale:.2f} ± {spread:.2f}"


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.parquet and test.parquet of CIFAR-10"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/cifar10-random10"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    spec = DataSpec(
        source=str(arguments.data / "train.parquet"),
        test_source=str(arguments.data / "test.parquet"),
        train_limit=TRAIN,
        test_limit=TEST,
        validation_fraction=0.0,
    )
    data = load_data(spec)
    train = by_content(data.images("train"), data.table)
    test = data.images("test", train.normalisation)
    benches = [Bench(train, test, seed, arguments.out) for seed in range(arguments.seeds)]
    rows = list(rows_of(benches))
    table = markdown(rows)
    print(table)
    document = {
        "suite": "cifar10-random10",
        "architecture": ARCHITECTURE,
        "train": len(train),
        "forget": FORGET,
        "test": len(test),
        "seeds": arguments.seeds,
        "split_digest": data.split.digest,
        "base": BASE,
        "shared": SHARED,
        "grids": GRIDS,
        "methods": {name: METHODS[method].needs_mask for name, method in NAMES.items()},
        "rows": rows,
        "table": table,
    }
    target = Path(__file__).parent / "results" / "cifar10-random10.json"
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
