"""Shared by the scripts that compare the usual procedure with this library: the table with targets, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lab.bench.results import machine

RESULTS = Path(__file__).parents[1] / "results"


def report(name: str, rows: Mapping[str, Any], comparisons: Sequence[Mapping[str, str]], **setting: int) -> None:
    """Print the ratios and their targets, and write everything to `lab/results/NAME.json`.

    Each comparison has `what`, `usual`, `ours`, `ratio` and `target`. The setting is how it was measured: `rounds`,
    `quick`, `threads`, and the script's own.
    """
    print("\n| | usual | here | ratio | target |\n|---|---|---|---|---|")
    for item in comparisons:
        print("| " + " | ".join(item.values()) + " |")
    document = {"machine": machine(), "torch": torch.__version__, **setting, "rows": rows, "comparisons": comparisons}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
