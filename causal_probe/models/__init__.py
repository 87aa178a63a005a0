"""Transformers whose mechanism is known."""

from causal_probe.models.constructions import Circuit, fit_scales, hand_set
from causal_probe.models.disentangled import DisentangledTransformer
from causal_probe.models.export import real_heads, to_transformer_lens
from causal_probe.models.files import load, save
from causal_probe.models.loading import LoadedModel, load_model
from causal_probe.models.reduced import ReducedTransformer, first_gradient
from causal_probe.models.subspaces import subspaces

__all__ = [
    "Circuit",
    "DisentangledTransformer",
    "LoadedModel",
    "ReducedTransformer",
    "first_gradient",
    "fit_scales",
    "hand_set",
    "load",
    "load_model",
    "real_heads",
    "save",
    "subspaces",
    "to_transformer_lens",
]
