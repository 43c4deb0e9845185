"""The component `merge_scores`."""

from components.merge_scores.component import merge_scores

__all__ = ["merge_scores"]
