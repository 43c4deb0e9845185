"""Compares the cost of unlearning a diffusion model with the usual procedure: arithmetic, mask, memory and step time.

    python -m lab.studies.diffusion_cost [--skip-mask]

The arithmetic is counted (see diffusion_flops.py); the mask is a real one of Stable Diffusion 1.4's 859,520,964
weights, from random scores, in its own process; sampling and the step use the small U-Net of the demo.
Prints tables and writes lab/results/diffusion-cost.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from lab.architectures import build_architecture
from lab.studies.diffusion_flops import arithmetic, batch_of, context_of, denoiser_of, our_step, table, usual_step
from salun_core.device_memory import LiveBytes
from salun_core.diffusion.conditions import ConditionTable
from salun_core.diffusion.sampling import Sampler, samples
from salun_core.saliency import SaliencyMask

ROOT = Path(__file__).parents[2]
MASK_NEEDS = 9 * 2**30


def mask_at_full_size() -> dict[str, float]:
    """Threshold random scores of SD 1.4's shapes, save and load the mask: seconds, peak memory, bytes."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    unet = build_architecture("sd-1.4-unet")
    scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in unet.named_parameters()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    mask = SaliencyMask.from_scores(scores, 0.5)
    chosen = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores.clear()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"
        mask.save(path)
        saved = time.process_time()
        same, size = SaliencyMask.load(path) == mask, path.stat().st_size
    packed = sum(bits.nbytes for bits in mask.bits.values())
    return {
        "weights": mask.weights,
        "salient": mask.k,
        "packed bytes": packed,
        "file bytes": size,
        "bits a weight in the file": size * 8 / mask.weights,
        "int64 bytes": mask.weights * 8,
        "from_scores, CPU s": chosen - started,
        "save, CPU s": saved - chosen,
        "scores, MB": before / 1024,
        "peak, MB": peak / 1024,
        "loads equal": float(same),
    }


def small_unet() -> nn.Module:
    """Return the small U-Net over an 8 x 8 latent."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def sampling_peak(network: nn.Module, steps: int, images: int, batch_size: int = 8) -> int:
    """Return the peak bytes of live tensors while images are drawn and dropped, without the network's own."""
    from diffusers import DDPMScheduler

    table = ConditionTable(["c", ""], {"encoder_hidden_states": torch.randn(2, 16, 64)}, null=1)
    sampler = Sampler.of_scheduler(DDPMScheduler(), (4, 8, 8), latents=True, steps=steps, batch_size=batch_size)
    with LiveBytes() as counted:
        for _ in samples(denoiser_of(network), table, sampler, [0] * images, range(images)):
            pass
    return counted.peak


def step_times(rounds: int, threads: int, count: int = 32) -> dict[str, float]:
    """Time a gradient of the small U-Net, alternating with the usual one: medians, seconds."""
    torch.set_num_threads(threads)
    network, shape = small_unet(), (4, 8, 8)
    context = context_of(network, shape, (16, 64), "cpu")
    forget, retain = batch_of(shape, count, "cpu", 0, 1), batch_of(shape, count, "cpu", 2)
    times: dict[str, list[float]] = {"ours": [], "usual": []}
    for turn in range(rounds + 2):
        for name, step in (("ours", our_step), ("usual", usual_step)):
            network.zero_grad()
            started = time.perf_counter()
            step(context, forget, retain)
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
    pairs = zip(times["ours"], times["usual"], strict=True)
    return {
        "weights": sum(weight.numel() for weight in network.parameters()),
        **{name: statistics.median(found) for name, found in times.items()},
        "ours / usual": statistics.median(ours / usual for ours, usual in pairs),
    }


def available_bytes() -> int:
    """Return the memory that is free for use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def measured_mask() -> dict[str, float] | None:
    """Measure the full-size mask in its own process, or print why not."""
    if available_bytes() < MASK_NEEDS:
        print(f"full-size mask left out: it needs {MASK_NEEDS / 2**30:.0f} GiB of free memory")
        return None
    command = [sys.executable, "-m", "lab.studies.diffusion_cost", "--child"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)  # type: ignore[no-any-return]


def main() -> None:
    """Count, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-mask", action="store_true", help="leave out the full-size mask (7 GB of memory)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return print(json.dumps(mask_at_full_size()))
    target = Path(__file__).parents[1] / "results" / "diffusion-cost.json"
    known = json.loads(target.read_text()) if target.exists() else {}
    counts = arithmetic()
    print(table(counts))
    mask = None if arguments.skip_mask else measured_mask()
    network = small_unet()
    document = {
        "arithmetic": counts,
        "mask": mask or known.get("mask"),
        "sampling peak bytes": {
            f"{steps} steps, {images} images": sampling_peak(network, steps, images)
            for steps, images in ((10, 8), (50, 8), (50, 32))
        },
        "step": step_times(arguments.rounds, arguments.threads) | {"threads": arguments.threads},
    }
    for part in ("mask", "sampling peak bytes", "step"):
        print(f"\n{part}:", json.dumps(document[part], indent=1))
    target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return None


if __name__ == "__main__":
    main()
