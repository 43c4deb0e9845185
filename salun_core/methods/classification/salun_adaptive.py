"""SalUn with measured rounds: each round of training is kept or undone, until D_f looks unseen.

    round          one pass over D_r mixed with D_f, at a rate that falls from its peak to 0 as a cosine, in at least 32
                   steps: small data have smaller batches, because the number of steps decides how far a round moves
    forget loss    max(0, m_i - t_i),    m_i = log-odds of the true class of sample i,
                   t_i = margin of the unseen image of the rank that i has in D_f, times 2 a
    whole class    cross-entropy with the kept class that the original finds most probable (as Boundary Shrink, Chen et
                   al., CVPR 2023, finds it by an attack): the mean of that of the outputs and that of the original's
                   last layer on the features, so that the features change and not only the last layer

A sample whose margin is at most t_i adds no gradient, so that it is not made less familiar than unseen images are. a is
the aim: the area of telling D_f from unseen images of the same classes. After each round the figures of a `Reading`
decide (`Controller`): the round is undone if it cost more than `Limits` allows or made D_f less familiar than unseen
images, and the next one is gentler; else it is kept, and the next one is stronger if little was gained.

The run ends when the aim is met, when the budget is spent, or when no strength helps without harm. Its result is the
last kept state, so that a run never ends with a state that was found to be damaged.

It trains salient weights only, as SalUn does, but not towards random labels. Deviations: docs/research/deviations.md,
row `salun_adaptive`. Figures: docs/research/adaptive.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from salun_core.data.images import ImageSource
from salun_core.evaluation.classifier import compare, restored_share
from salun_core.evaluation.evidence import EpochRecord, Reading
from salun_core.evaluation.membership import match_classes
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.methods.classification.method import (
    ClassifierContext,
    ClassifierMethod,
    Trained,
    Training,
    cross_entropy,
    dataset_phase,
)
from salun_core.methods.config import UnlearnConfig
from salun_core.methods.distributed import ProcessGroup
from salun_core.methods.loop import Phase, run_loop

_FIRST = 2.0  # times `learning_rate`: gentler first rounds moved nothing in any case, and a harmful one is undone
_RETAINED_WATCHED = 500  # most retained images that a reading measures: a loss of two points is seen, at half the cost
_UNSEEN_WATCHED = 1000  # most unseen ones: the model is less sure of them, and shares are known to about a point
_RETAINED = 5_000  # most retained images of a round, and ten for each sample of D_f
_MOST_REFUSED, _MOST_IDLE = 4, 2  # rounds in a row that were undone, or that gained less than a tenth
_MOST_UPDATING = 2  # first rounds that were undone, after which batch norm is frozen
_LEAST_STEPS = 32  # of a round: the rate needs some steps to fall, and more passes cost more than smaller batches
_LEAST_BATCH = 8  # images of a step, unless the configuration has fewer: batch norm needs some
_LEAST_BUDGET = 20_000  # passes: small data may use more epochs, because they cost seconds
_LEAST_SHARE = 0.1  # of a batch that is of D_f, so that few samples are seen in every step


@dataclass(frozen=True)
class Limits:
    """What a round may cost, and what it must reach; shares are ratios, losses are in nats.

    Args:
        accuracy: of retained and of unseen images that may be lost in all rounds; half of what the shipped policy
            allows for retained ones.
        loss: rise of the mean loss that is allowed, plus `loss_share` of the loss before.
        loss_share: see `loss`.
        above: how far the area may stay above the aim.
        below: how far it may fall below the aim.
        change: least mean change of the margins on D_f, in typical margins.
        recognised: most of a whole class that may still be recognised.
        restored: most of it that the last layer of the original may recognise in the features.
    """

    accuracy: float = 0.01
    loss: float = 0.05
    loss_share: float = 0.05
    above: float = 0.05
    below: float = 0.08
    change: float = 0.06
    recognised: float = 0.02
    restored: float = 0.55


class End(StrEnum):
    """Why a run ended."""

    FORGOTTEN = "forgotten"
    BUDGET = "budget"
    EXHAUSTED = "exhausted"

    @property
    def words(self) -> str:
        """A sentence for reports."""
        return {
            End.FORGOTTEN: "the forget set looks like unseen data",
            End.BUDGET: "the budget is spent",
            End.EXHAUSTED: "every further round costs too much accuracy or changes nothing",
        }[self]


class AdaptiveConfig(UnlearnConfig):
    """What every method can set; a round draws its own images, and has its own schedule."""

    epochs: int = Field(default=5, ge=1, description="passes over all training images that the run may cost")
    learning_rate: float = Field(
        default=0.003, gt=0, le=1e6, description="half of the rate at which the first round begins"
    )


def most_passes(config: UnlearnConfig, images: int) -> int:
    """Return the budget of a run in image passes: `epochs` over all training images, but not below the least one."""
    return max(config.epochs * images, _LEAST_BUDGET)


def aim_at(before: float | None, unseen: bool) -> float:
    """Return the area to aim at; `before` is the area of the original, None if only whole classes are forgotten.

    Unseen images give 1/2. If the original already tells little, the area must fall all the same, by 0.05 but not below
    0.45. Without unseen images D_f is compared with retained ones, which are as familiar as D_f was: D_f must fall
    behind them by 0.15, a usual distance of training and unseen images.
    """
    if before is None:
        return 0.5
    return min(0.5, max(before - 0.05, min(before - 0.01, 0.45))) if unseen else before - 0.15


@dataclass
class Controller:
    """Decides after each round whether it is kept, and how strong the next one is. It sees only numbers.

    States: running, until `ended` is set. A round that did harm is undone; the next peak lies between the largest one
    that was kept and the smallest one that did harm. A kept round that closed less than three quarters of the distance
    to the aim makes the next one three times as strong, but never as strong as one that did harm: at the same rate, the
    last images of a class take as many rounds as all others. Readings of an earlier process, taken again in their
    order, give the same state: that is how a run resumes.

    Args:
        peak: learning rate at the start of the first round.
        budget: most passes.
        frozen: whether batch norm keeps its running statistics. Updated ones make training robust, but of few images,
            or without a large class, they can do harm at any rate: after two such rounds they stay as they are.
        spent: passes so far, the reading of the original included.
    """

    before: Reading
    peak: float
    budget: int
    aim: float = 0.5
    limits: Limits = field(default_factory=Limits)
    frozen: bool = True
    ended: End | None = None
    spent: int = field(init=False)

    def __post_init__(self) -> None:
        self.spent, self._good, self._first = self.before.passes, self.before, self.peak
        self._safe, self._harmful, self._refused, self._idle = 0.0, math.inf, 0, 0

    def take(self, reading: Reading) -> Reading:
        """Return the reading with the decision about its round: `kept`, and why it was undone."""
        self.spent += reading.passes
        why = self._harm(reading) or self._too_far(reading)
        if why:
            self._undo()
        else:
            self._keep(reading)
        if self.ended is None and self.spent + reading.passes > self.budget:
            self.ended = End.BUDGET
        return reading.model_copy(update={"kept": not why, "why": why})

    def _undo(self) -> None:
        self._refused, self._harmful = self._refused + 1, min(self._harmful, self.peak)
        if self._safe > self._harmful / 2:  # what was safe from an earlier state is not safe from this one
            self._safe = 0.0
        self.peak = math.sqrt(self._safe * self._harmful) if self._safe else self._harmful / 3
        if not self.frozen and self._good is self.before and self._refused == _MOST_UPDATING:
            self.frozen, self.peak, self._harmful, self._refused = True, self._first, math.inf, 0
        if self._refused > _MOST_REFUSED or self.peak < self._first / 1000:
            self.ended = End.EXHAUSTED

    def _keep(self, reading: Reading) -> None:
        was, now = self.distance(self._good), self.distance(reading)
        self._good, self._safe, self._refused = reading, self.peak, 0
        if now <= 0:
            self.ended = End.FORGOTTEN
            return
        self._idle = self._idle + 1 if now > 0.9 * was else 0
        if now > 0.25 * was:
            self.peak = min(3 * self.peak, math.sqrt(self.peak * self._harmful))
        if self._idle > _MOST_IDLE:
            self.ended = End.EXHAUSTED

    def distance(self, reading: Reading) -> float:
        """Return how far D_f is from looking unseen: 0 if the aim is met."""
        limits, far = self.limits, 0.0
        if reading.area is not None and self.before.area is not None:
            # An aim below 0, of samples that were unfamiliar before, is met at 0: no area is smaller.
            highest = max(0.0, min(self.aim + limits.above, self.before.area - 0.01))
            far += max(0.0, reading.area - highest) + max(0.0, limits.change - (reading.change or 0.0))
        if reading.recognised is not None:
            far += max(0.0, reading.recognised - limits.recognised)
            far += max(0.0, (1.0 if reading.restored is None else reading.restored) - limits.restored)
        return far

    def _harm(self, reading: Reading) -> str:
        if not reading.finite:
            return "a loss or a weight is not finite"
        before, limits = self.before, self.limits
        for name, lost, loss, old in (
            ("retained", reading.retained_lost, reading.retained_loss, before.retained_loss),
            ("unseen", reading.unseen_lost, reading.unseen_loss, before.unseen_loss),
        ):
            if lost > limits.accuracy:
                return f"accuracy on {name} images fell by {100 * lost:.1f} points"
            if loss > old + limits.loss + limits.loss_share * old:
                return f"the loss on {name} images rose from {old:.3f} to {loss:.3f}"
        return ""

    def _too_far(self, reading: Reading) -> str:
        if reading.area is None or reading.area >= self.aim - self.limits.below:
            return ""
        return f"the forget set became less familiar than unseen data (area {reading.area:.3f})"


@dataclass(frozen=True)
class Seen:
    """Outputs of one state of the model on the watched images, and its features if whole classes are forgotten."""

    forget: Outputs
    retain: Outputs
    unseen: Outputs
    forget_features: Tensor | None = None
    retain_features: Tensor | None = None

    @property
    def by_split(self) -> dict[str, Outputs]:
        """The outputs, as the evaluation names the splits."""
        return {"forget": self.forget, "retain": self.retain, "test": self.unseen}

    @property
    def finite(self) -> bool:
        """Whether all outputs are numbers."""
        return all(np.isfinite(item.margins).all() for item in self.by_split.values())


class AdaptiveRun:
    """Steers the rounds of one run: draws them, measures them, and asks the controller.

    Every process draws the same rounds from the same seed. The first process measures, and the others take over its
    numbers, so that rounding on other hardware cannot lead to another decision.
    """

    def __init__(self, context: ClassifierContext[AdaptiveConfig], group: ProcessGroup) -> None:
        assert context.model is not None
        assert context.original is not None
        self._context, self._group, config = context, group, context.config
        generator = torch.Generator().manual_seed(config.seed)
        self._train, kept = context.retain, set(context.retain.labels.tolist())
        labels = context.forget.labels
        self._emptied = sorted(set(labels.tolist()) - kept)
        self._whole = torch.isin(labels, torch.tensor(self._emptied, dtype=labels.dtype, device=labels.device))
        held_out = context.held_out
        if held_out is None or not len(held_out):
            self._unseen, self._train = _divided(context.retain, generator)
            self.unseen_is = f"{len(self._unseen)} retained images that were held back: there is no validation split"
        else:
            self._unseen = _sample(held_out, _UNSEEN_WATCHED, generator)
            self.unseen_is = f"{len(self._unseen)} images of the validation split"
        self._retain = _sample(self._train, _RETAINED_WATCHED, generator)
        layers = [module for module in context.original.modules() if isinstance(module, nn.Linear)]
        self._head = layers[-1] if layers and layers[-1].out_features == context.num_classes else None
        self._before = self._look(context.original)
        self._nearest = self._nearest_kept(labels)
        before = self._reading(self._before, None)
        budget = most_passes(config, len(context.forget) + len(context.retain))
        aim = aim_at(before.area, self._train is context.retain)
        updating = config.batch_norm == "update" and any(isinstance(m, _BatchNorm) for m in context.model.modules())
        self.controller = Controller(before, _FIRST * config.learning_rate, budget, aim, frozen=not updating)

    def begin(self, history: Sequence[EpochRecord]) -> Self:
        """Take over the rounds before a resume; the model in training has the state of the last kept one."""
        for record in history:
            assert record.reading is not None
            self.controller.take(record.reading)
        assert self._context.model is not None
        self._set_targets(self._look(self._context.model) if history else self._before)
        return self

    @property
    def ended(self) -> bool:
        """Whether the last round was run."""
        return self.controller.ended is not None

    @property
    def passes(self) -> int:
        """Cost so far in image passes, measurements included."""
        return self.controller.spent

    @property
    def summary(self) -> str:
        """Why the run ended, in words."""
        end = self.controller.ended
        return f"{end}: {end.words}; compared with {self.unseen_is}" if end else ""

    @property
    def batch_norm(self) -> str:
        """Whether batch norm is frozen or updated in the next round."""
        return "freeze" if self.controller.frozen else "update"

    def rate_at(self, progress: float) -> float:
        """Return the learning rate at a progress of the round from 0 to 1."""
        return self.controller.peak * 0.5 * (1 + math.cos(math.pi * progress))

    def phases(self, epoch: int, generator: torch.Generator) -> Sequence[Phase]:
        """Return one round: D_r mixed with what of D_f is still too familiar."""
        context, train, config = self._context, self._train, self._context.config
        fewest = min(_LEAST_STEPS * _LEAST_BATCH, 8 * len(train))  # tiny data: several passes
        wanted = max(min(len(train), _RETAINED + 10 * len(context.forget)), fewest)
        size = min(config.batch_size, max(_LEAST_BATCH, wanted // _LEAST_STEPS))
        passes = -(-wanted // len(train))
        retain = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(passes)])[:wanted]
        active = self._familiar.nonzero().flatten()
        rows = active.repeat(max(1, int(_LEAST_SHARE * wanted) // max(1, len(active))))
        # From K on, a label is a row of D_f.
        mixed = context.forget.select(rows).relabelled(context.num_classes + rows).joined(train.select(retain))
        if len(mixed) % size == 1:  # batch norm cannot normalise one image
            mixed = mixed.select(range(len(mixed) - 1))
        self._rows = len(mixed)
        return [dataset_phase("mixed", mixed, config.model_copy(update={"batch_size": size}), self._loss)]

    def _loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        count = self._context.num_classes
        with _last_inputs(model) as seen:
            logits = model(images)
        gone = labels >= count
        if not bool(gone.any()):
            return cross_entropy(logits, labels)
        rows, asked = labels[gone] - count, logits[gone]
        whole = self._whole[rows]
        total = logits.new_zeros(())
        if bool((~whole).any()):
            single, margins = rows[~whole], asked[~whole]
            true = self._context.forget.labels[single][:, None]
            margins = margins.gather(1, true)[:, 0] - margins.scatter(1, true, -torch.inf).amax(1)
            total = total + torch.relu(margins - self._targets[single]).sum()
        if bool(whole.any()):
            nearest = self._nearest[rows[whole]]
            answers = [asked[whole]]
            if self._head is not None and seen and seen[-1].shape == (len(labels), self._head.in_features):
                answers.append(self._head(seen[-1][gone][whole]))
            losses = [nn.functional.cross_entropy(answer, nearest, reduction="sum") for answer in answers]
            total = total + torch.stack(losses).mean()
        if bool((~gone).any()):
            total = total + nn.functional.cross_entropy(logits[~gone], labels[~gone], reduction="sum")
        mean: Tensor = total / len(labels)
        return mean

    def judge(self, model: nn.Module, finite: bool) -> Reading:
        """Measure the model after a round and decide about it; `finite` covers its losses and weights."""
        seen = self._look(model) if finite else None
        reading = self._reading(seen, model) if seen is not None and seen.finite else self._nothing()
        reading = self.controller.take(self._shared(reading))
        if reading.kept and not self.ended:
            assert seen is not None
            self._set_targets(seen)
        return reading

    def _nearest_kept(self, labels: Tensor) -> Tensor:
        """Return the class that the original finds most probable for each sample of D_f, of those that are kept."""
        logits = np.array(self._before.forget.logits)
        logits[:, self._emptied] = -np.inf
        logits[np.arange(len(logits)), labels.cpu().numpy()] = -np.inf
        found = np.frombuffer(self._group.first(logits.argmax(axis=1).astype(np.int64).tobytes()) or b"", np.int64)
        return torch.tensor(found, device=labels.device)

    def _nothing(self) -> Reading:
        return self.controller.before.model_copy(update={"finite": False, "passes": self._rows + self._cost})

    @property
    def _cost(self) -> int:
        return math.ceil((len(self._context.forget) + len(self._retain) + len(self._unseen)) / 3)

    def _look(self, model: nn.Module) -> Seen:
        watched = self._context.forget, self._retain, self._unseen
        if not self._emptied:
            forget, retain, unseen = (outputs_of(model, images) for images in watched)
            return Seen(forget, retain, unseen)
        outputs, features = list[Outputs](), list[Tensor | None]()
        for images in watched:
            with _last_inputs(model) as seen:
                outputs.append(outputs_of(model, images))
            # An attempt without room for its batches leaves features too; the last ones are of the whole attempt.
            features.append(torch.cat([part.flatten(1).cpu() for part in seen])[-len(images) :] if seen else None)
        return Seen(outputs[0], outputs[1], outputs[2], features[0], features[1])

    def _reading(self, seen: Seen, model: nn.Module | None) -> Reading:
        whole = np.isin(seen.forget.labels, self._emptied)
        figures: dict[str, float | None] = {}
        passes = self._cost + (self._rows if model is not None else 0)
        if not whole.all():
            found = compare({"before": self._before.by_split, "after": seen.by_split}, whole)
            figures |= {"area": found["attack_auc"].after, "change": found["change"].after}
        if whole.any():
            figures["recognised"] = recognised = float(seen.forget.correct[whole].mean())
            # While more is recognised, the features still show the class.
            if model is not None and recognised <= 0.1:
                figures["restored"] = self._restored(seen, whole)
        return Reading(
            retained=float(seen.retain.correct.mean()),
            retained_lost=_lost(self._before.retain, seen.retain),
            retained_loss=float(seen.retain.losses.mean()),
            unseen=float(seen.unseen.correct.mean()),
            unseen_lost=_lost(self._before.unseen, seen.unseen),
            unseen_loss=float(seen.unseen.losses.mean()),
            passes=passes,
            **figures,
        )

    def _restored(self, seen: Seen, whole: np.ndarray) -> float | None:
        """Return the share of whole classes that the original's last layer recognises in the features of this look."""
        if self._head is None or seen.forget_features is None:
            return None
        assert seen.retain_features is not None
        assert self._before.retain_features is not None
        labels = torch.from_numpy(seen.forget.labels[whole])
        asked = seen.forget_features[torch.from_numpy(whole)]
        return restored_share(self._head, labels, asked, seen.retain_features, self._before.retain_features)

    def _shared(self, reading: Reading) -> Reading:
        return Reading.model_validate_json(self._group.first(reading.model_dump_json().encode()) or b"")

    def _set_targets(self, seen: Seen) -> None:
        """Set t by row of D_f, and which rows are above it; all are if none is and the aim is not met."""
        targets = np.zeros(len(seen.forget))
        single = ~np.isin(seen.forget.labels, self._emptied)
        if single.any():
            targets[single] = targets_of(seen.forget.where(single), seen.unseen, self.controller.aim)
        targets = np.frombuffer(self._group.first(targets.tobytes()) or b"")
        familiar = torch.tensor(seen.forget.margins > targets, device=self._whole.device) | self._whole
        self._targets = torch.tensor(targets, dtype=torch.float32, device=self._whole.device)
        self._familiar = familiar if bool(familiar.any()) else torch.ones_like(familiar)


def targets_of(forget: Outputs, unseen: Outputs, aim: float) -> np.ndarray:
    """Return the margin of each sample of D_f if the set looked like unseen images of the same classes, float64 [N].

    Ranks are kept, so that each sample moves as little as possible. The sample at the share u of D_f gets the weighted
    quantile 2 a u of the unseen margins: the area of telling the two sets is then a, the `aim`, at most 1/2.
    """
    weights = match_classes(forget.labels, unseen.labels).weights
    order = np.argsort(unseen.margins, kind="stable")
    shares = np.cumsum(weights[order]) / weights.sum()
    ranks = (np.argsort(np.argsort(forget.margins, kind="stable"), kind="stable") + 0.5) / len(forget)
    found = np.searchsorted(shares, 2 * aim * ranks)
    return np.asarray(unseen.margins[order][np.minimum(found, len(order) - 1)])


def _lost(before: Outputs, after: Outputs) -> float:
    """Return the share of accuracy that was lost, as far as so many images can tell; at least 0.

    A hundred images change their accuracy by points without any harm, because some lie at the boundary of two classes.
    So each image also counts by its margin: as a share that rises from 0 to 1 around the boundary, over a width of a
    quarter of the typical margin of its model, whatever the scale of the logits. Of both falls, the larger one counts,
    less the standard error of the paired difference, or two images if they are more.
    """
    falls = [
        before.correct.astype(np.float64) - after.correct,
        _soft(before.margins) - _soft(after.margins),
    ]
    return max(0.0, *(float(fall.mean() - max(fall.std() / len(fall) ** 0.5, 2 / len(fall))) for fall in falls))


def _soft(margins: np.ndarray) -> np.ndarray:
    width = 0.25 * float(np.median(np.abs(margins))) or 1.0
    return np.asarray(0.5 * (1 + np.tanh(margins / (2 * width))))


@contextmanager
def _last_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a model's last linear layer receives, a tensor for each forward pass; nothing without a layer."""
    seen: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in layers[-1:]]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _divided(retain: ImageSource, generator: torch.Generator) -> tuple[ImageSource, ImageSource]:
    """Divide D_r at random into a tenth, at most `_UNSEEN_WATCHED`, and the rest."""
    order = torch.randperm(len(retain), generator=generator)
    size = max(1, min(_UNSEEN_WATCHED, len(retain) // 10))
    return retain.select(order[:size]), retain.select(order[size:])


def _sample(images: ImageSource, most: int, generator: torch.Generator) -> ImageSource:
    """Return at most so many images, drawn at random."""
    if len(images) <= most:
        return images
    return images.select(torch.randperm(len(images), generator=generator)[:most])


def train(context: ClassifierContext[AdaptiveConfig], training: Training) -> Trained:
    """Run rounds until one of the ends is reached, and change the context's model in place."""
    assert context.model is not None
    run, given = AdaptiveRun(context, training.group), training
    history = run_loop(
        context.model,
        run.phases,
        context.config,
        given.mask,
        given.checkpoint,
        given.fingerprint,
        given.on_epoch,
        given.group,
        run.begin,
    )
    return Trained(history, float(run.passes), run.summary)


def passes(context: ClassifierContext[AdaptiveConfig]) -> float:
    """Return the most that the run may cost in image passes."""
    return most_passes(context.config, len(context.forget) + len(context.retain))


METHOD = ClassifierMethod(
    train=train,
    config_type=AdaptiveConfig,
    about="as `salun`, in rounds that are measured and undone if they do harm; it chooses its own strength",
    source="this project; the mask of Fan et al., ICLR 2024",
    defaults={"batch_norm": "update"},
    needs_mask=True,
    needs_original=True,
    reads_held_out=True,
    passes=passes,
)
