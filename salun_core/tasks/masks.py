"""Masks of a run: creation from scores or at random, reading with checks, and selection of the mask in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from salun_core.data.split import SplitExcerpt
from salun_core.digest import check_digest
from salun_core.errors import IntegrityError
from salun_core.evaluation.evidence import RunFacts
from salun_core.methods.config import LoopConfig
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup
from salun_core.methods.method import get_method
from salun_core.saliency import SaliencyMask
from salun_core.tasks.task import Inputs, InputsT, ModelT, Task

TUNED_MASK = "mask.safetensors"
"""Mask file in the model folder of a tuned run."""

FORGET_ROWS = "forget_rows_digest"
"""Fact of a mask that was made without the whole split: the digest of the rows of its forget set."""

_AGREEMENT = 1e-3  # share of the sparser mask that may lie outside the denser one, for rounding on another machine


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
    """Make the mask for a method over all parameters: from scores, at random, or with every selected weight salient.

    Every selected weight is salient if the method takes no mask; weights that are not selected are frozen. `density` is
    a share of the selected weights, in (0, 1]. `random_seed` draws a random mask of that density, as a control.
    """
    network = inputs.original.network
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    selected = {name: shapes[name] for name in task.selected(inputs, config)}
    if not get_method(task.methods, method).needs_mask:
        mask = SaliencyMask.full(selected or shapes)  # nothing is selected where a text encoder is trained
    elif random_seed is not None:
        mask = SaliencyMask.random(selected, density, random_seed)
    else:
        scores = task.score(inputs, config, device, group)
        mask = SaliencyMask.from_scores(scores.values, density, scores.facts)
    return mask.within(shapes)


def mask_facts(inputs: Inputs[Any]) -> dict[str, str]:
    """Return what a mask was made from, to be kept in its file.

    A step with an excerpt has not seen the whole split. So it adds the rows that it used, and `read_mask`, in a step
    that has, compares them.
    """
    if not isinstance(inputs.split, SplitExcerpt):
        return inputs.digests
    return {**inputs.digests, FORGET_ROWS: inputs.split.rows_digest(inputs.forget_set.samples)}


def was_scored(mask: SaliencyMask) -> bool:
    """Whether a mask was made from scores, which cost passes over the forget set."""
    return mask.facts.get("scores", "none") not in ("none", "random")


def read_mask(path: Path | None, inputs: Inputs[ModelT]) -> SaliencyMask | None:
    """Read a mask, if given; IntegrityError if it is damaged or belongs to another model or forget set."""
    if path is None:
        return None
    mask = SaliencyMask.load(path)
    if (rows := mask.facts.get(FORGET_ROWS)) is not None:
        check_digest("the rows that the mask was made of", inputs.split.rows_digest(inputs.forget_set.samples), rows)
    for name, digest in inputs.digests.items():
        what = name.removesuffix("_digest").replace("_", " ")
        check_digest(f"the {what} of the mask", mask.facts.get(name, ""), digest)
    return mask


def used_mask(after: Path, mask: Path | None, run: RunFacts, inputs: Inputs[Any]) -> SaliencyMask | None:
    """Return the mask outside which weights must be unchanged; None for a method without a mask.

    A mask that was given is always compared, whatever facts are missing: a model folder without facts of its run must
    not escape the comparison. Only the full mask that the mask step makes for a method without one restricts nothing.

    A search chooses the density, so its mask is in the model folder. It must belong to this model and forget set, match
    the mask in the run facts, and agree with the mask of the mask step, which is computed from the same scores: of two
    densities, the sparser mask lies within the denser one. IntegrityError otherwise.
    """
    given = SaliencyMask.load(mask) if mask else None
    if run.density is None and given is not None and given.facts.get("scores") == "none":
        given = None
    if run.tuning is None or run.density is None:
        return given
    used = read_mask(after / TUNED_MASK, inputs)
    assert used is not None
    check_digest("the mask beside the model", run.tuning.mask or "", used.digest)
    if given is not None:
        require_nested(used, given)
    return used


def require_nested(first: SaliencyMask, second: SaliencyMask) -> None:
    """Check that two masks can have the same scores: at most a thousandth of the sparser one is outside the other.

    IntegrityError otherwise; ModelError if they belong to different models.
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
