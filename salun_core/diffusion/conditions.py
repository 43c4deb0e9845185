"""Conditions of a denoiser: class labels or prompt embeddings, computed once and looked up by row."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from salun_core.errors import DataError, UsageError, unknown_name
from salun_core.models.diffusers_folder import Components
from salun_core.telemetry.logs import get_logger

Conditions = Mapping[str, Tensor]


@dataclass(frozen=True)
class ConditionTable:
    """All conditions of a run, one per row.

    Args:
        names: class names or prompts of the rows; the null condition has an empty name.
        rows: tensors [K, ...] by argument name of the denoiser (`class_labels`, `encoder_hidden_states`, ...).
        null: row of the null condition, for classifier-free guidance; None if the model has none.
        tokens: by row, the positions of the concept's tokens in `encoder_hidden_states`. An empty row, or an empty
            `tokens`, means every position after the first.
    """

    names: Sequence[str]
    rows: Mapping[str, Tensor]
    null: int | None = None
    tokens: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if any(len(tensor) != len(self.names) for tensor in self.rows.values()) or not self.rows:
            raise DataError("conditions do not fit their names", "they differ in number", "encode the prompts again")
        known = [tensor for tensor in self.rows.values() if tensor.is_floating_point() and not tensor.is_meta]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in known):
            raise DataError("a condition is not finite", "an embedding holds NaN", "check the text encoder's weights")
        length = self.rows["encoder_hidden_states"].shape[1] if "encoder_hidden_states" in self.rows else 0
        in_range = all(0 <= place < length for row in self.tokens for place in row)
        if self.tokens and not (in_range and len(self.tokens) == len(self.names)):
            raise DataError("token positions do not fit the conditions", "", "encode the prompts again")

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: Tensor) -> Conditions:
        """Return the conditions of rows, int64 [B], as tensors [B, ...]."""
        return {name: tensor[index.to(tensor.device)] for name, tensor in self.rows.items()}

    def nulls(self, count: int) -> Conditions:
        """Return `count` copies of the null condition; `UsageError` if the model has none."""
        if self.null is None:
            raise UsageError(
                "the model has no null condition", "it was trained without label drop", "set guidance_scale: 1"
            )
        return self.take(torch.full((count,), self.null, dtype=torch.int64))

    def own_tokens(self) -> Tensor:
        """Mark the tokens of each row's concept: bool [K, L], on the CPU.

        `UsageError` if the conditions are not texts.
        """
        if "encoder_hidden_states" not in self.rows:
            raise UsageError("the conditions have no tokens", "they are not texts", "choose another method")
        length = self.rows["encoder_hidden_states"].shape[1]
        marks = torch.zeros(len(self), length, dtype=torch.bool)
        every = range(min(1, length - 1), length)
        for row in range(len(self)):
            marks[row, list(self.tokens[row] if self.tokens and self.tokens[row] else every)] = True
        return marks

    def row(self, name: str) -> int:
        """Return the row index of a name; an unknown one is a `UsageError`."""
        if name not in self.names:
            raise UsageError(f"there is no condition {name[:60]!r}", "it was not encoded", "add it to the target")
        return list(self.names).index(name)

    def to(self, device: torch.device | str) -> ConditionTable:
        """Return the table with its tensors on a device."""
        return replace(self, rows={name: rows.to(device) for name, rows in self.rows.items()})


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder with the tokens of a condition table's rows, for methods that train it.

    Args:
        network: `CLIPTextModel` in float32.
        tokens: int64 [K, L], by row of the table.
        words: bool [K, L]: tokens that are not special, such as the end and the padding.
    """

    network: nn.Module
    tokens: Tensor
    words: Tensor

    @classmethod
    def of(cls, model: Components, prompts: Sequence[str]) -> TextEncoder:
        """Copy the text encoder of a loaded Stable Diffusion 1.x or 2.x; the null condition is the empty prompt.

        A model that is not conditioned on a single CLIP text encoder is a `UsageError`.
        """
        check_single_clip(model.pipeline)
        tokenizer = model.parts["tokenizer"]
        length = tokenizer.model_max_length
        found = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        special = torch.tensor(tokenizer.all_special_ids)
        network = copy.deepcopy(model.parts["text_encoder"]).float()
        return cls(network, found.input_ids, ~torch.isin(found.input_ids, special))

    def to(self, device: torch.device | str) -> TextEncoder:
        """Return the encoder with its network, which is moved, and its tensors on a device."""
        return TextEncoder(self.network.to(device), self.tokens.to(device), self.words.to(device))

    def embeddings(self, rows: Tensor) -> Tensor:
        """Return the embeddings of the tokens of rows, int64 [B], as [B, L, D], without gradients."""
        with torch.no_grad():
            return _embedding(self.network)(self.tokens[rows])  # type: ignore[no-any-return]

    def encode(self, rows: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Encode rows, int64 [B], with gradients; see `encoded`."""
        return encoded(self.network, self.tokens[rows], embeddings)

    @property
    def spread(self) -> float:
        """Standard deviation of the elements of all tokens' embeddings."""
        return float(_embedding(self.network).weight.detach().std())

    def trained_parameters(self) -> list[str]:
        """Return the names of the parameters that training changes: the layers, not the embeddings of tokens."""
        return [name for name, _ in self.network.named_parameters() if "embeddings." not in name]


@dataclass(frozen=True)
class EncodedTable(ConditionTable):
    """A table whose texts an encoder in training encodes each time they are taken; `rows` has the original ones."""

    encoder: TextEncoder = field(kw_only=True)

    def take(self, index: Tensor) -> Conditions:
        """Return the conditions of rows, int64 [B], with gradients; each row is encoded once."""
        rows, place = torch.unique(index.to(self.encoder.tokens.device), return_inverse=True)
        return {"encoder_hidden_states": self.encoder.encode(rows)[place]}


def encoded(network: nn.Module, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
    """Encode tokens, int64 [B, L], as the pipeline of Stable Diffusion does: float32 [B, L, W].

    `embeddings` [B, L, D] replace the tokens' own; gradients flow back to them.
    """
    if embeddings is None:
        return network(tokens)[0].float()  # type: ignore[no-any-return]
    handle = _embedding(network).register_forward_hook(lambda _module, _args, output: embeddings.to(output.dtype))
    try:
        return network(tokens)[0].float()  # type: ignore[no-any-return]
    finally:
        handle.remove()


def _embedding(network: Any) -> Any:  # noqa: ANN401 - modules of transformers
    return network.get_input_embeddings()


def check_single_clip(pipeline: str) -> None:
    """Raise `UsageError` unless a pipeline has a single CLIP text encoder, so that a method can train it."""
    if pipeline != SINGLE_CLIP:
        raise UsageError(
            "the text encoder of this model cannot be trained",
            f"{pipeline} is not supported, only {SINGLE_CLIP}",
            "leave out --trainable-text-encoder, and selection: text",
        )


Rows = Mapping[str, Tensor]
Encode = Callable[[Any, list[str], bool], Rows]
"""(pipeline, prompts, whether they are the null condition) -> tensors [K, ...] by argument name of the denoiser."""

SINGLE_CLIP = "StableDiffusionPipeline"
"""The pipeline of Stable Diffusion 1.x and 2.x, whose only condition is the output of one CLIP text encoder."""

_BATCH = 32  # prompts per forward pass of the text encoders


def _stable_diffusion(pipeline: Any, prompts: list[str], null: bool) -> Rows:  # noqa: ANN401 - diffusers' pipelines
    found, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, False)
    return {"encoder_hidden_states": found}


def _stable_diffusion_xl(pipeline: Any, prompts: list[str], null: bool) -> Rows:  # noqa: ANN401
    """Encode prompts; settings of the pipeline may make the null condition zero (Podell et al., "SDXL", 2023)."""
    every = pipeline.encode_prompt(prompts, device=pipeline.device, do_classifier_free_guidance=null)
    states, pooled = (every[1], every[3]) if null else (every[0], every[2])
    return {"encoder_hidden_states": states, "text_embeds": pooled}


def _stable_diffusion_3(pipeline: Any, prompts: list[str], null: bool) -> Rows:  # noqa: ANN401
    states, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, device=pipeline.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _pixart(pipeline: Any, prompts: list[str], null: bool) -> Rows:  # noqa: ANN401
    states, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=pipeline.device)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


ENCODERS: dict[str, Encode] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
}
_OPTIONAL = ("text_encoder_3", "tokenizer_3", "safety_checker", "feature_extractor", "image_encoder")


def encode_prompts(model: Components, prompts: Sequence[str], height: int, width: int) -> ConditionTable:
    """Encode prompts, each once, and the null condition: float32 on the CPU.

    Rows are in the order of first occurrence; the null condition comes last. The text encoders run on their current
    device. Height and width of the images, in pixels, are a condition of SDXL. An empty prompt is a `UsageError`, and
    an embedding that is not finite a `DataError`.
    """
    unique = check_prompts(prompts)
    if model.pipeline not in ENCODERS:
        raise unknown_name("text-to-image pipeline", model.pipeline, ENCODERS)
    for prompt in truncated_prompts(model, unique):
        get_logger().warning(
            "prompt is longer than the text encoder reads; its end is cut off",
            prompt=prompt[:60],
            tokens=model.parts["tokenizer"].model_max_length,
        )
    pipeline, encode = _pipeline(model), ENCODERS[model.pipeline]
    with torch.no_grad():
        parts = [encode(pipeline, unique[at : at + _BATCH], False) for at in range(0, len(unique), _BATCH)]
        parts.append(encode(pipeline, [""], True))
    rows = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    if "text_embeds" in rows:
        sizes = torch.tensor([height, width, 0, 0, height, width])  # original size, crop, target size
        rows["time_ids"] = sizes.to(rows["text_embeds"].dtype).expand(len(unique) + 1, -1).contiguous()
    rows = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in rows.items()}
    return ConditionTable([*unique, ""], rows, len(unique))


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return prompts without repeats; `UsageError` if one is empty or there is none."""
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty", "it does not describe an image", "write what the image shows")
    return list(dict.fromkeys(prompts))


def truncated_prompts(model: Components, prompts: Sequence[str]) -> list[str]:
    """Return the prompts that exceed the length limit of the first tokenizer."""
    tokenizer = model.parts.get("tokenizer")
    if tokenizer is None:
        return []
    return [prompt for prompt in prompts if len(tokenizer(prompt).input_ids) > tokenizer.model_max_length]


def _pipeline(model: Components) -> Any:  # noqa: ANN401
    """Build a pipeline from the loaded parts, because each class encodes prompts in its own way."""
    import diffusers

    kind = getattr(diffusers, model.pipeline)
    given = {**model.parts, "scheduler": copy.deepcopy(model.parts["scheduler"])}  # pipelines change its settings
    wanted = inspect.signature(kind.__init__).parameters
    absent = {name: None for name in _OPTIONAL if name in wanted and name not in given}
    settings = {name: value for name, value in model.settings.items() if name in wanted}
    if "requires_safety_checker" in wanted:
        settings["requires_safety_checker"] = False
    return kind(**given, **absent, **settings)
