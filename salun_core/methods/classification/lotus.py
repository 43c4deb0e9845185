"""LoTUS: train towards the original's own outputs, tempered on the forget set and sharpened on the retain set.

    min_θ  E_{x in D_f} CE(f_θ(x), s((f_θo(x) + g) / T))  +  E_{x in D_r} CE(f_θ(x), onehot(argmax(f_θo(x) + g)))
    T = exp(α (Acc(f_θ; D_f) - A)),    g ~ Gumbel(0, 1) for each image and class,    s the softmax,    θ_o frozen

α is `temper_strength`. A is the accuracy of θ_o on unseen images of the classes of D_f, 0 for a class of which nothing
is retained. So D_f becomes as uncertain as data that the model has not seen. T is measured before each epoch. If D_f is
recognised less often than unseen data by more than 0.01, the rest of the run changes nothing. Each epoch is one pass
over D_f and a fixed draw of D_r (`retain_share`), shuffled together.

Source: Spartalis et al., "LoTUS: Large-Scale Machine Unlearning with a Taste of Uncertainty", CVPR 2025. Deviations:
docs/research/deviations.md, row `lotus`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from salun_core.data.images import ImageSource
from salun_core.errors import UsageError
from salun_core.evaluation.outputs import correct_of
from salun_core.methods.classification.method import ClassifierContext, ClassifierMethod, batches_of, share_step, shares
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import Phase, Step

_BELOW = 0.01  # the authors' margin: a run that has forgotten more than this stops


class LotusConfig(UnlearnConfig):
    """Temperature, and the draw from D_r."""

    temper_strength: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="α, how fast the temperature grows with the accuracy on D_f",
    )
    retain_share: float = Field(default=0.3, gt=0, le=1, description="share of D_r that the epochs train on")


@dataclass(frozen=True, kw_only=True)
class LotusContext(ClassifierContext[LotusConfig]):
    """A context with what is computed once.

    Args:
        unseen: A.
        images: D_f with label 1, then the draw of D_r with label 0.
    """

    unseen: float
    images: ImageSource


def begin(context: ClassifierContext[LotusConfig]) -> ClassifierContext[LotusConfig]:
    """Measure A and draw from D_r; without held-out images that A needs, it raises a `UsageError`."""
    generator = torch.Generator().manual_seed(context.config.seed)
    drawn = context.retain.select(torch.randperm(len(context.retain), generator=generator)[: _draws(context)])
    tempered, sharpened = torch.ones_like(context.forget.labels), torch.zeros_like(drawn.labels)
    images = context.forget.relabelled(tempered).joined(drawn.relabelled(sharpened))
    return LotusContext(**vars(context), unseen=unseen_accuracy(context), images=images)


def _draws(context: ClassifierContext[LotusConfig]) -> int:
    return max(1, int(context.config.retain_share * len(context.retain)))


def unseen_accuracy(context: ClassifierContext[LotusConfig]) -> float:
    """Return A, averaged over the class histogram of D_f.

    A class without held-out images gets the accuracy over all of them. Without any held-out images D_f may only have
    complete classes; otherwise it raises a `UsageError`.
    """
    forgotten = context.forget.labels.cpu().numpy()
    partly = np.isin(forgotten, context.retain.labels.cpu().numpy())
    if not partly.any():
        return 0.0
    if context.held_out is None or not len(context.held_out):
        raise UsageError(
            "LoTUS needs held-out images",
            "it makes D_f as uncertain as data that the model was not trained on",
            "train with `validation_fraction: 0.1` in the data spec, in Python give held_out",
        )
    assert context.original is not None
    labels, correct = context.held_out.labels.cpu().numpy(), correct_of(context.original, context.held_out)
    known = {label: float(correct[labels == label].mean()) for label in np.unique(labels).tolist()}
    everything = float(correct.mean())
    return sum(known.get(label, everything) for label in forgotten[partly].tolist()) / len(forgotten)


def tempered_loss(
    context: ClassifierContext[LotusConfig], temperature: float, model: nn.Module, images: Tensor, drawn: Tensor
) -> Tensor:
    """Return the mean cross-entropy with the targets.

    `drawn` [B, 1 + K] has 1 for an image of D_f and 0 for one of D_r, then g; `temperature` is T.
    """
    assert context.original is not None
    forgotten, noise = drawn[:, :1].bool(), drawn[:, 1:]
    with torch.no_grad():
        noisy = context.original(images) + noise
        sharp = torch.nn.functional.one_hot(noisy.argmax(dim=1), noisy.shape[1]).to(noisy.dtype)
        targets = torch.where(forgotten, torch.softmax(noisy / temperature, dim=1), sharp)
    return -(targets * torch.log_softmax(model(images), dim=1)).sum(dim=1).mean()


def phases(context: ClassifierContext[LotusConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch over D_f and the draw of D_r; nothing if D_f is recognised less often than unseen data."""
    assert isinstance(context, LotusContext)
    assert context.model is not None
    config, images = context.config, context.images
    above = float(correct_of(context.model, context.forget).mean()) - context.unseen
    if above <= -_BELOW:
        return []
    temperature = float(np.exp(config.temper_strength * above))

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        for share in shares(images, config, generator, group):
            noise = -torch.empty(share.batch, context.num_classes).exponential_(generator=generator).log()
            mine = noise[group.part(share.batch)]
            drawn = torch.cat([share.labels[:, None].to(mine), mine], dim=1).to(share.images)
            yield share_step(partial(tempered_loss, context, temperature), replace(share, labels=drawn))

    return [Phase("mixed", images.labels.device, len(images), batches_of(images, config), draw)]


def passes(context: ClassifierContext[LotusConfig]) -> float:
    """Return the cost of all epochs in image passes; a run that stops costs less.

    The outputs of θ_o and the accuracies count a third.
    """
    held_out = len(context.held_out) if context.held_out is not None else 0
    forget, draws = len(context.forget), _draws(context)
    return held_out / 3 + context.config.epochs * (forget / 3 + (forget + draws) * 4 / 3)


METHOD = ClassifierMethod(
    phases,
    config_type=LotusConfig,
    about="trains towards θ_o's own outputs, tempered on D_f",
    source='Spartalis et al., "LoTUS", CVPR 2025',
    defaults={"epochs": 10, "learning_rate": 1e-4, "optimizer": "adamw", "batch_norm": "update"},
    needs_original=True,
    search={"temper_strength": (0.5, 16.0, True)},
    begin=begin,
    passes=passes,
    reads_held_out=True,
)
