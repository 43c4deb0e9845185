"""SFR-on: salient forgetting steps of weighted ascent, each followed by steps that repair the retain set.

    forget step    θ <- θ - lr m ⊙ ∇_θ[-α_t Σ_i c_i ℓ_i / Σ_i c_i],    c_i = ℓ_i^-λ held constant,    i in a D_f batch
    retain steps   θ <- θ - lr ∇_θ ℓ_r,    `forget_every` of them
    slow update    θ <- θ_s + β (θ - θ_s),    θ_s the weights before the round
    saliency       m = 1(F_f >= γ F_r),    F the diagonal of the Fisher matrix of D_f and of D_r at θ_o

Source: Huang et al., "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement", NeurIPS 2024
(adaptive coefficients, forget-remain balanced saliency, fast-slow updates). α_t falls as a cosine over the run. β is 1
by default, as in the authors' classification code: then there is no slow update.
Simplifications: an epoch is one pass over D_r, not a number of steps; the mask is of the original and is not renewed;
F sums the squares of whole batches' gradients, divided by the number of samples, which estimates the diagonal where
samples' gradients are independent and have mean 0; the gradient is clipped in every step. Only the forget gradient is
masked: retain steps, momentum and weight decay move every weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy as sample_losses

from salun_core.data.images import ImageSet
from salun_core.methods.classification.method import Method, Step, Task, augmented, cross_entropy, cycled, cycled_count
from salun_core.methods.config import LoopConfig
from salun_core.methods.distributed import ALONE, Share, World
from salun_core.saliency.scores import scoring

_LEAST = 1e-15


def fisher_diagonal(model: nn.Module, images: ImageSet, batch_size: int) -> dict[str, Tensor]:
    """Return the mean over images of squared gradients, by parameter name; batches stand in for single images.

    Args:
        model: in eval mode, every gradient asked for.
        images: D_f or D_r with true labels.
        batch_size: 1 gives the empirical Fisher diagonal itself.
    """
    squares = {name: torch.zeros_like(p, requires_grad=False) for name, p in model.named_parameters()}
    for inputs, labels in images.batches(batch_size):
        model.zero_grad(set_to_none=True)
        (cross_entropy(model(inputs), labels) * len(labels)).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name].addcmul_(parameter.grad, parameter.grad, value=1 / len(images))
    return squares


def begin(task: Task) -> Task:
    """Return the task with the saliency mask of the model before its first step."""
    assert task.model is not None
    with scoring(task.model):
        forget = fisher_diagonal(task.model, task.forget, task.config.batch_size)
        retain = fisher_diagonal(task.model, task.retain, task.config.batch_size)
    ratio = task.config.saliency_ratio
    return replace(task, salient={name: forget[name] + _LEAST >= ratio * (retain[name] + _LEAST) for name in forget})


def adaptive_ascent(logits: Tensor, labels: Tensor, power: float, world: World = ALONE) -> Tensor:
    """Negated mean of the losses, each weighted by its own value to the power -λ.

    Args:
        logits: [B, K].
        labels: int64 [B].
        power: λ.
        world: this process; where several share a batch, each gets its summand of the batch's mean.
    """
    losses = sample_losses(logits, labels, reduction="none")
    weights = 1 / (losses.detach() ** power + _LEAST)
    return -(weights / world.total(weights.sum()) * losses).sum()


@dataclass(frozen=True)
class Rounds:
    """Every retain image once, in random order, with a forget batch before every so many retain batches.

    Args:
        task: what to forget and to keep, with the saliency mask.
    """

    task: Task

    @property
    def name(self) -> str:
        """For the history: the loss of the retain steps."""
        return "retain"

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.task.retain.labels.device

    def __len__(self) -> int:
        return len(self.task.retain)

    def steps(self, batch_size: int) -> int:
        """Return the number of retain and forget batches."""
        retained = -(-len(self.task.retain) // batch_size)
        return retained - (-retained // self.task.config.forget_every)

    def draw(self, config: LoopConfig, generator: torch.Generator, world: World) -> Iterator[Step]:
        """Yield the steps of all rounds; the slow update runs when the optimiser has taken a round's last one."""
        settings, every = self.task.config, self.task.config.forget_every
        retained = self.task.retain.batches(config.batch_size, generator, augmented(config))
        forgotten = cycled(self.task.forget, config, generator)
        steps = self.steps(config.batch_size)
        for done in range(0, steps, every + 1):
            slow = self._weights() if settings.slow_rate < 1 else []
            progress = (self.task.epoch + done / steps) / settings.epochs
            yield self._forget_step(next(forgotten), progress, world)
            for images, labels in islice(retained, every):
                share = world.share(images, labels)
                yield Step(partial(_retain_loss, share.images, share.labels), share.count, share.weight)
            self._pull_back(slow, settings.slow_rate)

    def _forget_step(self, batch: tuple[Tensor, Tensor], progress: float, world: World) -> Step:
        strength = self.task.config.forget_strength * 0.5 * (1 + math.cos(math.pi * progress))
        return Step(partial(self._forget_loss, world.share(*batch), strength, world), 0, 1.0)

    def _forget_loss(self, share: Share, strength: float, world: World, model: nn.Module) -> Tensor:
        """Only salient weights get a gradient: the others are constants here."""
        weights = {
            name: torch.where(self.task.salient[name], parameter, parameter.detach())
            for name, parameter in model.named_parameters()
        }
        logits = functional_call(model, weights, (share.images,))[: share.count]
        return strength * adaptive_ascent(logits, share.labels[: share.count], self.task.config.adaptive_power, world)

    def _weights(self) -> list[Tensor]:
        assert self.task.model is not None
        return [parameter.detach().clone() for parameter in self.task.model.parameters()]

    @torch.no_grad()
    def _pull_back(self, slow: Sequence[Tensor], rate: float) -> None:
        assert self.task.model is not None
        if slow:
            for parameter, before in zip(self.task.model.parameters(), slow, strict=True):
                parameter.copy_(torch.lerp(before, parameter, rate))


def _retain_loss(images: Tensor, labels: Tensor, model: nn.Module) -> Tensor:
    return cross_entropy(model(images), labels)


def parts(task: Task, generator: torch.Generator) -> Sequence[Rounds]:
    """Return one epoch: D_r in rounds."""
    return [Rounds(task)]


def passes(task: Task) -> float:
    """Return images forward and backward: the mask over both sets, then D_r and its forget batches each epoch."""
    size = task.config.batch_size
    retained = -(-len(task.retain) // size)
    forgotten = cycled_count(len(task.forget), size, -(-retained // task.config.forget_every))
    return len(task.forget) + len(task.retain) + task.config.epochs * (len(task.retain) + forgotten)


METHOD = Method(
    parts,
    defaults={"schedule": "cosine", "gradient_clip": 7.0},
    reads=frozenset({"forget_every", "forget_strength", "adaptive_power", "saliency_ratio", "slow_rate"}),
    begin=begin,
    passes=passes,
)
