"""The component `claim_requests`."""

from components.claim_requests.component import claim_requests

__all__ = ["claim_requests"]
