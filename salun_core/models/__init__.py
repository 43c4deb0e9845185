"""Classifiers by name, model folders (safetensors + card) and the import of foreign checkpoints."""

from salun_core.models.architectures import build_classifier
from salun_core.models.card import ModelCard
from salun_core.models.checkpoint import LoadedModel, load_model, save_model

__all__ = ["LoadedModel", "ModelCard", "build_classifier", "load_model", "save_model"]
