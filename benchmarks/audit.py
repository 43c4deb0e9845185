"""Measures how often an audit passes retrained models and refuses forgeries, by what the auditor is given.

    python -m benchmarks.audit
    python -m benchmarks.audit --models 4

The populations are those of `salun calibrate`: small nets that memorise noisy digits, and 200 samples or a class to
forget. Writes benchmarks/results/audit.json and the table of docs/reference/audit.md, unless the number of models is
chosen. Four minutes of one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from salun_core.audit.checks import WORDS, examine, level_of
from salun_core.audit.folders import Networks
from salun_core.audit.predictions import Audited
from salun_core.calibration.forgeries import Forgery, forgeries_of, mislabelled, unchanged
from salun_core.calibration.populations import BATCHES, UNLIKE, Draw, dense, request, samples, trained, whole_class
from salun_core.evaluation import Splits
from salun_core.evaluation.likelihood_ratio import Shadows, assignments, logit_scaled
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.evaluation.statistics import wilson_interval
from salun_core.storage.local_files import write_whole

HONEST, FORGED, ORACLES, SHADOWS = 40, 10, 5, 8
CELLS = {"200 samples": ("samples", samples(200)), "class": ("class", whole_class)}
MORE = {"class": [Forgery("a quarter mislabelled, the rest kept", "forgery", frozenset({"class"}), mislabelled(0.25))]}
_REFERENCES, _SHADOWS = {"relative", "klom"}, {"lira", "lira_tpr"}
_MODELS = {"restored", "relearn"}
_ALL: set[str] = {*WORDS}
WAYS: Mapping[str, set[str]] = {
    "predictions": _ALL - _REFERENCES - _SHADOWS - _MODELS,
    "predictions, oracles": _ALL - _SHADOWS - _MODELS,
    "models": _ALL - _REFERENCES - _SHADOWS,
    "models, oracles": _ALL - _SHADOWS,
    "models, oracles, shadow models": _ALL,
}
"""What the auditor is given, and the tests that are then possible."""
BEGIN, END = "<!-- rates -->", "<!-- /rates -->"
ROOT = Path(__file__).resolve().parent.parent


class Case(NamedTuple):
    """A model before, what it has to forget, and what an auditor may be given."""

    seed: int
    before: nn.Module
    splits: Splits
    retrained: Sequence[nn.Module]
    shadows: Shadows | None


def cases(kind: str, draw: Draw, models: int) -> Iterator[Case]:
    """Yield the cases of a cell. The first of the retrained models is audited, the others are oracles.

    All nets of one kind are trained at once, with as many steps as the smallest set of images has batches.
    """
    asked = [request(kind, dense, draw, seed, models) for seed in range(models)]
    each = 1 + ORACLES
    sets = [one.splits.retain for one in asked for _ in range(each)]
    retrained = trained(dense, sets, [UNLIKE + number for number in range(len(sets))], BATCHES[0])
    shadows = _shadows([one.splits for one in asked]) if kind == "samples" else [None] * models
    for place, one in enumerate(asked):
        yield Case(one.seed, one.before, one.splits, retrained[place * each : (place + 1) * each], shadows[place])


def _shadows(splits: Sequence[Splits]) -> list[Shadows]:
    """Train the shadow models of each request, on the retained images and half of the forgotten and held-out ones."""
    pools = [one.forget.joined(one.test) for one in splits]
    inside = [assignments(SHADOWS, len(pool), seed) for seed, pool in enumerate(pools)]
    sets = [
        one.retain.joined(pool.select(np.flatnonzero(row).tolist()))
        for one, pool, rows in zip(splits, pools, inside, strict=True)
        for row in rows
    ]
    nets = trained(dense, sets, [2 * UNLIKE + number for number in range(len(sets))], BATCHES[0])
    confidences = [
        np.stack([logit_scaled(outputs_of(net, pool)) for net in nets[place * SHADOWS : (place + 1) * SHADOWS]])
        for place, pool in enumerate(pools)
    ]
    return [Shadows(scaled, rows) for scaled, rows in zip(confidences, inside, strict=True)]


def audited(case: Case, after: nn.Module, known: Mapping[int, dict[str, Outputs]]) -> Audited:
    """Return what an auditor with everything measures."""
    splits = case.splits
    emptied = set(splits.forget.labels.tolist()) - set(splits.retain.labels.tolist())
    networks = Networks(case.before, after, splits.forget, splits.retain, splits.test)
    references = [known[id(model)] for model in case.retrained[1:]]
    after_outputs = known.get(id(after)) or outputs_by_set(after, splits)
    return Audited(
        known[id(case.before)], after_outputs, references, case.shadows, sorted(emptied), len(splits.retain), networks
    )


def outputs_by_set(model: nn.Module, splits: Splits) -> dict[str, Outputs]:
    """Run a model on each set."""
    sets = {"forget": splits.forget, "unseen": splits.test}
    return {name: outputs_of(model, images) for name, images in sets.items()}


def measure(models: int | None) -> list[dict[str, object]]:
    """Return a row for each population and way: how many models had each level, and which tests failed."""
    honest, forged = (models, models) if models else (HONEST, FORGED)
    levels: dict[tuple[str, str, str, str], Counter[str]] = {}
    tests: dict[tuple[str, str, str, str], Counter[str]] = {}
    for cell, (kind, draw) in CELLS.items():
        for case in cases(kind, draw, honest):
            print(f"{cell}: case {case.seed + 1} of {honest}", file=sys.stderr)
            known = {id(model): outputs_by_set(model, case.splits) for model in (case.before, *case.retrained)}
            population = [("retrained", "honest", case.retrained[0])]
            for forgery in [*forgeries_of(kind), *MORE.get(kind, [])] if case.seed < forged else ():
                after = case.before if forgery.forge is unchanged else copy.deepcopy(case.before)
                torch.manual_seed(case.seed)
                forgery.forge(after, case.splits.forget, case.splits.retain)
                population.append((forgery.name, forgery.sort, after.eval()))
            for name, sort, model in population:
                found = examine(audited(case, model, known))
                for way, possible in WAYS.items():
                    chosen = [finding for finding in found if finding.test in possible]
                    key = cell, way, name, sort
                    levels.setdefault(key, Counter())[level_of(chosen)] += 1
                    failed = [finding.test for finding in chosen if finding.verdict == "fail"]
                    tests.setdefault(key, Counter()).update(failed)
    return [
        {
            "cell": cell,
            "given": way,
            "model": name,
            "sort": sort,
            "n": counts.total(),
            **{level: counts[level] for level in ("measured", "procedure", "refused")},
            "failed": dict(tests[cell, way, name, sort].most_common()),
        }
        for (cell, way, name, sort), counts in levels.items()
        if cell != "class" or "shadow" not in way
    ]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return how many models were refused, by what the auditor is given; for honest ones also how many are measured."""
    lines = [f"| request | model | n | {' | '.join(WAYS)} |", f"|---|---|--:|{'--:|' * len(WAYS)}"]
    keys = dict.fromkeys((row["cell"], row["model"], row["sort"], row["n"]) for row in rows)
    for cell, model, sort, n in keys:
        cells = []
        for way in WAYS:
            row = next((r for r in rows if (r["cell"], r["model"], r["given"]) == (cell, model, way)), None)
            text = "" if row is None else f"{row['refused']} refused"
            if row is not None and (sort == "honest" or row["refused"] != n):
                text = f"{row['measured']} measured, {row['procedure']} procedure, {text}"
            cells.append(text)
        lines.append(f"| {cell} | {model} | {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--models", type=int, help="of each population; by default 40 honest ones and 10 of each forgery"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    rows = measure(arguments.models)
    text = table(rows)
    print(text)
    goals = {(str(r["cell"]), str(r["given"])): Counter[str]() for r in rows}
    for row in rows:
        side = "honest" if row["sort"] == "honest" else "forged"
        goals[str(row["cell"]), str(row["given"])].update(
            {side: int(str(row["n"])), f"{side} refused": int(str(row["refused"]))}
        )
    for (cell, way), found in goals.items():
        shares = [f"{side} {found[f'{side} refused']} of {found[side]} refused" for side in ("honest", "forged")]
        low, high = wilson_interval(found["forged refused"] / found["forged"], found["forged"])
        print(f"{cell}, {way}: {', '.join(shares)} [{low:.1%}, {high:.1%}]")
    print(f"{time.process_time() - started:.0f} s of processor time")
    if arguments.models is None:
        document = {"oracles": ORACLES, "shadow_models": SHADOWS, "rows": rows}
        write_whole(ROOT / "benchmarks/results/audit.json", (json.dumps(document, indent=1) + "\n").encode())
        page = ROOT / "docs/reference/audit.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        write_whole(page, f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}".encode())


if __name__ == "__main__":
    main()
