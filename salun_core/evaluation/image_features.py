"""FID and KID: how far generated images are from real ones in the features of an extractor.

Distances in the features of two extractors have nothing to do with each other; each travels with its extractor's name.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from salun_core.digest import sha256_file
from salun_core.errors import DataError, ModelError, UsageError
from salun_core.evaluation.image_classifier import ImageClassifier, fitted
from salun_core.models.checkpoint import read_weights

_BATCH = 1024
_INCEPTION_BATCH = 32
_SUBSETS, _SUBSET_SIZE = 100, 1000  # of the published KID
_CONVERT = (
    "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{old}', weights_only=True), '{new}')\""
)


class Extractor(Protocol):
    """What turns images into features that FID and KID compare."""

    @property
    def name(self) -> str:
        """`judge:<digest>` or `inception:<digest>`."""

    def features(self, images: Tensor, /) -> Tensor:
        """Return features [B, F] of uint8 images [B, C, H, W]."""


@dataclass(frozen=True)
class _Named:
    name: str
    features: Callable[[Tensor], Tensor]


def classifier_extractor(judge: ImageClassifier) -> Extractor:
    """Compare images in the penultimate features of a classifier: for small models, whose images Inception misreads."""
    return _Named(f"judge:{judge.digest}", judge.features)


def inception_extractor(path: Path, device: torch.device | str = "cpu") -> Extractor:
    """Compare images in the 2048 features of the Inception network of the published FID.

    Args:
        path: its weights (`pt_inception-2015-12-05`) as safetensors.
        device: where it runs.

    Returns:
        The extractor.

    Raises:
        UsageError: the file is a pickle or missing, or torch-fidelity is.
        IntegrityError: the file is damaged.
        ModelError: its tensors are not those of the network.

    Source:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017; torch-fidelity's port.
    """
    if path.suffix != ".safetensors":
        command = _CONVERT.format(old=path.name, new=path.with_suffix(".safetensors").name)
        raise UsageError(f"{path.name} is no safetensors file", "a pickle can run code when it is read", command)
    network = _inception(path).to(device)

    def features(images: Tensor) -> Tensor:
        parts = torch.split(fitted(images, 3, images.shape[2], images.shape[3]), _INCEPTION_BATCH)
        with torch.no_grad():
            return torch.cat([network(part.to(device))[0].float().cpu() for part in parts])

    return _Named(f"inception:{sha256_file(path)}", features)


def _inception(path: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise _missing("torch-fidelity") from error
    memory = io.BytesIO()  # the package reads torch's own format only: ours, made here of checked tensors
    torch.save(read_weights(path), memory)
    memory.seek(0)
    try:
        network: nn.Module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], memory)
    except RuntimeError as error:
        faults = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{path.name} does not fit Inception", faults, "give the weights of the published FID"
        ) from error
    return network.eval()


def features_of(extractor: Extractor, batches: Iterable[Tensor]) -> Tensor:
    """Extract the features of all images, batch after batch; only the features are kept.

    Args:
        extractor: whose features.
        batches: uint8 images [B, C, H, W].

    Returns:
        float32 [N, F] on the CPU; [0, 0] without a batch.

    Raises:
        ModelError: features are not numbers, or change their size from batch to batch.
    """
    return joined_features([extractor.features(images) for images in batches], extractor.name)


def joined_features(parts: Sequence[Tensor], name: str) -> Tensor:
    """Join the features of batches, checked.

    Args:
        parts: features [B, F] of each batch.
        name: of the extractor, for the message.

    Returns:
        float32 [N, F] on the CPU; [0, 0] without a batch.

    Raises:
        ModelError: features are not numbers, or change their size from batch to batch.
    """
    for part in parts:
        if part.ndim != 2 or part.shape[1] != parts[0].shape[1]:
            raise _other_size(list(part.shape), list(parts[0].shape))
        if not torch.isfinite(part).all():
            raise ModelError("an extractor's features are not numbers", name, "give another extractor")
    return torch.cat([part.detach().float().cpu() for part in parts]) if parts else torch.empty(0, 0)


def frechet_distance(extractor: Extractor, real: Iterable[Tensor], generated: Iterable[Tensor]) -> float | None:
    """Return the FID of generated images: the distance of two Gaussians fitted to the features.

    Args:
        extractor: whose features are compared.
        real: batches of uint8 images.
        generated: batches of uint8 images.

    Returns:
        The distance, None where either has fewer than 2 images.

    Raises:
        ModelError: the features differ in size or are not numbers.

    Source:
        Heusel et al., NeurIPS 2017, equation (6); by torchmetrics, in float64.
    """
    return frechet_of(features_of(extractor, real), features_of(extractor, generated))


def kernel_distance(extractor: Extractor, real: Iterable[Tensor], generated: Iterable[Tensor]) -> float | None:
    """Return the KID of generated images: the unbiased squared MMD of the features under a cubic kernel.

    Args:
        extractor: whose features are compared.
        real: batches of uint8 images.
        generated: batches of uint8 images.

    Returns:
        The distance, which may be below 0; None where either has fewer than 2 images.

    Raises:
        ModelError: the features differ in size or are not numbers.

    Source:
        Bińkowski et al., "Demystifying MMD GANs", ICLR 2018, section 4; by torchmetrics, in float64.
    """
    return kernel_of(features_of(extractor, real), features_of(extractor, generated))


def frechet_of(real: Tensor, generated: Tensor) -> float | None:
    """Return the FID of features [N, F] and [M, F]; see `frechet_distance`.

    It rises as either set shrinks: figures of sets of other sizes say little beside each other.
    """
    if not _comparable(real, generated):
        return None
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise _missing("torchmetrics") from error
    given = nn.Identity()
    given.num_features = torch.tensor(real.shape[1])
    metric = FrechetInceptionDistance(feature=given)
    for features, is_real in ((real, True), (generated, False)):
        for part in torch.split(features.double(), _BATCH):
            metric.update(part, real=is_real)
    return max(0.0, float(metric.compute()))


def kernel_of(real: Tensor, generated: Tensor) -> float | None:
    """Return the KID of features [N, F] and [M, F]; see `kernel_distance`.

    The mean of 100 draws of 1000 features each, or of all of them once where neither set has more.
    """
    if not _comparable(real, generated):
        return None
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise _missing("torchmetrics") from error
    size = min(_SUBSET_SIZE, len(real), len(generated))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features, which are in memory anyway
        torch.manual_seed(0)  # the draws
        once = size == len(real) == len(generated)
        metric = KernelInceptionDistance(feature=nn.Identity(), subsets=1 if once else _SUBSETS, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        return float(metric.compute()[0])


def require_same_extractor(a: str | None, b: str | None) -> None:
    """Check that two figures were measured in the features of one extractor; others are never compared.

    Args:
        a: `Generation.extractor` of one evaluation.
        b: of the other.

    Raises:
        UsageError: they differ.
    """
    if a != b:
        raise UsageError(
            "FID and KID of two extractors cannot be compared",
            f"{a or 'none'} and {b or 'none'}",
            "measure both with one extractor",
        )


def _comparable(real: Tensor, generated: Tensor) -> bool:
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2:
            raise DataError(f"features of the {name} images have no shape [N, F]", str(list(features.shape)))
    if min(len(real), len(generated)) < 2:
        return False
    if real.shape[1] != generated.shape[1]:
        raise _other_size(list(generated.shape), list(real.shape))
    return True


def _other_size(found: list[int], expected: list[int]) -> ModelError:
    return ModelError(
        "features of two sizes cannot be compared",
        f"an extractor gave {found} where the others are {expected}",
        "extract all images with one extractor",
    )


def _missing(package: str) -> UsageError:
    return UsageError(f"{package} is not installed", "FID and KID need it", "run pip install 'salun[diffusion]'")
