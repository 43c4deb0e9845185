"""The steps of a method: batches, shares of several processes, and what is spared."""

from dataclasses import replace

import pytest
import torch
from tiny_diffusion import lab

from salun_core.errors import UsageError
from salun_core.methods.diffusion import METHODS, Setting, generation_config
from salun_core.methods.diffusion.method import DiffusionStretch, GenerationMethod
from salun_core.methods.distributed import ALONE, World

pytest.importorskip("diffusers")


def stretch(method="finetune", count=3, **config):
    denoiser, task = lab("class")
    settings = generation_config(method, {"batch_size": 8, "steps": 3, "epochs": 1, **config})
    return DiffusionStretch(METHODS[method], Setting(denoiser, None, task, settings, torch.Generator()), count)


def drawn(found, world=ALONE, seed=7):
    return list(found.draw(found.setting.config, torch.Generator().manual_seed(seed), world))


def test_a_stretch_knows_its_size():
    found = stretch()
    assert (len(found), found.steps(8), len(drawn(found)), found.name) == (24, 3, 3, "denoising")
    assert found.device.type == "cpu"


def test_several_processes_share_what_one_would_take():
    found = stretch("salun")
    network = found.setting.denoiser.network
    with torch.no_grad():
        alone = [float(step.loss(network)) for step in drawn(found)]
        shares = [[(float(s.loss(network)), s.weight) for s in drawn(found, World(rank, 2))] for rank in range(2)]
    together = [sum(loss * weight for loss, weight in pair) for pair in zip(*shares, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5)
    assert shares[0] != shares[1]


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UsageError, match="8 cannot be shared by 3"):
        drawn(stretch(), World(0, 3))


def test_a_method_that_reads_no_forget_examples_sees_none():
    seen = []

    def loss(setting, forget, retain):
        seen.append((len(forget), len(retain)))
        return retain.noisy.sum()

    found = stretch()
    for method in (GenerationMethod(loss, needs_forget=False), GenerationMethod(loss)):
        drawn(replace(found, method=method))[0].loss(found.setting.denoiser.network)
    assert seen == [(0, 8), (8, 8)]


def test_the_loss_is_of_the_model_that_is_handed_over():
    found = stretch()
    other, _ = lab("class")
    for weight in other.network.parameters():
        weight.data.zero_()
    step = drawn(found)[0]
    with torch.no_grad():
        mine, zero = float(step.loss(found.setting.denoiser.network)), float(step.loss(other.network))
    assert mine != zero
    assert 0.8 < zero < 1.2  # a network of zeros predicts 0, and the noise has unit variance
