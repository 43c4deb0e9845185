"""Stores are in memory."""

from tests.support.memory_s3 import memory_s3, store

__all__ = ["memory_s3", "store"]
