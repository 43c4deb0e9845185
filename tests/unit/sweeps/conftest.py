"""The API servers that a sweep may ask."""

from tests.support.api_server import account, kubeflow, kubernetes

__all__ = ["account", "kubeflow", "kubernetes"]
