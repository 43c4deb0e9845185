"""RUM: the parts against numpy, and each method in parts against a chain of its runs that is built by hand."""

import numpy as np
import pytest
import torch

from salun_core.errors import ConflictError, IntegrityError, UsageError
from salun_core.methods.classification import METHODS, FileCheckpoint, method_config, unlearn
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask
from tests.support.by_hand import (
    FORGET,
    PLAIN,
    RATE,
    RETAIN,
    gradients,
    image_set,
    linear,
    losses,
    net,
    run,
    unrecognised,
    weights,
)

SETTINGS = {
    **PLAIN,
    "epochs": 2,
    "batch_size": 8,
    "batch_norm": "update",
    "momentum": 0.9,
    "learning_rate": 0.02,
    "schedule": "cosine",
    "augment": True,
}
SETS = image_set(11, 1), image_set(16, 2)


def by_memorisation(model, images, parts):
    """Rows in parts, from the smallest to the largest loss; the loss by numpy."""
    with torch.no_grad():
        logits = model.eval()(next(images.batches(len(images)))[0]).double().numpy()
    shifted = logits - logits.max(1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(images)), images.labels.numpy()]
    return np.array_split(np.argsort(loss, kind="stable"), parts)


def needed(method):
    shapes = {name: tuple(parameter.shape) for name, parameter in net().named_parameters()}
    given = {"mask": SaliencyMask.random(shapes, 0.5, seed=3)} if METHODS[method].needs_mask else {}
    return given | ({"held_out": unrecognised(net(), 20, 3)} if METHODS[method].reads_held_out else {})


def chain_by_hand(method, parts):
    """Run the method once for each part, on the model of the part before; later parts are retained."""
    model, (forget, retain) = net(), SETS
    rows, history, cost = by_memorisation(model, forget, parts), [], 0
    for number, part in enumerate(rows):
        kept = retain
        for later in rows[number + 1 :]:
            kept = kept.joined(forget.select(later.tolist()))
        gone = forget.select(part.tolist())
        result = unlearn(model, method, forget=gone, retain=kept, config=SETTINGS, **needed(method))
        model, cost = result.model, cost + result.passes
        history += [record.losses for record in result.history]
    return model, history, cost


def in_parts(method="random_label", parts=3, **extra):
    sets = {"forget": SETS[0], "retain": SETS[1]}
    return unlearn(net(), method, **sets, config={**SETTINGS, "forget_parts": parts}, **needed(method), **extra)


@pytest.mark.parametrize("method", ["salun", "scrub", "influence", "boundary_expanding", "msg", "amun"])
def test_a_method_in_parts_is_a_chain_of_its_runs(method):
    model, history, cost = chain_by_hand(method, 3)
    found = in_parts(method)
    assert model_digest(found.model) == model_digest(model) != model_digest(net())
    assert [record.losses for record in found.history] == history
    assert [record.epoch for record in found.history] == list(range(1, len(history) + 1))
    assert -1 < cost + 11 / 3 - found.passes < 3  # the sum is rounded up once, each run of the chain by itself


def test_the_least_memorised_are_forgotten_first():
    theta = weights(linear())
    order = np.argsort(losses(theta, *FORGET), kind="stable")
    for part in np.array_split(order, 2):
        theta = theta + RATE * gradients(theta, FORGET[0][part], FORGET[1][part]).mean(0)
    result = run("gradient_ascent", forget_parts=2)
    np.testing.assert_allclose(weights(result.model), theta, atol=2e-6)
    assert result.passes == np.ceil(7 / 3 + 7)


def test_a_part_is_retained_until_it_is_its_turn():
    theta = weights(linear())
    first, second = np.array_split(np.argsort(losses(theta, *FORGET), kind="stable"), 2)
    images, labels = torch.cat([RETAIN[0], FORGET[0][second]]), torch.cat([RETAIN[1], FORGET[1][second]])
    theta = theta - RATE * gradients(theta, images, labels).mean(0)
    theta = theta - RATE * gradients(theta, *RETAIN).mean(0)
    result = run("finetune", forget_parts=2)
    np.testing.assert_allclose(weights(result.model), theta, atol=2e-6)
    assert len(first) + len(second) == 7


def test_weights_outside_the_mask_keep_their_bits_through_all_parts():
    found, before, mask = in_parts("salun"), dict(net().named_parameters()), needed("salun")["mask"]
    for name, value in found.model.named_parameters():
        changed = value.view(torch.int32) != before[name].view(torch.int32)
        assert not (changed & ~mask.tensor(name)).any()


def test_there_are_no_more_parts_than_images():
    assert len(in_parts("gradient_ascent", parts=40).history) == 11 * 2


class BrokenOffError(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize(  # in the first part, within the second, at its end, in the third
    ("method", "last"), [("random_label", 1), ("scrub", 3), ("random_label", 4), ("msg", 5)]
)
def test_a_resumed_run_gives_the_same_bits(method, last, tmp_path):
    whole, store = in_parts(method), FileCheckpoint(tmp_path / "state")

    def stop(record):
        if record.epoch == last:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        in_parts(method, checkpoint=store, on_epoch=stop)
    fresh = []
    resumed = in_parts(method, checkpoint=store, on_epoch=fresh.append)
    assert [record.epoch for record in fresh] == list(range(last + 1, 7))
    assert model_digest(resumed.model) == model_digest(whole.model)
    assert [record.losses for record in resumed.history] == [record.losses for record in whole.history]
    assert resumed.passes == whole.passes
    again = in_parts(method, checkpoint=store, on_epoch=fresh.append)  # nothing is left to do
    assert len(fresh) == 6 - last
    assert model_digest(again.model) == model_digest(whole.model)


def test_a_checkpoint_of_another_run_and_a_damaged_one_are_refused(tmp_path):
    store = FileCheckpoint(tmp_path / "state")
    in_parts(checkpoint=store)
    for parts in (1, 2):
        with pytest.raises(ConflictError, match="belongs to another run"):
            in_parts(parts=parts, checkpoint=store)
    data = bytearray(store.path.read_bytes())
    data[len(data) // 2] ^= 1
    store.path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="damaged"):
        in_parts(checkpoint=store)


def test_a_retraining_has_no_parts():
    with pytest.raises(UsageError, match="retrain cannot divide the forget set"):
        method_config("retrain", {"forget_parts": 2})
    with pytest.raises(UsageError, match="forget_parts"):
        method_config("salun", {"forget_parts": 0})
