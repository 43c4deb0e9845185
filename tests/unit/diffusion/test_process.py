"""The forward process against diffusers' schedulers, and its own algebra."""

import numpy as np
import pytest
import torch

from salun_core.diffusion.process import Process
from salun_core.errors import ModelError

diffusers = pytest.importorskip("diffusers")

CLEAN, NOISE = torch.randn(2, 6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([0, 1, 250, 500, 900, 999])


def of(prediction, **settings):
    if prediction == "flow":
        return Process.of_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(**settings))
    return Process.of_scheduler(diffusers.DDPMScheduler(prediction_type=prediction, **settings))


def test_alphas_are_the_product_of_a_linear_schedule():
    betas = np.linspace(1e-4, 0.02, 1000)
    cumulative = np.cumprod(1 - betas)
    process = of("epsilon")
    np.testing.assert_allclose(process.signal.numpy(), np.sqrt(cumulative), rtol=1e-4)
    np.testing.assert_allclose(process.noise.numpy(), np.sqrt(1 - cumulative), rtol=1e-3)
    assert process.times == 1000


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noising_and_targets_are_those_of_diffusers(prediction):
    process, scheduler = of(prediction), diffusers.DDPMScheduler()
    assert torch.allclose(process.noisy(CLEAN, NOISE, TIMES), scheduler.add_noise(CLEAN, NOISE, TIMES), atol=1e-6)
    wanted = {"epsilon": NOISE, "sample": CLEAN, "v_prediction": scheduler.get_velocity(CLEAN, NOISE, TIMES)}
    assert torch.allclose(process.target(CLEAN, NOISE, TIMES), wanted[prediction], atol=1e-6)
    assert torch.equal(process.network_times(TIMES), TIMES)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_a_straight_line_at_diffusers_own_times(shift):
    process, scheduler = of("flow", shift=shift), diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    moments = scheduler.timesteps.flip(0)[TIMES]
    noisy = process.noisy(CLEAN, NOISE, TIMES)
    assert torch.allclose(process.network_times(TIMES), moments, atol=1e-3)
    assert torch.allclose(noisy, scheduler.scale_noise(CLEAN, moments, NOISE), atol=1e-5)
    later = process.noisy(CLEAN, NOISE, TIMES) + 1e-3 * process.target(CLEAN, NOISE, TIMES)
    sigma = process.noise[TIMES].view(-1, 1, 1, 1) + 1e-3
    assert torch.allclose(later, (1 - sigma) * CLEAN + sigma * NOISE, atol=1e-5)  # the target is d x / d σ


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_clean_sample_and_noise_follow_from_the_target(prediction):
    process = of(prediction)
    noisy, target = process.noisy(CLEAN, NOISE, TIMES), process.target(CLEAN, NOISE, TIMES)
    clear = slice(0, 5)  # at the last time a clean sample is divided by 0.006
    assert torch.allclose(process.clean_of(noisy, target, TIMES)[clear], CLEAN[clear], atol=1e-4)
    assert torch.allclose(process.noise_of(noisy, target, TIMES), NOISE, atol=1e-4)


def test_times_are_drawn_over_the_whole_range():
    times = of("epsilon").draw_times(20_000, torch.Generator().manual_seed(1))
    assert (int(times.min()), int(times.max())) == (0, 999)
    assert float(times.float().mean()) == pytest.approx(499.5, abs=8)


@pytest.mark.parametrize(
    "scheduler", [lambda: diffusers.DDPMScheduler(prediction_type="other"), lambda: diffusers.EDMEulerScheduler()]
)
def test_an_unknown_process_is_refused(scheduler):
    with pytest.raises(ModelError, match="is not supported"):
        Process.of_scheduler(scheduler())
