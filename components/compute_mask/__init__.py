"""The component `compute_mask`."""

from components.compute_mask.component import compute_mask

__all__ = ["compute_mask"]
