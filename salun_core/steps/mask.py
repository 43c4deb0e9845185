"""Step 2: score the weights on the forget set and write the mask."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from salun_core.methods.classification import METHODS, pick_device
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.method import get_method
from salun_core.saliency import SaliencyMask
from salun_core.steps.observe import RunRef
from salun_core.steps.sharding import distributed, forget_scores, require_same_inputs
from salun_core.tasks import open_inputs
from salun_core.tasks.classification.inputs import Inputs


def compute_mask(
    model: Path,
    forget_manifest_uri: str,
    density: float,
    out: Path,
    *,
    method: str = "salun",
    overrides: Mapping[str, Any] | None = None,
    model_line: str = "local",
    data: str | None = None,
    device: str = "auto",
    random_seed: int | None = None,
    run: RunRef | None = None,
) -> SaliencyMask:
    """Compute the saliency mask of a model for a forget set.

    A method that takes no mask gets one in which every weight is salient. Where torchrun has started several
    processes, each scores its share, and the first one writes the same mask as one process alone.

    Args:
        model: folder of the original model.
        forget_manifest_uri: address of the forget targets.
        density: share of weights to keep salient, in (0, 1].
        out: file to write.
        method: the unlearning method that will use it.
        overrides: what differs from the method's default configuration; a diffusion model's says which part is
            scored, and how.
        model_line: for the metrics.
        data: data set spec, where the data lie elsewhere than the model card says.
        device: auto, cpu, cuda or cuda:N.
        random_seed: draw a random mask of the same density in place of saliency: the control.
        run: the run of the deletion ledger that it belongs to.

    Returns:
        The mask.
    """
    with distributed("compute_mask", model_line, run) as (metrics, group):
        started = time.perf_counter()
        inputs = open_inputs(model, forget_manifest_uri, data)
        require_same_inputs(inputs, group)
        facts = {"model_digest": inputs.original.digest, "forget_set_digest": inputs.forget_set.digest}
        chosen = pick_device(device)
        if isinstance(inputs, Inputs):
            mask = _classifier_mask(inputs, method, density, chosen, random_seed, group)
        else:
            from salun_core.methods.diffusion import diffusion_config
            from salun_core.tasks.diffusion.unlearning import generation_mask

            config = diffusion_config(method, overrides)
            mask = generation_mask(inputs, method, config, density, chosen, random_seed)
        mask = mask.with_facts({**facts, "seconds": f"{time.perf_counter() - started:.3f}"})
        if group.main:
            mask.save(out)
        metrics.record("salun_mask_density_ratio", mask.density, method=method)
        return mask


def was_scored(mask: SaliencyMask) -> bool:
    """Say whether a mask rests on scores, which cost a pass over the forget set; random and full masks do not."""
    return mask.facts.get("scores", "none") not in ("none", "random")


def _classifier_mask(
    inputs: Inputs, method: str, density: float, device: torch.device, random_seed: int | None, group: ProcessGroup
) -> SaliencyMask:
    network = inputs.original.model.to(device)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    if not get_method(METHODS, method).needs_mask:
        return SaliencyMask.full(shapes)
    if random_seed is not None:
        return SaliencyMask.random(shapes, density, random_seed)
    return SaliencyMask.from_scores(forget_scores(network, inputs.forget, device, group), density)
