"""The steps of a method: batches, shares of several processes, and what is spared."""

import pytest
import torch

from salun_core.errors import UsageError
from salun_core.methods.diffusion import METHODS, DiffusionContext, diffusion_config
from salun_core.methods.diffusion.method import DiffusionMethod, denoising_phase
from salun_core.methods.distributed import SINGLE_PROCESS, ProcessGroup
from tests.support.tiny_diffusion import lab

pytest.importorskip("diffusers")


def context_of(method="finetune"):
    denoiser, sets = lab("class")
    settings = diffusion_config(method, {"batch_size": 8, "steps": 3, "epochs": 1})
    return DiffusionContext(denoiser, None, sets, settings, torch.Generator())


def phase(method="finetune"):
    return denoising_phase(METHODS[method], context_of(method))


def drawn(found, group=SINGLE_PROCESS, seed=7):
    return list(found.draw(torch.Generator().manual_seed(seed), group))


def test_a_phase_has_its_size():
    found = phase()
    assert (found.samples, found.steps, len(drawn(found)), found.name) == (24, 3, 3, "denoising")
    assert found.device.type == "cpu"


def test_several_processes_share_the_batch_of_one():
    found, network = phase("salun"), lab("class")[0].network
    with torch.no_grad():
        alone = [float(step.loss(network)) for step in drawn(found)]
        shares = [
            [(float(s.loss(network)), s.weight) for s in drawn(found, ProcessGroup(rank, 2))] for rank in range(2)
        ]
    together = [sum(loss * weight for loss, weight in pair) for pair in zip(*shares, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5)
    assert shares[0] != shares[1]


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UsageError, match="8 cannot be shared by 3"):
        drawn(phase(), ProcessGroup(0, 3))


def test_a_method_without_forget_loss_gets_no_forget_examples():
    seen = []

    def loss(context, forget, retain):
        seen.append((len(forget), len(retain)))
        return retain.noisy.sum()

    context = context_of()
    for method in (DiffusionMethod(loss, needs_forget=False), DiffusionMethod(loss)):
        drawn(denoising_phase(method, context))[0].loss(context.denoiser.network)
    assert seen == [(0, 8), (8, 8)]


def test_the_loss_is_of_the_given_model():
    context = context_of()
    other, _ = lab("class")
    for weight in other.network.parameters():
        weight.data.zero_()
    step = drawn(denoising_phase(METHODS["finetune"], context))[0]
    with torch.no_grad():
        mine, zero = float(step.loss(context.denoiser.network)), float(step.loss(other.network))
    assert mine != zero
    assert 0.8 < zero < 1.2  # a network of zeros predicts 0, and the noise has unit variance
