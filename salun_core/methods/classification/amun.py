"""AMUN: fine-tune on all images and on the nearest adversarial example of each forget image, with its wrong label.

    D_A = {(x', argmax_k f_θo(x')_k)},    x' the first point of an attack on (x, y) in D_f that θ_o misclassifies
    min_θ  E_{D_r ∪ D_f ∪ D_A} CE(f_θ(x), y),    D_r and D_f with their true labels

    attack    x' <- P_ε(x' + ε/10 g / ||g||_2),    g = ∇_x' CE(f_θo(x'), y),    from x' = x, for `adversarial_steps`;
              then ε is doubled, from `adversarial_radius`. P_ε projects on the ball of ε around x and on pixels 0 to 1

D_A lies on the original's own decision boundary. So the model becomes unsure of D_f without a label that contradicts
what it knows. A class of which nothing is retained has to be forgotten as a whole: its images are not trained under
their true label. ε is in pixel values from 0 to 1, before normalisation. Images without a known normalisation are moved
as they are, without bounds.

Source: Ebrahimpour-Boroojeny et al., "Not All Wrong is Bad: Using Adversarial Examples for Unlearning", ICML 2025
(arXiv 2503.00917). Deviations: docs/research/deviations.md, rows `amun`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from salun_core.data.images import ImageSet, ImageSource, Normalisation
from salun_core.device_memory import fitting
from salun_core.methods.classification.method import (
    ClassifierContext,
    ClassifierMethod,
    classification_loss,
    share_step,
)
from salun_core.methods.config import DrawingConfig
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import Phase, Step

_STEP = 0.1  # share of ε that a step of the attack moves
_DOUBLINGS = 16  # from 0.04 to 1,300: no two images of 224 pixels are as far apart


class AmunConfig(DrawingConfig):
    """Settings of the attack."""

    adversarial_radius: float = Field(
        default=0.04, gt=0, allow_inf_nan=False, description="first ε of the attack, where pixels go from 0 to 1"
    )
    adversarial_steps: int = Field(default=50, ge=1, description="steps of the attack before its radius is doubled")


@dataclass(frozen=True, kw_only=True)
class AmunContext(ClassifierContext[AmunConfig]):
    """A context with what is computed once.

    Args:
        adversarial: D_A, normalised float32 images with their wrong labels.
        partly: the images of D_f whose class is retained in part, with true labels.
        attack_passes: cost of D_A in image passes.
    """

    adversarial: ImageSource
    partly: ImageSource
    attack_passes: float


@dataclass
class _Found:
    """The result of an attack: normalised images, what θ_o takes them for, and the cost in image passes."""

    images: Tensor
    labels: Tensor
    passes: float = 0.0


def adversarial_examples(
    original: nn.Module,
    images: Tensor,
    labels: Tensor,
    radius: float,
    steps: int,
    normalisation: Normalisation | None,
) -> _Found:
    """Return the nearest images that θ_o (in eval mode, frozen) misclassifies; `images` are normalised [B, C, H, W].

    An image that is not misclassified at any radius gets the most probable wrong label. `radius` is the first ε, and
    `steps` are those of the attack at each ε.
    """
    mean, std = (
        images.new_tensor(values).view(1, -1, 1, 1)
        for values in ((normalisation.mean, normalisation.std) if normalisation else ((0.0,), (1.0,)))
    )
    start = images * std + mean
    moved, found = start.clone(), _Found(images.clone(), labels.clone())
    active = torch.arange(len(labels), device=labels.device)
    for round_ in range(_DOUBLINGS):
        reach = radius * 2**round_
        for _ in range(steps):
            inputs = ((moved[active] - mean) / std).requires_grad_(True)
            with torch.enable_grad():
                logits = original(inputs)
            right = logits.argmax(dim=1) == labels[active]
            found.images[active[~right]] = inputs.detach()[~right]
            found.labels[active[~right]] = logits.detach().argmax(dim=1)[~right]
            if not right.any():
                found.passes += len(active) / 3
                return found
            found.passes += len(active)
            # The log-odds have the gradient's direction, but no saturation: a float32 loss of 0 has no direction.
            others = logits.scatter(1, labels[active][:, None], -torch.inf).logsumexp(dim=1)
            odds = (others - logits.gather(1, labels[active][:, None])[:, 0])[right].sum()
            (slope,) = torch.autograd.grad(odds, inputs)
            active, slope = active[right], slope[right] / std
            change = moved[active] + reach * _STEP * _unit(slope) - start[active]
            change = change * (reach / _norm(change)).clamp_max(1.0)
            moved[active] = start[active] + change
            if normalisation:
                moved[active] = moved[active].clamp(0.0, 1.0)
    with torch.no_grad():
        found.images[active] = (moved[active] - mean) / std
        wrong = original(found.images[active]).scatter(1, labels[active][:, None], -torch.inf)
        found.labels[active] = wrong.argmax(dim=1)
        found.passes += len(active) / 3
    return found


def _norm(images: Tensor) -> Tensor:
    """L2 norm of each image, [B, 1, 1, 1]; never 0."""
    norms: Tensor = images.flatten(1).norm(dim=1).clamp_min(torch.finfo(images.dtype).tiny)
    return norms.view(-1, 1, 1, 1)


def _unit(images: Tensor) -> Tensor:
    return images / _norm(images)


def begin(context: ClassifierContext[AmunConfig]) -> ClassifierContext[AmunConfig]:
    """Attack θ_o on D_f; a resumed run repeats the attack, with the same result."""
    config, forget = context.config, context.forget
    assert context.original is not None
    original = context.original

    def attacked(size: int) -> list[_Found]:
        radius, steps = config.adversarial_radius, config.adversarial_steps
        batches = forget.batches(size)
        return [adversarial_examples(original, *batch, radius, steps, forget.normalisation) for batch in batches]

    found, _ = fitting(attacked, config.batch_size)
    images, labels = (torch.cat([getattr(item, name) for item in found]) for name in ("images", "labels"))
    partly = torch.isin(forget.labels, context.retain.labels).nonzero().flatten()
    return AmunContext(
        **vars(context),
        adversarial=ImageSet(images, labels),
        partly=forget.select(partly),
        attack_passes=sum(item.passes for item in found),
    )


def phases(context: ClassifierContext[AmunConfig], generator: torch.Generator) -> Sequence[Phase]:
    """Return one epoch: all images and D_A, shuffled together. Augmented, D_A would leave the decision boundary."""
    assert isinstance(context, AmunContext)
    config, adversarial = context.config, context.adversarial
    known = context.retain.joined(context.partly)
    total = len(known) + len(adversarial)

    def draw(generator: torch.Generator, group: ProcessGroup) -> Iterator[Step]:
        known.ready()  # each step selects a few of them
        for index in torch.split(torch.randperm(total, generator=generator), config.batch_size):
            plain, moved = index[index < len(known)], index[index >= len(known)] - len(known)
            batch = list(known.select(plain).batches(config.batch_size, generator, config.augment))
            batch += adversarial.select(moved).batches(config.batch_size)
            images, labels = (torch.cat(parts) for parts in zip(*batch, strict=True))
            yield share_step(classification_loss, group.share(images, labels))

    return [Phase("mixed", known.labels.device, total, -(-total // config.batch_size), draw)]


def passes(context: ClassifierContext[AmunConfig]) -> float:
    """Return the cost in image passes. Before the attack, its cost is taken as all steps at the first radius."""
    forget, retain, config = context.forget, context.retain, context.config
    partly = int(torch.isin(forget.labels, retain.labels).sum())
    attack = config.adversarial_steps * len(forget)
    attack_passes = context.attack_passes if isinstance(context, AmunContext) else attack
    return attack_passes + config.epochs * (context.retain_count + partly + len(forget))


METHOD = ClassifierMethod(
    phases,
    config_type=AmunConfig,
    about="trains on all images and the nearest adversarial examples of D_f",
    source='Ebrahimpour-Boroojeny et al., "Not All Wrong is Bad", ICML 2025',
    defaults={"learning_rate": 0.01, "batch_norm": "update"},
    needs_original=True,
    needs="D_f as float",
    begin=begin,
    passes=passes,
)
