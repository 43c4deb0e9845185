"""Step 3: unlearn, changing salient weights only."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from salun_core import __version__
from salun_core.config import load, parse_text
from salun_core.digest import check_digest
from salun_core.errors import UsageError
from salun_core.evaluation.evidence import RunFacts
from salun_core.models import LoadedModel, save_model
from salun_core.saliency import SaliencyMask
from salun_core.steps.inputs import Inputs, load_inputs
from salun_core.steps.observe import RunRef
from salun_core.steps.sharding import distributed, require_same_inputs
from salun_core.unlearn import FileCheckpoint, UnlearnResult, get_method, method_config, unlearn
from salun_core.unlearn.loop import OnEpoch
from salun_core.unlearn.training import fresh_classifier

RUN = "run.json"
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

    Returns:
        The result.

    Raises:
        UsageError: a wrong method or configuration.
        IntegrityError: the mask is of another model or forget set.
        ModelError: the loss became NaN or infinite.
    """
    with distributed("unlearn", model_line, run) as (_, world):
        config = method_config(method, {**(overrides or {}), "seed": seed})
        inputs = load_inputs(model, forget_manifest_uri, data)
        require_same_inputs(inputs, world)
        loaded = read_mask(mask, inputs)
        checkpoint = checkpoint or _checkpoint_from_environment(model_line)
        result = unlearn(
            inputs.original.model,
            method,
            forget=inputs.forget,
            retain=inputs.retain,
            config=config,
            mask=loaded if get_method(method).needs_mask else None,
            fresh=lambda: fresh_classifier(
                inputs.original.card.architecture, inputs.retain, len(inputs.original.card.classes), seed
            ),
            checkpoint=FileCheckpoint(checkpoint) if checkpoint else None,
            on_epoch=on_epoch if world.main else None,
            world=world,
        )
        if world.main:
            _write(out, inputs, result, loaded, world.size)
        if checkpoint and world.main:
            checkpoint.unlink(missing_ok=True)
        return result


def read_mask(path: Path | None, inputs: Inputs) -> SaliencyMask | None:
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


def _write(out: Path, inputs: Inputs, result: UnlearnResult, mask: SaliencyMask | None, processes: int) -> None:
    original = inputs.original
    split = original.split.without(inputs.forget_set.ids)
    card = original.card.model_copy(
        update={
            "split_digest": split.digest,
            "parent": original.digest,
            "method": result.method,
            "forget_set_digest": inputs.forget_set.digest,
            "training": result.config.model_dump() if get_method(result.method).fresh_start else original.card.training,
        }
    )
    used = mask if get_method(result.method).needs_mask else None
    facts = RunFacts(
        method=result.method,
        config=result.config.model_dump(),
        seed=result.config.seed,
        density=used.density if used else None,
        density_by_parameter=used.density_by_parameter() if used else {},
        seconds={"mask": float(used.facts.get("seconds", 0.0)) if used else 0.0, "unlearn": result.seconds},
        passes=result.passes + (len(inputs.forget_set.ids) if used else 0),
        history=result.history,
        environment=environment() | ({"processes": str(processes)} if processes > 1 else {}),
    )
    run = json.dumps(facts.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    save_model(out, result.model.cpu(), card, split, {RUN: run.encode()})


def read_run(folder: Path, model: LoadedModel) -> RunFacts:
    """Read the facts of the run that made a model; a folder without them gives what its card knows."""
    path = folder / RUN
    return load(RunFacts, path) if path.is_file() else RunFacts(method=model.card.method)


def environment() -> dict[str, str]:
    """Return versions, device and processor threads, for the evidence."""
    cuda = torch.cuda.is_available()
    return {
        "salun": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": str(torch.get_num_threads()),
    }
