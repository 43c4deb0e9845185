"""The API servers that a sweep may ask, and stores in memory."""

from tests.support.api_server import account, kubeflow, kubernetes
from tests.support.memory_s3 import memory_s3, store

__all__ = ["account", "kubeflow", "kubernetes", "memory_s3", "store"]
