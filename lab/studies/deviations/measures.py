"""One function per difference: measures both sides on one seed.

Each returns the cells (UA, RA, TA, MIA, gap by variant) and the facts (its own numbers). The name of a variant is its
side, `ours` or `theirs`, then a method, or a learning rate of which the best counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch import nn

from lab.studies.deviations import influence, theirs
from lab.studies.deviations.stage import CLASSES, DENSITY, RATE, Cell, Stage
from lab.studies.deviations.weights import frozen_change, overlap
from salun_core.evaluation.membership import entropy_attack, modified_entropy
from salun_core.evaluation.outputs import Outputs
from salun_core.methods.classification import boundary_expanding, sfr_on
from salun_core.methods.classification.method import ClassifierContext
from salun_core.saliency import SaliencyMask
from salun_core.saliency.scores import scoring

RATES = (0.01, 0.02, 0.04, 0.08)
FROZEN_RATES = (0.0025, 0.005, 0.01, 0.02)
FORGET_ONLY_RATES = (0.001, 0.003, 0.01)
DENSITIES = (0.1, 0.5)
METHODS = ("random_label", "salun")
GRIDDED = ("salun",)


@dataclass(frozen=True)
class Measured:
    """Result of one difference on one seed: ratios by variant, and facts by name."""

    cells: dict[str, Cell] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)


def split(stage: Stage) -> Measured:
    """The base model was trained on another draw from the pool."""
    cells = {
        "ours original": stage.cell("original", lambda: stage.base),
        "theirs original": stage.cell("original elsewhere", lambda: stage.elsewhere),
        "ours salun": stage.ours(learning_rate=RATE),
        "theirs salun": stage.cell("salun elsewhere", lambda: _from_elsewhere(stage)),
    }
    return Measured(cells, {"never seen": stage.never_seen})


def _from_elsewhere(stage: Stage) -> nn.Module:
    return stage.unlearnt("salun", stage.elsewhere, stage.mask_of(stage.elsewhere))


def wrong_labels(stage: Stage) -> Measured:
    """A random label may be the true one."""

    def make(method: str) -> nn.Module:
        mask = stage.mask if method == "salun" else None
        return theirs.trained(stage.base, stage.context(), theirs.labels_of_all_classes, mask)

    cells = {f"ours {method}": stage.ours(method, learning_rate=RATE) for method in METHODS}
    for method in METHODS:
        cells[f"theirs {method}"] = stage.cell(f"{method} labels of all classes", partial(make, method))
    draw = theirs.labels_of_all_classes(stage.context(), torch.Generator().manual_seed(stage.seed))[0]
    return Measured(cells, {"true": float((draw.images.labels == stage.forget.labels).float().mean())})


def order(stage: Stage) -> Measured:
    """Forget and retain images mixed in each batch."""
    cells = {}
    for method in GRIDDED:
        for rate in RATES:
            cells[f"ours {method} {rate}"] = stage.ours(method, learning_rate=rate)
            cells[f"theirs {method} {rate}"] = stage.ours(method, learning_rate=rate, order="mixed")
    return Measured(cells)


def batch_norm(stage: Stage) -> Measured:
    """Running statistics are updated."""
    cells = {}
    for method in GRIDDED:
        for rate, frozen in zip(RATES, FROZEN_RATES, strict=True):
            cells[f"ours {method} {frozen}"] = stage.ours(method, learning_rate=frozen, batch_norm="freeze")
            cells[f"theirs {method} {rate}"] = stage.ours(method, learning_rate=rate)
    return Measured(cells)


def reduction(stage: Stage) -> Measured:
    """Saliency from the sum of batch means: the last batch has 2 of 64 images, or 194 of 256."""
    scores = {size: theirs.scores_by_batch(stage.base, stage.forget.batches(size)) for size in (64, 256)}
    facts: dict[str, float] = {}
    for density in DENSITIES:
        whole = stage.mask_of(stage.base, density)
        for size, found in scores.items():
            facts |= overlap(f"batch {size}, density {density}", whole, SaliencyMask.from_scores(found, density))
    mask = SaliencyMask.from_scores(scores[64], DENSITY)
    made = stage.cell("salun batch means", lambda: stage.unlearnt("salun", mask=mask))
    return Measured({"ours salun": stage.ours(learning_rate=RATE), "theirs salun": made}, facts)


def augmented(stage: Stage) -> Measured:
    """Saliency of augmented images, drawn twice."""
    draws = [replace(stage.forget, **_drawn(stage, seed)) for seed in (2 * stage.seed, 2 * stage.seed + 1)]
    scores = [theirs.scores_by_batch(stage.base, images.batches(len(images))) for images in draws]
    facts: dict[str, float] = {}
    for density in DENSITIES:
        first, second = (SaliencyMask.from_scores(found, density) for found in scores)
        facts |= overlap(f"two draws, density {density}", first, second)
        facts |= overlap(f"not augmented, density {density}", stage.mask_of(stage.base, density), first)
    mask = SaliencyMask.from_scores(scores[0], DENSITY)
    made = stage.cell("salun augmented saliency", lambda: stage.unlearnt("salun", mask=mask))
    return Measured({"ours salun": stage.ours(learning_rate=RATE), "theirs salun": made}, facts)


def _drawn(stage: Stage, seed: int) -> dict[str, Any]:
    return {"images": theirs.augmented_once(stage.forget, seed).images}


def masked_step(stage: Stage) -> Measured:
    """Only the gradient is masked."""
    facts: dict[str, float] = {}

    def make() -> nn.Module:
        model = theirs.only_gradient_masked(stage.base, stage.context(), stage.mask)
        facts.update(stage.kept("frozen weights", lambda: frozen_change(stage.base, model, stage.mask)))
        return model

    cells = {"ours salun": stage.ours(learning_rate=RATE), "theirs salun": stage.cell("salun gradient masked", make)}
    return Measured(cells, facts or stage.kept("frozen weights", dict))


def attack(stage: Stage) -> Measured:
    """Modified entropy, faulty and as defined."""
    facts: dict[str, float] = {}
    for name in ("original", "retrained", "unlearned"):
        values = stage.kept(f"attack {name}", partial(_attacked, stage, name))
        facts |= {f"{name}: {key}": value for key, value in values.items()}
    return Measured(facts=facts)


def _attacked(stage: Stage, name: str) -> dict[str, float]:
    made = {"original": stage.base, "retrained": stage.reference}
    return attack_values(stage.outputs(made[name] if name in made else stage.unlearnt("salun")))


def attack_values(outputs: dict[str, Outputs]) -> dict[str, float]:
    """Return the share of D_f classified as unseen: by the threshold used here, and by the reference's classifier."""
    forget, retain, test = outputs["forget"], outputs["retain"], outputs["test"]
    values = {"threshold": float(entropy_attack(retain, test, forget).mean())}
    for name, entropy in (("defined", modified_entropy), ("faulty", theirs.label_blind_entropy)):
        size = min(len(retain), len(test))
        known = np.concatenate([entropy(retain)[:size], entropy(test)[:size]])[:, None]
        fitted = SVC(C=3, gamma="auto", kernel="rbf").fit(known, np.repeat([1, 0], size))
        values[name] = float((fitted.predict(entropy(forget)[:, None]) == 0).mean())
    return values


def expanding(stage: Stage) -> Measured:
    """The added logit is kept."""
    cells: dict[str, Cell] = {}
    facts: dict[str, float] = {}
    for rate in FORGET_ONLY_RATES:
        name = f"expanded {rate}"
        cells[f"ours boundary_expanding {rate}"] = stage.ours("boundary_expanding", learning_rate=rate)
        cells[f"theirs boundary_expanding {rate}"] = stage.cell(name, partial(_expanded, stage, rate))
        called = stage.kept(f"{name} called extra", partial(_called_extra, stage, rate))
        facts |= {f"{rate}: {key}": value for key, value in called.items()}
    return Measured(cells, facts)


def _expanded(stage: Stage, rate: float) -> nn.Module:
    model = copy.deepcopy(stage.base)
    context = replace(stage.context("boundary_expanding", learning_rate=rate), model=model)
    return theirs.trained_in_place(model, boundary_expanding.begin(context), boundary_expanding.phases)


def _called_extra(stage: Stage, rate: float) -> dict[str, float]:
    outputs = stage.outputs(_expanded(stage, rate))
    return {name: float((found.predictions == CLASSES).mean()) for name, found in outputs.items()}


def shrink(stage: Stage) -> Measured:
    """The true label may be the nearest."""
    cells = {}
    for rate in FORGET_ONLY_RATES:
        cells[f"ours boundary_shrink {rate}"] = stage.ours("boundary_shrink", learning_rate=rate)
        cells[f"theirs boundary_shrink {rate}"] = stage.cell(
            f"shrunk with true labels {rate}",
            partial(_shrunk, stage, rate),
        )
    return Measured(cells, stage.kept("nearest labels", lambda: nearest_labels(stage)))


def _shrunk(stage: Stage, rate: float) -> nn.Module:
    context = stage.context("boundary_shrink", learning_rate=rate)
    return theirs.trained(stage.base, context, theirs.shrink_with_true_labels)


def nearest_labels(stage: Stage) -> dict[str, float]:
    """Return the share of D_f whose nearest class is the true one, and whose label the rounding changes."""
    context: ClassifierContext = replace(stage.context("boundary_shrink"), original=stage.base)
    images, labels = next(stage.forget.batches(len(stage.forget)))
    free, plain, rounded = (
        theirs.label_of_rounded_step(context, images, labels, exclude, rounding)
        for exclude, rounding in ((False, True), (True, False), (True, True))
    )
    return {
        "true is nearest": float((free == labels).float().mean()),
        "changed by rounding": float((plain != rounded).float().mean()),
    }


def running_vector(stage: Stage) -> Measured:
    """One running vector for all inverse products."""
    cells = {
        "ours influence": stage.ours("influence"),
        "theirs influence": stage.cell("running vector", lambda: influence.edited(stage)),
    }
    return Measured(cells, stage.kept("inverse product", lambda: influence.distances(stage)))


def soft(stage: Stage) -> Measured:
    """The share that is restored falls once per epoch; both sides in mixed order, the only one where it does."""
    facts: dict[str, float] = {}

    def make() -> nn.Module:
        model = theirs.trained(stage.base, stage.context("salun_soft", order="mixed"), theirs.softened_by_epoch)
        pairs = list(zip(stage.base.parameters(), model.parameters(), strict=True))
        moved = sum(int((old != new).sum()) for old, new in pairs) / sum(old.numel() for old, _ in pairs)
        facts.update(stage.kept("moved by epochs", lambda: {"moved": moved}))
        return model

    cells = {
        "ours salun_soft": stage.ours("salun_soft", learning_rate=RATE, order="mixed"),
        "theirs salun_soft": stage.cell("soft by epochs", make),
    }
    return Measured(cells, facts or stage.kept("moved by epochs", dict))


def sfr_mask(stage: Stage) -> Measured:
    """SFR-on's mask from squares of batch means on augmented images; steps and clipping as here."""
    context = stage.context("sfr_on", learning_rate=RATE / 2)
    with scoring(stage.base):
        ours = sfr_on.begin(replace(context, model=stage.base)).salient
    found = theirs.salient_by_batch(stage.base, context, context.config)
    differ = sum(int((ours[name] != found[name]).sum()) for name in ours) / sum(bits.numel() for bits in ours.values())
    made = stage.cell(
        "sfr_on batch means", lambda: theirs.trained(stage.base, replace(context, salient=found), sfr_on.phases)
    )
    cells = {"ours sfr_on": stage.ours("sfr_on", learning_rate=RATE / 2), "theirs sfr_on": made}
    return Measured(cells, {"bits that differ": differ})


MEASURES: dict[str, Callable[[Stage], Measured]] = {
    "split": split,
    "wrong-labels": wrong_labels,
    "order": order,
    "batch-norm": batch_norm,
    "reduction": reduction,
    "augmented": augmented,
    "masked-step": masked_step,
    "attack": attack,
    "salun_soft": soft,
    "influence": running_vector,
    "boundary_expanding": expanding,
    "boundary_shrink": shrink,
    "sfr_on": sfr_mask,
}
