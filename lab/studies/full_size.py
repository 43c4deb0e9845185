"""Takes models of full size through the pipeline's own steps, and compares their memory with what is predicted.

    python -m lab.studies.full_size [--parts unet resnet50 vit]

Every model has random weights, and its data are a few images of noise. Each step runs in a process of its own:

- mask: `compute_mask` on two forget images
- unlearn: `run_unlearning` with `salun`, two masked steps, and the new model folder
- frozen: the model folders before and after are read, and weights outside the mask compared bit by bit, as `evaluate`
  does first. The rest of `evaluate`, which generates images, is left out.

unet: the U-Net of Stable Diffusion 1.x (859,520,964 weights) over latents of 64 x 64, with gradient checkpointing,
bf16 passes and offloaded state. Its autoencoder and its text encoder are narrow: only their shapes are those of Stable
Diffusion. resnet50 and vit (ViT-B/16): torchvision's, at 224 x 224, with Adam in float32.

Peaks are the largest resident memory of a process (`VmHWM`). The prediction is `TrainingMemory` plus the memory of
the process after its imports. Writes lab/results/full-size.json; `make generated` makes the tables from it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lab.architectures import build_architecture
from salun_core.data import DataSpec, load_data
from salun_core.device_memory import TrainingMemory
from salun_core.evaluation.integrity import compare_weights
from salun_core.methods.recipe import Recipe
from salun_core.models.architectures import build_classifier
from salun_core.models.card import ModelCard
from salun_core.models.checkpoint import save_model
from salun_core.saliency import SaliencyMask
from salun_core.steps.context import RunContext
from salun_core.steps.mask import compute_mask
from salun_core.steps.unlearning import run_unlearning
from salun_core.tasks import task_of
from salun_core.tasks.diffusion.importing import import_diffusion

ROOT = Path(__file__).parents[2]
CLASSES = ("church", "garden")
PER_CLASS = 3  # one of each class is the test split
STEPS = 2
CARDS = (16, 24, 80)  # GiB
USABLE = 0.9  # of a card: the rest is for the context, workspaces and fragments
Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Part:
    """A model to take through the steps.

    `side` is in pixels, `together` the examples that go through the network at once. `settings` are Adam's,
    whose memory is predicted for the cards, by what the table calls them.
    """

    title: str
    side: int
    config: dict[str, Any]
    together: int
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


_UNET = {"device": "cpu", "steps": STEPS, "epochs": 1, "batch_size": 1, "retain_limit": 2, "learning_rate": 1e-5}
_UNET |= {"precision": "bf16", "gradient_checkpointing": True, "offload": "disk"}
_CLASSIFIER = {"device": "cpu", "epochs": 1, "batch_size": 2, "optimizer": "adam"}
PARTS = {
    "unet": Part(
        "U-Net of Stable Diffusion 1.x",
        512,
        _UNET,
        2,
        {
            "float32": {"precision": "float32"},
            "bf16": {"precision": "bf16"},
            "bf16, checkpointing": {"precision": "bf16", "checkpointing": True},
            "bf16, checkpointing, offload": {"precision": "bf16", "checkpointing": True, "offload": True},
        },
    ),
    "resnet50": Part("ResNet-50", 224, _CLASSIFIER, 2, {name: {"precision": name} for name in ("float32", "bf16")}),
    "vit": Part("ViT-B/16", 224, _CLASSIFIER, 2, {name: {"precision": name} for name in ("float32", "bf16")}),
}
ARCHITECTURES = {"resnet50": "torchvision:resnet50", "vit": "torchvision:vit_b_16"}


def write_images(folder: Path, side: int) -> None:
    """Write images of noise in class folders."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def make(part: str, folder: Path) -> dict[str, Any]:
    """Write the data and a model folder with random weights, and the forget target."""
    torch.manual_seed(0)
    write_images(folder / "data", PARTS[part].side)
    spec = DataSpec(source=str(folder / "data"), validation_fraction=0, test_fraction=1 / PER_CLASS)
    (folder / "target.json").write_text(json.dumps({"kind": "class", "class_id": CLASSES[0]}))
    if part == "unet":
        write_stable_diffusion(folder / "diffusers")
        return {"parameters": import_diffusion(str(folder / "diffusers"), spec, folder / "before").parameters}
    data, side = load_data(spec), PARTS[part].side
    network = build_classifier(ARCHITECTURES[part], len(CLASSES), 3, side)
    card = ModelCard(
        architecture=ARCHITECTURES[part],
        classes=list(CLASSES),
        channels=3,
        height=side,
        width=side,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        data=data.spec,
        dataset_digest=data.split.dataset_digest,
        split_digest=data.split.digest,
    )
    save_model(folder / "before", network, card, data.split)
    return {"parameters": sum(parameter.numel() for parameter in network.parameters())}


def write_stable_diffusion(folder: Path) -> None:
    """Write a diffusers folder: the U-Net in full, with narrow encoders around it."""
    from diffusers import StableDiffusionPipeline

    from examples.small_diffusion import recipes

    unet: Any = build_architecture("sd-1.4-unet", "cpu")
    sizes = {"channels": [8], "autoencoder_channels": [8, 16, 16, 16], "text_width": 768, "text_layers": 1}
    recipe = recipes.StableDiffusionRecipe.model_validate({**sizes, "text_length": 77})
    tokenizer = recipes.build_tokenizer([recipe.prompt.replace("{label}", name) for name in CLASSES], 77)
    ends = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
    parts = {
        "vae": recipes.build_autoencoder(recipe, 512, 3),
        "text_encoder": recipes.build_text_encoder(recipe, len(tokenizer), ends),
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": recipes.build_scheduler(recipe),
    }
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline: Any = StableDiffusionPipeline(**parts, **absent)  # type: ignore[no-untyped-call]
    pipeline.save_pretrained(folder, safe_serialization=True)
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))


def _context(folder: Path) -> RunContext:
    return RunContext(folder / "before", str(folder / "target.json"), device="cpu")


def mask(part: str, folder: Path) -> dict[str, Any]:
    made = compute_mask(
        _context(folder), Recipe(method="salun", method_config=PARTS[part].config), folder / "mask.safetensors"
    )
    return {"salient": made.k, "weights": made.weights}


def unlearn(part: str, folder: Path) -> dict[str, Any]:
    """Take the masked steps, and write the new model."""
    recipe = Recipe(method="salun", method_config=PARTS[part].config)
    result = run_unlearning(_context(folder), recipe, folder / "mask.safetensors", folder / "after")
    return {"losses": result.history[-1].losses, "loop_s": result.seconds}


def frozen(part: str, folder: Path) -> dict[str, Any]:
    """Compare the weights before and after."""
    task, found = task_of(folder / "before"), SaliencyMask.load(folder / "mask.safetensors")
    before, after = (task.load(folder / name).network for name in ("before", "after"))
    integrity = compare_weights(before, after, found)
    return {"changed": integrity.weights_changed, "frozen_changed": integrity.frozen_changed}


ACTIONS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "make": make,
    "mask": mask,
    "unlearn": unlearn,
    "frozen": frozen,
}


def _peak() -> int:
    """Return the peak of this program's resident memory; `ru_maxrss` would include the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def child(action: str, part: str, folder: Path) -> dict[str, Any]:
    """Run one action, and measure this process."""
    if part == "unet":
        import diffusers  # noqa: F401 - its memory belongs to the imports
        from diffusers import StableDiffusionPipeline  # noqa: F401
    imported, started, began = _peak(), time.process_time(), time.perf_counter()
    facts = ACTIONS[action](part, folder)
    costs = {"cpu_s": time.process_time() - started, "wall_s": time.perf_counter() - began}
    return {**facts, **costs, "imported": imported, "peak": _peak()}


def measured(action: str, part: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run one action in its own process."""
    command = [sys.executable, "-m", "lab.studies.full_size", "--child", action, part, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TMPDIR": str(folder)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(f"{part:<9} {action:<8} {found['cpu_s']:8.0f} CPU s {found['peak'] / 1e9:7.2f} GB", flush=True)
    return found


def network_of(part: str) -> nn.Module:
    """Return the network on the meta device."""
    if part == "unet":
        return build_architecture("sd-1.4-unet")
    with torch.device("meta"):
        return build_classifier(ARCHITECTURES[part], len(CLASSES), 3, PARTS[part].side).eval()


def loss_of(part: str) -> Callable[[Any, int], Tensor]:
    """Return the loss of so many examples."""

    def denoising(network: Any, count: int) -> Tensor:  # noqa: ANN401 - of diffusers
        noisy, times = torch.zeros(count, 4, 64, 64), torch.zeros(count, dtype=torch.int64)
        found = network(noisy, times, torch.zeros(count, 77, 768), return_dict=False)[0]
        return mse_loss(found.float(), noisy)

    def classifying(network: Any, count: int) -> Tensor:  # noqa: ANN401
        side = PARTS[part].side
        return cross_entropy(network(torch.zeros(count, 3, side, side)), torch.zeros(count, dtype=torch.int64))

    return denoising if part == "unet" else classifying


@cache
def predictor(part: str, precision: Precision, checkpointing: bool = False) -> TrainingMemory:
    """Return what predicts the memory of a model."""
    network: Any = network_of(part)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return TrainingMemory.of(network, loss_of(part), precision)


def predicted(part: str) -> dict[str, int]:
    """Predict the peaks of the steps that are measured, without imports."""
    config = PARTS[part].config
    checkpointing, precision = config.get("gradient_checkpointing", False), config.get("precision", "float32")
    scoring = predictor(part, "float32", checkpointing)  # scores are always in float32
    training = predictor(part, precision, checkpointing)
    offload = config.get("offload", "none") != "none"
    examples = PER_CLASS - 1 if part != "unet" else config["batch_size"]
    return {
        "mask": scoring.scoring(examples),
        "unlearn": training.step(PARTS[part].together, "adam", offload=offload),
    }


def largest_batches(part: str) -> list[dict[str, Any]]:
    """Return, for each setting and card, the most examples that fit at once: in scoring, and in a step of Adam."""
    rows = []
    for title, setting in PARTS[part].settings.items():
        checkpointing, offload = setting.get("checkpointing", False), setting.get("offload", False)
        scoring = predictor(part, "float32", checkpointing)
        training = (
            scoring if setting["precision"] == "float32" else predictor(part, setting["precision"], checkpointing)
        )

        step = partial(training.step, optimizer="adam", offload=offload, gpu=True)
        rows.append(
            {
                "settings": title,
                "one": {"mask": scoring.scoring(1), "step": step(1)},
                "fits": {
                    str(card): {
                        "mask": most(scoring.scoring, card),
                        "step": most(step, card),
                    }
                    for card in CARDS
                },
            }
        )
    return rows


def most(needs: Callable[[int], int], card: int) -> int:
    """Return the largest number of examples whose memory fits a card of so many GiB, up to 4,096."""
    room, low, high = USABLE * card * 2**30, 0, 4096
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= room else (low, middle - 1)
    return low


def main() -> None:
    """Measure every part, and predict what it needs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where models and temporary files are written; default: a temporary folder")
    parser.add_argument("--predict", action="store_true", help="only predict; measured values are kept")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        action, part, folder = arguments.child
        return print(json.dumps(child(action, part, Path(folder))))
    target = Path(__file__).parents[1] / "results" / "full-size.json"
    document = json.loads(target.read_text()) if target.is_file() else {"parts": {}}

    def keep(part: str, **facts: object) -> None:
        """Write at once: a step of the U-Net may take half an hour."""
        document["parts"].setdefault(part, {}).update(facts)
        target.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")

    for part in arguments.parts:
        keep(part, title=PARTS[part].title, config=PARTS[part].config)
        if not arguments.predict:
            found: dict[str, Any] = {"threads": arguments.threads, "torch": torch.__version__}
            with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
                for action in ACTIONS:
                    found[action] = measured(action, part, Path(name), arguments.threads)
                    keep(part, measured=found)
        keep(part, predicted=predicted(part), cards=largest_batches(part))
    return None


if __name__ == "__main__":
    main()
