"""Finds who judges the images of a diffusion line, and measures with them."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from salun_core.diffusion.families import family_of
from salun_core.digest import sha256_file
from salun_core.errors import ModelError, UsageError
from salun_core.evaluation.evidence import Evidence, RunFacts
from salun_core.models.diffusers_folder import LoadedDiffusion, load_diffusion, model_files
from salun_core.saliency import SaliencyMask
from salun_core.steps.generation.evaluation import Candidate, judges_of, measure, retrained
from salun_core.steps.generation.inputs import GenerationInputs
from salun_core.steps.sources import model_folder

if TYPE_CHECKING:
    from salun_core.models import LoadedModel
    from salun_core.steps.evaluation import Reference


def evaluate_images(
    inputs: GenerationInputs,
    candidate: LoadedModel | LoadedDiffusion,
    facts: RunFacts,
    mask: SaliencyMask | None,
    wish: Reference,
    store_uri: str | None,
    device: torch.device,
) -> Evidence:
    """Evaluate a diffusion model against the original, by the judges that the model card names.

    Args:
        inputs: the model before, its data, the forget set.
        candidate: the model after.
        facts: how it was made.
        mask: that it was made with.
        wish: what to compare with beside the model before.
        store_uri: of the store that holds the judge's model line.
        device: to compute on.

    Raises:
        UsageError: the judge cannot be found, or the model after is a classifier.
    """
    if not isinstance(candidate, LoadedDiffusion):
        raise UsageError(
            "the model after is a classifier", "the one before is a diffusion model", "compare like with like"
        )
    require_same_parts(inputs.original, candidate)
    named = inputs.card.evaluation.judge
    with ExitStack() as stack:
        judge = stack.enter_context(model_folder(named, store_uri)) if named else None
        judges = judges_of(inputs, judge)
        started, reference = time.perf_counter(), None
        if wish.folder is not None:
            reference = family_of(load_diffusion(wish.folder), device).denoiser
        elif wish.retrain:
            reference = retrained(inputs, device)
            seconds = {**facts.seconds, "reference": time.perf_counter() - started}
            facts = facts.model_copy(update={"seconds": seconds})
        return measure(inputs, Candidate(candidate, facts, mask), judges, device, reference)


def require_same_parts(original: LoadedDiffusion, candidate: LoadedDiffusion) -> None:
    """Check that nothing but the denoiser changed: no other component is unlearned, or compared bit by bit.

    Raises:
        ModelError: a file of another component differs, is missing or was added.
    """
    before, after = (_other_files(model) for model in (original, candidate))
    differing = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if differing:
        raise ModelError(
            "the two models differ in more than the denoiser",
            ", ".join(differing[:5]),
            "compare a model with its own child",
        )


def _other_files(model: LoadedDiffusion) -> dict[str, str]:
    folder, own = model.components.folder, f"{model.components.denoiser_name}/"
    names = [name for name in model_files(folder) if not name.startswith(own)]
    return {name: sha256_file(folder / name) for name in names}
