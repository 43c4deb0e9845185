"""AMUN: the attack and the training against numpy, from the paper's equations."""

import numpy as np
import pytest
import torch
from torch import nn

from salun_core.data import ImageSet
from salun_core.data.images import Normalisation
from salun_core.methods.classification import unlearn
from salun_core.methods.classification.amun import AmunConfig, adversarial_examples, begin, passes, phases
from salun_core.methods.classification.method import ClassifierContext
from tests.support.by_hand import FORGET, PLAIN, RATE, RETAIN, image_set, inputs, linear, net, run, softmax, weights

NORMALISED = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def attack_by_hand(theta, image, label, radius, steps, normalisation=None):
    """Projected gradient ascent of one image of the linear model, until it is misclassified: (image, label, steps)."""
    normal = normalisation or Normalisation((0.0,) * 3, (1.0,) * 3)
    mean, std = np.repeat(normal.mean, 4), np.repeat(normal.std, 4)
    start = image.flatten().double().numpy() * std + mean
    moved, taken = start.copy(), 0
    while True:
        for _ in range(steps):
            x = (moved - mean) / std
            logits = theta[:, :12] @ x + theta[:, 12]
            if logits.argmax() != label:
                return x, int(logits.argmax()), taken
            slope = (theta[:, :12].T @ (softmax(logits[None])[0] - np.eye(len(theta))[label])) / std
            moved = moved + radius / 10 * slope / np.linalg.norm(slope)
            change = moved - start
            moved = start + change * min(1.0, radius / np.linalg.norm(change))
            if normalisation:
                moved = moved.clip(0, 1)
            taken += 1
        radius *= 2


def cost_by_hand(found):
    """Each step passes all images that were misclassified by no step before; the last look only goes forward."""
    taken = np.array([item[2] for item in found])
    return sum((taken >= step).sum() for step in range(taken.max())) + (taken == taken.max()).sum() / 3


def pixels(count, seed):
    """Normalised images of pixels from 0 to 1, and the labels that the model gives them."""
    values = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (NORMALISED.mean, NORMALISED.std))
    images = (values - mean) / std
    return images, linear()(images).argmax(1)


@pytest.mark.parametrize(("radius", "steps"), [(0.04, 50), (0.3, 7)])
@pytest.mark.parametrize("normalisation", [None, NORMALISED])
def test_the_attack_finds_the_first_misclassified_point_in_the_smallest_ball(radius, steps, normalisation):
    images, labels = pixels(6, 1)
    labels[2] = (labels[2] + 1) % 3  # misclassified from the start: it stays where it is
    found = adversarial_examples(linear(), images, labels, radius, steps, normalisation)
    expected = [
        attack_by_hand(weights(linear()), *pair, radius, steps, normalisation)
        for pair in zip(images, labels, strict=True)
    ]
    np.testing.assert_allclose(found.images.flatten(1), np.stack([item[0] for item in expected]), atol=2e-5)
    assert found.labels.tolist() == [item[1] for item in expected]
    assert torch.equal(found.images[2], images[2])
    assert not (found.labels == labels).any()
    assert torch.equal(linear()(found.images).argmax(1), found.labels)
    assert found.passes == pytest.approx(cost_by_hand(expected))


def test_an_image_that_is_recognised_with_certainty_is_moved_too():
    """Its float32 loss and the gradient of it are 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        model[1].weight.copy_(linear()[1].weight * 3000)
    images = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    assert float(nn.functional.cross_entropy(model(images), labels).detach()) == 0
    found = adversarial_examples(model, images, labels, 0.5, 5, None)
    assert not (model(found.images).argmax(1) == labels).any()


def test_an_image_that_nothing_misclassifies_gets_the_most_probable_wrong_label():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([5.0, 1.0, 2.0]))
    found = adversarial_examples(model, FORGET[0], torch.zeros(7, dtype=torch.int64), 0.1, 2, None)
    assert found.labels.tolist() == [2] * 7


def test_an_epoch_trains_all_images_and_their_adversarial_examples():
    theta = original = weights(linear())
    made = [attack_by_hand(original, *pair, 0.1, 10) for pair in zip(*FORGET, strict=True)]
    x = np.vstack([inputs(RETAIN[0]), inputs(FORGET[0]), [[*item[0], 1.0] for item in made]])
    labels = np.array([*RETAIN[1].tolist(), *FORGET[1].tolist(), *[item[1] for item in made]])
    for _ in range(2):
        theta = theta - RATE * (softmax(x @ theta.T) - np.eye(3)[labels]).T @ x / len(x)
    result = run("amun", epochs=2, adversarial_radius=0.1, adversarial_steps=10)
    np.testing.assert_allclose(weights(result.model), theta, atol=3e-6)
    assert [list(record.losses) for record in result.history] == [["mixed"]] * 2
    assert result.passes == np.ceil(cost_by_hand(made) + 2 * 34 - 1e-6)


def test_images_of_a_class_that_is_gone_are_not_trained_under_their_label():
    kept = RETAIN[1] != 1
    forget, retain = (FORGET[0], torch.tensor([1, 1, 1, 0, 2, 1, 1])), (RETAIN[0][kept], RETAIN[1][kept])
    context = ClassifierContext(ImageSet.of(forget), ImageSet.of(retain), 3, AmunConfig(**PLAIN), linear(), linear())
    found = begin(context)
    assert sorted(found.partly.labels.tolist()) == [0, 2]
    (phase,) = phases(found, torch.Generator())
    assert phase.samples == len(retain[1]) + 2 + 7
    assert len(found.adversarial) == 7
    assert not (found.adversarial.labels == ImageSet.of(forget).labels).any()
    assert passes(context) == 50 * 7 + len(retain[1]) + 2 + 7
    assert passes(found) == found.attack_passes + len(retain[1]) + 2 + 7


def test_a_class_is_forgotten_by_its_adversarial_examples():
    """The model recognises the class before, and after training mostly not."""
    labels = torch.as_tensor((inputs(FORGET[0]) @ weights(linear()).T).argmax(1))
    gone = int(labels.mode().values)
    forget = FORGET[0][labels == gone], labels[labels == gone]
    retain = RETAIN[0][RETAIN[1] != gone], RETAIN[1][RETAIN[1] != gone]
    found = run("amun", forget=forget, retain=retain, epochs=60).model
    assert float((found(forget[0]).argmax(1) == gone).float().mean()) < 0.5


def test_batches_mix_stored_and_moved_images_of_any_number():
    """Images of 256 levels with augmentation beside float images without; some batches hold one kind only."""
    sets = {"forget": image_set(5, 1), "retain": image_set(9, 2)}
    config = {**PLAIN, "augment": True, "batch_size": 2, "learning_rate": 0.01}
    result = unlearn(net(), "amun", **sets, config=config)
    assert result.history[0].losses["mixed"] > 0
