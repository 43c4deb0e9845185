"""Saliency unlearning (SalUn): masks, methods, evaluation, gate and lineage, without kfp."""

__version__ = "0.1.0"
