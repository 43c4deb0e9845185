"""Adversarial prompt search against an unlearned diffusion model, after UnlearnDiffAtk.

It searches for extra tokens in front of a prompt under which the unlearned model denoises images of the concept best.
Source: Zhang et al., "To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe
Images", ECCV 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from salun_core.diffusion.conditions import SINGLE_CLIP, encoded
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, Noised, noised
from salun_core.errors import UsageError
from salun_core.models.diffusers_folder import Components

_RATE = 0.3  # step size, as a fraction of the words' spread


@dataclass(frozen=True)
class ClipWords:
    """Tokenizer and text encoder of a Stable Diffusion 1.x or 2.x."""

    tokenizer: Any
    encoder: Any

    @classmethod
    def of(cls, model: Components) -> ClipWords:
        """Take them from a loaded folder; a model without a single CLIP text encoder is a `UsageError`."""
        if model.pipeline != SINGLE_CLIP:
            raise UsageError(
                "prompts of this model cannot be attacked", f"{model.pipeline} is not supported", "set attack_steps: 0"
            )
        return cls(model.parts["tokenizer"], model.parts["text_encoder"])

    @cached_property
    def words(self) -> Tensor:
        """Embeddings of the vocabulary, float32 [V, D]; special tokens are NaN, and are never chosen."""
        table: Tensor = self._embedding.weight.detach().clone().float()
        table[list(self.tokenizer.all_special_ids)] = torch.nan
        return table

    @property
    def _embedding(self) -> Any:  # noqa: ANN401 - a module of transformers
        return self.encoder.get_input_embeddings()

    def encode(self, prompt: str, extra: Tensor) -> Mapping[str, Tensor]:
        """Return `encoder_hidden_states` [1, L, W] of a prompt with extra token embeddings before its words.

        `extra` is float32 [N, D]; gradients flow back to it. A prompt that exceeds the encoder's length with them is a
        `UsageError`.
        """
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        length = self.tokenizer.model_max_length
        if len(ids) + len(extra) + 2 > length:
            raise UsageError("the attacked prompt is too long", f"the encoder reads {length} tokens", "shorten it")
        begin, end, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        whole = [begin, *[ids[0]] * len(extra), *ids, end]  # placeholders, whose embeddings are replaced below
        whole += [pad] * (length - len(whole))
        tokens = torch.tensor([whole], device=self._embedding.weight.device)
        own = self._embedding(tokens)
        embeddings = torch.cat([own[:, :1], extra[None].to(own.dtype), own[:, 1 + len(extra) :]], dim=1)
        return {"encoder_hidden_states": encoded(self.encoder, tokens, embeddings)}

    def spell(self, tokens: Tensor) -> str:
        """Return the words of tokens, int64 [N]."""
        return str(self.tokenizer.decode(tokens.tolist())).strip()


@dataclass(frozen=True)
class Attack:
    """Result of a search.

    Args:
        conditions: of the attacked prompt, [1, ...].
        tried: all candidates, spelled.
        loss: denoising loss of the concept's images under each candidate, on the same images, noise and times.
    """

    words: str
    conditions: Mapping[str, Tensor]
    tried: list[str]
    loss: list[float]


def search(
    denoiser: Denoiser,
    encoder: ClipWords,
    prompt: str,
    images: Examples,
    *,
    steps: int = 40,
    tokens: int = 3,
    batch_size: int = 16,
    seed: int = 0,
) -> Attack:
    """Search for tokens under which a model denoises images of the concept best.

    The best of all tokens that were tried is returned. Gradient descent on continuous embeddings. Each step takes the
    gradient at the nearest words, on images, noise and times of its own, and moves each token by a fixed length along
    its normalised gradient. All candidates are compared on one other batch of images, noise and times: on batches of
    their own, the easiest batch would win.
    """
    generator = torch.Generator().manual_seed(seed)
    words = encoder.words
    known = torch.isfinite(words).all(dim=1)
    choice = torch.multinomial(known.float().cpu(), tokens, replacement=True, generator=generator).to(words.device)
    step_size = _RATE * float(words[known].std(dim=0).norm())
    current, losses = words[choice].clone(), dict[tuple[int, ...], float]()
    parameters = [(item, item.requires_grad) for item in denoiser.network.parameters()]
    denoiser.network.requires_grad_(False)
    try:
        fixed = _batch(denoiser, images, batch_size, generator)
        for _ in range(steps):
            if (candidate := tuple(choice.tolist())) not in losses:
                with torch.no_grad():
                    losses[candidate] = float(_loss(denoiser, encoder.encode(prompt, words[choice]), fixed))
            extra = words[choice].clone().requires_grad_(True)
            batch = _batch(denoiser, images, batch_size, generator)
            (gradient,) = torch.autograd.grad(_loss(denoiser, encoder.encode(prompt, extra), batch), extra)
            current = current - step_size * normalize(gradient, dim=1)
            choice = nearest(current, words, known)
    finally:
        for item, flag in parameters:
            item.requires_grad_(flag)
    best = torch.tensor(min(losses, key=losses.__getitem__), device=words.device)
    tried = [encoder.spell(torch.tensor(candidate)) for candidate in losses]
    with torch.no_grad():
        return Attack(encoder.spell(best), encoder.encode(prompt, words[best]), tried, list(losses.values()))


def _batch(denoiser: Denoiser, images: Examples, size: int, generator: torch.Generator) -> Noised:
    index = torch.randint(len(images), (size,), generator=generator)
    return noised(images.select(index), denoiser.process, generator)


def _loss(denoiser: Denoiser, told: Mapping[str, Tensor], batch: Noised) -> Tensor:
    conditions = {name: row.expand(len(batch), *row.shape[1:]) for name, row in told.items()}
    return mse_loss(denoiser.predict(batch.noisy, batch.times, conditions), batch.target)


def nearest(points: Tensor, words: Tensor, known: Tensor) -> Tensor:
    """Return the vocabulary's nearest known word to each point, int64 [N]; `points` are [N, D] and `words` [V, D]."""
    distances = torch.cdist(points, torch.nan_to_num(words))
    return distances.masked_fill(~known, float("inf")).argmin(dim=1)
