"""Compares an epoch of ResNet-18 with a mask with an epoch without one and with mask-and-restore.

    python -m lab.studies.masked_epoch

All variants train the same model (32 x 32 pixels, small stem, SGD with momentum and weight decay) on the same images in
the same order, by the loop of unlearning. "Mask and restore" is the usual procedure, restated here and called around
each step: see masked_step.py. "Not channels-last" is the unmasked epoch with weights and images in torch's default
layout; the loop has them channels-last.

The variants alternate, each from the same weights, after a warm-up. Wall-clock seconds of the whole run of one epoch,
with the preparation of the mask. Ratios are medians of those within a round. Writes
lab/results/masked-epoch.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lab.studies.compared import report
from lab.studies.masked_step import MaskAndRestore
from salun_core.data.images import ImageSet, Normalisation
from salun_core.methods.classification.method import dataset_phase
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.loop import run_loop
from salun_core.models import build_classifier
from salun_core.saliency import SaliencyMask

VARIANTS = ("plain", "masked", "mask and restore", "not channels-last")
MOST_COST = 0.03


class DefaultLayout(nn.Module):
    """Passes images to a model in torch's default layout."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's logits."""
        return self.model(images.contiguous())


@contextmanager
def restoring(model: nn.Module, mask: SaliencyMask) -> Iterator[None]:
    """Call mask-and-restore around every optimiser step."""
    usual = MaskAndRestore(model, mask)
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: usual.mask_gradients()),
        register_optimizer_step_post_hook(lambda *_: usual.restore()),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def epoch(variant: str, base: nn.Module, mask: SaliencyMask, images: ImageSet, batch: int) -> tuple[float, nn.Module]:
    """Train for one epoch; return wall-clock seconds and the model."""
    config = UnlearnConfig(epochs=1, learning_rate=0.01, batch_size=batch, batch_norm="update", device="cpu")
    model = copy.deepcopy(base)
    if variant == "not channels-last":
        model = DefaultLayout(model.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]
    phases = [dataset_phase("retain", images, config)]
    started = time.perf_counter()
    if variant == "mask and restore":
        with restoring(model, mask):
            run_loop(model, lambda *_: phases, config)
    else:
        run_loop(model, lambda *_: phases, config, mask if variant == "masked" else None)
    return time.perf_counter() - started, model


def measure(images: ImageSet, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return seconds and ratios of each variant."""
    torch.manual_seed(0)
    base = build_classifier("resnet18", 10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mask = SaliencyMask.random({name: weight.shape for name, weight in base.named_parameters()}, 0.5, seed=0)
    epoch("plain", base, mask, images.select(range(min(len(images), 2 * batch))), batch)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(rounds):
        models = {}
        for place in range(len(VARIANTS)):
            name = VARIANTS[(turn + place) % len(VARIANTS)]
            seconds, models[name] = epoch(name, base, mask, images, batch)
            times[name].append(seconds)
    rows = {name: {"seconds": statistics.median(found)} for name, found in times.items()}
    for name, row in rows.items():
        ratios = [one / plain for one, plain in zip(times[name], times["plain"], strict=True)]
        row |= {"against plain": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    pair = models["masked"].state_dict().values(), models["mask and restore"].state_dict().values()
    rows["masked"]["equal to mask and restore"] = float(all(map(torch.equal, *pair)))
    return rows


def comparisons(rows: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Return the ratios and the target."""
    ours, usual, default = (rows[name]["against plain"] for name in VARIANTS[1:])
    bits = "the same bits" if rows["masked"]["equal to mask and restore"] else "OTHER BITS"
    return [
        {
            "what": "epoch of ResNet-18, against one without a mask",
            "usual": f"{usual:.3f} x",
            "ours": f"{ours:.3f} x",
            "ratio": f"{100 * (ours - 1):+.1f} % against {100 * (usual - 1):+.1f} %, {bits}",
            "target": f"at most +{100 * MOST_COST:.0f} %",
        },
        {
            "what": "epoch of ResNet-18 in torch's default layout, against channels-last",
            "usual": f"{default:.3f} x",
            "ours": "1.000 x",
            "ratio": f"{100 * (default - 1):+.1f} %",
            "target": "-",
        },
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="64 images in batches of 32, one round")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count, batch, rounds = (64, 32, 1) if arguments.quick else (arguments.images, arguments.batch, arguments.rounds)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    images = ImageSet(pixels, labels, Normalisation((0.5,) * 3, (0.25,) * 3), "crop-flip")
    rows = measure(images, batch, rounds)
    print("| epoch | s | against plain | lowest | highest |\n|---|---|---|---|---|")
    for name, row in rows.items():
        ratios = " | ".join(f"{row[key]:.3f}" for key in ("against plain", "lowest", "highest"))
        print(f"| {name} | {row['seconds']:.2f} | {ratios} |")
    report(
        "masked-epoch",
        rows,
        comparisons(rows),
        threads=arguments.threads,
        quick=arguments.quick,
        rounds=rounds,
        images=count,
        batch=batch,
    )


if __name__ == "__main__":
    main()
