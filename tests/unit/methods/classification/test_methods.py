"""Each method against a few lines of numpy on a linear model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from salun_core.data import ImageSet
from salun_core.data.images import Normalisation
from salun_core.errors import DataError, ModelError, UsageError
from salun_core.methods.classification import METHODS, method_config, pick_device, unlearn
from salun_core.methods.classification.random_label import RandomLabelConfig, wrong_labels
from salun_core.methods.loop import epoch_generator
from salun_core.methods.method import fresh_seed
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask

RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.01
STEP = {
    "learning_rate": RATE,
    "momentum": MOMENTUM,
    "weight_decay": DECAY,
    "batch_size": 64,
    "augment": False,
    "device": "cpu",
}


def linear(classes=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))


def pair(count, seed, classes=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 2, 2, generator=generator), torch.randint(0, classes, (count,), generator=generator)


FORGET, RETAIN = pair(7, 1), pair(20, 2)


class Numpy:
    """A linear classifier with SGD, weight decay and momentum, by hand."""

    def __init__(self, model):
        self.weight = model[1].weight.detach().double().numpy().copy()
        self.bias = model[1].bias.detach().double().numpy().copy()
        self.velocity = [np.zeros_like(self.weight), np.zeros_like(self.bias)]
        self.losses = []

    def step(self, images, labels, sign=1.0, mask=(1.0, 1.0)):
        x, y = images.flatten(1).double().numpy(), labels.numpy()
        logits = x @ self.weight.T + self.bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        self.losses.append(sign * -np.log(p[np.arange(len(y)), y]).mean())
        error = (p - np.eye(len(self.bias))[y]) / len(y) * sign
        for index, (value, grad) in enumerate([(self.weight, error.T @ x), (self.bias, error.sum(0))]):
            self.velocity[index] = MOMENTUM * self.velocity[index] + (grad + DECAY * value) * mask[index]
            value -= RATE * self.velocity[index]

    def assert_equals(self, model):
        np.testing.assert_allclose(model[1].weight.detach().numpy(), self.weight, atol=2e-6)
        np.testing.assert_allclose(model[1].bias.detach().numpy(), self.bias, atol=2e-6)


def run(method, epochs=2, forget=FORGET, retain=RETAIN, model=None, **extra):
    config = {key: extra.pop(key) for key in list(extra) if key in METHODS[method].config_type.model_fields}
    settings = {**STEP, "epochs": epochs, **config}
    return unlearn(model or linear(), method, forget=forget, retain=retain, config=settings, **extra)


def test_finetuning_descends_the_retain_loss():
    by_hand = Numpy(linear())
    by_hand.step(*RETAIN)
    by_hand.step(*RETAIN)
    result = run("finetune")
    by_hand.assert_equals(result.model)
    assert [record.losses["retain"] for record in result.history] == pytest.approx(by_hand.losses, abs=1e-6)
    assert result.passes == 40


def test_gradient_ascent_climbs_the_forget_loss():
    by_hand = Numpy(linear())
    by_hand.step(*FORGET, sign=-1.0)
    by_hand.step(*FORGET, sign=-1.0)
    result = run("gradient_ascent")
    by_hand.assert_equals(result.model)
    assert [record.losses["forget"] for record in result.history] == pytest.approx(by_hand.losses, abs=1e-6)
    assert result.history[1].losses["forget"] < result.history[0].losses["forget"]
    assert result.passes == 14


def test_sequential_random_labelling_trains_wrong_labels_then_the_retain_set():
    by_hand = Numpy(linear())
    for _ in range(2):
        by_hand.step(FORGET[0], 1 - FORGET[1])  # of two classes the other one is the only wrong one
        by_hand.step(*RETAIN)
    result = run("random_label", order="sequential")
    by_hand.assert_equals(result.model)
    assert list(result.history[0].losses) == ["forget", "retain"]
    assert [value for r in result.history for value in r.losses.values()] == pytest.approx(by_hand.losses, abs=1e-6)
    assert result.passes == 54


def test_mixed_random_labelling_trains_both_sets_in_one_batch():
    by_hand = Numpy(linear())
    images, labels = torch.cat([FORGET[0], RETAIN[0]]), torch.cat([1 - FORGET[1], RETAIN[1]])
    by_hand.step(images, labels)
    by_hand.step(images, labels)
    result = run("random_label", order="mixed")
    by_hand.assert_equals(result.model)
    assert list(result.history[0].losses) == ["mixed"]


@pytest.mark.parametrize("order", ["sequential", "mixed"])
def test_salun_is_random_labelling_inside_the_mask(order):
    model = linear()
    mask = SaliencyMask.random({name: p.shape for name, p in model.named_parameters()}, 0.5, 1)
    salient = [mask.tensor("1.weight").numpy(), mask.tensor("1.bias").numpy()]
    by_hand = Numpy(model)
    for _ in range(3):
        if order == "mixed":
            images, labels = torch.cat([FORGET[0], RETAIN[0]]), torch.cat([1 - FORGET[1], RETAIN[1]])
            by_hand.step(images, labels, mask=salient)
        else:
            by_hand.step(FORGET[0], 1 - FORGET[1], mask=salient)
            by_hand.step(*RETAIN, mask=salient)
    result = run("salun", epochs=3, order=order, mask=mask)
    by_hand.assert_equals(result.model)
    for name, parameter in result.model.named_parameters():
        before = dict(model.named_parameters())[name].detach().view(torch.int32)
        changed = parameter.detach().view(torch.int32) != before
        assert torch.equal(changed, mask.tensor(name)), name


def test_salun_with_a_full_mask_is_random_labelling_bit_for_bit():
    full = SaliencyMask.full({name: p.shape for name, p in linear().named_parameters()})
    for optimizer in ("sgd", "adam", "adamw"):
        ours = run("salun", mask=full, optimizer=optimizer).model
        assert model_digest(ours) == model_digest(run("random_label", optimizer=optimizer).model)


def test_retraining_starts_from_fresh_weights_and_ignores_the_original():
    other = linear()
    with torch.no_grad():
        other[1].weight.fill_(100.0)
    first = run("retrain", model=linear(), batch_norm="update")
    second = run("retrain", model=other, batch_norm="update")
    assert model_digest(first.model) == model_digest(second.model)
    fresh = linear()
    with torch.random.fork_rng():
        torch.manual_seed(fresh_seed(0, len(RETAIN[1])))
        fresh[1].reset_parameters()
    by_hand = Numpy(fresh)
    rates = [0.1, 0.01]  # the schedule `step` falls by ten at half the run
    for rate in rates:
        globals()["RATE"] = rate
        by_hand.step(*RETAIN)
    globals()["RATE"] = 0.1
    by_hand.assert_equals(first.model)


def test_retraining_takes_a_builder_of_fresh_weights():
    result = run("retrain", fresh=lambda _: linear().requires_grad_(True), batch_norm="update", schedule="constant")
    by_hand = Numpy(linear())
    by_hand.step(*RETAIN)
    by_hand.step(*RETAIN)
    by_hand.assert_equals(result.model)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12, 2))

    def forward(self, images):
        return images.flatten(1) @ self.weight


def test_layers_that_cannot_be_initialised_again_are_refused():
    with pytest.raises(ModelError, match="the model cannot be initialised again"):
        run("retrain", model=Odd(), batch_norm="update")
    with pytest.raises(ModelError, match="0 cannot be initialised again"):
        run("retrain", model=nn.Sequential(Odd()), batch_norm="update")


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"ct"}))  # the linear model has no kernel to transpose
def test_the_model_that_was_given_is_unchanged(method):
    model = linear().train()
    mask = SaliencyMask.full({name: p.shape for name, p in model.named_parameters()})
    before = model_digest(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    result = run(method, model=model, mask=mask if METHODS[method].needs_mask else None, held_out=RETAIN)
    assert model_digest(model) == before != model_digest(result.model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not result.model.training
    assert torch.equal(torch.rand(3), expected)  # the global random state went on as if nothing happened


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_wrong_labels_are_never_the_true_one_and_uniform_over_the_others(classes):
    labels = torch.arange(classes).repeat_interleave(6000)
    wrong = wrong_labels(labels, classes, torch.Generator().manual_seed(0))
    assert not (wrong == labels).any()
    counts = torch.zeros(classes, classes)
    counts.index_put_((labels, wrong), torch.ones(len(labels)), accumulate=True)
    expected = 6000 / (classes - 1)
    others = counts[~torch.eye(classes, dtype=torch.bool)]
    degrees = classes * (classes - 2)
    statistic = float(((others - expected) ** 2 / expected).sum())
    assert statistic <= degrees + 5 * (2 * degrees) ** 0.5 + 1e-6
    assert wrong.min() >= 0
    assert wrong.max() < classes


def test_wrong_labels_are_drawn_again_in_each_epoch():
    labels = torch.zeros(100, dtype=torch.int64)
    draws = [wrong_labels(labels, 10, epoch_generator(0, epoch)) for epoch in range(3)]
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], wrong_labels(labels, 10, epoch_generator(0, 0)))
    assert not torch.equal(draws[0], wrong_labels(labels, 10, epoch_generator(1, 0)))


def test_the_same_seed_gives_the_same_weights():
    kwargs = {"forget": pair(30, 1, 5), "retain": pair(50, 2, 5), "batch_size": 8}
    first, second = (run("random_label", model=linear(5), **kwargs) for _ in range(2))
    assert model_digest(first.model) == model_digest(second.model)
    other = run("random_label", model=linear(5), seed=1, **kwargs)
    assert model_digest(other.model) != model_digest(first.model)


def test_images_can_be_a_pair_an_image_set_or_a_data_set():
    digests = {
        model_digest(run("finetune", forget=forget, retain=retain, batch_size=8).model)
        for forget, retain in [
            (FORGET, RETAIN),
            (ImageSet.of(FORGET), ImageSet.of(RETAIN)),
            (TensorDataset(*FORGET), TensorDataset(*RETAIN)),
        ]
    }
    assert len(digests) == 1


@pytest.mark.parametrize("images", ["forget", "retain"])
def test_empty_sets_are_refused(images):
    empty = (torch.empty(0, 3, 2, 2), torch.empty(0, dtype=torch.int64))
    with pytest.raises(DataError, match=f"{images} set is empty"):
        run("finetune", **{images: empty})
    with pytest.raises(DataError, match=f"{images} set is empty"):
        run("finetune", **{images: TensorDataset(*empty)})


@pytest.mark.parametrize("images", ["forget", "retain"])
@pytest.mark.parametrize("label", [-1, 2])
def test_labels_out_of_range_are_refused(images, label):
    given = {"forget": FORGET, "retain": RETAIN}[images]
    bad = given[1].clone()
    bad[3] = label
    with pytest.raises(DataError, match="out of range"):
        run("finetune", **{images: (given[0], bad)})


def test_images_and_labels_must_have_the_same_number():
    with pytest.raises(DataError, match="differ in number"):
        run("finetune", forget=(FORGET[0], FORGET[1][:3]))


def test_a_model_of_one_class_is_refused():
    zeros = torch.zeros(7, dtype=torch.int64)
    with pytest.raises(DataError, match="one class"):
        run("random_label", model=linear(1), forget=(FORGET[0], zeros), retain=(FORGET[0], zeros))


def test_sets_with_different_normalisations_cannot_be_mixed():
    raw = ImageSet(
        torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.ones(4, dtype=torch.int64), Normalisation((0.5,), (0.5,))
    )
    with pytest.raises(DataError, match="cannot be joined"):
        run("random_label", order="mixed", forget=raw)


def test_masks_are_required_and_never_ignored():
    mask = SaliencyMask.full({name: p.shape for name, p in linear().named_parameters()})
    with pytest.raises(UsageError, match="needs a mask"):
        run("salun")
    for method in [name for name, row in METHODS.items() if not row.needs_mask]:
        with pytest.raises(UsageError, match="takes no mask"):
            run(method, mask=mask)
    with pytest.raises(ModelError, match="does not fit"):
        run("salun", mask=SaliencyMask.full({"other": (3,)}))


def test_an_unknown_method_gets_a_suggestion():
    with pytest.raises(UsageError, match="did you mean 'salun'"):
        run("salum")


def test_all_faults_of_a_configuration_are_listed():
    overrides = {
        "epochs": 0,
        "learning_rat": 1,
        "momentum": 1.0,
        "batch_norm": "off",
        "optimizer": "lion",
        "seed": -1,
        "schedule": 3,
    }
    with pytest.raises(UsageError) as caught:
        run("finetune", model=linear()) and method_config("salun", overrides)
    for name in overrides:
        assert name in str(caught.value)
    assert "did you mean 'learning_rate'" in str(caught.value)
    assert "7 faults" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ({"nesterov": True, "momentum": 0}, "nesterov needs a momentum"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"gradient_clip": 0}, "gradient_clip"),
        ({"seed": 2**53}, "seed"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"weight_decay": float("inf")}, "weight_decay"),
    ],
)
def test_values_out_of_range_are_refused(overrides, fault):
    with pytest.raises(UsageError, match=fault):
        method_config("salun", overrides)


def test_methods_have_their_own_defaults():
    assert method_config("gradient_ascent").learning_rate == 5e-4
    assert method_config("retrain").epochs == 182
    assert method_config("salun") == RandomLabelConfig()
    with pytest.raises(UsageError, match="cannot freeze batch norm"):
        method_config("retrain", {"batch_norm": "freeze"})


def test_missing_devices_are_refused():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "tpu", "gpu"):
        with pytest.raises(UsageError, match="is not available"):
            pick_device(name)


def test_a_resolved_configuration_is_kept_in_the_result():
    config = method_config("finetune", {"epochs": 1, "device": "cpu"})
    result = unlearn(linear(), "finetune", forget=FORGET, retain=RETAIN, config=config)
    assert (result.config, result.method, len(result.history)) == (config, "finetune", 1)
    with pytest.raises(UsageError, match="scrub takes no DrawingConfig: .* give a ScrubConfig"):
        unlearn(linear(), "scrub", forget=FORGET, retain=RETAIN, config=config)
    assert result.seconds > 0
    assert copy.deepcopy(result.history[0]).epoch == 1
