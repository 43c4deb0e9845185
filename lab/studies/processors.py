"""How often a verdict differs between the kernels of processors: the same runs with three sets of instructions.

Run with `python -m lab.studies.processors`; `--write` stores the table in docs/research/processors.md. Each set of
instructions is a process of its own, because torch selects its kernels once. A run trains a ResNet-8 on digits, forgets
with the default recipe or with the fixed one of the paper, and is judged by the default policy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/research/processors.md"
KERNELS: Mapping[str, Mapping[str, str]] = {
    "the machine's own": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "SSE 4.1": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
CASES: Mapping[str, Mapping[str, Any]] = {
    "a class": {"kind": "class", "class_name": "3"},
    "a tenth of the images": {"kind": "random", "fraction": 0.1, "seed": 1},
    "20 images": {"kind": "random", "fraction": 0.0176, "seed": 2},
    "5 images": {"kind": "random", "fraction": 0.0045, "seed": 3},
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "fixed": {"method": "salun", "config": {"epochs": 2, "learning_rate": 0.003, "batch_size": 32}},
}


def decisions(seed: int, cases: Iterable[str], recipes: Iterable[str]) -> dict[str, Any]:
    """Return the decision on each run in this process: whether it passed, its level, and the verdict of each rule."""
    import torch

    import salun_core as salun
    from salun_core.data import DataSpec
    from salun_core.gate import decide, load_policy
    from salun_core.methods.classification import UnlearnConfig
    from salun_core.tasks.classification.training import train_model

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    config = UnlearnConfig(
        epochs=6, learning_rate=0.05, schedule="cosine", batch_norm="update", batch_size=32, device="cpu", seed=seed
    )
    with tempfile.TemporaryDirectory() as folder:
        train_model(DataSpec(source="digits"), "resnet8", config, Path(folder) / "model")
        model = salun.load(Path(folder) / "model")
    for case in cases:
        images = salun.sets(model, dict(CASES[case]))
        mask = salun.mask(model, images.forget, density=0.5, progress=False)
        sets = {"forget": images.forget, "retain": images.retain}
        for recipe in recipes:
            result = salun.unlearn(
                model,
                **sets,
                held_out=images.held_out,
                mask=mask,
                **RECIPES[recipe],
                seed=seed,
                progress=False,
            )
            evidence = salun.evaluate(model, result, **sets, test=images.test, mask=mask)
            decision = decide(evidence, load_policy("classifier"))
            rules = {item.rule: [item.passed, item.shown, item.close] for item in decision.verdicts}
            found[f"{case}, {recipe} recipe, seed {seed}"] = [decision.passed, decision.level, rules]
    return found


def compared(seeds: int, cases: Sequence[str], recipes: Sequence[str], kernels: Sequence[str]) -> dict[str, Any]:
    """Return {kernels: decisions}, one process for each set of instructions."""
    found: dict[str, Any] = {}
    for name in kernels:
        command = [sys.executable, "-m", "lab.studies.processors", "--child", json.dumps([seeds, [*cases], [*recipes]])]
        ran = subprocess.run(
            command, env=os.environ | KERNELS[name], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        )
        found[name] = json.loads(ran.stdout.splitlines()[-1])
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Return the two tables: runs by recipe and case, and rules."""
    runs = list(next(iter(found.values())))
    lines = ["| runs | passed | other verdict | other level |", "|---|---|---|---|"]
    for group in dict.fromkeys(run.rsplit(", seed", 1)[0] for run in runs):
        own = [[by[run] for by in found.values()] for run in runs if run.rsplit(", seed", 1)[0] == group]
        passed = " / ".join(
            str(sum(by[run][0] for run in runs if run.startswith(f"{group}, "))) for by in found.values()
        )
        other, level = (sum(len({str(item[at]) for item in items}) > 1 for items in own) for at in (0, 1))
        lines.append(f"| {len(own)} x {group} | {passed} | {other} | {level} |")
    lines += ["", "| rule | runs that it judges | other verdict | of these, marked as close |", "|---|---|---|---|"]
    rules = dict.fromkeys(rule for run in runs for by in found.values() for rule in by[run][2])
    for rule in rules:
        judged = [
            [by[run][2][rule] for by in found.values()]
            for run in runs
            if all(rule in by[run][2] for by in found.values())
        ]
        flipped = [items for items in judged if len({item[0] for item in items}) > 1]
        close = sum(any(item[2] for item in items) for items in flipped)
        lines.append(f"| `{rule}` | {len(judged)} | {len(flipped)} | {close} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare the kernels and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write docs/research/processors.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        seeds, cases, recipes = json.loads(asked.child)
        print(
            json.dumps({key: value for seed in range(seeds) for key, value in decisions(seed, cases, recipes).items()})
        )
        return
    tables = markdown(compared(asked.seeds, [*CASES], [*RECIPES], [*KERNELS]))
    print(tables)
    if asked.write:
        head, _, _ = PAGE.read_text("utf-8").partition("<!-- tables -->\n")
        PAGE.write_text(f"{head}<!-- tables -->\n{tables}", "utf-8")


if __name__ == "__main__":
    main()
