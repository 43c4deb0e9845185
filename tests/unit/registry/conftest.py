"""Stores are in memory, except in tests that start processes or lose connections."""

from tests.support.memory_s3 import memory_s3, store

__all__ = ["memory_s3", "store"]
