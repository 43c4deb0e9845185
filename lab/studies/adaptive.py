"""Measures `salun_adaptive` against `salun` and other methods, on cases that differ in net, data and request.

    python -m lab.studies.adaptive                  # the cases on scikit-learn's digits
    python -m lab.studies.adaptive --data FOLDER    # all; FOLDER has cifar10/, imagenette160/ and faces/ as Parquet
    python -m lab.studies.adaptive --cases "digits-mlp: class"

Each net is trained in the script, in at most a few minutes on one core, and each method runs with its own defaults. One
net is written in the layout of a public repository and imported from its file. Digits have noise, so that the nets
memorise what they cannot generalise. Accuracies, AUC and the gate are measured on test data, which no method sees.
It prints the table; with --write it also writes lab/results/adaptive.json and the table in
docs/research/adaptive.md; --check compares both. `--results FILE` continues a file of an earlier call, `--nets FOLDER`
keeps the trained nets.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lab.studies import first_use_model
from salun_core.data import DataSpec, ImageSet, load_data
from salun_core.errors import DivergedError
from salun_core.evaluation import Splits, evaluate_classifier
from salun_core.evaluation.evidence import Forgotten, Measured
from salun_core.gate import Policy, decide, load_policy
from salun_core.methods.classification import unlearn
from salun_core.models import build_classifier
from salun_core.models.checkpoint import load_weights
from salun_core.models.importing import read_checkpoint
from salun_core.models.layouts import recognise
from salun_core.saliency import SaliencyMask, saliency_scores

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "lab/results/adaptive.json", ROOT / "docs/research/adaptive.md"
NOISE, CLASS, DENSITY = 60.0, 3, 0.5  # of 255; the class and the share of weights of the mask
MOST_LOST = 0.02
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "adaptive": ("salun_adaptive", {}),
    "fixed": ("salun", {}),
    "sfr_on": ("sfr_on", {}),
    "scrub": ("scrub", {}),
}
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def specs(folder: Path | None) -> Mapping[str, DataSpec]:
    """Return the data sets that can be read."""
    found = {"digits": DataSpec(source="digits"), "digits-colour": DataSpec(source="digits", channels=3)}
    if folder is None:
        return found
    cifar, imagenette = folder / "cifar10", folder / "imagenette160"
    return found | {
        "cifar10": DataSpec(
            source=str(cifar / "train.parquet"),
            test_source=str(cifar / "test.parquet"),
            classes=CIFAR10,
            size=16,
            train_limit=4000,
            test_limit=2000,
        ),
        "imagenette": DataSpec(
            source=str(imagenette / "train.parquet"),
            test_source=str(imagenette / "val.parquet"),
            size=32,
            validation_fraction=0.15,
        ),
        "faces": DataSpec(
            source=str(folder / "faces/faces.parquet"),
            subject_column="subject_id",
            channels=1,
            size=32,
            validation_fraction=0.15,
        ),
    }


def mlp(classes: int) -> nn.Module:
    """Build a net without convolutions for digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, classes))


def transformer(channels: int, size: int, patch: int) -> Callable[[int], nn.Module]:
    """Return a builder of a small vision transformer."""
    from timm.models.vision_transformer import VisionTransformer

    return lambda classes: VisionTransformer(
        img_size=size, patch_size=patch, in_chans=channels, num_classes=classes, embed_dim=64, depth=4, num_heads=4
    )


def resnet(channels: int, size: int) -> Callable[[int], nn.Module]:
    """Return a builder of a ResNet-8."""
    return lambda classes: build_classifier("resnet8", classes, channels, size)


def public_resnet(classes: int) -> nn.Module:
    """Build a ResNet-20 as a public repository has it; nothing of it is this project's."""
    model = first_use_model.ResNet20()
    model.linear = nn.Linear(64, classes)
    return model


@dataclass(frozen=True)
class Net:
    """How a net is made: `build` takes the number of classes; the rate is the largest, of SGD, or AdamW below 0.01.

    `imported` writes it to a file and imports it from there.
    """

    data: str
    build: Callable[[int], nn.Module]
    epochs: int
    rate: float
    imported: bool = False


NETS: Mapping[str, Net] = {
    "digits-mlp": Net("digits", mlp, 40, 0.05),
    "digits-resnet8": Net("digits", resnet(1, 8), 10, 0.1),
    "digits-resnet20 (imported)": Net("digits-colour", public_resnet, 10, 0.1, imported=True),
    "digits-vit": Net("digits", transformer(1, 8, 2), 25, 0.001),
    "cifar-resnet8": Net("cifar10", resnet(3, 16), 15, 0.1),
    "cifar-vit": Net("cifar10", transformer(3, 16, 4), 20, 0.001),
    "imagenette-resnet8": Net("imagenette", resnet(3, 32), 15, 0.1),
    "faces-resnet8": Net("faces", resnet(1, 32), 30, 0.05),
}
Draw = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(labels of the training images, generator) -> indices of the forget set."""


def samples(count: int) -> Draw:
    """Draw so many images at random."""
    return lambda labels, rng: rng.permutation(len(labels))[:count]


def whole_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return all images of one class; among the faces, of a person."""
    return np.flatnonzero(labels == CLASS)


def subject(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the images of a person who wrote two digits often and all others rarely."""
    weights = np.where(np.isin(labels, rng.permutation(int(labels.max()) + 1)[:2]), 10.0, 1.0)
    return rng.choice(len(labels), 60, replace=False, p=weights / weights.sum())


CASES: Sequence[tuple[str, str, Draw]] = (
    ("digits-mlp", "5 samples", samples(5)),
    ("digits-mlp", "class", whole_class),
    ("digits-resnet8", "50 samples", samples(50)),
    ("digits-resnet8", "subject", subject),
    ("digits-resnet20 (imported)", "50 samples", samples(50)),
    ("digits-resnet20 (imported)", "class", whole_class),
    ("digits-vit", "20 samples", samples(20)),
    ("digits-vit", "class", whole_class),
    ("faces-resnet8", "subject", whole_class),
    ("faces-resnet8", "20 samples", samples(20)),
    ("imagenette-resnet8", "class", whole_class),
    ("cifar-resnet8", "class", whole_class),
    ("cifar-resnet8", "200 samples", samples(200)),
    ("cifar-vit", "50 samples", samples(50)),
)
"""Net, name of the request, and its draw."""


def noisy(images: ImageSet, seed: int) -> ImageSet:
    """Add noise to the pixels."""
    generator = torch.Generator().manual_seed(seed)
    noise = NOISE * torch.randn(images.images.shape, generator=generator)
    pixels = (images.images.float() + noise).clamp(0, 255).to(torch.uint8)
    return ImageSet(pixels, images.labels, images.normalisation, images.augment, images.ids)


def images_of(name: str, spec: DataSpec) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return training, validation and test images."""
    data = load_data(spec)
    train = data.images("train")
    parts = (train, data.images("validation", train.normalisation), data.images("test", train.normalisation))
    return tuple(noisy(part, seed) for seed, part in enumerate(parts)) if name.startswith("digits") else parts


def trained(net: Net, images: ImageSet, kept: Path) -> nn.Module:
    """Train a net with a rate that rises and falls, or read it if it was kept."""
    torch.manual_seed(0)
    model = net.build(int(images.labels.max()) + 1).to(memory_format=torch.channels_last)
    if not kept.exists():
        size, adam = 64 if len(images) > 600 else 32, net.rate < 0.01
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(model.parameters(), net.rate)
            if adam
            else torch.optim.SGD(model.parameters(), net.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
        )
        steps = net.epochs * -(-len(images) // size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, net.rate, total_steps=steps, pct_start=0.2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(net.epochs):
            for inputs, labels in images.batches(size, generator, augment=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                schedule.step()
        torch.save(model.state_dict(), kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return (imported(model, images) if net.imported else model).eval()


def imported(model: nn.Module, images: ImageSet) -> nn.Module:
    """Write a network as public checkpoints are, and import it from the file."""
    state = {f"module.{name}": value for name, value in model.state_dict().items() if "num_batches" not in name}
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"state_dict": state, "best_prec1": 99.0}, Path(folder, "resnet20.th"))
        found = recognise(read_checkpoint(Path(folder, "resnet20.th")), None, 3, images.images.shape[-1])
    network = build_classifier(found.architecture, found.num_classes or 0, 3)
    load_weights(network, found.state)
    return network.to(memory_format=torch.channels_last)


def measured(
    model: nn.Module, request: str, parts: tuple[ImageSet, ImageSet, ImageSet], draw: Draw, policy: Policy
) -> dict[str, Any]:
    """Run all methods on one case and return their figures by method."""
    train, held_out, test = parts
    labels = train.labels.numpy()
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[draw(labels, np.random.default_rng(0))] = True
    forget, retain = (train.select(np.flatnonzero(side).tolist()) for side in (chosen, ~chosen))
    emptied = sorted(set(forget.labels.tolist()) - set(retain.labels.tolist()))
    inside = int(np.isin(forget.labels.numpy(), emptied).sum())
    kind = request.split()[-1]
    forgotten = Forgotten(count=len(forget), train_count=len(train), kinds=[kind], classes=emptied, in_classes=inside)
    scores = saliency_scores(model, forget.batches(64), nn.functional.cross_entropy, samples=len(forget))
    mask = SaliencyMask.from_scores(scores, DENSITY)
    found: dict[str, Any] = {}
    for name, (method, config) in METHODS.items():
        started, used = time.perf_counter(), mask if "salun" in method else None
        digests = Measured(
            before="b", after="a", dataset="d", split="s", forget_set="f", mask=used.digest if used else None
        )
        try:
            result = unlearn(
                model, method, forget=forget, retain=retain, held_out=held_out, config=dict(config), mask=used
            )
        except DivergedError:
            found[name] = {"passed": False, "failed": ["diverged"]}
            continue
        seconds = time.perf_counter() - started
        evidence = evaluate_classifier(model, result.model, Splits(forget, retain, test), digests, forgotten, mask=used)
        decision = decide(evidence, policy)
        figures = {
            key: [evidence.metrics[key].before, evidence.metrics[key].after]
            for key in ("RA", "TA", "attack_auc", "UA_class", "restored")
            if key in evidence.metrics
        }
        found[name] = {
            **figures,
            "passed": decision.passed,
            "failed": sorted({verdict.metric or verdict.rule for verdict in decision.verdicts if not verdict.passed}),
            "epochs": result.passes / len(train),
            "seconds": round(seconds, 1),
            "ended": result.ended,
        }
        lost = {key: 100 * (figures[key][0] - figures[key][1]) for key in ("RA", "TA")}
        print(
            f"  {name:9} lost RA {lost['RA']:5.1f} TA {lost['TA']:5.1f}  {found[name]['failed']}  {result.ended}",
            flush=True,
        )
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table and its summary as Markdown."""
    lines = [
        "| case | before: RA / TA / AUC | adaptive: RA / TA / AUC | gate | epochs | ended | fixed: RA / TA | gate | "
        "best other: RA / TA | gate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, found in results.items():
        new, old = found["adaptive"], found["fixed"]
        others = {name: item for name, item in found.items() if name not in {"adaptive", "fixed"} and "RA" in item}
        name = max(others, key=lambda one: (others[one]["passed"], -_lost(others[one])))
        whole = "UA_class" in new
        area = ["-" if whole else f"{value:.2f}" for value in new["attack_auc"]]
        lines.append(
            f"| {case} | {_shares(new, 0)} / {area[0]} | {_shares(new, 1)} / {area[1]} | {_gate(new)} | "
            f"{new['epochs']:.1f} | {new['ended'].split(':')[0]} | {_shares(old, 1)} | {_gate(old)} | "
            f"`{name}`: {_shares(others[name], 1)} | {_gate(others[name])} |"
        )
    losses = [_lost(found["adaptive"]) for found in results.values()]
    possible = [found for found in results.values() if any(item["passed"] for item in found.values())]
    passed = sum(found["adaptive"]["passed"] for found in possible)
    harmless = sum(loss <= MOST_LOST for loss in losses)
    fixed = [_lost(found["fixed"]) for found in results.values()]
    lines += [
        "",
        f"The adaptive recipe costs at most 2 points of RA and TA in {harmless} of {len(losses)} cases (at most "
        f"{100 * max(losses):.1f}); the fixed one in {sum(loss <= MOST_LOST for loss in fixed)} (at most "
        f"{100 * max(fixed):.1f}). The adaptive recipe passes the gate in {passed} of the {len(possible)} cases "
        f"that some method here passes, the fixed one in {sum(found['fixed']['passed'] for found in possible)}.",
    ]
    return "\n".join(lines)


def _lost(item: Mapping[str, Any]) -> float:
    return max(item[name][0] - item[name][1] for name in ("RA", "TA")) if "RA" in item else 1.0


def _shares(item: Mapping[str, Any], state: int) -> str:
    return " / ".join(f"{100 * item[name][state]:.1f}" for name in ("RA", "TA")) if "RA" in item else "diverged"


def _gate(item: Mapping[str, Any]) -> str:
    return "passed" if item["passed"] else "refused: " + ", ".join(item["failed"])


def main() -> None:
    """Measure the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cases", nargs="*", help="such as 'digits-mlp: class'")
    parser.add_argument("--nets", type=Path, help="folder for the trained nets")
    parser.add_argument("--results", type=Path, help="file of results to continue")
    parser.add_argument("--write", action="store_true", help="write the results and the page")
    parser.add_argument("--check", action="store_true", help="measure nothing; exit with 1 if the page is another one")
    given = parser.parse_args()
    if given.check:
        if PAGE.read_text() != _filled(json.loads(RESULTS.read_text())):
            sys.exit(
                "docs/research/adaptive.md does not have the table of lab/results/adaptive.json: "
                "run this script with --results and that file, and --write"
            )
        return
    torch.set_num_threads(1)
    policy, available = load_policy("classifier"), specs(given.data)
    results: dict[str, Any] = json.loads(given.results.read_text()) if given.results and given.results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        nets = given.nets or Path(folder)
        for name, request, draw in CASES:
            case, net = f"{name}: {request}", NETS[name]
            if net.data not in available or case in results or (given.cases and case not in given.cases):
                continue
            parts = images_of(net.data, available[net.data])
            print(case, flush=True)
            results[case] = measured(
                trained(net, parts[0], nets / f"{name.split()[0]}.pt"), request, parts, draw, policy
            )
            if given.results:
                given.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if given.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(_filled(results))


def _filled(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page with the table of these results."""
    table_between = rf"\1\n{table(results)}\n\2"
    return re.sub("(<!-- table -->).*(<!-- /table -->)", table_between, PAGE.read_text(), flags=re.S)


if __name__ == "__main__":
    main()
