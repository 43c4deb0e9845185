"""Which mask a model was unlearned under: the mask step's, or the one that a search made and left beside the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from salun_core.digest import check_digest
from salun_core.errors import IntegrityError
from salun_core.evaluation.evidence import RunFacts
from salun_core.saliency import SaliencyMask

BESIDE = "mask.safetensors"
_AGREEMENT = 1e-3  # share of the sparser mask that may lie outside the denser one: rounding on another machine


def used_mask(
    after: Path, mask: Path | None, run: RunFacts, model_digest: str, forget_set_digest: str
) -> SaliencyMask | None:
    """Return the mask outside which no weight may have changed.

    A search chooses the density, so its mask lies beside the model. It must be of this model and this forget set, be
    the one that the run's facts name, and agree with the mask step's, which another step computed from the same
    scores: of two densities the sparser mask lies within the denser one.

    Args:
        after: folder of the model after.
        mask: the mask step's file, where there is one.
        run: facts of the run that made the model.
        model_digest: of the model before.
        forget_set_digest: of what was to be forgotten.

    Returns:
        The mask; None for a method that takes none.

    Raises:
        UsageError: it is not there.
        IntegrityError: it is another, is damaged, or contradicts the mask step's.
    """
    if run.density is None:
        return None
    given = SaliencyMask.load(mask) if mask else None
    if run.tuning is None:
        return given
    used = SaliencyMask.load(after / BESIDE)
    check_digest("the model of the mask", used.facts.get("model_digest", ""), model_digest)
    check_digest("the forget set of the mask", used.facts.get("forget_set_digest", ""), forget_set_digest)
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
            "the mask beside the model contradicts the mask step's",
            f"{outside} of its {sparse.k} salient weights lie outside the other",
            "both must come from the saliency of this model and this forget set; run the pipeline again",
        )
