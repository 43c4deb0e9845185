"""Step 3: unlearn, changing salient weights only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salun_core.config import parse_text
from salun_core.digest import check_digest
from salun_core.errors import UsageError
from salun_core.evaluation.evidence import RunFacts
from salun_core.methods.classification import (
    METHODS,
    FileCheckpoint,
    UnlearnConfig,
    UnlearnResult,
    method_config,
    unlearn,
)
from salun_core.methods.classification.training import fresh_classifier
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import OnEpoch
from salun_core.methods.method import get_method
from salun_core.models import save_model
from salun_core.saliency import SaliencyMask
from salun_core.steps.mask import was_scored
from salun_core.steps.observe import RunRef
from salun_core.steps.run_facts import RUN, environment, facts_json
from salun_core.steps.sharding import AnyInputs, distributed, require_same_inputs
from salun_core.tasks import kept_split, open_inputs
from salun_core.tasks.classification.inputs import Inputs

if TYPE_CHECKING:
    from salun_core.tasks.classification.tuning import TunedRun, TuningOptions

CHECKPOINT_VARIABLE = "SALUN_CHECKPOINT_DIR"


def parse_overrides(text: str) -> dict[str, Any]:
    """Read the run form's `method_config`: a JSON object, or nothing.

    Raises:
        UsageError: it is something else.
    """
    document = parse_text(text, "method_config") if text.strip() else {}
    if not isinstance(document, dict):
        raise UsageError("method_config is no JSON object", f"it is a {type(document).__name__}", 'give {"epochs": 5}')
    return document


def run_unlearning(
    model: Path,
    mask: Path | None,
    forget_manifest_uri: str,
    out: Path,
    *,
    method: str = "salun",
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    model_line: str = "local",
    data: str | None = None,
    checkpoint: Path | None = None,
    run: RunRef | None = None,
    on_epoch: OnEpoch | None = None,
    tune: TuningOptions | None = None,
) -> UnlearnResult:
    """Run one unlearning method and write the new model with the facts of its run.

    Where torchrun has started several processes, they share each batch, and the first one writes.

    Args:
        model: folder of the original model.
        mask: mask file of this very model and forget set; None for a method that takes none.
        forget_manifest_uri: address of the forget targets.
        out: folder for the new model; it appears whole or not at all.
        method: a name of `METHODS`.
        overrides: what differs from the method's default configuration.
        seed: of the loop; `overrides` may not set another.
        model_line: for the metrics.
        data: data set spec, where the data lie elsewhere than the model card says.
        checkpoint: file that keeps the state after each epoch; by default under $SALUN_CHECKPOINT_DIR, if set.
        run: the run of the deletion ledger that it belongs to.
        on_epoch: called after each epoch.
        tune: search for the settings that `overrides` leaves open. The search makes its own mask, which lies beside
            the model with all that was tried; `mask` must be of the same scores. A method that trains anew has
            nothing to search for and runs by its recipe. A killed search starts again.

    Returns:
        The result.

    Raises:
        UsageError: a wrong method or configuration.
        IntegrityError: the mask is of another model or forget set.
        ModelError: the loss became NaN or infinite.
        GateRefusedError: a search found no setting within the policy; nothing is written.
    """
    with distributed("unlearn", model_line, run) as (_, group):
        given = {**(overrides or {}), "seed": seed}
        checkpoint = checkpoint or _checkpoint_from_environment(model_line)
        kept = FileCheckpoint(checkpoint) if checkpoint else None
        progress = on_epoch if group.main else None
        inputs = open_inputs(model, forget_manifest_uri, data)
        require_same_inputs(inputs, group)
        loaded = read_mask(mask, inputs)
        result: UnlearnResult
        if tune is not None and _tunable(inputs, method, group):
            assert isinstance(inputs, Inputs)
            tuned = _tuned(inputs, method, given, loaded, tune, run)
            result = tuned.result
            _write(out, inputs, result, loaded, group.size, tuned)
        elif isinstance(inputs, Inputs):
            result = _classifier(inputs, method, method_config(method, given), loaded, kept, progress, group)
            if group.main:
                _write(out, inputs, result, loaded, group.size)
        else:
            from salun_core.methods.diffusion import diffusion_config
            from salun_core.tasks.diffusion.unlearning import run_generation, write_generation

            settings = diffusion_config(method, given)
            result, count = run_generation(inputs, method, settings, loaded, kept, progress, group)
            if group.main:
                write_generation(out, inputs, result, loaded, count, group.size)
        if checkpoint and group.main:
            checkpoint.unlink(missing_ok=True)
        return result


def _tunable(inputs: AnyInputs, method: str, group: ProcessGroup) -> bool:
    if not isinstance(inputs, Inputs):
        raise UsageError("a diffusion model is not tuned", "the search is for classifiers", "leave the tuning out")
    if group.size > 1:
        raise UsageError("a search runs in one process", f"{group.size} were started", "leave out --processes")
    return not get_method(METHODS, method).fresh_start


def _tuned(
    inputs: Inputs,
    method: str,
    given: Mapping[str, Any],
    mask: SaliencyMask | None,
    wish: TuningOptions,
    run: RunRef | None,
) -> TunedRun:
    from salun_core.steps.used_mask import require_nested
    from salun_core.tasks.classification.tuning import run_tuning

    tuned = run_tuning(inputs, method, given, wish, run)
    if tuned.mask is not None and mask is not None:
        require_nested(tuned.mask, mask)
    return tuned


def _classifier(
    inputs: Inputs,
    method: str,
    config: UnlearnConfig,
    mask: SaliencyMask | None,
    checkpoint: FileCheckpoint | None,
    on_epoch: OnEpoch | None,
    group: ProcessGroup,
) -> UnlearnResult:
    card = inputs.original.card
    return unlearn(
        inputs.original.model,
        method,
        forget=inputs.forget,
        retain=inputs.retain,
        config=config,
        mask=mask if get_method(METHODS, method).needs_mask else None,
        fresh=lambda: fresh_classifier(card.architecture, inputs.retain, len(card.classes), config.seed),
        checkpoint=checkpoint,
        on_epoch=on_epoch,
        group=group,
    )


def read_mask(path: Path | None, inputs: AnyInputs) -> SaliencyMask | None:
    """Read a mask, if there is one, and check that it is of this very model and forget set.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is damaged, or of another model or forget set.
    """
    if path is None:
        return None
    mask = SaliencyMask.load(path)
    check_digest("the model of the mask", mask.facts.get("model_digest", ""), inputs.original.digest)
    check_digest("the forget set of the mask", mask.facts.get("forget_set_digest", ""), inputs.forget_set.digest)
    return mask


def _checkpoint_from_environment(model_line: str) -> Path | None:
    folder = os.environ.get(CHECKPOINT_VARIABLE)
    return Path(folder) / f"{model_line}.checkpoint.safetensors" if folder else None


def _write(
    out: Path,
    inputs: Inputs,
    result: UnlearnResult,
    mask: SaliencyMask | None,
    processes: int,
    tuned: TunedRun | None = None,
) -> None:
    original = inputs.original
    split = kept_split(inputs)
    card = original.card.model_copy(
        update={
            "split_digest": split.digest,
            "parent": original.digest,
            "method": result.method,
            "forget_set_digest": inputs.forget_set.digest,
            "training": result.config.model_dump()
            if get_method(METHODS, result.method).fresh_start
            else original.card.training,
        }
    )
    given = mask if get_method(METHODS, result.method).needs_mask else None
    used = tuned.mask if tuned else given
    scored = len(inputs.forget_set.ids) if given and was_scored(given) else 0  # a search counts its own scores
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
        tuning=tuned.facts if tuned else None,
        changed_fraction=result.changed_fraction,
    )
    beside = tuned.beside if tuned else {}
    save_model(out, result.model.cpu(), card, split, {RUN: facts_json(facts), **beside})
