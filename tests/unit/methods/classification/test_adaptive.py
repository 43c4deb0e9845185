"""`salun_adaptive`: what the controller decides from numbers, and what a run of it keeps."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.cli.output import round_line
from salun_core.data import ImageSet
from salun_core.data.images import Normalisation
from salun_core.evaluation.classifier import restored_metric
from salun_core.evaluation.evidence import EpochRecord, Reading
from salun_core.evaluation.membership import matched_area
from salun_core.evaluation.outputs import Outputs, outputs_of
from salun_core.gate import load_policy
from salun_core.methods.classification import FileCheckpoint, method_config, unlearn
from salun_core.methods.classification.method import ClassifierContext
from salun_core.methods.classification.salun_adaptive import (
    AdaptiveRun,
    Controller,
    End,
    Limits,
    _lost,
    aim_at,
    targets_of,
)
from salun_core.methods.distributed import SINGLE_PROCESS
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask

BEFORE = Reading(retained=1.0, retained_loss=0.1, unseen=0.9, unseen_loss=0.5, area=0.8, change=0.0, passes=10)


def reading(**figures):
    return BEFORE.model_copy(update={"passes": 100, "change": 1.0, **figures})


def controller(**changes):
    return Controller(**{"before": BEFORE, "peak": 0.001, "budget": 10_000, **changes})


def test_it_ends_when_the_forget_set_looks_unseen():
    steered = controller()
    found = steered.take(reading(area=0.53))
    assert (found.kept, found.why, steered.ended) == (True, "", End.FORGOTTEN)
    assert steered.spent == 110


def test_a_round_that_gains_little_makes_the_next_one_stronger():
    steered = controller()
    assert steered.take(reading(area=0.79)).kept
    assert steered.ended is None
    assert steered.peak == pytest.approx(0.003)
    steered.take(reading(area=0.6))  # most of the distance: no reason to push harder
    assert steered.peak == pytest.approx(0.003)


@pytest.mark.parametrize(
    ("figures", "why"),
    [
        ({"retained_lost": 0.02}, "accuracy on retained images fell by 2.0 points"),
        ({"unseen_lost": 0.011}, "accuracy on unseen images fell by 1.1 points"),
        ({"retained_loss": 0.2}, "the loss on retained images rose from 0.100 to 0.200"),
        ({"unseen_loss": 0.6}, "the loss on unseen images rose from 0.500 to 0.600"),
        ({"area": 0.4}, "the forget set became less familiar than unseen data (area 0.400)"),
        ({"finite": False}, "a loss or a weight is not finite"),
    ],
)
def test_harm_is_undone_and_the_next_round_is_gentler_also_if_it_forgot(figures, why):
    steered = controller()
    found = steered.take(reading(**{"area": 0.5, **figures}))
    assert (found.kept, found.why) == (False, why)
    assert steered.ended is None
    assert steered.peak < 0.001


def test_after_harm_the_rate_lies_between_what_was_safe_and_what_was_not():
    steered = controller()
    steered.take(reading(area=0.79))
    steered.take(reading(area=0.6, retained_lost=0.5))
    assert steered.peak == pytest.approx(math.sqrt(0.001 * 0.003))
    for _ in range(20):  # gains nothing: grows, but never up to the rate that did harm
        steered.take(reading(area=0.79))
        assert steered.peak < 0.003


def test_a_rate_that_was_safe_before_can_do_harm_later():
    steered = controller()
    steered.take(reading(area=0.6))
    for _ in range(3):
        peak = steered.peak
        steered.take(reading(area=0.6, unseen_lost=0.5))
        assert steered.peak <= peak / 1.4


def test_batch_norm_is_frozen_if_updating_it_does_harm_at_once():
    steered = controller(frozen=False)
    for frozen in (False, True):
        steered.take(reading(unseen_lost=0.5))
        assert steered.frozen is frozen
    assert steered.peak == 0.001  # both rounds are tried again
    steered = controller(frozen=False)
    steered.take(reading(area=0.7))
    for _ in range(3):
        steered.take(reading(area=0.6, unseen_lost=0.5))
    assert not steered.frozen


@pytest.mark.parametrize("figures", [{"retained_lost": 0.5}, {"area": 0.8}])
def test_it_gives_up_when_nothing_helps(figures):
    steered = controller(budget=10**9)
    for _ in range(6):
        steered.take(reading(**figures))
    assert steered.ended is End.EXHAUSTED


def test_the_budget_is_never_exceeded():
    steered = controller(budget=330)
    steered.take(reading(area=0.79))
    assert steered.ended is None
    steered.take(reading(area=0.78))
    steered.take(reading(area=0.77))
    assert (steered.ended, steered.spent) == (End.BUDGET, 310)


def test_a_whole_class_must_be_gone_from_outputs_and_features():
    before = BEFORE.model_copy(update={"area": None, "recognised": 1.0})
    steered = controller(before=before)
    for figures in ({"recognised": 0.5}, {"recognised": 0.0, "restored": 0.9}, {"recognised": 0.0}):
        steered.take(reading(area=None, **figures))
        assert steered.ended is None
    steered.take(reading(area=None, recognised=0.0, restored=0.3))
    assert steered.ended is End.FORGOTTEN


def test_a_model_that_hardly_memorises_must_change_all_the_same():
    before = BEFORE.model_copy(update={"area": 0.5})
    steered = controller(before=before, aim=aim_at(0.5, unseen=True))
    steered.take(reading(area=0.5, change=0.0))
    assert steered.ended is None
    steered.take(reading(area=0.48, change=0.1))
    assert steered.ended is End.FORGOTTEN


def test_the_same_readings_give_the_same_state():
    steered, again = controller(), controller()
    taken = [steered.take(reading(area=area, unseen_lost=lost)) for area, lost in ((0.79, 0), (0.6, 0.3), (0.7, 0))]
    for item in taken:
        again.take(item)
    assert vars(again) == vars(steered)


def test_a_line_tells_what_was_measured_and_decided():
    steered = controller()
    readings = steered.take(reading(area=0.7)), steered.take(reading(area=None, recognised=0.5, unseen_lost=0.03))
    lines = [
        round_line(EpochRecord(epoch=2, learning_rate=0.001, losses={}, seconds=1.0, reading=item)) for item in readings
    ]
    assert lines == [
        "round 2, rate 0.001: AUC 0.700, retained 100.0%, unseen 90.0%; kept",
        "round 2, rate 0.001: class recognised 50.0%, retained 100.0%, unseen 90.0%; "
        "undone: accuracy on unseen images fell by 3.0 points",
    ]


def test_the_aim():
    assert aim_at(None, unseen=True) == 0.5
    assert aim_at(0.9, unseen=True) == 0.5
    assert aim_at(0.5, unseen=True) == 0.45
    assert aim_at(0.3, unseen=True) == pytest.approx(0.29)
    assert aim_at(0.5, unseen=False) == 0.35


@pytest.mark.parametrize("before", [0.0, 0.005, 0.04])
@pytest.mark.parametrize("unseen", [True, False])
def test_an_aim_below_0_is_met_at_0(before, unseen):
    """Else the rate rises until the budget is spent, and the model is trained at a rate that no limit has tested."""
    steered = controller(before=BEFORE.model_copy(update={"area": before}), aim=aim_at(before, unseen))
    steered.take(reading(area=0.0))
    assert steered.ended is End.FORGOTTEN


def test_the_limits_are_within_those_of_the_shipped_policy():
    limits = Limits()
    rules = {rule.metric: rule for rule in load_policy("classifier").rules if rule.relative_to}
    for metric in ("RA", "TA"):
        assert -limits.accuracy >= rules[metric].relative_to.offset / 2
    for metric in ("RA_loss", "TA_loss"):
        assert limits.loss <= rules[metric].relative_to.offset
        assert 1 + limits.loss_share <= rules[metric].relative_to.scale


def outputs(margins, labels=None):
    margins = np.asarray(margins, dtype=np.float64)
    logits = np.stack([margins, np.zeros_like(margins)], axis=1)
    if labels is not None:
        logits = np.where(np.asarray(labels)[:, None] == 1, logits[:, ::-1], logits)
    labels = np.zeros(len(margins), dtype=np.int64) if labels is None else np.asarray(labels)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Outputs(p, -np.log(p[np.arange(len(p)), labels]), labels, logits)


def test_targets_give_the_aim_and_keep_the_order():
    rng = np.random.default_rng(0)
    forget, unseen = outputs(rng.normal(5, 1, 200)), outputs(rng.normal(1, 2, 300))
    targets = targets_of(forget, unseen, 0.5)
    assert matched_area(outputs(targets), unseen) == pytest.approx(0.5, abs=0.01)
    assert (np.diff(targets[np.argsort(forget.margins)]) >= 0).all()
    assert matched_area(outputs(targets_of(forget, unseen, 0.35)), unseen) == pytest.approx(0.35, abs=0.01)


def test_targets_come_from_unseen_images_of_the_same_classes():
    unseen = outputs([1.0, 1.1, 7.0, 7.1], [0, 0, 1, 1])
    assert set(targets_of(outputs([9.0, 9.0, 8.0]), unseen, 0.5)) <= {1.0, 1.1}


def test_lost_accuracy():
    before = outputs(np.full(1000, 3.0))
    assert _lost(before, before) == 0.0
    assert _lost(before, outputs(np.full(1000, 0.3))) == 0.0  # rescaled logits
    broken = np.full(1000, 3.0)
    broken[:100] = -3.0
    assert 0.07 < _lost(before, outputs(broken)) <= 0.1
    two = np.full(40, 3.0)
    two[:2] = -0.1
    assert _lost(outputs(np.full(40, 3.0)), outputs(two)) == 0.0  # as far as 40 images can tell


class Net(nn.Module):
    """A small batch-norm net."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(12, 32)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 3)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.hidden(images.flatten(1)))))


def drawn(count, seed):
    """Draw images of three classes that overlap, so that a net memorises what it cannot generalise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 3, 2, 2, generator=generator)
    images[torch.arange(count), labels] += 0.7
    return ImageSet(images, labels)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model, images = Net(), drawn(240, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.images), images.labels).backward()
        optimizer.step()
    return model.eval()


def run(model, forget=range(20), method="salun_adaptive", held_out=True, **extra):
    images = drawn(240, 1)
    rest = sorted(set(range(240)) - set(forget))
    mask = SaliencyMask.random({name: p.shape for name, p in model.named_parameters()}, 0.5, 0)
    config = {"batch_size": 32, **extra.pop("config", {})}
    return unlearn(
        model,
        method,
        forget=images.select(list(forget)),
        retain=images.select(rest),
        held_out=drawn(300, 2) if held_out else None,
        mask=mask,
        config=config,
        **extra,
    )


def test_samples_become_like_unseen_images_and_frozen_weights_keep_their_bits(trained):
    result = run(trained)
    images, test = drawn(240, 1), drawn(3000, 3)
    forget = images.select(range(20))
    before, after = (
        matched_area(outputs_of(model, forget), outputs_of(model, test)) for model in (trained, result.model)
    )
    assert before > 0.6
    assert after < before - 0.05
    kept = [outputs_of(model, images.select(range(20, 240))).correct.mean() for model in (trained, result.model)]
    assert kept[1] >= kept[0] - 0.02
    mask = SaliencyMask.random({name: p.shape for name, p in trained.named_parameters()}, 0.5, 0)
    for name, parameter in result.model.named_parameters():
        outside = ~mask.tensor(name)
        assert torch.equal(parameter[outside], trained.get_parameter(name)[outside])
    looked = 20 + 220 + 300
    assert result.passes == sum(record.reading.passes for record in result.history) + looked // 3
    assert result.ended.split(":")[0] in {"forgotten", "budget", "exhausted"}
    assert result.ended.endswith("compared with 300 images of the validation split")


def test_a_whole_class_is_not_recognised_afterwards(trained):
    images = drawn(240, 1)
    gone = [index for index, label in enumerate(images.labels.tolist()) if label == 2]
    result = run(trained, gone)
    assert outputs_of(result.model, images.select(gone)).correct.mean() < 0.1
    kept = images.select([index for index in range(240) if index not in set(gone)])
    accuracy = [outputs_of(model, kept).correct.mean() for model in (trained, result.model)]
    assert accuracy[1] >= accuracy[0] - 0.02
    # The features are seen in the same passes as the outputs.
    last = [record.reading for record in result.history if record.reading.kept][-1]
    assert last.restored == restored_metric({"before": trained, "after": result.model}, images.select(gone), kept).after
    looked = 80 + 160 + 200  # of the held-out images, those of the kept classes
    assert last.passes == 80 + 256 + -(-looked // 3)


def adaptive_run(trained, gone, train=240, **config):
    images, model = drawn(train, 1), copy.deepcopy(trained)
    forget, retain = images.select(gone), images.select([index for index in range(train) if index not in set(gone)])
    settings = method_config("salun_adaptive", config)
    context = ClassifierContext(forget, retain, 3, settings, model, trained, held_out=drawn(30, 2))
    steered = AdaptiveRun(context, SINGLE_PROCESS)
    steered.begin([])
    return steered, model


@pytest.mark.parametrize(
    ("train", "batch_size", "samples", "steps"),
    [
        (30, 64, 8 * 22 + 2 * 8, 24),  # tiny data: at most eight passes, in batches of 8
        (240, 64, 256 + 3 * 8, 35),
        (240, 4, 256 + 3 * 8, 70),  # batches of the configuration are never enlarged
        (1008, 64, 1000 + 12 * 8, 36),
        (4808, 64, 4800 + 60 * 8, 83),
    ],
)
def test_a_round_is_one_pass_in_enough_steps(trained, train, batch_size, samples, steps):
    steered, _ = adaptive_run(trained, range(8), train, batch_size=batch_size)
    (phase,) = steered.phases(0, torch.Generator().manual_seed(0))
    assert (phase.samples, phase.steps) == (samples, steps)


def test_a_class_that_only_the_last_layer_hides_is_still_trained_on(trained):
    """A bias of the last layer hides a class at once; the features must forget it."""
    gone = [index for index in range(240) if index % 3 == 2]
    steered, model = adaptive_run(trained, gone)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    rows = (steered._nearest == 0).nonzero().flatten()  # whose wanted class is the one that is always answered
    assert len(rows)
    forgotten = steered._context.forget.select(rows).images
    steered._loss(model.eval(), forgotten, 3 + rows).backward()
    assert model.hidden.weight.grad.abs().sum() > 0


def test_a_run_that_only_does_harm_returns_the_original(trained):
    harmful = {"learning_rate": 1e6, "optimizer": "adam", "weight_decay": 0.0}
    result = run(trained, config=harmful)
    assert not any(record.reading.kept for record in result.history)
    assert result.ended.startswith("exhausted")
    for name, value in trained.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value)


def test_without_unseen_images_a_part_of_the_retained_ones_is_held_back(trained):
    result = run(trained, held_out=False)
    assert "22 retained images that were held back" in result.ended


class BrokenOffError(Exception):
    """Stands for whatever ends a run."""


def test_a_resumed_run_gives_the_same_bits(trained, tmp_path):
    # rounds that are undone, then rounds that are kept
    harmful = {"learning_rate": 0.03, "batch_size": 16}
    whole = run(trained, config=harmful)
    kept = [record.reading.kept for record in whole.history]
    assert kept[:4] == [False, False, False, True]  # updating batch norm, then frozen
    store = FileCheckpoint(tmp_path / "state")

    def stop(record):
        if record.epoch in (1, 4):
            raise BrokenOffError

    for _ in range(2):
        with pytest.raises(BrokenOffError):
            run(trained, config=harmful, checkpoint=store, on_epoch=stop)
    resumed = run(trained, config=harmful, checkpoint=store)
    assert model_digest(resumed.model) == model_digest(whole.model)
    assert [record.reading for record in resumed.history] == [record.reading for record in whole.history]
    assert (resumed.passes, resumed.ended) == (whole.passes, whole.ended)


def test_images_as_pixels_and_batches_of_one(trained):
    pixels = torch.randint(0, 256, (41, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(41) % 3, Normalisation((0.5,) * 3, (0.3,) * 3))
    mask = SaliencyMask.random({name: p.shape for name, p in trained.named_parameters()}, 0.5, 0)
    config = {"batch_size": 8}
    sets = {"forget": images.select(range(8)), "retain": images.select(range(8, 41)), "held_out": images}
    assert unlearn(trained, "salun_adaptive", **sets, mask=mask, config=config).history
