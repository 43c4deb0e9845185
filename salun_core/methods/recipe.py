"""The recipe of a run. It is a separate module without torch, because the run form and the ledger use it too."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from salun_core.config import Document, parse, parse_text
from salun_core.errors import UsageError

AUTO_METHOD = "auto"
DEFAULT_METHOD = "default"
"""Stands for the default method of the model's kind; `salun ls methods` marks it."""


class Recipe(Document):
    """The recipe of an unlearning run: one method with its settings, or a choice of methods for a search."""

    method: str = Field(
        default=DEFAULT_METHOD,
        description="the unlearning method; default: that of the kind of model; for a search also auto, or several",
    )
    density: float = Field(default=0.5, gt=0, le=1, description="share of the weights that may change")
    method_config: dict[str, Any] = Field(default={}, description="settings that differ from the method's defaults")
    seed: int = Field(default=0, ge=0, description="of the run")

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings plus the seed, which they must not override."""
        return {**self.method_config, "seed": self.seed}

    @property
    def leaves_method_open(self) -> bool:
        """Whether a search chooses the method: `auto`, or several names with commas between them."""
        return self.method == AUTO_METHOD or "," in self.method


class Role(StrEnum):
    """What a recipe of an escalation is for."""

    STRENGTH = "strength"
    """The method of the first recipe, at some strength."""
    OTHER = "other"
    """Another method."""
    RETRAIN = "retrain"
    """A full retraining, which has no strength."""


class Level(Document):
    """One recipe of an escalation, as settling sees it."""

    role: Role = Field(description="the method at some strength, another method, or a full retraining")
    strength: Annotated[int, Field(ge=-99, le=99, strict=True)] = Field(
        default=0, description="0 as configured; above it stronger, below it gentler; only with the role strength"
    )
    words: Annotated[str, Field(max_length=128)] = Field(default="", description="method and changed settings")


class Escalation(Document):
    """The recipes of a sweep. The cause of a refusal decides which one comes next.

    A recipe with the method `retrain` is a full retraining, the last resort after any cause. Without `gentler` and
    `others`, damage leads to that retraining, or to a person.
    """

    recipes: list[Recipe] = Field(
        min_length=1, description="as configured, then each stronger than the one before; `retrain` is the last resort"
    )
    gentler: list[Recipe] = Field(default=[], description="after damage; each gentler than the one before")
    others: list[Recipe] = Field(default=[], description="other methods, if no strength passes")

    @property
    def all_recipes(self) -> list[Recipe]:
        """The recipes by level."""
        return [*self.recipes, *self.gentler, *self.others]

    @property
    def levels(self) -> list[Level]:
        """What the recipes of `all_recipes` are for, in the same order."""
        first = self.recipes[0]
        return [
            *(_level(recipe, first, Role.STRENGTH, number) for number, recipe in enumerate(self.recipes)),
            *(_level(recipe, first, Role.STRENGTH, -number) for number, recipe in enumerate(self.gentler, start=1)),
            *(_level(recipe, first, Role.OTHER, 0) for recipe in self.others),
        ]


def _level(recipe: Recipe, first: Recipe, role: Role, strength: int) -> Level:
    if recipe.method == "retrain":
        role, strength = Role.RETRAIN, 0
    changed = {name: value for name, value in recipe.method_config.items() if first.method_config.get(name) != value}
    if role is not Role.STRENGTH:
        changed = {}
    elif recipe.density != first.density:
        changed["density"] = recipe.density
    words = [recipe.method, *(f"{name} {_short(value)}" for name, value in changed.items())]
    return Level(role=role, strength=strength, words=", ".join(words)[:128])


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str)


def parse_recipe(method: str, density: float, method_config: str, seed: int = 0) -> Recipe:
    """Build a recipe from the parameters of a run form; `method_config` is a JSON object or empty."""
    settings = parse_text(method_config, "method_config") if method_config.strip() else {}
    if not isinstance(settings, dict):
        raise UsageError(
            "method_config must be a JSON object", f"it is a {type(settings).__name__}", 'give {"epochs": 5}'
        )
    fields = {"method": method, "density": density, "method_config": settings, "seed": seed}
    return parse(Recipe, fields, "the recipe")
