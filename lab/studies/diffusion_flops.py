"""Counts the arithmetic of unlearning Stable Diffusion 1.4, here and in the usual procedure, without any weights.

Every operation of a U-Net on the meta device goes through torch's FLOP counter (a multiplication and an addition are
two). The usual procedure, restated here: each pair of a forget and a retain example encodes the forget image twice and
the retain image once, encodes three prompts, calls the U-Net three times with gradients (under c, under c', for the
retain example), drops the second one's graph, and recomputes activations in the backward pass, because the published
U-Net has checkpointing on. Its saliency pass calls it twice per image, under the prompt and under the empty one. This
library caches latents and prompts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from lab.architectures import build_architecture
from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.denoiser import Denoiser
from salun_core.diffusion.examples import Examples, Noised
from salun_core.diffusion.process import Process
from salun_core.methods.diffusion import diffusion_config
from salun_core.methods.diffusion.method import DiffusionContext, ExampleSets
from salun_core.methods.diffusion.objectives import denoising_loss, relabel_loss

EPOCHS = 5


def flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of some work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def denoiser_of(network: nn.Module) -> Denoiser:
    """Return a denoiser with Stable Diffusion's own process."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Denoiser(network, Process.of_scheduler(scheduler))


def batch_of(shape: tuple[int, int, int], count: int, device: str, row: int, pseudo: int | None = None) -> Noised:
    """Return noised examples of one condition; on the meta device, their shapes only."""
    kept = {"device": device, "dtype": torch.int64}
    other = None if pseudo is None else torch.full((count,), pseudo, **kept)
    noisy, target = torch.randn(count, *shape, device=device), torch.randn(count, *shape, device=device)
    return Noised(noisy, torch.full((count,), 500, **kept), target, torch.full((count,), row, **kept), other)


def context_of(network: nn.Module, shape: tuple[int, int, int], text: tuple[int, int], device: str) -> DiffusionContext:
    """Return the inputs of a loss: three prompts and one example of each kind."""
    table = ConditionTable(["c", "c'", "r"], {"encoder_hidden_states": torch.randn(3, *text, device=device)})
    one = Examples(torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    sets = ExampleSets(one, one, table, pixels=False)
    return DiffusionContext(denoiser_of(network), None, sets, diffusion_config("salun"), torch.Generator())


def our_step(context: DiffusionContext, forget: Noised, retain: Noised) -> None:
    """Take the gradient of one step of this library."""
    relabel_loss(context, forget, retain).backward()


def usual_step(context: DiffusionContext, forget: Noised, retain: Noised) -> None:
    """Take the gradient as the usual procedure does: three calls, each with gradients."""
    denoiser, table = context.denoiser, context.sets.table
    kept = denoising_loss(denoiser, retain, table)
    found = denoiser.predict(forget.noisy, forget.times, table.take(forget.condition))
    wanted = denoiser.predict(forget.noisy, forget.times, table.take(forget.pseudo)).detach()
    (mse_loss(found, wanted) + context.config.alpha * kept).backward()


def usual_scoring(context: DiffusionContext, forget: Noised) -> None:
    """Take the gradient of the usual saliency: of the guided prediction, from two calls."""
    denoiser, table = context.denoiser, context.sets.table
    found = denoiser.predict(forget.noisy, forget.times, table.take(forget.condition))
    free = denoiser.predict(forget.noisy, forget.times, table.take(forget.pseudo))
    mse_loss(8.5 * found - 7.5 * free, forget.target).backward()


def arithmetic() -> dict[str, float]:
    """Count Stable Diffusion 1.4: its parts, a pair of examples, and the scoring of one, in FLOPs."""
    unet, shape, text = build_architecture("sd-1.4-unet"), (4, 64, 64), (77, 768)
    vae, clip = build_architecture("sd-1.4-vae"), build_architecture("sd-1.4-text-encoder")
    context = context_of(unet, shape, text, "meta")
    forget, retain = batch_of(shape, 1, "meta", 0, 1), batch_of(shape, 1, "meta", 2)
    conditions = context.sets.table.take(forget.condition)
    with torch.no_grad():
        counts: dict[str, float] = {
            "unet forward": flops(lambda: context.denoiser.predict(forget.noisy, forget.times, conditions)),
            "vae encode": flops(lambda: vae.encode(torch.empty(1, 3, 512, 512, device="meta"))),
            "clip encode": flops(lambda: clip(input_ids=torch.zeros(1, 77, dtype=torch.int64, device="meta"))),
        }
    counts["our pair"] = flops(lambda: our_step(context, forget, retain))
    counts["our scoring"] = flops(lambda: denoising_loss(context.denoiser, forget, context.sets.table).backward())
    counts["usual unet, no recomputation"] = flops(lambda: usual_step(context, forget, retain))
    unet.train().enable_gradient_checkpointing()
    with set_checkpoint_early_stop(False):
        counts["usual unet"] = flops(lambda: usual_step(context, forget, retain))
        counts["usual scoring unet"] = flops(lambda: usual_scoring(context, forget))
    return counts | totals(counts)


def totals(counts: dict[str, float]) -> dict[str, float]:
    """Add up a pair, a pair with its share of the caches, and a run, per forget example.

    A run has as many retain as forget examples and visits each once per epoch. Every example counts with its own
    prompt, although examples of a class share one.
    """
    forward, vae, clip = counts["unet forward"], counts["vae encode"], counts["clip encode"]
    encoders = 3 * (vae + clip)
    cache = 2 * vae + 3 * clip
    nominal, usual = 9 * forward + encoders, counts["usual unet"] + encoders
    plain = counts["usual unet, no recomputation"] + encoders
    ours, our_once = counts["our pair"], counts["our scoring"] + cache
    usual_once = counts["usual scoring unet"] + 2 * (vae + clip)
    our_run, usual_run = our_once + EPOCHS * ours, usual_once + EPOCHS * usual
    return {
        "usual pair, nominal": nominal,
        "usual pair": usual,
        "our pair, caches shared": ours + cache / EPOCHS,
        "usual run": usual_run,
        "our run": our_run,
        "ratio, pair, nominal": ours / nominal,
        "ratio, pair": ours / usual,
        "ratio, pair, no recomputation": ours / plain,
        "ratio, pair with caches, nominal": (ours + cache / EPOCHS) / nominal,
        "ratio, pair with caches": (ours + cache / EPOCHS) / usual,
        "ratio, run": our_run / usual_run,
        "ratio, run of one epoch": (our_once + ours) / (usual_once + usual),
    }


def table(counts: dict[str, float]) -> str:
    """Render the arithmetic side by side."""
    forward = counts["unet forward"]
    rows = [
        ("VAE encodes a pair, in the loop", "3", "0"),
        ("text encodes a pair, in the loop", "3", "0"),
        ("U-Net forwards a pair", f"{counts['usual unet'] / forward:.2f}", f"{counts['our pair'] / forward:.2f}"),
        ("TFLOP a pair, in the loop", f"{counts['usual pair'] / 1e12:.2f}", f"{counts['our pair'] / 1e12:.2f}"),
        (
            f"TFLOP a pair, caches shared over {EPOCHS} epochs",
            f"{counts['usual pair'] / 1e12:.2f}",
            f"{counts['our pair, caches shared'] / 1e12:.2f}",
        ),
        (
            f"TFLOP a forget example, saliency and {EPOCHS} epochs",
            f"{counts['usual run'] / 1e12:.2f}",
            f"{counts['our run'] / 1e12:.2f}",
        ),
    ]
    lines = ["| Stable Diffusion 1.4, 512 x 512 | usual procedure | here |", "|---|---|---|"]
    lines += [f"| {name} | {usual} | {ours} |" for name, usual, ours in rows]
    lines += ["", *(f"{name}: {value:.3f}" for name, value in counts.items() if name.startswith("ratio"))]
    return "\n".join(lines)
