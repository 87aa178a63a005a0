"""Transformers whose mechanism is known."""

from causal_probe.models.constructions import Circuit, fit_scales, hand_set
from causal_probe.models.device import choose_device
from causal_probe.models.disentangled import DisentangledTransformer
from causal_probe.models.export import real_heads, to_transformer_lens
from causal_probe.models.files import load, save
from causal_probe.models.gradient_step import gradient_steps, mesa_step
from causal_probe.models.linear import LinearTransformer
from causal_probe.models.loading import LoadedModel, load_model
from causal_probe.models.reduced import ReducedTransformer, first_gradient
from causal_probe.models.subspaces import subspaces

__all__ = [
    "Circuit",
    "DisentangledTransformer",
    "LinearTransformer",
    "LoadedModel",
    "ReducedTransformer",
    "choose_device",
    "first_gradient",
    "fit_scales",
    "hand_set",
    "gradient_steps",
    "load",
    "load_model",
    "mesa_step",
    "real_heads",
    "save",
    "subspaces",
    "to_transformer_lens",
]


def __dir__() -> list[str]:
    return [*__all__]
