"""Compares the cost of one evaluation's membership attacks with five support vector classifiers.

    python -m lab.studies.attack

The usual procedure, restated here: for each of five features of a model's outputs (whether it is right, probability of
the true class, entropy, modified entropy, all probabilities) fit an RBF support vector classifier (C = 3, gamma "auto")
on 10,000 members and 10,000 others, and classify each forgotten sample. This library computes three attacks per
evaluation: by confidence on at most 2,048 weighted points per side, by modified entropy with the best threshold, and
the ROC by the loss. The first two are among the five, the third is not.

The outputs are drawn: softmax of ten logits, of a model that has memorised its members. CPU seconds of this process;
the procedures alternate, and the table shows medians. Writes lab/results/attack.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from sklearn.svm import SVC

from lab.studies.compared import report
from salun_core.evaluation.membership import attack_roc, confidence_attack, entropy_attack, modified_entropy
from salun_core.evaluation.outputs import Outputs

CLASSES, TARGET_RATIO = 10, 33  # 1.5 s where five classifiers take 50
FEATURES: dict[str, Callable[[Outputs], np.ndarray]] = {
    "correctness": lambda outputs: outputs.correct.astype(np.float64)[:, None],
    "confidence": lambda outputs: outputs.confidences[:, None],
    "entropy": lambda outputs: entropy(outputs)[:, None],
    "modified entropy": lambda outputs: modified_entropy(outputs)[:, None],
    "probabilities": lambda outputs: outputs.probabilities,
}


def entropy(outputs: Outputs) -> np.ndarray:
    """Return the entropy of each prediction, in nats."""
    p = outputs.probabilities
    return -(p * np.log(np.clip(p, 1e-30, 1))).sum(axis=1)


def drawn(count: int, lift: float, spread: float, rng: np.random.Generator) -> Outputs:
    """Draw outputs: logits of unit variance, that of the true class raised by a normal variable."""
    labels = rng.integers(0, CLASSES, count)
    logits = rng.normal(size=(count, CLASSES))
    logits[np.arange(count), labels] += rng.normal(lift, spread, count)
    logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return Outputs(np.exp(logs), -logs[np.arange(count), labels], labels)


def share_unseen(feature: Callable[[Outputs], np.ndarray], members: Outputs, others: Outputs, asked: Outputs) -> float:
    """Fit one classifier on every sample; return the share of `asked` that it classifies as unseen."""
    known = np.concatenate([feature(members), feature(others)])
    truth = np.repeat([1, 0], [len(members), len(others)])
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(known, truth)
    return float((attack.predict(feature(asked)) == 0).mean())


def timed(work: Callable[[], float]) -> tuple[float, float]:
    """Return CPU seconds and the result."""
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def attacks(members: Outputs, others: Outputs, asked: Outputs) -> dict[str, Callable[[], float]]:
    """Return all attacks of both procedures; each returns the share classified as unseen, the ROC its area."""
    work: dict[str, Callable[[], float]] = {
        f"SVC, {name}": partial(share_unseen, feature, members, others, asked) for name, feature in FEATURES.items()
    }
    work["ours, confidence"] = lambda: float(confidence_attack(members, others, asked).mean())
    work["ours, modified entropy"] = lambda: float(entropy_attack(members, others, asked).mean())
    work["ours, ROC"] = lambda: attack_roc(asked, others).auc
    return work


def measure(size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return for each attack the median CPU seconds and the share of the forget set classified as unseen."""
    runs: dict[str, list[tuple[float, float]]] = {}
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        members, others = drawn(size, 11, 2, rng), drawn(size, 6, 3.5, rng)
        for name, work in attacks(members, others, drawn(size // 2, 8, 3, rng)).items():
            runs.setdefault(name, []).append(timed(work))
    rows = {
        name: {"cpu_s": statistics.median(run[0] for run in found), "value": statistics.median(run[1] for run in found)}
        for name, found in runs.items()
    }
    pairs = zip(runs["SVC, confidence"], runs["ours, confidence"], strict=True)
    rows["ours, confidence"]["furthest_from_svc"] = max(abs(left[1] - right[1]) for left, right in pairs)
    return rows


def comparisons(rows: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Return the ratios and their targets."""
    usual = sum(row["cpu_s"] for name, row in rows.items() if name.startswith("SVC"))
    ours = sum(row["cpu_s"] for name, row in rows.items() if name.startswith("ours"))
    one, same = rows["SVC, confidence"]["cpu_s"], rows["ours, confidence"]["cpu_s"]
    return [
        {
            "what": "membership attacks of one model, CPU s",
            "usual": f"{usual:.1f}",
            "ours": f"{ours:.2f}",
            "ratio": f"{usual / ours:.0f} x less",
            "target": f"{TARGET_RATIO} x less",
        },
        {
            "what": "of these the attack by confidence, CPU s",
            "usual": f"{one:.1f}",
            "ours": f"{same:.2f}",
            "ratio": f"{one / same:.1f} x less",
            "target": "-",
        },
        {
            "what": "its MIA, %",
            "usual": f"{100 * rows['SVC, confidence']['value']:.2f}",
            "ours": f"{100 * rows['ours, confidence']['value']:.2f}",
            "ratio": f"at most {100 * rows['ours, confidence']['furthest_from_svc']:.2f} points apart",
            "target": "at most 0.1 points apart",
        },
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a quarter of the samples, one round")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size, rounds = (2500, 1) if arguments.quick else (10_000, arguments.rounds)
    rows = measure(size, rounds)
    print("| attack | CPU, s | share classified as unseen, or area |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['cpu_s']:.2f} | {row['value']:.4f} |")
    report(
        "attack",
        rows,
        comparisons(rows),
        threads=arguments.threads,
        quick=arguments.quick,
        rounds=rounds,
        members=size,
        others=size,
        asked=size // 2,
    )


if __name__ == "__main__":
    main()
