"""Classifiers by name, model folders (safetensors + card) and the import of foreign checkpoints."""

from salun_core.models.card import ModelCard
from salun_core.models.checkpoint import LoadedModel, load_model, save_model
from salun_core.models.registry import build_classifier

__all__ = ["LoadedModel", "ModelCard", "build_classifier", "load_model", "save_model"]
