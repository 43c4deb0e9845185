"""The facts of an unlearning run, beside the model that it made."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from salun_core import __version__
from salun_core.config import load
from salun_core.evaluation.evidence import RunFacts

RUN = "run.json"


def facts_json(facts: RunFacts) -> bytes:
    """Return the bytes of `run.json`."""
    return (json.dumps(facts.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def read_run(folder: Path, method: str) -> RunFacts:
    """Read the facts of the run that made a model; a folder without them gives what its card knows, the method."""
    path = folder / RUN
    return load(RunFacts, path) if path.is_file() else RunFacts(method=method)


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
