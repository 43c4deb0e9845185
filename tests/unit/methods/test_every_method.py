"""What all methods of the loop have in common: they resume, they repeat, they refuse settings of others."""

import copy
from dataclasses import replace

import pytest
import torch

from salun_core.errors import UsageError
from salun_core.methods.classification import METHODS, FileCheckpoint, method_config
from salun_core.methods.classification.method import ClassifierContext
from salun_core.methods.distributed import ProcessGroup
from salun_core.models.checkpoint import model_digest
from salun_core.saliency import SaliencyMask
from tests.support.by_hand import image_set, net, run, unrecognised

pytestmark = pytest.mark.slow

TRAINED = ["boundary_expanding", "boundary_shrink", "l1_sparse", "salun_soft", "scrub", "neggrad_plus", "sfr_on"]
TRAINED += ["lotus", "salun_lotus", "msg", "ct", "amun"]
SETTINGS = {
    "epochs": 3,
    "batch_size": 8,
    "batch_norm": "update",
    "learning_rate": 0.02,
    "schedule": "cosine",
    "momentum": 0.9,
    "augment": True,
}
OWN = {"sfr_on": {"forget_every": 2, "slow_rate": 0.5}}


class BrokenOffError(Exception):
    """Stands for whatever ends a run."""


def needed(method):
    """What the method needs besides D_f and D_r."""
    shapes = {name: tuple(parameter.shape) for name, parameter in net().named_parameters()}
    given = {"mask": SaliencyMask.random(shapes, 0.5, seed=3)} if METHODS[method].needs_mask else {}
    return given | ({"held_out": unrecognised(net(), 20, 3)} if METHODS[method].reads_held_out else {})


def started(method, **extra):
    settings = {**SETTINGS, **OWN.get(method, {})}
    return run(method, net(), image_set(11, 1), image_set(30, 2), **settings, **needed(method), **extra)


@pytest.mark.parametrize("method", TRAINED)
def test_a_resumed_run_gives_the_same_bits(method, tmp_path):
    whole = started(method)
    store = FileCheckpoint(tmp_path / "state")

    def stop(record):
        if record.epoch == 2:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        started(method, checkpoint=store, on_epoch=stop)
    fresh = []
    resumed = started(method, checkpoint=store, on_epoch=fresh.append)
    assert [record.epoch for record in fresh] == [3]
    assert model_digest(resumed.model) == model_digest(whole.model)
    assert [r.losses for r in resumed.history] == [r.losses for r in whole.history]
    assert resumed.passes == whole.passes


@pytest.mark.parametrize("method", [*TRAINED, "influence"])
def test_the_same_run_gives_the_same_weights_and_does_not_change_the_model(method):
    model = net()
    before = model_digest(model)
    sets = image_set(11, 1), image_set(30, 2)
    first, second = (run(method, model, *sets, batch_size=8, **needed(method)) for _ in range(2))
    assert model_digest(first.model) == model_digest(second.model) != before == model_digest(model)
    assert 0 < first.changed_fraction <= 1
    assert not first.model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_unknown_settings_and_those_of_other_methods_are_refused_with_those_of_the_method():
    with pytest.raises(UsageError, match="did you mean 'temperature'"):
        method_config("scrub", {"temperatur": 2.0})
    own = "the settings of finetune are augment, batch_norm, batch_size"
    with pytest.raises(UsageError, match=f"temperature: unknown key; order: unknown key.*{own}"):
        method_config("finetune", {"temperature": 2.0, "order": "mixed"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("soft_density", 0),
        ("l1_strength", -1),
        ("influence_damping", 0),
        ("influence_samples", 0),
        ("adversarial_step", 2),
        ("temperature", float("nan")),
        ("retain_weight", 1),
        ("forget_every", 0),
        ("slow_rate", 0),
        ("temper_strength", 0),
        ("retain_share", 1.5),
        ("reset_share", 0),
        ("kept_gradient", -0.1),
        ("adversarial_radius", 0),
        ("adversarial_steps", 0),
        ("forget_strength", float("inf")),
    ],
)
def test_values_out_of_range_are_refused(key, value):
    method = next(name for name, row in METHODS.items() if key in row.config_type.model_fields)
    with pytest.raises(UsageError, match=key):
        method_config(method, {key: value})


@pytest.mark.parametrize("method", [name for name in TRAINED if name != "sfr_on"])
def test_the_shares_of_several_processes_add_up_to_the_batch(method):
    """17 images in batches of 4: the last batch has one, fewer than there are processes."""
    model = net()
    with torch.no_grad():
        model.conv.weight.mul_(1.1)
    config = METHODS[method].config_type(batch_size=4, augment=False)
    context = ClassifierContext(
        image_set(17, 1), image_set(17, 2), 4, config, model, net(), held_out=unrecognised(net(), 20, 3)
    )
    context = METHODS[method].begin(context) if METHODS[method].begin else context
    original = net() if method == "salun_soft" else context.original

    def losses(group):
        generator = torch.Generator().manual_seed(0)
        phases = METHODS[method].phases(replace(context, model=copy.deepcopy(model), original=original), generator)
        return [
            float(step.loss(model).detach() * step.weight) for phase in phases for step in phase.draw(generator, group)
        ]

    alone = losses(ProcessGroup())
    shared = [sum(values) for values in zip(*(losses(ProcessGroup(rank, 3)) for rank in range(3)), strict=True)]
    assert shared == pytest.approx(alone, rel=1e-4, abs=1e-6)


CLASS_WISE = [
    ("influence", {"influence_samples": 200}),
    ("boundary_expanding", {"epochs": 5, "learning_rate": 3e-4}),
    ("boundary_shrink", {"epochs": 3, "learning_rate": 3e-4}),
    ("salun_soft", {"epochs": 2}),
    ("scrub", {"epochs": 2}),
    ("neggrad_plus", {"epochs": 4}),
    ("sfr_on", {"epochs": 2}),
    ("msg", {"epochs": 6, "learning_rate": 0.05, "reset_share": 0.8}),
    ("ct", {"epochs": 4, "learning_rate": 0.03}),
    ("amun", {"epochs": 3, "learning_rate": 0.03, "adversarial_radius": 0.5, "adversarial_steps": 5}),
]


@pytest.mark.parametrize(("method", "config"), CLASS_WISE)
def test_a_digit_is_forgotten_and_the_others_are_kept(lab, method, config):
    forget, retain = lab.parts("class")
    made = lab.unlearn("class", method, **{**METHODS[method].defaults, **config})
    with torch.no_grad():
        correct = [
            sum(int((made(images).argmax(1) == labels).sum()) for images, labels in part.batches(512)) / len(part)
            for part in (forget, retain)
        ]
    assert correct[0] < 0.5
    assert correct[1] > 0.9
