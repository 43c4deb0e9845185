"""Outputs of models that nobody trained: what a model saw has a larger margin, and each retraining its own noise."""

from __future__ import annotations

import numpy as np

from salun_core.audit.predictions import Audited, outputs_from

CLASSES = 5


class World:
    """Outputs of models on samples of different difficulty: what a model saw has a margin of its own."""

    def __init__(self, count=200, held_out=500, seed=0, whole=None):
        rng = np.random.default_rng(seed)
        self.count, self.whole = count, whole
        self.labels = rng.integers(0, CLASSES, count + held_out)
        if whole is not None:
            self.labels[:count] = whole
            self.labels[count : count + 50] = whole
        self.centre = rng.normal(0, 1, (len(self.labels), CLASSES))
        self.centre[np.arange(len(self.labels)), self.labels] += 2

    def logits(self, seed, saw=False):
        rng = np.random.default_rng((seed, 1))
        logits = self.centre + rng.normal(0, 0.7, self.centre.shape)
        if saw:
            logits[np.arange(self.count), self.labels[: self.count]] += 3
        elif self.whole is not None:
            logits[:, self.whole] = rng.normal(-6, 0.7, len(logits))
        return logits

    def outputs(self, logits):
        found = outputs_from(logits, self.labels, logits=True)
        rows = np.arange(len(self.labels))
        return {"forget": found.where(rows < self.count), "unseen": found.where(rows >= self.count)}

    def audited(self, after, references=0, **more):
        emptied = [] if self.whole is None else [self.whole]
        known = [self.outputs(self.logits(10 + number)) for number in range(references)]
        before = self.outputs(self.logits(0, saw=True))
        return Audited(before, self.outputs(after), known, emptied=emptied, **more)
