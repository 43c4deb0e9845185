"""The recipe of a run. It is a separate module without torch, because the run form and the ledger use it too."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from salun_core.config import Document, parse, parse_text
from salun_core.errors import UsageError


class Recipe(Document):
    """The recipe of an unlearning run: one method with its settings."""

    method: str = Field(default="salun", description="the unlearning method")
    density: float = Field(default=0.5, gt=0, le=1, description="share of the weights that may change")
    method_config: dict[str, Any] = Field(default={}, description="settings that differ from the method's defaults")
    seed: int = Field(default=0, ge=0, description="of the run")

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings plus the seed, which they must not override."""
        return {**self.method_config, "seed": self.seed}


def parse_recipe(method: str, density: float, method_config: str, seed: int = 0) -> Recipe:
    """Build a recipe from the parameters of a run form.

    Args:
        method: the unlearning method.
        density: share of the weights that may change.
        method_config: settings as a JSON object; may be empty.
        seed: seed of the run.

    Raises:
        UsageError: `method_config` is not a JSON object, or a value is out of range.
    """
    settings = parse_text(method_config, "method_config") if method_config.strip() else {}
    if not isinstance(settings, dict):
        raise UsageError(
            "method_config must be a JSON object", f"it is a {type(settings).__name__}", 'give {"epochs": 5}'
        )
    fields = {"method": method, "density": density, "method_config": settings, "seed": seed}
    return parse(Recipe, fields, "the recipe")
