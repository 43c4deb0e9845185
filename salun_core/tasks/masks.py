"""Masks of a run: made from scores or at random, read and checked, and the one that a model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from salun_core.digest import check_digest
from salun_core.errors import IntegrityError
from salun_core.evaluation.evidence import RunFacts
from salun_core.methods.config import LoopConfig
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup
from salun_core.methods.method import get_method
from salun_core.saliency import SaliencyMask
from salun_core.tasks.task import Inputs, InputsT, ModelT, Task

TUNED_MASK = "mask.safetensors"
"""File in the folder of a model whose settings were searched for."""

_AGREEMENT = 1e-3  # share of the sparser mask that may lie outside the denser one: rounding on another machine


def make_mask(
    task: Task[InputsT],
    inputs: InputsT,
    method: str,
    config: LoopConfig,
    density: float,
    device: torch.device,
    random_seed: int | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> SaliencyMask:
    """Make the mask for a method: of scores, at random, or with every selected weight salient.

    Args:
        task: of the model.
        inputs: model, data, forget set.
        method: a method that takes no mask gets one in which every selected weight is salient.
        config: of the method.
        density: share of the selected weights to keep salient, in (0, 1].
        device: to compute on.
        random_seed: draw a random mask of the same density, as a control.
        group: the processes that share the scoring.

    Returns:
        A mask over all parameters; those that are not selected are frozen.
    """
    network = inputs.original.network
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    selected = {name: shapes[name] for name in task.selected(inputs, config)}
    if not get_method(task.methods, method).needs_mask:
        mask = SaliencyMask.full(selected)
    elif random_seed is not None:
        mask = SaliencyMask.random(selected, density, random_seed)
    else:
        scores = task.score(inputs, config, device, group)
        mask = SaliencyMask.from_scores(scores.values, density, scores.facts)
    return mask.within(shapes)


def was_scored(mask: SaliencyMask) -> bool:
    """Return whether a mask is made of scores, which cost passes over the forget set."""
    return mask.facts.get("scores", "none") not in ("none", "random")


def read_mask(path: Path | None, inputs: Inputs[ModelT]) -> SaliencyMask | None:
    """Read a mask, if there is one, and check that it is of this model and this forget set.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is damaged, or of another model or forget set.
    """
    if path is None:
        return None
    mask = SaliencyMask.load(path)
    for name, digest in inputs.digests.items():
        what = name.removesuffix("_digest").replace("_", " ")
        check_digest(f"the {what} of the mask", mask.facts.get(name, ""), digest)
    return mask


def used_mask(after: Path, mask: Path | None, run: RunFacts, inputs: Inputs[Any]) -> SaliencyMask | None:
    """Return the mask outside which no weight may have changed.

    A search chooses the density, so its mask is in the folder of the model. It must be of this model and this forget
    set, be the one that the facts of the run name, and agree with the mask of the mask step, which is computed from
    the same scores: of two densities the sparser mask lies within the denser one.

    Args:
        after: folder of the model after.
        mask: file of the mask step, if there is one.
        run: facts of the run that made the model.
        inputs: the model before and the forget set.

    Returns:
        The mask; None for a method that takes none.

    Raises:
        UsageError: the file does not exist.
        IntegrityError: it is another mask, is damaged, or contradicts that of the mask step.
    """
    if run.density is None:
        return None
    given = SaliencyMask.load(mask) if mask else None
    if run.tuning is None:
        return given
    used = read_mask(after / TUNED_MASK, inputs)
    assert used is not None
    check_digest("the mask beside the model", run.tuning.mask or "", used.digest)
    if given is not None:
        require_nested(used, given)
    return used


def require_nested(first: SaliencyMask, second: SaliencyMask) -> None:
    """Check that two masks can be of the same scores: all but a thousandth of the sparser one lies in the other.

    Raises:
        IntegrityError: they cannot.
        ModelError: they are of different models.
    """
    first.check_fits(second.shapes)
    sparse, dense = sorted((first, second), key=lambda item: item.k)
    outside = sum(int(np.bitwise_count(bits & ~dense.bits[name]).sum()) for name, bits in sparse.bits.items())
    if outside > _AGREEMENT * sparse.k:
        raise IntegrityError(
            "the mask in the model folder contradicts the mask of the mask step",
            f"{outside} of its {sparse.k} salient weights lie outside the other",
            "both must come from the saliency of this model and this forget set; run the pipeline again",
        )
