"""Sampling against the equations, and its promises about seeds and batches."""

import numpy as np
import pytest
import torch

from salun_core.diffusion.sampling import Sampler, images, samples, starting_noise, to_bytes
from salun_core.errors import ModelError, UsageError
from tests.support.tiny_diffusion import NULL, class_table, class_unet, lab, text_unet

diffusers = pytest.importorskip("diffusers")

SHAPE = (1, 8, 8)


def ddim(**settings):
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    return Sampler.of_scheduler(scheduler, SHAPE, latents=True, **{"steps": 4, "guidance_scale": 1.0, **settings})


@pytest.mark.parametrize("kind", ["PNDM", "EulerDiscrete", "DPMSolverMultistep", "LMSDiscrete", "DDPM", "DDIM"])
def test_latents_are_never_clipped_whatever_the_scheduler_file_says(kind):
    """The files of the first four name no clipping, the others' defaults and dynamic thresholds clip."""
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    clipping = {"clip_sample": True, "thresholding": True} if kind.startswith("DD") else {}
    denoiser, table = class_unet(), class_table()
    drawn = {}
    for latents in (True, False):
        scheduler = getattr(diffusers, f"{kind}Scheduler")(**betas, **clipping)
        sampler = Sampler.of_scheduler(scheduler, SHAPE, latents=latents, steps=4, guidance_scale=1.0)
        drawn[latents] = next(samples(denoiser, table, sampler, [0, 1], [11, 12]))
    assert torch.equal(drawn[True], next(samples(denoiser, table, ddim(), [0, 1], [11, 12])))
    assert drawn[True].abs().max() > 1.5
    assert drawn[False].abs().max() <= 1  # pixels have that range


def test_pixels_keep_the_setting_of_their_scheduler():
    for setting in (True, False):
        scheduler = diffusers.DDPMScheduler(clip_sample=setting)
        made = Sampler.of_scheduler(scheduler, SHAPE, latents=False, steps=4).scheduler
        assert made.config.clip_sample is setting


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_samples_follow_the_equation_of_ddim(scale):
    denoiser, table = class_unet(), class_table()
    found = next(samples(denoiser, table, ddim(guidance_scale=scale), [0, 1], [11, 12]))
    cumulative = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    current = np.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(s)).numpy() for s in (11, 12)])
    for time in (750, 500, 250, 0):
        with torch.no_grad():

            def ask(rows, now=current, when=time):
                noisy = torch.from_numpy(now).float()
                return denoiser.network(noisy, torch.full((2,), when), class_labels=torch.tensor(rows)).sample.numpy()

            noise = ask([NULL, NULL]) + scale * (ask([0, 1]) - ask([NULL, NULL]))
        earlier = cumulative[time - 250] if time >= 250 else cumulative[0]
        clean = (current - np.sqrt(1 - cumulative[time]) * noise) / np.sqrt(cumulative[time])
        current = np.sqrt(earlier) * clean + np.sqrt(1 - earlier) * noise if time else clean
    scheduler = ddim().scheduler
    assert scheduler.config.set_alpha_to_one
    np.testing.assert_allclose(found.numpy(), current, atol=2e-3)


def test_flows_are_sampled_by_euler_steps():
    denoiser, task = lab("flow")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler = Sampler.of_scheduler(scheduler, SHAPE, latents=True, steps=3, guidance_scale=1.0)
    found = next(samples(denoiser, task.table, sampler, [2], [5]))
    scheduler.set_timesteps(3)
    current = starting_noise([5], SHAPE)
    for moment, now, then in zip(scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        told = task.table.take(torch.tensor([2]))
        with torch.no_grad():
            current = current + (then - now) * denoiser.network(current, timestep=moment[None], **told).sample
    assert torch.allclose(found, current, atol=1e-5)


def test_an_image_depends_on_its_seed_only():
    denoiser, table = class_unet(), class_table()
    rows, seeds = [0, 1, 2, 0, 1], [1, 2, 3, 4, 5]
    together = torch.cat(list(samples(denoiser, table, ddim(), rows, seeds)))
    apart = list(samples(denoiser, table, ddim(batch_size=2), rows, seeds))
    assert [len(part) for part in apart] == [2, 2, 1]
    assert torch.allclose(torch.cat(apart), together, atol=1e-4)
    last = next(samples(denoiser, table, ddim(), rows[-1:], seeds[-1:]))
    assert torch.allclose(last, together[-1:], atol=1e-4)


def test_batches_are_drawn_one_by_one():
    denoiser, calls = class_unet(), []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    stream = samples(denoiser, class_table(), ddim(batch_size=2), [0] * 1000, range(1000))
    next(stream)
    assert len(calls) == 4  # one batch of four steps; the other 499 are still to come


def test_images_are_bytes_in_three_colours():
    found = list(images(class_unet(), class_table(), ddim(), [0, 1], [0, 1]))
    assert (found[0].dtype, found[0].shape) == (torch.uint8, (2, 3, 8, 8))
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5)
    assert to_bytes(pixels)[0, 2, 0].tolist() == [0, 0, 128, 255, 255]


def test_guidance_needs_a_null_condition_and_nan_is_refused():
    from dataclasses import replace

    with pytest.raises(UsageError, match="null condition"):
        next(samples(class_unet(), replace(class_table(), null=None), ddim(guidance_scale=3.0), [0], [0]))
    broken, task = text_unet(), lab("text")[1]
    next(broken.network.parameters()).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="generated images are not finite"):
        next(samples(broken, task.table, ddim(), [0], [0]))
