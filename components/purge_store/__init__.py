"""The component `purge_store`."""

from components.purge_store.component import purge_store

__all__ = ["purge_store"]
