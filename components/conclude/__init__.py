"""The component `conclude`."""

from components.conclude.component import conclude

__all__ = ["conclude"]
