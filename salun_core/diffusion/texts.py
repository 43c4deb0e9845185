"""Prompts to embeddings: each prompt once, by the pipeline's own text encoders, and the empty one for guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from salun_core.diffusion.conditions import ConditionTable
from salun_core.errors import UsageError, unknown_name
from salun_core.models.diffusers_folder import Components
from salun_core.telemetry.logs import get_logger

Rows = Mapping[str, Tensor]
Encode = Callable[[Any, list[str], bool], Rows]
"""(pipeline, prompts, whether they are the null condition) -> tensors [K, ...] by argument name of the denoiser."""

_BATCH = 32


def _stable_diffusion(pipeline: Any, prompts: list[str], null: bool) -> Rows:  # noqa: ANN401 - diffusers' pipelines
    found, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, False)
    return {"encoder_hidden_states": found}


def _stable_diffusion_xl(pipeline: Any, prompts: list[str], null: bool) -> Rows:  # noqa: ANN401
    """The null condition may be all zeros, as the pipeline's settings say (Podell et al., "SDXL", 2023)."""
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
    """Encode prompts, each once however often it occurs, and the null condition after them.

    Args:
        model: its parts; its text encoders are asked on the device where they are.
        prompts: as one would ask for an image.
        height: of the images in pixels; SDXL is told.
        width: the same.

    Returns:
        The table, float32 on the CPU, in the order in which the prompts first occur; the null condition comes last.

    Raises:
        UsageError: a prompt is empty, or there are none.
        DataError: an embedding is not finite.
    """
    unique = check_prompts(prompts)
    if model.pipeline not in ENCODERS:
        raise unknown_name("pipeline told by text", model.pipeline, ENCODERS)
    _warn_of_cut(model, unique)
    pipeline, encode = _pipeline(model), ENCODERS[model.pipeline]
    with torch.no_grad():
        parts = [encode(pipeline, unique[at : at + _BATCH], False) for at in range(0, len(unique), _BATCH)]
        parts.append(encode(pipeline, [""], True))
    rows = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
    if "text_embeds" in rows:
        sizes = torch.tensor([height, width, 0, 0, height, width])
        rows["time_ids"] = sizes.to(rows["text_embeds"].dtype).expand(len(unique) + 1, -1).contiguous()
    rows = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in rows.items()}
    return ConditionTable([*unique, ""], rows, len(unique))


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return prompts without repeats.

    Raises:
        UsageError: one is empty, or there are none.
    """
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty", "it says nothing that could be drawn", "write what the image shows")
    return list(dict.fromkeys(prompts))


def cut_prompts(model: Components, prompts: Sequence[str]) -> list[str]:
    """Return the prompts of which the first tokenizer reads the beginning only."""
    tokenizer = model.parts.get("tokenizer")
    if tokenizer is None:
        return []
    return [prompt for prompt in prompts if len(tokenizer(prompt).input_ids) > tokenizer.model_max_length]


def _warn_of_cut(model: Components, prompts: list[str]) -> None:
    for prompt in cut_prompts(model, prompts):
        get_logger().warning(
            "prompt is longer than the text encoder reads; its end is cut off",
            prompt=prompt[:60],
            tokens=model.parts["tokenizer"].model_max_length,
        )


def _pipeline(model: Components) -> Any:  # noqa: ANN401
    """Build the pipeline around the parts that are there, for its way of encoding prompts."""
    import copy
    import inspect

    import diffusers

    kind = getattr(diffusers, model.pipeline)
    given = {**model.parts, "scheduler": copy.deepcopy(model.parts["scheduler"])}  # pipelines correct its settings
    wanted = inspect.signature(kind.__init__).parameters
    absent = {name: None for name in _OPTIONAL if name in wanted and name not in given}
    settings = {name: value for name, value in model.settings.items() if name in wanted}
    if "requires_safety_checker" in wanted:
        settings["requires_safety_checker"] = False
    return kind(**given, **absent, **settings)
