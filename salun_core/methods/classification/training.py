"""Training of a classifier from fresh weights, with the loop that unlearning uses."""

from __future__ import annotations

import torch
from torch import nn

from salun_core.data.images import ImageSource
from salun_core.errors import ModelError
from salun_core.evaluation.evidence import EpochRecord
from salun_core.methods.checkpoint import CheckpointStore
from salun_core.methods.classification.method import dataset_phase
from salun_core.methods.config import UnlearnConfig, pick_device
from salun_core.methods.loop import OnEpoch, run_loop
from salun_core.models.architectures import build_classifier


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """Reinitialise every layer of a model in place, as torch initialises new layers, and return the model.

    A module that has parameters but no `reset_parameters` is a `ModelError`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise ModelError(
                    f"{name or 'the model'} cannot be initialised again", "it has no reset_parameters", "give `fresh`"
                )
    return model


def fresh_classifier(architecture: str, images: ImageSource, num_classes: int, seed: int) -> nn.Module:
    """Build a classifier for images with fresh weights from a seed; the global random state does not change."""
    channels, height = images.shape[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_classifier(architecture, num_classes, channels, height)


def train_classifier(
    architecture: str,
    images: ImageSource,
    num_classes: int,
    config: UnlearnConfig,
    checkpoint: CheckpointStore | None = None,
    on_epoch: OnEpoch | None = None,
) -> tuple[nn.Module, list[EpochRecord]]:
    """Train a classifier and return it in eval mode with one record per epoch.

    `batch_norm` of the configuration must be `update`. An interrupted training resumes from the checkpoint.
    """
    device = pick_device(config.device)
    model = fresh_classifier(architecture, images, num_classes, config.seed)
    model.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    resident = images.to(device)
    fingerprint = f"train {architecture} {len(images)} {config.model_dump_json(exclude={'device'})}"
    phases = [dataset_phase("train", resident, config)]
    history = run_loop(model, lambda *_: phases, config, None, checkpoint, fingerprint, on_epoch)
    return model, history
