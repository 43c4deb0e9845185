"""A device without room for a batch: training adds up the gradients of its parts and takes the same steps."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from salun_core.errors import DeviceMemoryError
from salun_core.methods.classification import METHODS, FileCheckpoint, UnlearnConfig, method_config, unlearn
from salun_core.methods.classification.method import classification_loss, share_step
from salun_core.methods.distributed import ProcessGroup, Share
from salun_core.methods.loop import Phase, run_loop
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask
from salun_core.tasks.classification import ClassificationTask
from tests.support.by_hand import image_set, net, unrecognised
from tests.support.full_device import limited

BATCH = 16
SETTINGS = {"epochs": 2, "batch_size": BATCH, "learning_rate": 0.02, "schedule": "cosine", "momentum": 0.9}
WHOLE = {"influence", "sfr_on"}  # closed form; a forget step whose weights are normalised over the batch


def unlearned(method, limit=None, batch_norm="freeze", **extra):
    """Return the result of a run, and the room on its device."""
    model = net()
    model.drop.p = 0.0  # the parts of a batch draw other units to drop
    mask = half_mask(model) if METHODS[method].needs_mask else None
    room = limited(model, limit) if limit is not None else None
    config = {**SETTINGS, "batch_norm": batch_norm, "device": "cpu"}
    sets = {"forget": image_set(20, 1), "retain": image_set(37, 2), "held_out": unrecognised(net(), 20, 3)}
    return unlearn(model, method, **sets, config=config, mask=mask, **extra), room


def half_mask(model):
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return SaliencyMask.random(shapes, 0.5, seed=3)


@cache
def with_room(method):
    return unlearned(method)[0]


def assert_same_steps(found, expected):
    for name, value in found.model.state_dict().items():
        torch.testing.assert_close(value, expected.model.state_dict()[name], rtol=1e-4, atol=2e-6)
    for record, other in zip(found.history, expected.history, strict=True):
        assert record.losses == pytest.approx(other.losses, rel=1e-5, abs=1e-6)
        assert record.learning_rate == other.learning_rate


DIVIDED = [(method, 5, 4) for method in sorted(set(METHODS) - WHOLE - {"retrain", "salun_adaptive"})]
DIVIDED += [("salun", 15, 2), ("salun", 1, BATCH), ("amun", 1, BATCH), ("msg", 1, BATCH)]


@pytest.mark.parametrize(("method", "limit", "parts"), DIVIDED)
def test_every_method_takes_the_same_steps_in_parts(method, limit, parts):
    found, room = unlearned(method, limit)
    assert [record.parts for record in found.history] == [parts, parts]
    assert max(room.passed) <= limit < max(room.refused)
    assert_same_steps(found, with_room(method))
    assert [record.parts for record in with_room(method).history] == [1, 1]
    assert found.config.batch_size == BATCH


def test_the_size_that_fits_is_kept_for_the_rest_of_the_run():
    _, room = unlearned("finetune", 5)
    assert room.refused == [16, 8]


def test_weights_outside_the_mask_keep_their_bits():
    found, _ = unlearned("salun", 5)
    before, mask = net(), half_mask(net())
    for name, value in found.model.named_parameters():
        frozen = ~mask.tensor(name)
        assert torch.equal(value[frozen], dict(before.named_parameters())[name][frozen])


def test_a_training_with_batch_norm_records_its_parts():
    """Each part is normalised by its own statistics, so the steps are others."""
    found, room = unlearned("retrain", 8, batch_norm="update")
    assert [record.parts for record in found.history] == [2, 2]
    assert max(room.passed) <= 8


def test_a_device_without_room_for_one_image_ends_the_run():
    with pytest.raises(DeviceMemoryError, match="a batch of 1 does not fit"):
        one_step(0)


def test_a_step_that_cannot_be_divided_names_its_batch():
    """A forget step of SFR-on; a closed-form method is explained by its task."""
    with pytest.raises(DeviceMemoryError, match="a batch of 8 does not fit"):
        one_step(7, divisible=False)


def one_step(limit, divisible=True):
    """Run one step of the loop on the mean loss of eight images."""
    model, images = net(), image_set(8, 1)
    limited(model, limit)
    pixels = next(images.batches(8))[0]
    step = share_step(classification_loss, ProcessGroup().share(pixels, images.labels))
    step = step if divisible else replace(step, halves=None)
    phase = Phase("all", torch.device("cpu"), 8, 1, lambda generator, group: iter([step]))
    run_loop(model, lambda *_: [phase], UnlearnConfig(epochs=1, batch_size=8, device="cpu"))


def test_a_run_on_a_full_device_resumes_like_any_other(tmp_path):
    """The checkpoint belongs to the same run, whatever room there was."""
    whole, _ = unlearned("random_label", 5)
    store = FileCheckpoint(tmp_path / "state")

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearned("random_label", 5, checkpoint=store, on_epoch=stop)
    resumed, _ = unlearned("random_label", checkpoint=store)
    assert [record.parts for record in resumed.history] == [4, 1]
    assert_same_steps(resumed, whole)


def test_a_share_of_one_image_is_halved_with_a_stand_in():
    images, labels = torch.arange(5.0)[:, None], torch.arange(5)
    share = ProcessGroup().share(images, labels)
    left, right = share.halves()
    assert (left.count, right.count, left.weight, right.weight) == (3, 2, pytest.approx(0.6), pytest.approx(0.4))
    assert torch.equal(torch.cat([left.images, right.images]), images)
    one, stand_in = Share(images[:1], labels[:1], 1, 0.2, 5).halves()
    assert (one.count, one.weight, stand_in.count, stand_in.weight) == (1, 0.2, 0, 0.0)
    assert len(stand_in.images) == 1
    assert [half.count for half in stand_in.halves()] == [0, 0]


def test_with_room_the_weights_are_those_of_one_part():
    again, room = unlearned("neggrad_plus", BATCH)
    assert room.refused == []
    assert model_digest(again.model) == model_digest(with_room("neggrad_plus").model)


DIFFUSION = ("salun", "random_label", "finetune", "gradient_ascent", "forget_me_not")


@pytest.mark.parametrize("method", DIFFUSION)
def test_a_denoiser_takes_the_same_steps_in_parts(method):
    pytest.importorskip("diffusers")
    from salun_core.methods.diffusion import unlearn_denoiser
    from tests.support.tiny_diffusion import digits_sets, lab, selection_mask, text_table, text_unet

    def run(limit):
        denoiser, sets = lab("text") if method != "forget_me_not" else (text_unet(), digits_sets(text_table()))
        mask = selection_mask(denoiser, "full") if method == "salun" else None
        room = limited(denoiser.network, limit)
        config = {"steps": 2, "epochs": 1, "batch_size": 4, "device": "cpu", "learning_rate": 1e-4}
        return unlearn_denoiser(denoiser, sets, method, config=config, mask=mask), room

    (whole, free), (found, room) = run(99), run(2)
    assert (free.refused, bool(room.refused)) == ([], True)
    assert found.history[0].parts in (2, 4)
    assert max(room.passed) <= 2
    state = whole.model.state_dict()
    for name, value in found.model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=3e-5)
    assert found.history[0].losses == pytest.approx(whole.history[0].losses, rel=1e-3)


def test_a_closed_form_method_is_explained_by_its_task():
    """Its batch is part of its definition, so it is not divided."""
    model = net()
    limited(model, 15)
    card = SimpleNamespace(architecture="none", classes=["a"] * 4)
    inputs = SimpleNamespace(original=SimpleNamespace(model=model, card=card))
    inputs.forget, inputs.retain = image_set(20, 1), image_set(37, 2)
    config = method_config("influence", {"batch_size": BATCH, "device": "cpu"})
    with pytest.raises(DeviceMemoryError, match="To fix it: set a smaller batch_size, or use a device"):
        ClassificationTask().unlearn(inputs, "influence", config)
