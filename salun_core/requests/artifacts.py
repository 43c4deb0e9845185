"""Where Kubeflow Pipelines keeps the files of a run, and which of them are weights or masks.

Its driver puts an output at `<root>/<pipeline>/<run id>/<task>/<random id>/<output>`, older releases without the
random id; an output may be a folder. It never deletes any of them.
"""

from __future__ import annotations

import re
from collections.abc import Container

NAMES = frozenset({"model", "mask", "unlearned", "before", "after"})
"""Outputs that hold weights, the list of training samples, or the critical weights."""
_RANDOM = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_DEEPEST = 5  # a pipeline's name may be `namespace/<n>/pipeline/<p>`


def parse_artifact(key: str, runs: Container[str]) -> tuple[str, str] | None:
    """Return run id and name of the output that a file belongs to, or None where the run is not known.

    Args:
        key: below the pipeline root.
        runs: the ids of the runs that are known.

    Example:
        >>> parse_artifact("salun-unlearning/r-1/unlearn/0b0c2b0e-6a4f-4a38-9d0c-7a8f9c1d2e3f/unlearned/x", {"r-1"})
        ('r-1', 'unlearned')
        >>> parse_artifact("salun-unlearning/r-1/compute-mask/mask", {"r-1"})
        ('r-1', 'mask')
    """
    parts = key.split("/")
    for place, part in enumerate(parts[1:_DEEPEST], 1):
        if part in runs:
            rest = parts[place + 2 :]
            if rest and _RANDOM.fullmatch(rest[0]):
                rest = rest[1:]
            return part, rest[0] if rest else ""
    return None


def run_folder(key: str) -> str:
    """Return the folder that a file of an unknown run is counted under."""
    return "/".join(key.split("/")[:2])
