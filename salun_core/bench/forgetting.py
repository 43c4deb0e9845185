"""What is forgotten at a seed: the file of the forget target, and one for each request of a sequence."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salun_core.bench.suite import RandomTarget, Request, Scenario, SequenceTarget
from salun_core.config import load
from salun_core.data.split import SplitManifest
from salun_core.models.checkpoint import SPLIT
from salun_core.steps.inputs import load_inputs
from salun_core.storage.local import write_whole

Plain = dict[str, Any]


def forget_files(
    scenario: Scenario, base: Path, out: Path, seed: int, data: str | None = None
) -> tuple[Path, tuple[Path, ...]]:
    """Write what is forgotten.

    Args:
        scenario: of the suite.
        base: folder of the model that is to forget.
        out: folder of the run.
        seed: of the draws.
        data: data set, where it does not lie where the model card says.

    Returns:
        The file of all that is forgotten, and the files of its requests, in order. A single request has one file.
    """
    whole = out / f"forget-{seed}.json"
    if not isinstance(scenario, SequenceTarget):
        _write(whole, _plain(scenario, base, (), seed))
        return whole, (whole,)
    targets: list[Plain] = []
    files = []
    for number, request in enumerate(scenario.steps, start=1):
        gone = load_inputs(base, str(whole), data).forget_set.samples if targets else ()
        targets.append(_plain(request, base, gone, [seed, number]))
        files.append(out / f"forget-{seed}-{number}.json")
        _write(files[-1], targets[-1])
        _write(whole, targets)
    return whole, tuple(files)


def _plain(request: Scenario | Request, base: Path, gone: Collection[str], seed: int | Sequence[int]) -> Plain:
    if isinstance(request, RandomTarget):
        split = load(SplitManifest, base / SPLIT).without(gone)
        return {"kind": "samples", "ids": drawn(split, request.fraction, seed)}
    return request.model_dump(mode="json", exclude_none=True)


def _write(path: Path, target: Plain | list[Plain]) -> None:
    data = (json.dumps(target, indent=1, sort_keys=True) + "\n").encode()
    if not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)


def drawn(split: SplitManifest, fraction: float, seed: int | Sequence[int]) -> list[str]:
    """Draw a share of the training split, at least one sample; the draw hangs on the rows' content, not on their names.

    Args:
        split: of the base model, or what earlier requests left of it.
        fraction: in (0, 1).
        seed: of the draw.

    Returns:
        Sample ids, sorted.
    """
    ids = split.ids("train")
    count = max(1, round(fraction * len(ids)))
    return sorted(ids[index] for index in np.random.default_rng(seed).permutation(len(ids))[:count])
