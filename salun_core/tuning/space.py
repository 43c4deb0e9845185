"""The search space of each method, and the portfolio of `auto`; settings that the user has set stay fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from salun_core.errors import UsageError
from salun_core.methods.classification import METHODS, UnlearnConfig, method_config
from salun_core.methods.method import get_method
from salun_core.methods.recipe import AUTO_METHOD, Recipe

if TYPE_CHECKING:
    from optuna.trial import Trial

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
_LEAST, _MOST = 0.1, 50.0  # factors of the method's default rate
_CHOICES: dict[str, tuple[str, ...]] = {"order": ("sequential", "mixed"), "batch_norm": ("freeze", "update")}

PORTFOLIO = (
    "salun",  # few changed weights, among the nearest for random samples and for classes
    "random_label",  # SalUn without a mask: nearest for a random half, where few weights are not enough
    "scrub",  # keeps the most of D_r: among the nearest for classes and persons
    "sfr_on",  # ascent instead of wrong labels: nearest for a person, and independent of the methods above
)
"""The methods of `auto`, in the order in which a small budget tries them."""


@dataclass(frozen=True)
class Choice:
    """One point of the search space.

    Args:
        method: its name.
        settings: overrides of the method's configuration.
        density: share of salient weights, for a method with a mask.
        epochs: maximum number of epochs.
    """

    method: str
    settings: dict[str, float | str]
    density: float | None
    epochs: int


@dataclass(frozen=True)
class Space:
    """The search space of a method.

    Args:
        method: its name.
        fixed: what the user has set, seed and device included.
        ranges: (lowest, highest, logarithmic) by setting.
        choices: values of the settings that are not numbers.
        densities: of the mask; a single one if it is given; empty for a method without a mask.
        epochs: the most to run.
        growing: whether each epoch of a trial is an answer of its own.
    """

    method: str
    fixed: Mapping[str, Any]
    ranges: Mapping[str, tuple[float, float, bool]]
    choices: Mapping[str, tuple[str, ...]]
    densities: tuple[float, ...]
    epochs: int
    growing: bool

    @classmethod
    def of(
        cls, method: str, overrides: Mapping[str, Any], density: float | None = None, normalised: bool = True
    ) -> Space:
        """Build the search space of a method; `overrides` is what the user has set, its `epochs` the most to run.

        `density` is that of the mask if it is not to be searched for. Without batch-norm layers (`normalised`) there is
        nothing to choose for them. If no setting is left to search for, it raises a `UsageError`.
        """
        config, row = method_config(method, overrides), get_method(METHODS, method)
        if row.train or row.fresh_start:
            why = "it chooses its own strength" if row.train else "it trains fresh weights by its recipe"
            raise UsageError(f"{method} is not tuned", why, "leave the tuning out, or search the method salun")
        rate = config.learning_rate
        ranges = {} if row.edit else {"learning_rate": (rate * _LEAST, rate * _MOST, True)}
        ranges = {name: item for name, item in {**ranges, **row.search}.items() if name not in overrides}
        read = {"batch_norm": not row.edit and normalised, "order": "order" in row.config_type.model_fields}
        choices = {name: values for name, values in _CHOICES.items() if read[name] and name not in overrides}
        growing = row.grows and config.schedule == "constant" and config.forget_parts == 1
        densities = (DENSITIES if density is None else (density,)) if row.needs_mask else ()
        if not ranges and not choices and len(densities) < 2 and config.epochs == 1:
            raise UsageError("there is nothing to search for", "all settings are fixed", "leave one of them out")
        epochs = 1 if row.edit else config.epochs
        return cls(method, dict(overrides), ranges, choices, densities, epochs, growing)

    def draw(self, trial: Trial) -> Choice:
        """Draw a point from the optimiser."""
        settings: dict[str, float | str] = {
            name: float(f"{trial.suggest_float(name, low, high, log=log):.3g}")
            for name, (low, high, log) in self.ranges.items()
        }
        settings |= {name: values[trial.suggest_int(name, 0, len(values) - 1)] for name, values in self.choices.items()}
        density = self.densities[0] if self.densities else None
        if len(self.densities) > 1:
            density = self.densities[trial.suggest_int("density", 0, len(self.densities) - 1)]
        epochs = self.epochs
        if not self.growing and epochs > 1:
            epochs = trial.suggest_int("epochs", 1, epochs)
        return Choice(self.method, settings, density, epochs)

    def start(self) -> dict[str, float]:
        """Return the point to try first: the method's defaults and the default density.

        There is only one, and it does little harm. Points that did well on some model would take a large part of a
        budget of a few trials, and bias the search towards that model.
        """
        config = method_config(self.method, self.fixed)
        point: dict[str, float] = {name: getattr(config, name) for name in self.ranges}
        point |= {name: values.index(getattr(config, name)) for name, values in self.choices.items()}
        if not self.growing and self.epochs > 1:
            point["epochs"] = self.epochs
        if len(self.densities) > 1:
            point["density"] = self.densities.index(Recipe().density)
        return point

    def mirror(self) -> dict[str, float]:
        """Return the point to try second among several methods: the mirror image of the first in the space.

        A method gets two or three trials then. A random second point can lie next to the first, and tell nothing of
        what a stronger rate or the other choices do. The number of epochs stays.
        """
        point = self.start()
        for name, (low, high, log) in self.ranges.items():
            point[name] = low * high / point[name] if log else low + high - point[name]
        point |= {name: len(values) - 1 - point[name] for name, values in self.choices.items()}
        if "density" in point:
            point["density"] = len(self.densities) - 1 - point["density"]
        return point

    def config(self, choice: Choice) -> UnlearnConfig:
        """Return the configuration of a point."""
        return method_config(self.method, {**self.fixed, **choice.settings, "epochs": choice.epochs})


def spaces_of(
    method: str, overrides: Mapping[str, Any], density: float | None = None, normalised: bool = True
) -> list[Space]:
    """Return the search spaces of all methods that a recipe leaves open; see `Space.of`.

    `method` is one method, several with commas between them, or `auto` for those of `PORTFOLIO`. Each must read all
    `overrides`; a method that is named twice is a `UsageError`.
    """
    names = methods_of(method)
    if len(set(names)) < len(names):
        raise UsageError(f"{method} names a method twice", "each is searched once", "leave the second one out")
    return [Space.of(name, overrides, density, normalised) for name in names]


def methods_of(method: str) -> tuple[str, ...]:
    """Return the names of the methods that the method of a recipe stands for: itself, unless it leaves a choice."""
    if method == AUTO_METHOD:
        return PORTFOLIO
    return tuple(name.strip() for name in method.split(","))


assert set(METHODS) >= set(PORTFOLIO)
