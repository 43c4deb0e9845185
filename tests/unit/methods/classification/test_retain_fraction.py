"""A draw of the retained images for each epoch: fresh, the same wherever it is repeated, and counted."""

import pytest
import torch

from salun_core.errors import UsageError
from salun_core.methods.classification import METHODS, FileCheckpoint, expected_passes, method_config
from salun_core.methods.classification.method import ClassifierContext
from salun_core.methods.loop import epoch_generator
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask
from salun_core.tasks.classification.training import training_config
from tests.support.by_hand import image_set, net, run

DRAWING = [name for name, row in METHODS.items() if "retain_fraction" in row.config_type.model_fields]
OTHERS = ["retrain", "influence", "gradient_ascent", "boundary_expanding", "boundary_shrink", "lotus", "salun_lotus"]
OTHERS += ["salun_adaptive"]
SETTINGS = {"batch_size": 8, "batch_norm": "update", "learning_rate": 0.02, "augment": True}
OWN = {"amun": {"adversarial_steps": 2}}


def started(method, **extra):
    shapes = {name: tuple(parameter.shape) for name, parameter in net().named_parameters()}
    mask = {"mask": SaliencyMask.random(shapes, 0.5, seed=3)} if METHODS[method].needs_mask else {}
    return run(
        method,
        net(),
        image_set(11, 1),
        image_set(60, 2),
        **{**SETTINGS, **OWN.get(method, {}), "epochs": 3},
        **mask,
        **extra,
    )


def context(fraction=1.0, method="finetune", **settings):
    config = METHODS[method].config_type(retain_fraction=fraction, batch_size=8, **settings)
    return ClassifierContext(image_set(11, 1), image_set(60, 2), 4, config, net(), net())


def places(given, epoch):
    """The places in D_r of an epoch's draw."""
    numbered = ClassifierContext(given.forget, given.retain.relabelled(torch.arange(60)), 4, given.config)
    return numbered.drawn(epoch_generator(0, epoch)).retain.labels.tolist()


def test_every_method_either_draws_or_refuses():
    assert sorted([*DRAWING, *OTHERS]) == sorted(METHODS)
    for name in OTHERS:
        with pytest.raises(UsageError, match="retain_fraction: unknown key"):
            method_config(name, {"retain_fraction": 0.5})
    with pytest.raises(UsageError, match="retain_fraction: unknown key"):
        training_config({"retain_fraction": 0.5})
    for value in (0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="retain_fraction"):
            method_config("salun", {"retain_fraction": value})


def test_each_epoch_has_its_own_draw_and_the_whole_uses_no_random_numbers():
    fifth = context(0.2)
    epochs = [places(fifth, epoch) for epoch in range(4)]
    assert all(len(set(rows)) == 12 for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4
    assert epochs == [places(fifth, epoch) for epoch in range(4)]  # as another process, or a resumed one, draws it
    assert len(places(context(0.001), 0)) == 1
    whole, generator = context(), epoch_generator(0, 1)
    assert whole.drawn(generator) is whole
    assert torch.equal(generator.get_state(), epoch_generator(0, 1).get_state())


@pytest.mark.parametrize("method", DRAWING)
def test_a_killed_run_resumes_with_the_same_draws(method, tmp_path):
    whole = started(method, retain_fraction=0.3)
    assert model_digest(whole.model) != model_digest(started(method).model)
    store = FileCheckpoint(tmp_path / "state")

    def stop(record):
        if record.epoch == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        started(method, retain_fraction=0.3, checkpoint=store, on_epoch=stop)
    resumed = started(method, retain_fraction=0.3, checkpoint=store)
    assert model_digest(resumed.model) == model_digest(whole.model)
    assert resumed.passes == whole.passes


# For each method: what an epoch costs of F = 11 images of D_f and R of D_r, and what the run costs besides.
COSTS = {
    "salun": (lambda r: 11 + r, lambda r: 0),
    "random_label": (lambda r: 11 + r, lambda r: 0),
    "salun_soft": (lambda r: 11 + r, lambda r: 0),
    "finetune": (lambda r: r, lambda r: 0),
    "l1_sparse": (lambda r: r, lambda r: 0),
    "ct": (lambda r: r, lambda r: 0),
    "msg": (lambda r: r, lambda r: 22),
    "scrub": (lambda r: 4 / 3 * r, lambda r: 4 / 3 * 2 * 11),
    "neggrad_plus": (lambda r: r + (8 if r <= 8 else 11 + 11 * (r == 30)), lambda r: 0),
    "sfr_on": (lambda r: r + (8 if r <= 40 else 11), lambda r: 11 + r),
}


@pytest.mark.parametrize("method", COSTS)
@pytest.mark.parametrize(("fraction", "images"), [(1.0, 60), (0.5, 30), (0.1, 6)])
def test_the_cost_is_that_of_the_drawn_images(method, fraction, images):
    if method == "neggrad_plus" and images == 60:
        return  # its own test counts the whole
    of_epoch, once = COSTS[method]
    expected = 3 * of_epoch(images) + once(images)
    given = context(fraction, method, epochs=3)
    assert expected_passes(METHODS[method], given) == pytest.approx(expected, abs=1)


def test_only_drawn_images_go_through_the_model():
    model, seen = net(), []
    model.register_forward_hook(lambda module, inputs, _: seen.append(len(inputs[0])) if module.training else None)
    result = run("finetune", model, image_set(11, 1), image_set(60, 2), epochs=3, retain_fraction=0.25, batch_size=8)
    assert sum(seen) == result.passes == 3 * 15
