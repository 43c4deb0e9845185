"""The component `settle_requests`."""

from components.settle_requests.component import settle_requests

__all__ = ["settle_requests"]
