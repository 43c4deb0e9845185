"""A search for words that bring a forgotten concept back, after UnlearnDiffAtk.

    min_δ  E_t ||ε - ε_θu(x_t | [δ, c])||²,    x_0 an image of the concept, δ some tokens in front of the prompt

The model is unlearned well if even the best δ makes no image of the concept. The search moves the embeddings of the
extra tokens by signed gradients and, after each step, puts the nearest words of the vocabulary in their place, so that
what it finds can be typed.

Source: Zhang et al., "To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe
Images ... For Now", ECCV 2024, equation (5). Theirs relaxes the words to weights over the vocabulary; ours projects
their embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, noised

_RATE = 0.3  # of the mean distance between two words, a step


class PromptEncoder(Protocol):
    """A text encoder that takes token embeddings in the place of words."""

    @property
    def words(self) -> Tensor:
        """Embeddings of the vocabulary, float32 [V, D]; special tokens are NaN, and are never chosen."""
        ...

    def encode(self, prompt: str, extra: Tensor) -> Mapping[str, Tensor]:
        """Return the conditions [1, ...] of a prompt with extra token embeddings [N, D] before its words."""
        ...

    def spell(self, tokens: Tensor) -> str:
        """Return the words of tokens, int64 [N]."""
        ...


@dataclass(frozen=True)
class Attack:
    """What a search found.

    Args:
        words: the extra tokens, spelled.
        conditions: of the attacked prompt, [1, ...].
        loss: denoising loss of the concept's images under it, by step.
    """

    words: str
    conditions: Mapping[str, Tensor]
    loss: list[float]


def search(
    denoiser: Denoiser,
    encoder: PromptEncoder,
    prompt: str,
    images: Examples,
    *,
    steps: int = 40,
    tokens: int = 3,
    batch_size: int = 16,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda step: None,
) -> Attack:
    """Look for tokens under which the unlearned model denoises images of the concept best.

    Args:
        denoiser: the unlearned model.
        encoder: of its prompts.
        prompt: of the concept.
        images: of the concept, as the model before made them or the data hold them.
        steps: of the search.
        tokens: how many extra tokens.
        batch_size: images and times a step.
        seed: of the start, times and noise.
        on_step: called after each step.

    Returns:
        The best of all tokens that were tried.
    """
    generator = torch.Generator().manual_seed(seed)
    words = encoder.words
    known = torch.isfinite(words).all(dim=1)
    choice = torch.multinomial(known.float().cpu(), tokens, replacement=True, generator=generator).to(words.device)
    step_size = _RATE * float(words[known].std(dim=0).norm())
    current, best, losses = words[choice].clone(), choice, []
    parameters = [(item, item.requires_grad) for item in denoiser.network.parameters()]
    denoiser.network.requires_grad_(False)
    try:
        lowest = float("inf")
        for step in range(steps):
            index = torch.randint(len(images), (batch_size,), generator=generator)
            moved = words[choice].clone().requires_grad_(True)
            batch = noised(images.select(index), denoiser.process, generator)
            told = {name: row.expand(batch_size, *row.shape[1:]) for name, row in encoder.encode(prompt, moved).items()}
            loss = mse_loss(denoiser.predict(batch.noisy, batch.times, told), batch.target)
            losses.append(float(loss.detach()))
            if losses[-1] < lowest:
                lowest, best = losses[-1], choice
            (gradient,) = torch.autograd.grad(loss, moved)
            current = current - step_size * torch.nn.functional.normalize(gradient, dim=1)
            choice = nearest(current, words, known)
            on_step(step)
    finally:
        for item, flag in parameters:
            item.requires_grad_(flag)
    with torch.no_grad():
        return Attack(encoder.spell(best), encoder.encode(prompt, words[best]), losses)


def nearest(points: Tensor, words: Tensor, known: Tensor) -> Tensor:
    """Return the vocabulary's nearest word to each point.

    Args:
        points: [N, D].
        words: [V, D].
        known: bool [V]: words that may be chosen.

    Returns:
        int64 [N].
    """
    distances = torch.cdist(points, torch.nan_to_num(words))
    return distances.masked_fill(~known, float("inf")).argmin(dim=1)
