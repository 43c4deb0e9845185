"""The component `unlearn`."""

from components.unlearn.component import unlearn

__all__ = ["unlearn"]
