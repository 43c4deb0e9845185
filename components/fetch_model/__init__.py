"""The component `fetch_model`."""

from components.fetch_model.component import fetch_model

__all__ = ["fetch_model"]
