"""Step 2: score the weights on the forget set and write the mask."""

from __future__ import annotations

import time
from pathlib import Path

from salun_core.methods.config import pick_device
from salun_core.methods.method import resolve_config
from salun_core.methods.recipe import Recipe
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext, method_label
from salun_core.tasks.masks import make_mask, mask_facts
from salun_core.tasks.task import named


def compute_mask(context: RunContext, recipe: Recipe, out: Path, random_seed: int | None = None) -> SaliencyMask:
    """Compute the saliency mask of a model for a forget set.

    A method that takes no mask gets one in which every weight is salient, and so does a recipe that leaves the method
    to a search, which makes its own masks. If torchrun has started several processes, each scores its share, and the
    first one writes the same mask as one process alone.

    The recipe's seed is not used: runs of several seeds share a mask. `random_seed` draws a random mask of the same
    density, as a control.
    """
    with context.distributed("compute_mask") as (metrics, group):
        started = time.perf_counter()
        task = context.task
        recipe = named(task, recipe, tune=True)  # the scores are the same without a search
        if not recipe.leaves_method_open:
            config = resolve_config(task.methods, recipe.method, recipe.method_config)
        context.require_same_inputs(group)
        device, inputs = pick_device(context.device), context.inputs
        if recipe.leaves_method_open:
            parameters = inputs.original.network.named_parameters()
            mask = SaliencyMask.full({name: tuple(parameter.shape) for name, parameter in parameters})
        else:
            mask = make_mask(task, inputs, recipe.method, config, recipe.density, device, random_seed, group)
        mask = mask.with_facts({**mask_facts(inputs), "seconds": f"{time.perf_counter() - started:.3f}"})
        if group.main:
            mask.save(out)
        metrics.record("salun_mask_density_ratio", mask.density, method=method_label(recipe.method))
        return mask
