"""The component `sweep_compact`."""

from components.sweep_compact.component import sweep_compact

__all__ = ["sweep_compact"]
