"""FID and KID: the distance between generated and real images in the features of an extractor.

Distances in the features of different extractors are not comparable; each is stored with its extractor's name.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from salun_core.data.images import fitted
from salun_core.device_memory import fitting
from salun_core.digest import sha256_file
from salun_core.errors import DataError, ModelError, UsageError
from salun_core.evaluation.image_classifier import ImageClassifier
from salun_core.models.checkpoint import read_weights

_BATCH = 1024
_INCEPTION_BATCH = 32
_SUBSETS, _SUBSET_SIZE = 100, 1000  # of the published KID
_CONVERT = (
    "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{old}', weights_only=True), '{new}')\""
)


@dataclass(frozen=True)
class Extractor:
    """Computes the features that FID and KID compare.

    Args:
        name: `judge:<digest>` or `inception:<digest>`.
        features: uint8 images [B, C, H, W] -> features [B, F].
    """

    name: str
    features: Callable[[Tensor], Tensor]


def classifier_extractor(classifier: ImageClassifier) -> Extractor:
    """Use the penultimate features of a classifier: for small images, which Inception was not trained on."""
    return Extractor(f"judge:{classifier.digest}", classifier.features)


def inception_extractor(path: Path, device: torch.device | str = "cpu") -> Extractor:
    """Use the 2048 features of the Inception network of the published FID.

    `path` is a safetensors file with the weights `pt_inception-2015-12-05`.

    Source:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017; torch-fidelity's port.
    """
    if path.suffix != ".safetensors":
        command = _CONVERT.format(old=path.name, new=path.with_suffix(".safetensors").name)
        raise UsageError(f"{path.name} is not a safetensors file", "a pickle can run code when it is read", command)
    network = _inception(path).to(device)

    def features(images: Tensor) -> Tensor:
        ready = fitted(images, 3, images.shape[2], images.shape[3])

        def run(size: int) -> list[Tensor]:
            return [network(part.to(device))[0].float().cpu() for part in torch.split(ready, size)]

        with torch.no_grad():
            return torch.cat(fitting(run, _INCEPTION_BATCH)[0])

    return Extractor(f"inception:{sha256_file(path)}", features)


def _inception(path: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise _missing("torch-fidelity") from error
    memory = io.BytesIO()  # the package reads torch's own format only: written here, from checked tensors
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


def joined_features(parts: Sequence[Tensor], extractor: Extractor | None = None) -> Tensor:
    """Join the features [B, F] of batches to float32 [N, F] on the CPU; [0, 0] without a batch.

    Features that are not finite, or whose number changes between batches, are a `ModelError`.
    """
    for part in parts:
        if part.ndim != 2 or part.shape[1] != parts[0].shape[1]:
            raise _other_size(list(part.shape), list(parts[0].shape))
        if not torch.isfinite(part).all():
            name = extractor.name if extractor else "unknown"
            raise ModelError("the extractor's features are not numbers", name, "use another extractor")
    return torch.cat([part.detach().float().cpu() for part in parts]) if parts else torch.empty(0, 0)


def frechet_distance(real: Tensor, generated: Tensor) -> float | None:
    """Return the FID of features [N, F] and [M, F]: the distance of two fitted Gaussians; None for fewer than 2 images.

    It rises as either set shrinks, so that values from different numbers of images are not comparable.

    Source:
        Heusel et al., NeurIPS 2017, equation (6); by torchmetrics, in float64.
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


def kernel_distance(real: Tensor, generated: Tensor) -> float | None:
    """Return the KID of features [N, F] and [M, F]: the unbiased squared MMD under a cubic kernel; it may be below 0.

    It is the mean of 100 draws of 1000 features each, or one value of all features if neither set has more. None if
    either set has fewer than 2 images.

    Source:
        Bińkowski et al., "Demystifying MMD GANs", ICLR 2018, section 4; by torchmetrics, in float64.
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


def _comparable(real: Tensor, generated: Tensor) -> bool:
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2:
            raise DataError(
                f"features of the {name} images have the wrong shape", str(list(features.shape)), "give [N, F]"
            )
    if min(len(real), len(generated)) < 2:
        return False
    if real.shape[1] != generated.shape[1]:
        raise _other_size(list(generated.shape), list(real.shape))
    return True


def _other_size(found: list[int], expected: list[int]) -> ModelError:
    return ModelError(
        "features of two sizes cannot be compared",
        f"an extractor returned {found} and {expected}",
        "extract all images with one extractor",
    )


def _missing(package: str) -> UsageError:
    return UsageError(f"{package} is not installed", "FID and KID need it", "run pip install 'salun[diffusion]'")
