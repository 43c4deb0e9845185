"""Mask and unlearning of a diffusion model."""

from __future__ import annotations

from pathlib import Path

import torch

from salun_core.evaluation.evidence import RunFacts
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.classification import pick_device
from salun_core.methods.diffusion import METHODS, unlearn_denoiser
from salun_core.methods.diffusion.config import DiffusionConfig
from salun_core.methods.diffusion.saliency import denoiser_mask, denoising_scores, random_denoiser_mask, selection_mask
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import OnEpoch
from salun_core.methods.method import UnlearnResult
from salun_core.models.diffusers_folder import save_diffusion
from salun_core.saliency import SaliencyMask
from salun_core.steps.run_facts import RUN, environment, facts_json
from salun_core.tasks import kept_split
from salun_core.tasks.diffusion.examples import build_example_sets
from salun_core.tasks.diffusion.inputs import DiffusionInputs


def generation_mask(
    inputs: DiffusionInputs,
    method: str,
    config: DiffusionConfig,
    density: float,
    device: torch.device,
    random_seed: int | None = None,
) -> SaliencyMask:
    """Compute the mask of a denoiser.

    Args:
        inputs: model, data, forget set.
        method: one that takes no mask gets one in which every selected weight is salient.
        config: passes, times, selection.
        density: share of the selected weights to keep salient, in (0, 1].
        device: to compute on.
        random_seed: draw a random mask of the same density: the control.

    Returns:
        The mask over all parameters.
    """
    denoiser = inputs.family(device).denoiser
    if not METHODS[method].needs_mask:
        return selection_mask(denoiser, config)
    if random_seed is not None:
        return random_denoiser_mask(denoiser, config, density, random_seed)
    sets = build_example_sets(inputs, config, device, retain=False)
    scores = denoising_scores(denoiser, sets, config)
    facts = {
        "scores": "denoising-gradient-magnitude",
        "selection": config.selection,
        "passes": str(config.saliency_passes),
        "times": config.saliency_times,
    }
    return denoiser_mask(denoiser, scores, density).with_facts(facts)


def run_generation(
    inputs: DiffusionInputs,
    method: str,
    config: DiffusionConfig,
    mask: SaliencyMask | None,
    checkpoint: CheckpointStore | None,
    on_epoch: OnEpoch | None,
    group: ProcessGroup,
) -> tuple[UnlearnResult, int]:
    """Run one method.

    Args:
        inputs: model, data, forget set.
        method: a name of the diffusion methods.
        config: of the method.
        mask: of this very denoiser; used by a method that needs one.
        checkpoint: keeps the state after each epoch.
        on_epoch: called after each epoch.
        group: this process.

    Returns:
        The result, and how many forget examples there were.
    """
    device = pick_device(config.device)
    sets = build_example_sets(inputs, config, device)
    used = mask if METHODS[method].needs_mask else None
    result = unlearn_denoiser(
        inputs.family(device).denoiser,
        sets,
        method,
        config=config,
        mask=used,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
        group=group,
    )
    return result, len(sets.forget)


def write_generation(
    out: Path,
    inputs: DiffusionInputs,
    result: UnlearnResult,
    mask: SaliencyMask | None,
    forget_count: int,
    processes: int,
) -> None:
    """Write the folder of the new model with the facts of its run; it appears whole or not at all."""
    split = kept_split(inputs)
    card = inputs.card.model_copy(
        update={
            "split_digest": split.digest,
            "parent": inputs.original.digest,
            "method": result.method,
            "forget_set_digest": inputs.forget_set.digest,
        }
    )
    used = mask if METHODS[result.method].needs_mask else None
    drawn = used is None or used.facts.get("scores") == "random"
    scored = 0 if drawn else getattr(result.config, "saliency_passes", 1) * forget_count
    facts = RunFacts(
        method=result.method,
        config=result.config.model_dump(),
        seed=result.config.seed,
        density=used.density if used else None,
        density_by_parameter=used.density_by_parameter() if used else {},
        seconds={"mask": float(used.facts.get("seconds", 0.0)) if used else 0.0, "unlearn": result.seconds},
        passes=result.passes + scored,
        history=result.history,
        environment=environment() | ({"processes": str(processes)} if processes > 1 else {}),
    )
    network = result.model.cpu()
    save_diffusion(out, inputs.original, network, card, split, {RUN: facts_json(facts)})
