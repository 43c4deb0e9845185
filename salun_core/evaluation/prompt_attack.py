"""Adversarial prompt search against an unlearned diffusion model, after UnlearnDiffAtk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, noised
from salun_core.errors import UsageError
from salun_core.models.diffusers_folder import Components

_PIPELINE = "StableDiffusionPipeline"


@dataclass(frozen=True)
class ClipWords:
    """Tokenizer and text encoder of a Stable Diffusion 1.x or 2.x.

    Args:
        tokenizer: CLIP's.
        encoder: `CLIPTextModel`, on its device.
    """

    tokenizer: Any
    encoder: Any

    @classmethod
    def of(cls, model: Components) -> ClipWords:
        """Take them from a loaded folder.

        Raises:
            UsageError: it is told by something else than one CLIP text encoder.
        """
        if model.pipeline != _PIPELINE:
            raise UsageError(
                "prompts of this model cannot be attacked", f"{model.pipeline} is not supported", "set attack_steps: 0"
            )
        return cls(model.parts["tokenizer"], model.parts["text_encoder"])

    @cached_property
    def words(self) -> Tensor:
        """Embeddings of the vocabulary, float32 [V, D]; special tokens are NaN."""
        table: Tensor = self._embedding.weight.detach().clone().float()
        table[list(self.tokenizer.all_special_ids)] = torch.nan
        return table

    @property
    def _embedding(self) -> Any:  # noqa: ANN401 - a module of transformers
        return self.encoder.get_input_embeddings()

    def encode(self, prompt: str, extra: Tensor) -> Mapping[str, Tensor]:
        """Return the conditions of a prompt with extra token embeddings before its words.

        Args:
            prompt: the words.
            extra: float32 [N, D]; gradients flow back to them.

        Returns:
            `encoder_hidden_states` [1, L, W].

        Raises:
            UsageError: the prompt and the extra tokens are longer than the encoder reads.
        """
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        length = self.tokenizer.model_max_length
        if len(ids) + len(extra) + 2 > length:
            raise UsageError("the attacked prompt is too long", f"the encoder reads {length} tokens", "shorten it")
        begin, end, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        whole = [begin, *[ids[0]] * len(extra), *ids, end]
        whole += [pad] * (length - len(whole))
        device = self._embedding.weight.device

        def put(module: Any, given: Any, found: Tensor) -> Tensor:  # noqa: ANN401
            return torch.cat([found[:, :1], extra[None].to(found.dtype), found[:, 1 + len(extra) :]], dim=1)

        handle = self._embedding.register_forward_hook(put)
        try:
            states = self.encoder(torch.tensor([whole], device=device))[0]
        finally:
            handle.remove()
        return {"encoder_hidden_states": states.float()}

    def spell(self, tokens: Tensor) -> str:
        """Return the words of tokens, int64 [N]."""
        return str(self.tokenizer.decode(tokens.tolist())).strip()


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
