"""A real classifier of digits, and what unlearning it gives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from salun_core.data import DataSpec, ForgetSet, ImageSet, LoadedData, load_data
from salun_core.evaluation import Evidence, Splits, evaluate_classifier
from salun_core.evaluation.evidence import Forgotten, Measured
from salun_core.methods.classification import UnlearnConfig, unlearn
from salun_core.methods.classification.training import fresh_classifier, train_classifier
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask, saliency_scores
from tests.support.made_once import made_once

CLASS = 3


@dataclass(frozen=True)
class Lab:
    """Digits, a ResNet-8 that fits them, and the evidence that a candidate model gives."""

    data: LoadedData
    train: ImageSet
    test: ImageSet
    model: nn.Module

    def forget_set(self, kind: str) -> ForgetSet:
        split = self.data.split
        labels = {sample: self.data.table.labels[self.data.table.position[sample]] for sample in split.train}
        ids = [s for s in split.train if labels[s] == CLASS] if kind == "class" else sorted(split.train)[::10]
        return ForgetSet(
            dataset_digest=split.dataset_digest,
            split_digest=split.digest,
            ids=sorted(ids),
            kinds=[kind],
            classes=[CLASS] if kind == "class" else [],
        )

    def parts(self, kind: str) -> tuple[ImageSet, ImageSet]:
        forget, scale = self.forget_set(kind), self.train.normalisation
        return self.data.forget(forget, scale), self.data.retain(forget, scale)

    def mask(self, kind: str, density: float = 0.3) -> SaliencyMask:
        forget, _ = self.parts(kind)
        return SaliencyMask.from_scores(saliency_scores(self.model, forget.batches(256), cross_entropy), density)

    def unlearn(self, kind: str, method: str = "salun", **config: object) -> nn.Module:
        forget, retain = self.parts(kind)
        settings = {"epochs": 2, "device": "cpu", "batch_size": 32, "learning_rate": 0.003, **config}
        mask = self.mask(kind) if method == "salun" else None
        return unlearn(self.model, method, forget=forget, retain=retain, config=settings, mask=mask).model

    def evidence(self, kind: str, after: nn.Module, mask: SaliencyMask | None = None) -> Evidence:
        forget, retain = self.parts(kind)
        forget_set = self.forget_set(kind)
        return evaluate_classifier(
            self.model,
            after,
            Splits(forget, retain, self.test),
            Measured(
                before=model_digest(self.model),
                after=model_digest(after),
                dataset=self.data.split.dataset_digest,
                split=self.data.split.digest,
                forget_set=forget_set.digest,
                mask=mask.digest if mask else None,
            ),
            Forgotten(
                count=len(forget), train_count=len(self.train), kinds=forget_set.kinds, classes=forget_set.classes
            ),
            mask=mask,
        )


WEIGHTS = "model.pt"


def load_lab(factory: pytest.TempPathFactory) -> Lab:
    """Return the classifier that the tests of evaluation, gate and report share; one worker trains it for all."""
    torch.set_num_threads(1)
    data = load_data(DataSpec(source="digits", validation_fraction=0.0, test_fraction=0.3))
    train = data.images("train")
    test = data.images("test", train.normalisation)
    folder = made_once(factory, "lab", lambda folder: torch.save(trained(train).state_dict(), folder / WEIGHTS))
    network = fresh_classifier("resnet8", train, 10, seed=0).to(memory_format=torch.channels_last)
    network.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
    return Lab(data, train, test, network.eval())


def trained(train: ImageSet, seed: int = 0) -> nn.Module:
    """Return a ResNet-8 that fits these images."""
    config = UnlearnConfig(
        epochs=6, learning_rate=0.05, schedule="cosine", batch_size=32, batch_norm="update", device="cpu", seed=seed
    )
    return train_classifier("resnet8", train, 10, config)[0]
