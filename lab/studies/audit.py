"""Measures how often an audit passes retrained models and refuses forgeries, by what the auditor is given.

    python -m lab.studies.audit
    python -m lab.studies.audit --cells class
    python -m lab.studies.audit --requests 1

The populations are those of `salun calibrate`: small nets that memorise noisy digits, and 200 samples or a class to
forget. Writes lab/results/audit.json and the table of docs/reference/audit.md, unless the number of requests
is another one. Two minutes of one core.
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

from lab.calibration.forgeries import Forgery, forgeries_of, mislabelled, unchanged
from lab.calibration.populations import BATCHES, UNLIKE, Draw, dense, request, samples, trained, whole_class
from salun_core.audit.checks import WORDS, examine, level_of, unseen_features
from salun_core.audit.folders import Networks
from salun_core.audit.predictions import Audited
from salun_core.evaluation import Splits
from salun_core.evaluation.likelihood_ratio import Shadows, assignments, logit_scaled
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.evaluation.statistics import wilson_interval
from salun_core.storage.local_files import write_whole

REQUESTS, AUDITED, ORACLES, SHADOWS = 8, 5, 5, 8
"""Requests of a cell, and for each request retrained models to audit, oracles, and shadow models."""
FORGED = 4
"""Requests for which forgeries are made, and shadow models trained: these cost most of the time."""
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
ROOT = Path(__file__).resolve().parents[2]


class Case(NamedTuple):
    """A model before, what it has to forget, and what an auditor may be given."""

    seed: int
    before: nn.Module
    splits: Splits
    retrained: Sequence[nn.Module]
    oracles: Sequence[nn.Module]
    shadows: Shadows | None


def cases(kind: str, draw: Draw, requests: int) -> Iterator[Case]:
    """Yield the cases of a cell. All nets of one kind are trained at once."""
    asked = [request(kind, dense, draw, seed, requests) for seed in range(requests)]
    each = AUDITED + ORACLES
    sets = [one.splits.retain for one in asked for _ in range(each)]
    nets = trained(dense, sets, [UNLIKE + number for number in range(len(sets))], BATCHES[0])
    shadows = _shadows([one.splits for one in asked[:FORGED]]) if kind == "samples" else []
    for place, one in enumerate(asked):
        own = nets[place * each : (place + 1) * each]
        known = shadows[place] if place < len(shadows) else None
        yield Case(one.seed, one.before, one.splits, own[:AUDITED], own[AUDITED:], known)


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
    references = [known[id(model)] for model in case.oracles]
    after_outputs = known.get(id(after)) or outputs_by_set(after, splits)
    return Audited(
        known[id(case.before)], after_outputs, references, case.shadows, sorted(emptied), len(splits.retain), networks
    )


def outputs_by_set(model: nn.Module, splits: Splits) -> dict[str, Outputs]:
    """Run a model on each set."""
    sets = {"forget": splits.forget, "unseen": splits.test}
    return {name: outputs_of(model, images) for name, images in sets.items()}


def measure(cells: Sequence[str], requests: int) -> list[dict[str, object]]:
    """Return a row for each population and way: how many models had each level, and which tests failed.

    Cells are names of requests, `requests` the number of each.
    """
    levels: dict[tuple[str, str, str, str], Counter[str]] = {}
    tests: dict[tuple[str, str, str, str], Counter[str]] = {}
    for cell in cells:
        kind, draw = CELLS[cell]
        for case in cases(kind, draw, requests):
            print(f"{cell}: case {case.seed + 1} of {requests}", file=sys.stderr)
            known = {id(model): outputs_by_set(model, case.splits) for model in (case.before, *case.oracles)}
            population = [("retrained", "honest", model) for model in case.retrained]
            for forgery in [*forgeries_of(kind), *MORE.get(kind, [])] if case.seed < FORGED else ():
                after = case.before if forgery.forge is unchanged else copy.deepcopy(case.before)
                torch.manual_seed(case.seed)
                forgery.forge(after, case.splits.forget, case.splits.retain)
                population.append((forgery.name, forgery.sort, after.eval()))
            for name, sort, model in population:
                found = examine(audited(case, model, known))
                for way, possible in WAYS.items():
                    if "shadow" in way and case.shadows is None:
                        continue
                    chosen = [finding for finding in found if finding.test in possible]
                    if kind == "class" and "models" not in way:
                        chosen.append(unseen_features(len(case.splits.forget)))
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
    ]


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return how many models were refused, by what the auditor is given; for honest ones also how many are measured."""
    lines = [f"| request | model | {' | '.join(WAYS)} |", f"|---|---|{'---|' * len(WAYS)}"]
    found = {(row["cell"], row["model"], row["given"]): row for row in rows}
    for cell, model in dict.fromkeys((row["cell"], row["model"]) for row in rows):
        texts = [_outcome(found.get((cell, model, way))) for way in WAYS]
        lines.append(f"| {cell} | {model} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _outcome(row: Mapping[str, object] | None) -> str:
    """Return the expected level first: `measured` of honest models, `refused` of forgeries."""
    if row is None:
        return ""
    order = ["measured", "procedure", "refused"]
    order = order if row["sort"] == "honest" else order[::-1]
    others = [f"{row[level]} {level}" for level in order[1:] if row[level]]
    return ", ".join([f"{row[order[0]]} of {row['n']} {order[0]}", *others])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each cell")
    parser.add_argument("--cells", nargs="*", choices=list(CELLS), default=list(CELLS), help="kinds of request")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    rows = measure(arguments.cells, arguments.requests)
    print(table(rows))
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
    if arguments.requests == REQUESTS:
        place = ROOT / "lab/results/audit.json"
        kept = json.loads(place.read_text(encoding="utf-8"))["rows"] if place.is_file() else []
        rows += [row for row in kept if row["cell"] not in arguments.cells]
        rows.sort(key=lambda row: list(CELLS).index(str(row["cell"])))
        text = table(rows)
        document = {"oracles": ORACLES, "shadow_models": SHADOWS, "rows": rows}
        write_whole(place, (json.dumps(document, indent=1) + "\n").encode())
        page = ROOT / "docs/reference/audit.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        write_whole(page, f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}".encode())


if __name__ == "__main__":
    main()
