"""The saliency mask: one bit per weight, chosen by an exact global threshold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from salun_core.errors import ModelError, UsageError
from salun_core.saliency import mask_file
from salun_core.saliency.threshold import as_ordered, kth_largest

Shapes = Mapping[str, tuple[int, ...]]
Scores = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class SaliencyMask:
    """The salient weights of a model as packed bits.

    Args:
        shapes: parameter shapes by name, in the model's order.
        bits: by parameter name, `ceil(numel / 8)` bytes in little bit order: weight i of the flat parameter is bit
            `i % 8` of byte `i // 8`. So the position of a bit does not depend on the size, and padding comes last.
        k: number of salient weights.
        facts: provenance, stored in the file's metadata (model_digest, forget_set_digest, scores, threshold).
    """

    shapes: dict[str, tuple[int, ...]]
    bits: dict[str, np.ndarray]
    k: int
    facts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_scores(cls, scores: Scores, density: float, facts: Mapping[str, str] | None = None) -> SaliencyMask:
        """Keep the share `density` of all weights with the highest scores, globally and exactly (SalUn, eq. 3).

        k = round(density * weights), at least 1. Ties at the threshold go to the lower index, counted over the
        parameters in the order of `scores`. Magnitudes are compared; `facts` is the provenance in the file. Raises
        UsageError unless the density is in (0, 1], and ModelError for no scores, NaN or infinity.
        """
        total = _count({name: tuple(score.shape) for name, score in scores.items()})
        k = _salient_count(density, total)
        for name, score in scores.items():
            if not bool(torch.isfinite(score).all()):
                raise ModelError(
                    f"score of {name} is not finite",
                    "NaN or infinity has no rank",
                    "check the loss and the weights",
                )
        wide = torch.float64 if any(score.dtype == torch.float64 for score in scores.values()) else torch.float32
        ordered = {name: as_ordered(score.to(wide)) for name, score in scores.items()}
        value, ties = kth_largest(list(ordered.values()), k)
        bits: dict[str, np.ndarray] = {}
        for name, values in ordered.items():
            chosen, ties = _choose(values, value, ties)
            bits[name] = np.packbits(chosen.cpu().numpy(), bitorder="little")
        integer = torch.tensor([value], dtype=torch.int64 if wide == torch.float64 else torch.int32)
        threshold = float(integer.view(wide)[0])
        return cls(
            {name: tuple(score.shape) for name, score in scores.items()},
            bits,
            k,
            {"scores": "gradient-magnitude", **(facts or {}), "threshold": repr(threshold)},
        )

    @classmethod
    def random(cls, scores_or_shapes: Scores | Shapes, density: float, seed: int) -> SaliencyMask:
        """Draw a uniform random mask with as many weights as `from_scores` keeps, as a control for saliency.

        The same seed gives the same mask on every device.
        """
        shapes = {name: tuple(getattr(item, "shape", item)) for name, item in scores_or_shapes.items()}
        total = _count(shapes)
        k = _salient_count(density, total)
        chosen = np.zeros(total, dtype=np.bool_)
        chosen[np.random.default_rng(seed).choice(total, size=k, replace=False, shuffle=False)] = True
        bits, start = {}, 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            bits[name] = np.packbits(chosen[start : start + size], bitorder="little")
            start += size
        return cls(shapes, bits, k, {"scores": "random", "seed": str(seed)})

    @classmethod
    def full(cls, shapes: Shapes) -> SaliencyMask:
        """Make every weight salient, as for a method without a mask."""
        ones = {name: np.ones(math.prod(shape), dtype=np.bool_) for name, shape in shapes.items()}
        bits = {name: np.packbits(flat, bitorder="little") for name, flat in ones.items()}
        return cls({name: tuple(shape) for name, shape in shapes.items()}, bits, _count(shapes), {"scores": "none"})

    def with_facts(self, facts: Mapping[str, str]) -> SaliencyMask:
        """Return the same mask with more provenance; its digest is the same."""
        return SaliencyMask(self.shapes, self.bits, self.k, {**self.facts, **facts})

    def within(self, shapes: Shapes) -> SaliencyMask:
        """Extend this mask to all parameters in `shapes`, in their order; the added ones are frozen."""
        bits = {
            name: self.bits[name] if name in self.bits else np.zeros(-(-math.prod(shape) // 8), dtype=np.uint8)
            for name, shape in shapes.items()
        }
        return SaliencyMask({name: tuple(shape) for name, shape in shapes.items()}, bits, self.k, self.facts)

    @property
    def weights(self) -> int:
        """Number of weights that the mask covers."""
        return _count(self.shapes)

    @property
    def density(self) -> float:
        """Share of salient weights, k / weights."""
        return self.k / self.weights

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and bits, in hex; it does not depend on device or provenance."""
        return mask_file.content_digest(self.shapes, self.bits)

    def density_by_parameter(self) -> dict[str, float]:
        """Return the share of salient weights of each parameter, from 0 to 1."""
        return {
            name: int(np.bitwise_count(self.bits[name]).sum()) / max(1, math.prod(shape))
            for name, shape in self.shapes.items()
        }

    def tensor(self, name: str) -> Tensor:
        """Return one parameter's mask as a bool tensor of its shape, on the CPU."""
        shape = self.shapes[name]
        flat = np.unpackbits(self.bits[name], count=math.prod(shape), bitorder="little")
        return torch.from_numpy(flat.view(np.bool_)).reshape(shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return all masks as bool tensors of their parameters' shapes, on the CPU."""
        return {name: self.tensor(name) for name in self.shapes}

    def check_fits(self, shapes: Shapes) -> None:
        """Raise ModelError, which lists the differences, unless names and shapes match those of the model."""
        differing = [
            name for name in [*shapes, *self.shapes] if tuple(shapes.get(name, (-1,))) != self.shapes.get(name, (-2,))
        ]
        if differing:
            some = ", ".join(list(dict.fromkeys(differing))[:5])
            raise ModelError(
                "mask does not fit the model",
                f"these parameters differ: {some}",
                "compute the mask from this model",
            )

    def save(self, path: str | Path) -> None:
        """Write the mask as safetensors (packed bits, metadata) atomically."""
        mask_file.write(
            Path(path),
            self.shapes,
            self.bits,
            {**self.facts, "k": str(self.k), "density": repr(self.density)},
        )

    @classmethod
    def load(cls, path: str | Path) -> SaliencyMask:
        """Read a mask and check it: format, sizes, padding bits and the number of salient weights."""
        shapes, bits, k, facts = mask_file.read(Path(path))
        return cls(shapes, bits, k, facts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SaliencyMask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"SaliencyMask({json.dumps({'weights': self.weights, 'k': self.k, 'digest': self.digest[:12]})})"


def _salient_count(density: float, total: int) -> int:
    if not 0.0 < density <= 1.0:
        raise UsageError(
            f"density {density} is outside (0, 1]",
            "it is the share of weights to keep salient",
            "give a value such as 0.5",
        )
    return max(1, round(density * total))


def _count(shapes: Shapes) -> int:
    total = sum(math.prod(shape) for shape in shapes.values())
    if total == 0:
        raise ModelError(
            "there are no weights to choose from", "the scores are empty", "score a model that has parameters"
        )
    return total


def _choose(values: Tensor, threshold: int, ties: int) -> tuple[Tensor, int]:
    chosen = values > threshold
    if ties:
        equal = torch.nonzero(values == threshold).flatten()[:ties]
        chosen[equal] = True
        ties -= equal.numel()
    return chosen, ties
