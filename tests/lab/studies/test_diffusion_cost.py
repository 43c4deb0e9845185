"""The cost of a step and a sample: counted arithmetic, no encoders in the loop, constant memory."""

from collections import Counter

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

pytest.importorskip("diffusers", reason="the diffusion extra is not installed")
pytest.importorskip("transformers", reason="the diffusion extra is not installed")

from diffusers import DDPMScheduler  # noqa: E402

from examples.small_diffusion.recipes import StableDiffusionRecipe, build_autoencoder, build_text_encoder  # noqa: E402
from lab.architectures import build_architecture  # noqa: E402
from lab.studies.diffusion_cost import LiveBytes, sampling_peak, small_unet  # noqa: E402
from lab.studies.diffusion_flops import batch_of, context_of, flops, our_step, usual_step  # noqa: E402
from salun_core.diffusion.conditions import ConditionTable  # noqa: E402
from salun_core.diffusion.denoiser import Denoiser  # noqa: E402
from salun_core.diffusion.examples import Examples  # noqa: E402
from salun_core.diffusion.latents import latents_of  # noqa: E402
from salun_core.diffusion.process import Process  # noqa: E402
from salun_core.methods.diffusion import ExampleSets, diffusion_config, unlearn_denoiser  # noqa: E402
from salun_core.methods.diffusion.saliency import denoising_scores  # noqa: E402
from salun_core.saliency import SaliencyMask  # noqa: E402


def test_a_pair_costs_at_most_0_55_of_the_usual_procedure():
    unet, shape = build_architecture("sd-1.4-unet"), (4, 64, 64)
    vae, text = build_architecture("sd-1.4-vae"), build_architecture("sd-1.4-text-encoder")
    context = context_of(unet, shape, (77, 768), "meta")
    forget, retain = batch_of(shape, 1, "meta", 0, 1), batch_of(shape, 1, "meta", 2)
    conditions = context.sets.table.take(forget.condition)
    with torch.no_grad():
        forward = flops(lambda: context.denoiser.predict(forget.noisy, forget.times, conditions))
        encoders = flops(lambda: vae.encode(torch.empty(1, 3, 512, 512, device="meta")))
        encoders += flops(lambda: text(input_ids=torch.zeros(1, 77, dtype=torch.int64, device="meta")))
    ours = flops(lambda: our_step(context, forget, retain))
    # Forward and backward of two examples and a forward of the third; the backward pass of a convolution or a product
    # is twice its forward pass, and neither the noise nor the prompt needs a gradient.
    assert 6.9 * forward < ours < 7 * forward
    assert ours <= 0.55 * (9 * forward + 3 * encoders)


def test_three_calls_cost_as_much_without_recomputation():
    """The savings are the encoders and the recomputation, and nothing that the loss needs."""
    shape = (4, 8, 8)
    context = context_of(small_unet().to("meta"), shape, (16, 64), "meta")
    forget, retain = batch_of(shape, 2, "meta", 0, 1), batch_of(shape, 2, "meta", 2)
    assert flops(lambda: our_step(context, forget, retain)) == flops(lambda: usual_step(context, forget, retain)) > 0


def test_both_steps_have_the_same_gradient():
    """The benchmark compares two ways to one result."""
    network, found = small_unet(), []
    context = context_of(network, (4, 8, 8), (16, 64), "cpu")
    forget, retain = batch_of((4, 8, 8), 3, "cpu", 0, 1), batch_of((4, 8, 8), 3, "cpu", 2)
    for step in (our_step, usual_step):
        network.zero_grad()
        step(context, forget, retain)
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    for ours, usual in zip(*found, strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-6)


class Encoders:
    """The autoencoder and the text encoder of the small Stable Diffusion, with fresh weights."""

    def __init__(self):
        torch.manual_seed(0)
        recipe = StableDiffusionRecipe(autoencoder_channels=[8, 8, 8], text_layers=1)
        self.vae = build_autoencoder(recipe, 32, 3).eval()
        self.text = build_text_encoder(recipe, 99, (0, 1)).eval()

    @torch.no_grad()
    def sets(self):
        """Latents and prompts of eight images to forget and eight to keep."""
        prompts = self.text(torch.randint(99, (3, 16))).last_hidden_state
        table, rows = ConditionTable(["a", "b", "c"], {"encoder_hidden_states": prompts}), torch.zeros(8).long()
        images = [torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8) for _ in range(2)]
        (forget, forget_std), (retain, retain_std) = (latents_of(self.vae, part) for part in images)
        return ExampleSets(
            Examples(forget, rows, forget_std, rows + 1), Examples(retain, rows + 2, retain_std), table, False
        )


@pytest.fixture
def calls():
    """How often the modules of each class were called, whoever called them."""
    counted: Counter[str] = Counter()
    handle = register_module_forward_pre_hook(lambda module, _: counted.update([type(module).__name__]))
    yield counted
    handle.remove()


def test_no_encoder_is_called_after_latents_and_prompts_are_cached(calls, monkeypatch):
    encoders = Encoders()
    sets = encoders.sets()
    assert calls["Encoder"] == 2  # the autoencoder's, once a set
    assert calls["CLIPTextModel"] == 1

    def refuse(*args, **kwargs):
        raise AssertionError("an encoder was called in the loop")

    vae, text = encoders.vae, encoders.text
    for module, name in ((vae, "encode"), (vae, "forward"), (vae.encoder, "forward"), (text, "forward")):
        monkeypatch.setattr(module, name, refuse)
    with pytest.raises(AssertionError, match="in the loop"):
        encoders.sets()
    calls.clear()
    denoiser = Denoiser(small_unet(), Process.of_scheduler(DDPMScheduler()))
    config = diffusion_config("salun", {"steps": 3, "epochs": 1, "batch_size": 4, "device": "cpu"})
    mask = SaliencyMask.from_scores(denoising_scores(denoiser, sets, config), 0.5)
    assert calls["UNet2DConditionModel"] == 2  # one a batch of the forget set
    unlearn_denoiser(denoiser, sets, "salun", config=config, mask=mask)
    assert calls["UNet2DConditionModel"] == 2 + 2 * 3  # a step: the target, and one batch with gradients
    assert not {name for name in calls if name.startswith(("CLIP", "Autoencoder", "Encoder", "DownEncoder"))}


def test_a_step_calls_the_network_once_for_targets_and_once_with_gradients():
    network, seen = small_unet(), []
    network.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled())))
    context = context_of(network, (4, 8, 8), (16, 64), "cpu")
    our_step(context, batch_of((4, 8, 8), 3, "cpu", 0, 1), batch_of((4, 8, 8), 5, "cpu", 2))
    assert seen == [(3, False), (8, True)]


def test_the_memory_of_sampling_is_constant_in_steps_and_images():
    network = small_unet()
    short, long = sampling_peak(network, 4, 4, batch_size=4), sampling_peak(network, 16, 4, batch_size=4)
    assert long - short <= 12 * 8  # the scheduler's own list of times, eight bytes each
    one_sample = 4 * 8 * 8 * 4
    two, four = sampling_peak(network, 2, 8, batch_size=4), sampling_peak(network, 2, 16, batch_size=4)
    assert four - two <= 8 * 8 < one_sample


def test_the_memory_gauge_counts_what_is_kept():
    def peak(keep):
        with LiveBytes() as counted:
            kept = []
            for _ in range(10):
                made = torch.ones(1000)
                kept = [*kept, made] if keep else []
        return counted.peak

    assert peak(keep=True) == 10 * 4000
    assert peak(keep=False) <= 2 * 4000
