"""Compares the cost of a masked optimiser step with the plain step and with mask-and-restore, on ResNet-18.

    python -m lab.studies.masked_step

All variants alternate in one process, so that a machine whose speed drifts does not favour one. "Mask and restore" is
the usual procedure, restated here: multiply each gradient by an int64 mask, check each tensor for change (a host
synchronisation), step, and copy the frozen weights back from a saved model. Prints a table of ratios (median of the
rounds) and writes lab/results/masked-step.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lab.studies.compared import report
from salun_core.models import build_classifier
from salun_core.saliency import SaliencyMask, masked_optimizer

TARGET_RATIO = 4
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD, momentum, weight decay": lambda model: SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
    "Adam, weight decay": lambda model: Adam(model.parameters(), lr=1e-3, weight_decay=5e-4),
    "AdamW": lambda model: AdamW(model.parameters(), lr=1e-3, weight_decay=0.01),
}


class MaskAndRestore:
    """The usual procedure: mask the gradient, step, put the frozen weights back."""

    def __init__(self, model: nn.Module, mask: SaliencyMask) -> None:
        self.model = model
        self.masks = {
            name: torch.empty_like(parameter, dtype=torch.int64, requires_grad=False).copy_(mask.tensor(name))
            for name, parameter in model.named_parameters()
        }
        self.original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Multiply each gradient by its mask if the mask has a zero: the test synchronises once for each tensor."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and bool((self.masks[name] == 0).any()):
                parameter.grad *= self.masks[name]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the frozen weights back."""
        for name, parameter in self.model.named_parameters():
            mask = self.masks[name]
            parameter.copy_(parameter * mask + self.original[name] * (1 - mask))

    def around(self, step: Callable[[], object]) -> None:
        """Take one step."""
        self.mask_gradients()
        step()
        self.restore()


def measure(make: Callable[[nn.Module], Optimizer], rounds: int) -> dict[str, float]:
    """Return the median seconds of each variant, and the medians of the ratios to the plain step."""
    base = build_classifier("resnet18", 10)
    mask = SaliencyMask.random({name: p.shape for name, p in base.named_parameters()}, 0.5, seed=0)
    models = {name: copy.deepcopy(base) for name in ("plain", "masked", "mask and restore")}
    plain = make(models["plain"])
    masked = masked_optimizer(make(models["masked"]), models["masked"], mask)
    usual = make(models["mask and restore"])
    restore = MaskAndRestore(models["mask and restore"], mask)
    steps = {"plain": plain.step, "masked": masked.step, "mask and restore": lambda: restore.around(usual.step)}
    gradients = [torch.randn_like(parameter) * 1e-3 for parameter in base.parameters()]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 3):
        for name, step in steps.items():
            for parameter, gradient in zip(models[name].parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            started = time.perf_counter()
            step()
            if turn >= 3:
                times[name].append(time.perf_counter() - started)
    result = {name: statistics.median(values) for name, values in times.items()}
    for name in ("masked", "mask and restore"):
        pairs = zip(times[name], times["plain"], strict=True)
        result[f"{name} / plain"] = statistics.median(ours / theirs for ours, theirs in pairs)
    pairs = zip(times["mask and restore"], times["masked"], strict=True)
    result["mask and restore / masked"] = statistics.median(usual / ours for usual, ours in pairs)
    same = all(
        torch.equal(left, right)
        for left, right in zip(models["masked"].parameters(), models["mask and restore"].parameters(), strict=True)
    )
    return result | {"equal to mask and restore": float(same)}


def comparisons(rows: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Return the ratios and the target, which is for SGD."""
    return [
        {
            "what": f"masked step of {name}, ms",
            "usual": f"{1e3 * row['mask and restore']:.1f}",
            "ours": f"{1e3 * row['masked']:.1f}",
            "ratio": f"{row['mask and restore / masked']:.1f} x less, "
            + ("the same bits" if row["equal to mask and restore"] else "OTHER BITS"),
            "target": f"{TARGET_RATIO} x less, the same bits" if name.startswith("SGD") else "-",
        }
        for name, row in rows.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="five rounds")
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    torch.set_num_threads(arguments.threads)
    rows = {name: measure(make, rounds) for name, make in OPTIMIZERS.items()}
    print("| optimiser | plain, ms | masked, ms | masked / plain | mask and restore / plain |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['plain'] * 1e3:.1f} | {row['masked'] * 1e3:.1f} | {row['masked / plain']:.2f} "
            f"| {row['mask and restore / plain']:.2f} |"
        )
    report("masked-step", rows, comparisons(rows), threads=arguments.threads, quick=arguments.quick, rounds=rounds)


if __name__ == "__main__":
    main()
