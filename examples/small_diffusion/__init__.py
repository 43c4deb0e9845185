"""Small diffusion models of the real architectures, trained from scratch in minutes for demos, suites and tests.

To unlearn with a real model, import it (`salun model import`); nothing here is needed for that.
"""

from examples.small_diffusion.folders import KINDS, resolve_recipe, train

__all__ = ["KINDS", "resolve_recipe", "train"]
