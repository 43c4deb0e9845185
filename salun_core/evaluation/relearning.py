"""Relearning: how fast does a model that was taught half of the forget set again remember the other half?"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from salun_core.data.images import ImageSet
from salun_core.evaluation.evidence import Metric, RelearnPoint
from salun_core.evaluation.outputs import outputs_of
from salun_core.evaluation.statistics import wilson_interval

LEARNING_RATE, MOMENTUM, BATCH = 0.003, 0.9, 64
_POINTS = 10


def halves(forget: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Part D_f at random into what is taught again and what is asked about; the first half is the smaller one."""
    order = torch.randperm(len(forget), generator=torch.Generator().manual_seed(seed))
    middle = len(forget) // 2
    return forget.select(order[:middle]), forget.select(order[middle:])


def relearn(model: nn.Module, taught: ImageSet, asked: ImageSet, steps: int, seed: int) -> list[RelearnPoint]:
    """Fine-tune a copy on some forgotten images and watch the accuracy on others.

    SGD at 0.003 with momentum 0.9, batches of 64 with true labels, no augmentation, batch-norm statistics frozen.

    Args:
        model: left as it is.
        taught: images with true labels, at least one.
        asked: images to measure on, at least one.
        steps: SGD steps.
        seed: of the order.

    Returns:
        Accuracy, as a ratio, before the first step, after the last, and at up to nine places between.
    """
    learner = copy.deepcopy(model).requires_grad_(True).eval()
    optimizer = torch.optim.SGD(learner.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(seed)
    points, done, every = [_point(learner, asked, 0)], 0, -(-steps // _POINTS)
    while done < steps:
        for images, labels in taught.batches(BATCH, generator):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(learner(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            if done % every == 0 or done == steps:
                points.append(_point(learner, asked, done))
            if done == steps:
                break
    return points


def _point(model: nn.Module, asked: ImageSet, step: int) -> RelearnPoint:
    return RelearnPoint(step=step, accuracy=float(outputs_of(model, asked).correct.mean()))


def relearn_metric(curves: Mapping[str, list[RelearnPoint]], n: int) -> Metric:
    """Return `relearn`: the accuracy at the end of each curve, with Wilson's interval.

    Args:
        curves: by model: before, after, perhaps reference; empty where D_f could not be halved.
        n: images asked about.
    """
    if not curves:
        return Metric(before=None, after=None, n=0)
    ends = {name: points[-1].accuracy for name, points in curves.items()}
    low, high = wilson_interval(ends["after"], n)
    return Metric(before=ends["before"], after=ends["after"], reference=ends.get("reference"), n=n, low=low, high=high)
