"""Transformers whose mechanism is known."""

from causal_probe.models.constructions import fit_scales, hand_set
from causal_probe.models.device import choose_device
from causal_probe.models.disentangled import DisentangledTransformer
from causal_probe.models.files import load, save
from causal_probe.models.gradient_step import gradient_steps, mesa_step
from causal_probe.models.linear import LinearTransformer
from causal_probe.models.loading import load_model
from causal_probe.models.reduced import ReducedTransformer
from causal_probe.models.selective import selective_induction

__all__ = [
    "DisentangledTransformer",
    "LinearTransformer",
    "ReducedTransformer",
    "choose_device",
    "fit_scales",
    "gradient_steps",
    "hand_set",
    "load",
    "load_model",
    "mesa_step",
    "save",
    "selective_induction",
]


def __dir__() -> list[str]:
    return [*__all__]
