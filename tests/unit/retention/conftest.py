"""Stores are in memory, except in tests that ask for the server."""

from tests.support.memory_s3 import memory_s3, store

__all__ = ["memory_s3", "store"]
