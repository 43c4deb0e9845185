"""Diffusion models of the real architectures that take a second to train on the digits; what they draw is noise."""

from __future__ import annotations

import json
from pathlib import Path

CLASS, OTHER = "3", "4"
QUICK = {"steps": 4, "epochs": 2, "batch_size": 8, "device": "cpu"}
PERMISSIVE = {
    "format": "salun.policy/v1",
    "name": "permissive",
    "rules": [{"metric": name, "op": ">=", "value": 0.0, "reason": "it was measured"} for name in ("UA", "RA")],
}


def quick_evaluation(judge: Path, **changes: object):
    """How few images of such a model are judged."""
    from salun_core.models.card import DiffusionEvaluation

    return DiffusionEvaluation(judge=str(judge), images_per_class=4, steps=2, real_images=20, **changes)


def tiny_ddpm(folder: Path, judge: Path, **changes: object) -> Path:
    """Write the folder of a class-conditional DDPM of digits."""
    from examples.small_diffusion import resolve_recipe, train
    from salun_core.data import DataSpec

    recipe = resolve_recipe("ddpm", {"steps": 2, "epochs": 1, "channels": [16, 16], "batch_size": 16, "device": "cpu"})
    train(DataSpec(source="digits"), recipe, folder, quick_evaluation(judge, **changes))
    return folder


def tiny_stable_diffusion(folder: Path, judge: Path, **changes: object) -> Path:
    """Write the folder of a Stable Diffusion of digits."""
    from examples.small_diffusion import resolve_recipe, train
    from salun_core.data import DataSpec

    small = {"channels": [16, 16], "autoencoder_channels": [8, 8], "autoencoder_steps": 2, "text_steps": 2}
    recipe = resolve_recipe("stable-diffusion", {"steps": 2, "epochs": 1, "batch_size": 16, "device": "cpu", **small})
    spec = DataSpec(source="digits", size=16, channels=3, train_limit=300)
    train(spec, recipe, folder, quick_evaluation(judge, **changes))
    return folder


def target_file(folder: Path, **target: object) -> str:
    """Write a forget target and return its address."""
    path = folder / "target.json"
    path.write_text(json.dumps(target))
    return str(path)
