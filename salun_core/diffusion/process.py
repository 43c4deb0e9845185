"""The forward process of a diffusion model: adds noise to clean samples and defines the prediction target.

epsilon       x_t = √ā_t x_0 + √(1 - ā_t) ε,   target ε             Ho et al., "DDPM", NeurIPS 2020, equation (14)
v_prediction  the same x_t,                    target √ā_t ε - √(1 - ā_t) x_0      Salimans & Ho, ICLR 2022
sample        the same x_t,                    target x_0
flow          x_t = (1 - σ_t) x_0 + σ_t ε,     target ε - x_0       Lipman et al., ICLR 2023; Esser et al., 2024
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from salun_core.errors import ModelError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class Process:
    """A forward process over T discrete times.

    Args:
        prediction: prediction type of the network.
        signal: [T] float32: √ā_t, or 1 - σ_t; the factor of the clean sample.
        noise: [T] float32: √(1 - ā_t), or σ_t; the factor of the noise.
    """

    prediction: Prediction
    signal: Tensor
    noise: Tensor

    @classmethod
    def of_scheduler(cls, scheduler: Any) -> Process:  # noqa: ANN401 - any scheduler of diffusers
        """Derive the process from a scheduler of diffusers.

        It must have `alphas_cumprod` or belong to the flow-matching family. Another scheduler, or another prediction
        type, is a `ModelError`.
        """
        name, config = type(scheduler).__name__, scheduler.config
        if "FlowMatch" in name:
            times = int(config.num_train_timesteps)
            sigma = torch.arange(1, times + 1, dtype=torch.float64) / times
            shift = float(config.get("shift") or 1.0)
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            return cls("flow", (1 - sigma).float(), sigma.float())
        kind = config.get("prediction_type", "epsilon")
        if not hasattr(scheduler, "alphas_cumprod") or kind not in get_args(Prediction)[:3]:
            raise ModelError(
                f"scheduler {name} is not supported",
                f"it has no cumulative alphas, or its prediction type is {kind!r}",
                "use a DDPM, DDIM, PNDM, Euler or flow-matching scheduler",
            )
        alphas = scheduler.alphas_cumprod.to(torch.float64)  # 1 - ā_t loses digits in float32 at small t
        return cls(cast(Prediction, kind), alphas.sqrt().float(), (1 - alphas).sqrt().float())

    @property
    def times(self) -> int:
        """T, the number of discrete times."""
        return len(self.signal)

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw times uniformly: int64 [count] from 0 to T - 1, on the CPU."""
        return torch.randint(self.times, (count,), generator=generator)

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return x_t, [B, C, H, W], of the clean x_0 and the noise ε."""
        signal, sigma = self._factors(clean, times)
        return signal * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return the target of the network's prediction for x_t; arguments as for `noisy`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        if self.prediction == "flow":
            return noise - clean
        signal, sigma = self._factors(clean, times)
        return signal * noise - sigma * clean

    def network_times(self, times: Tensor) -> Tensor:
        """Return times in the units of the network: t itself, or 1000 σ_t for flows."""
        if self.prediction != "flow":
            return times
        return self.noise.to(times.device)[times] * self.times

    def clean_of(self, noisy: Tensor, predicted: Tensor, times: Tensor) -> Tensor:
        """Return the estimate of x_0 that follows from a prediction for x_t; shapes as for `noisy`."""
        signal, sigma = self._factors(noisy, times)
        if self.prediction == "epsilon":
            return (noisy - sigma * predicted) / signal
        if self.prediction == "sample":
            return predicted
        if self.prediction == "flow":
            return noisy - sigma * predicted
        return signal * noisy - sigma * predicted

    def noise_of(self, noisy: Tensor, predicted: Tensor, times: Tensor) -> Tensor:
        """Return the estimate of ε that follows from a prediction for x_t; shapes as for `noisy`."""
        signal, sigma = self._factors(noisy, times)
        if self.prediction == "epsilon":
            return predicted
        if self.prediction == "sample":
            return (noisy - signal * predicted) / sigma
        if self.prediction == "flow":
            return noisy + signal * predicted
        return sigma * noisy + signal * predicted

    def _factors(self, like: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like.dim() - 1)
        index = times.to(self.signal.device)
        signal, sigma = self.signal[index].view(shape), self.noise[index].view(shape)
        return signal.to(like.device, like.dtype), sigma.to(like.device, like.dtype)
