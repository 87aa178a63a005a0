"""Transformers whose mechanism is known."""

from causal_probe.models.disentangled import DisentangledTransformer
from causal_probe.models.files import load, save
from causal_probe.models.subspaces import subspaces

__all__ = ["DisentangledTransformer", "load", "save", "subspaces"]
