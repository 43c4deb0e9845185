"""Step 3: unlearn, changing salient weights only, with the settings of a recipe or a search for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from salun_core.errors import ConflictError, DivergedError, UsageError
from salun_core.gate import DECISION, Cause, GateDecision, Refusal, Verdict
from salun_core.methods.checkpoint import FileCheckpoint
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import OnEpoch
from salun_core.methods.method import UnlearnResult, get_method, resolve_config
from salun_core.methods.recipe import Recipe
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.storage.keys import run_key
from salun_core.tasks.masks import read_mask, require_nested
from salun_core.tasks.run_facts import RUN_FACTS, facts_json, facts_of_run
from salun_core.tasks.task import TunedRun, TuningOptions, check_recipe

CHECKPOINT_VARIABLE = "SALUN_CHECKPOINT_DIR"


def run_unlearning(
    context: RunContext,
    recipe: Recipe,
    mask: Path | None,
    out: Path,
    *,
    checkpoint: Path | None = None,
    on_epoch: OnEpoch | None = None,
    tuning: TuningOptions | None = None,
) -> UnlearnResult:
    """Run one unlearning method and write the new model with the facts of its run.

    If torchrun has started several processes, they share each batch, and the first one writes. The folder appears whole
    or not at all. The state after each epoch is kept in `checkpoint`, by default under $SALUN_CHECKPOINT_DIR, if set.

    `tuning` searches for the settings that the recipe leaves open, perhaps also the method; the facts name what was
    chosen. The search makes its own mask, which is written to the model folder with all that was tried; `mask` must be
    of the same scores. A method that starts from fresh weights has nothing to search for and runs by its recipe. A
    search that was killed starts again.

    DivergedError: the loss or a weight became NaN or infinite; a sweep counts that as damage. GateRefusedError: the
    search found no setting within the policy, and nothing is written.
    """
    with context.distributed("unlearn") as (_, group):
        checkpoint = checkpoint or _checkpoint_from_environment(context.model_line)
        kept = FileCheckpoint(checkpoint) if checkpoint else None
        task, inputs = context.task, context.inputs
        context.require_same_inputs(group)
        given = read_mask(mask, inputs)
        recipe = check_recipe(task, recipe, tune=tuning is not None)
        tuned, masked = None, not recipe.leaves_method_open and get_method(task.methods, recipe.method).needs_mask
        given = given if masked else None
        if tuning is not None and _has_settings_to_search(context, recipe, group):
            tuned = _tune(context, recipe, given, tuning)
            result = tuned.result
        else:
            config = resolve_config(task.methods, recipe.method, recipe.overrides)
            progress = on_epoch if group.main else None
            with _divergence_kept(context, group):
                result = task.unlearn(inputs, recipe.method, config, given, kept, progress, group)
        if group.main:
            facts = facts_of_run(
                inputs.sizes["forget_samples"], result, given, group.size, tuned, inputs.original.card.architecture
            )
            task.save(out, inputs, result, {RUN_FACTS: facts_json(facts), **(tuned.extra_files if tuned else {})})
            if checkpoint:
                checkpoint.unlink(missing_ok=True)
        return result


def _has_settings_to_search(context: RunContext, recipe: Recipe, group: ProcessGroup) -> bool:
    if group.size > 1:
        raise UsageError("a search runs in one process", f"{group.size} were started", "leave out --processes")
    return context.task.check_tuning(recipe.method, recipe.overrides)


def _tune(context: RunContext, recipe: Recipe, mask: SaliencyMask | None, options: TuningOptions) -> TunedRun:
    options = replace(options, on_refusal=options.on_refusal or (lambda decision: _keep(context, decision)))
    tuned = context.task.tune(context.inputs, recipe.method, recipe.overrides, options)
    if tuned.mask is not None and mask is not None:
        require_nested(tuned.mask, mask)
    return tuned


def _keep(context: RunContext, decision: GateDecision) -> None:
    """Store a refusal as the gate stores its own: its cause then decides the sweep's next recipe."""
    if context.store_uri and context.run:
        with suppress(ConflictError):  # an earlier attempt of this step left its own
            key = run_key(context.run, DECISION)
            context.store.put_new(key, decision.model_dump_json().encode())


@contextmanager
def _divergence_kept(context: RunContext, group: ProcessGroup) -> Iterator[None]:
    """Store a divergence as a refusal for damage, so that a sweep does not repeat the same strength."""
    try:
        yield
    except DivergedError as error:
        if group.main:
            figures = error.why or "no figures"
            refusal = Refusal(words=error.what, figures=figures, cause=Cause.DAMAGED, next=error.remedy)
            finite = "finite losses and weights"
            verdict = Verdict(
                rule="unlearning", threshold=finite, passed=False, reason=str(error.what), refusal=refusal
            )
            summary = f"unlearning diverged: {error.what} ({figures})"
            none = {"policy": "none: the run diverged before its gate", "policy_digest": "", "evidence_digest": ""}
            _keep(context, GateDecision(passed=False, summary=summary, verdicts=[verdict], **none))
        raise


def _checkpoint_from_environment(model_line: str) -> Path | None:
    folder = os.environ.get(CHECKPOINT_VARIABLE)
    return Path(folder) / f"{model_line}.checkpoint.safetensors" if folder else None
