"""LoTUS and SalUn with its objective: targets, temperature and steps against numpy, from the paper's equations."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.data import DataSpec, ImageSet, load_data, resolve_forget
from salun_core.data.targets import SamplesTarget
from salun_core.errors import UsageError
from salun_core.methods.classification import method_config, unlearn
from salun_core.methods.classification.lotus import LotusConfig, begin, phases, unseen_accuracy
from salun_core.methods.classification.method import ClassifierContext
from salun_core.methods.loop import epoch_generator
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask
from salun_core.tasks.classification import ClassificationTask
from salun_core.tasks.classification.inputs import ClassifierInputs
from tests.support.by_hand import FORGET, PLAIN, RATE, RETAIN, inputs, linear, pair, softmax, weights

HELD_OUT = pair(30, 3)


def accuracy(theta, images, labels):
    return float(((inputs(images) @ theta.T).argmax(1) == labels.numpy()).mean())


def class_accuracy(theta, label):
    of_class = HELD_OUT[1] == label
    return accuracy(theta, HELD_OUT[0][of_class], HELD_OUT[1][of_class])


def unseen_by_hand(theta):
    """A: the held-out accuracy of each image's class, averaged over D_f."""
    return float(np.mean([class_accuracy(theta, label) for label in FORGET[1].tolist()]))


def drawn_by_hand(seed, share):
    order = torch.randperm(len(RETAIN[1]), generator=torch.Generator().manual_seed(seed))
    return order[: int(share * len(RETAIN[1]))]


def step_by_hand(theta, original, share, alpha, unseen, epoch):
    """One epoch as one batch; the noise and the order are those of the epoch's generator."""
    temperature = np.exp(alpha * (accuracy(theta, *FORGET) - unseen))
    images = torch.cat([FORGET[0], RETAIN[0][drawn_by_hand(0, share)]])
    generator = epoch_generator(0, epoch)
    order = torch.randperm(len(images), generator=generator)
    gumbel = -np.log(torch.empty(len(images), 3).exponential_(generator=generator).double().numpy())
    x = inputs(images[order])
    noisy = x @ original.T + gumbel
    targets = np.eye(3)[noisy.argmax(1)]
    tempered = (order < len(FORGET[1])).numpy()
    targets[tempered] = softmax(noisy[tempered] / temperature)
    p = softmax(x @ theta.T)
    return (p - targets).T @ x / len(x), float(-(targets * np.log(p)).sum(1).mean())


def run(method="lotus", model=None, mask=None, held_out=HELD_OUT, forget=FORGET, **config):
    settings = LotusConfig(**{**PLAIN, **config})
    given = {"forget": forget, "retain": RETAIN, "mask": mask, "held_out": held_out}
    return unlearn(model or linear(), method, **given, config=settings)


def half():
    return SaliencyMask.random({name: tuple(p.shape) for name, p in linear().named_parameters()}, 0.5, seed=3)


@pytest.mark.parametrize("method", ["lotus", "salun_lotus"])
@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_an_epoch_trains_towards_tempered_and_sharpened_outputs(method, alpha):
    original = weights(linear())
    mask = half() if method == "salun_lotus" else None
    salient = np.ones_like(original)
    if mask:
        salient = np.hstack([mask.tensor("1.weight").numpy(), mask.tensor("1.bias").numpy()[:, None]])
    theta, expected, unseen = original, [], unseen_by_hand(original)
    for epoch in range(3):
        if accuracy(theta, *FORGET) - unseen <= -0.01:
            continue
        slope, loss = step_by_hand(theta, original, 0.5, alpha, unseen, epoch)
        theta = theta - RATE * salient * slope
        expected.append(loss)
    assert expected
    result = run(method, mask=mask, epochs=3, temper_strength=alpha, retain_share=0.5)
    np.testing.assert_allclose(weights(result.model), theta, atol=2e-6)
    found = [value for record in result.history for value in record.losses.values()]
    assert found == pytest.approx(expected, rel=1e-4)
    assert result.passes == np.ceil(30 / 3 + 3 * (7 / 3 + (7 + 10) * 4 / 3))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_outside_the_mask_keep_their_bits(optimizer):
    mask, before = half(), dict(linear().named_parameters())
    result = run("salun_lotus", mask=mask, epochs=2, optimizer=optimizer, weight_decay=0.01, batch_size=4)
    for name, value in result.model.named_parameters():
        changed = value.view(torch.int32) != before[name].view(torch.int32)
        assert not (changed & ~mask.tensor(name)).any()
        assert changed.any()


def context(forget=FORGET, held_out=HELD_OUT, model=None):
    sets = ImageSet.of(forget), ImageSet.of(RETAIN)
    unseen = ImageSet.of(held_out) if held_out is not None else None
    return ClassifierContext(*sets, 3, LotusConfig(**PLAIN), model or linear(), linear(), held_out=unseen)


def test_the_target_follows_the_classes_of_the_forget_set():
    assert unseen_accuracy(context()) == pytest.approx(unseen_by_hand(weights(linear())))
    of_one = FORGET[1] == FORGET[1][0]
    target = unseen_accuracy(context((FORGET[0][of_one], FORGET[1][of_one])))
    assert target == pytest.approx(class_accuracy(weights(linear()), int(FORGET[1][0])))


def test_of_a_class_that_is_gone_nothing_should_be_recognised():
    """Half of D_f is of a class that D_r does not have: it counts 0, whatever the held-out accuracy."""
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    kept = RETAIN[1] != 1
    retain = ImageSet.of((RETAIN[0][kept], RETAIN[1][kept]))
    given = ClassifierContext(ImageSet.of((FORGET[0], labels)), retain, 3, LotusConfig(), linear(), linear())
    with pytest.raises(UsageError, match="LoTUS needs held-out images"):
        unseen_accuracy(given)
    one = ClassifierContext(
        ImageSet.of((FORGET[0], labels)), retain, 3, LotusConfig(), linear(), linear(), held_out=ImageSet.of(HELD_OUT)
    )
    assert unseen_accuracy(one) == pytest.approx(4 / 7 * class_accuracy(weights(linear()), 0))
    whole = ClassifierContext(ImageSet.of((FORGET[0], labels * 0 + 1)), retain, 3, LotusConfig(), linear(), linear())
    assert unseen_accuracy(whole) == 0


def test_a_whole_class_needs_no_held_out_images_and_becomes_uncertain():
    model = linear()
    with torch.no_grad():
        model[1].weight.mul_(5)
    labels = (model(FORGET[0]).argmax(1), model(RETAIN[0]).argmax(1))  # all are recognised
    gone = int(labels[0].mode().values)
    forget = FORGET[0][labels[0] == gone], labels[0][labels[0] == gone]
    retain = RETAIN[0][labels[1] != gone], labels[1][labels[1] != gone]
    config = LotusConfig(**{**PLAIN, "epochs": 40, "temper_strength": 8.0, "retain_share": 1.0})
    found = unlearn(model, "lotus", forget=forget, retain=retain, config=config)

    def confidence(network, images):
        return float(torch.softmax(network(images), 1).max(1).values.mean().detach())

    assert confidence(found.model, forget[0]) < confidence(model, forget[0]) - 0.1
    assert float((found.model(retain[0]).argmax(1) == retain[1]).float().mean()) > 0.8


def test_a_model_that_has_forgotten_enough_is_left_alone():
    model = linear()
    wrong = (inputs(FORGET[0]) @ weights(model).T).argmin(1)  # no image of D_f is recognised
    labels = torch.as_tensor(wrong)
    right = torch.as_tensor((inputs(HELD_OUT[0]) @ weights(model).T).argmax(1))
    given = begin(context((FORGET[0], labels), (HELD_OUT[0], right), model))
    assert phases(given, torch.Generator()) == []
    result = run(model=model, forget=(FORGET[0], labels), held_out=(HELD_OUT[0], right), epochs=2)
    assert [record.losses for record in result.history] == [{}, {}]
    np.testing.assert_array_equal(weights(result.model), weights(model))


def test_held_out_images_are_required_and_part_of_the_run():
    with pytest.raises(UsageError, match="validation_fraction"):
        run(held_out=None)
    every_class = pair(30, 4)
    others = run(held_out=(every_class[0], 2 - every_class[1]), epochs=2)
    assert not np.array_equal(weights(others.model), weights(run(epochs=2).model))


def test_the_model_in_training_stays_in_training_mode():
    model = linear().train()
    phases(begin(context(model=model)), torch.Generator())
    assert model.training


def test_the_task_gives_the_validation_split_and_no_other():
    data = load_data(DataSpec(source="digits", validation_fraction=0.1, test_fraction=0.3))
    original = SimpleNamespace(
        model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(),
        card=SimpleNamespace(architecture="none", classes=list("0123456789")),
        split=data.split,
        normalisation=data.images("train").normalisation,
        check_images=lambda *_: None,
    )
    ids = SamplesTarget(dataset_digest=data.split.dataset_digest, ids=sorted(data.split.train)[:20])
    task_inputs = ClassifierInputs(original, data, resolve_forget([ids], data.table, data.split))
    config = method_config("lotus", {"epochs": 1, "device": "cpu", "retain_share": 0.1})
    found = ClassificationTask().unlearn(task_inputs, "lotus", config)
    sets = {"forget": task_inputs.forget, "retain": task_inputs.retain}
    validation = data.images("validation", original.normalisation)
    expected = unlearn(original.model, "lotus", **sets, held_out=validation, config=config)
    assert model_digest(found.model) == model_digest(expected.model)
    assert found.passes == expected.passes
    none = replace(data, split=data.split.model_copy(update={"validation": {}}))
    without = replace(task_inputs, original=SimpleNamespace(**{**vars(original), "split": none.split}), data=none)
    with pytest.raises(UsageError, match="LoTUS needs held-out images"):
        ClassificationTask().unlearn(without, "lotus", config)
