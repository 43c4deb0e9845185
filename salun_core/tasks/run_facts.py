"""The facts of an unlearning run, stored as a file in the model folder."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from salun_core import __version__, plugins
from salun_core.config import load
from salun_core.evaluation.evidence import RunFacts
from salun_core.methods.method import UnlearnResult
from salun_core.saliency import SaliencyMask
from salun_core.tasks.masks import was_scored
from salun_core.tasks.task import TunedRun

RUN_FACTS = "run.json"


def facts_json(facts: RunFacts) -> bytes:
    """Return the content of the file."""
    return (json.dumps(facts.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def read_run_facts(folder: Path, method: str) -> RunFacts:
    """Read the facts of the run that made a model; without the file, only the method on the model card is known."""
    path = folder / RUN_FACTS
    return load(RunFacts, path) if path.is_file() else RunFacts(method=method)


def facts_of_run(
    forget_samples: int,
    result: UnlearnResult,
    mask: SaliencyMask | None,
    processes: int = 1,
    tuned: TunedRun | None = None,
    architecture: str = "",
) -> RunFacts:
    """Describe a run; `forget_samples` are those that a mask was scored on, and `architecture` may name a plug-in."""
    used = tuned.mask if tuned else mask
    scored = result.config.scoring_passes * forget_samples if mask and was_scored(mask) else 0
    return RunFacts(
        method=result.method,
        config=result.config.model_dump(),
        seed=result.config.seed,
        density=used.density if used else None,
        density_by_parameter=used.density_by_parameter() if used else {},
        seconds={"mask": float(used.facts.get("seconds", 0.0)) if used else 0.0, "unlearn": result.seconds},
        passes=result.passes + scored,  # a search counts its own scores
        history=result.history,
        environment=environment() | ({"processes": str(processes)} if processes > 1 else {}),
        tuning=tuned.facts if tuned else None,
        changed_fraction=result.changed_fraction,
        plugins=[*plugins.loaded("method", result.method), *plugins.loaded("architecture", architecture)] or None,
        ended=result.ended,
    )


def environment() -> dict[str, str]:
    """Return versions, device, and what the CPU computes with, for the evidence: both change the last bits."""
    cuda = torch.cuda.is_available()
    return {
        "salun": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
