"""A CLIP text encoder that takes embeddings in the place of some words: what a search for prompts moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

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
