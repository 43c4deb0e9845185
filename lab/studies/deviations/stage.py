"""One seed: its images, its original and retrained model, and its measurements, each in a file."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from salun_core.data import DataSpec, ImageSet, load_data
from salun_core.data.table import Table
from salun_core.evaluation.classifier import metric_shares
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.methods.classification import UnlearnConfig, method_config, unlearn
from salun_core.methods.classification.method import ClassifierContext, cross_entropy
from salun_core.methods.classification.training import fresh_classifier, train_classifier
from salun_core.saliency import SaliencyMask, saliency_scores

ARCHITECTURE, CLASSES = "resnet8", 10
POOL, TRAIN, TEST, FORGET = 5000, 4500, 2000, 450
RATE, DENSITY = 0.02, 0.5
BASE: dict[str, Any] = {
    "epochs": 30,
    "learning_rate": 0.1,
    "schedule": "cosine",
    "batch_size": 64,
    "batch_norm": "update",
    "augment": False,
}
SHARED: dict[str, Any] = {"epochs": 5, "batch_size": 128, "batch_norm": "update", "augment": False}
METRICS = ("UA", "RA", "TA", "MIA", "gap")
Cell = dict[str, float]


def by_content(images: ImageSet, table: Table) -> ImageSet:
    """Order images by the digest of their bytes, so that a draw by position does not depend on names or files."""
    digests = {sample: hashlib.sha256(bytes(table.payloads[table.position[sample]])).digest() for sample in images.ids}
    return images.select(sorted(range(len(images)), key=lambda index: (digests[images.ids[index]], images.ids[index])))


def images_of(folder: Path, side: int) -> tuple[ImageSet, ImageSet]:
    """Load the pool that splits are drawn from, and the test images, scaled to `side` pixels, from Parquet."""
    spec = DataSpec(
        source=str(folder / "train.parquet"),
        test_source=str(folder / "test.parquet"),
        train_limit=POOL,
        test_limit=TEST,
        validation_fraction=0.0,
        size=side,
    )
    data = load_data(spec)
    pool = by_content(data.image_set("train"), data.table)
    return pool, data.image_set("test", pool.normalisation)


class Stage:
    """One seed, ready to measure: nine tenths of the pool are the training split, a tenth of these is D_f.

    `folder` keeps models and measurements; what is there is not made again.
    """

    def __init__(self, pool: ImageSet, test: ImageSet, seed: int, folder: Path) -> None:
        self.test, self.seed, self.folder = test, seed, folder / f"seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        order, other = (torch.from_numpy(generator.permutation(len(pool))) for _ in range(2))
        self.forget, self.retain = pool.select(order[:FORGET]), pool.select(order[FORGET:TRAIN])
        self.never_seen = float(torch.isin(order[:FORGET], other[TRAIN:]).float().mean())
        self.base = self._model("base", lambda: self._trained(self.forget.joined(self.retain)))
        self.elsewhere = self._model("elsewhere", lambda: self._trained(pool.select(other[:TRAIN])))
        self.reference = self._model("reference", self._retrained)
        self.expected = self.kept("reference-metrics", lambda: self._shares(self.reference))
        self.mask = self.mask_of(self.base)

    def _trained(self, images: ImageSet) -> nn.Module:
        return train_classifier(ARCHITECTURE, images, CLASSES, UnlearnConfig(**BASE, seed=self.seed))[0]

    def _retrained(self) -> nn.Module:
        config = {**BASE, "seed": self.seed}
        return unlearn(
            self.base, "retrain", forget=self.forget, retain=self.retain, config=config, fresh=self._fresh
        ).model

    def _fresh(self, seed: int) -> nn.Module:
        return fresh_classifier(ARCHITECTURE, self.forget, CLASSES, seed)

    def _model(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            save_file({key: value.contiguous() for key, value in make().state_dict().items()}, path)
            print(f"seed {self.seed}: {name} trained", flush=True)
        model = self._fresh()
        model.load_state_dict(load_file(path))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.eval()

    def mask_of(self, model: nn.Module, density: float = DENSITY) -> SaliencyMask:
        """Return the saliency mask of a model, as this repository computes it."""
        return SaliencyMask.from_scores(saliency_scores(model, self.forget.batches(64), cross_entropy), density)

    def kept(self, name: str, make: Callable[[], Mapping[str, float]]) -> Cell:
        """Return a measurement by name, from its file if it exists."""
        path = self.folder / f"{name.replace(' ', '_')}.json"
        if not path.exists():
            path.write_text(json.dumps(dict(make())))
            print(f"seed {self.seed}: {name} {json.loads(path.read_text())}", flush=True)
        return dict(json.loads(path.read_text()))

    def cell(self, name: str, make: Callable[[], nn.Module]) -> Cell:
        """Return UA, RA, TA, MIA and gap of a model, as ratios; it is trained unless they exist."""
        return self.kept(name, lambda: self.measure(make()))

    def config(self, method: str = "random_label", **settings: Any) -> UnlearnConfig:  # noqa: ANN401
        """Return a method's configuration: the shared settings, then the given ones."""
        return method_config(method, {**SHARED, "learning_rate": RATE, "seed": self.seed, **settings})

    def context(self, method: str = "random_label", **settings: Any) -> ClassifierContext:  # noqa: ANN401
        """Return the context that a method's phases are built from."""
        config = self.config(method, **settings)
        return ClassifierContext(self.forget, self.retain, CLASSES, config)

    def unlearnt(
        self,
        method: str,
        model: nn.Module | None = None,
        mask: SaliencyMask | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> nn.Module:
        """Unlearn as this repository does; SalUn uses this seed's mask unless another is given."""
        chosen = mask or (self.mask if method == "salun" else None)
        config = self.config(method, **settings)
        started = self.base if model is None else model
        return unlearn(started, method, forget=self.forget, retain=self.retain, config=config, mask=chosen).model

    def ours(self, method: str = "salun", **settings: Any) -> Cell:  # noqa: ANN401
        """Return the cell of a method as it is in this repository."""
        name = " ".join([method, *(f"{key}={value}" for key, value in settings.items())])
        return self.cell(name, lambda: self.unlearnt(method, **settings))

    def outputs(self, model: nn.Module) -> dict[str, Outputs]:
        """Return the outputs of a model on forget, retain and test images."""
        splits = {"forget": self.forget, "retain": self.retain, "test": self.test}
        return {name: outputs_of(model, images) for name, images in splits.items()}

    def measure(self, model: nn.Module) -> Cell:
        """Return UA, RA, TA, MIA, and their mean distance to the retrained model's."""
        row = self._shares(model)
        return row | {"gap": statistics.mean(abs(row[name] - self.expected[name]) for name in METRICS[:4])}

    def _shares(self, model: nn.Module) -> Cell:
        shares = metric_shares(self.outputs(model))
        return {name: float(shares[name].mean()) for name in METRICS[:4]}
