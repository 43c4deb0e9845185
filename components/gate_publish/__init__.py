"""The component `gate_publish`."""

from components.gate_publish.component import gate_publish

__all__ = ["gate_publish"]
