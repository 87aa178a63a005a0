"""The weights of every head as one matrix each, whatever the model: grouped queries spread, normalizations' linear part folded in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel, require_hooks, undisturbed

__all__ = ["CircuitWeights", "circuit_weights"]


@dataclass(frozen=True)
class CircuitWeights:
    """The weights of every head, by layer [head, ...], with the linear part of the normalizations folded in.

    ``dimension`` is that of the space that they read: d_model, or d_model - 1 where LayerNorm takes the mean away.
    """

    W_E: Float[Tensor, "d_vocab d_model"]
    W_U: Float[Tensor, "d_model d_vocab"]
    W_Q: list[Float[Tensor, "_head d_model d_head"]]
    W_K: list[Float[Tensor, "_head d_model d_head"]]
    W_V: list[Float[Tensor, "_head d_model d_head"]]
    W_O: list[Float[Tensor, "_head d_head d_model"]]
    dimension: int

    @classmethod
    def read(cls, model: Any, n_heads: Sequence[int] | None) -> CircuitWeights:
        """Read them; ``n_heads`` are the heads by layer, None for all."""
        of = {name: _weight(model, name) for name in ("W_E", "W_U", "W_Q", "W_K", "W_V", "W_O")}
        d_model = of["W_E"].shape[-1]
        # Bridges of grouped-query models have one W_K, W_V for each group of queries; query heads of a group are neighbours.
        queries = of["W_Q"].shape[1]
        for name in ("W_K", "W_V"):
            groups = of[name].shape[1]
            if queries % groups:
                raise CausalProbeError(f"{queries} query heads can't share the {groups} heads of {name} evenly.")
            of[name] = of[name].repeat_interleave(queries // groups, dim=1)
        layers = {name: list(of[name]) for name in ("W_Q", "W_K", "W_V", "W_O")}
        for layer, block in enumerate(model.blocks):
            gain = _gain(model, block, "ln1", like=of["W_E"])
            for name in ("W_Q", "W_K", "W_V"):
                layers[name][layer] = _centred(model, gain[:, None] * layers[name][layer])
            # What a head writes is normalized once more in some models (Gemma 2 and 3).
            W_O = layers["W_O"][layer] * _gain(model, block, "ln1_post", like=of["W_E"])
            layers["W_O"][layer] = _centred(model, W_O.mT).mT  # the mean that it writes is taken away by whoever reads
            if n_heads is not None:
                for name in layers:
                    layers[name][layer] = layers[name][layer][: n_heads[layer]]
        W_U = _centred(model, _gain(model, model, "ln_final", like=of["W_E"])[:, None] * of["W_U"])
        return cls(of["W_E"], W_U, **layers, dimension=d_model - _takes_mean_away(model))


@contextmanager
def circuit_weights(model: HookedModel) -> Iterator[tuple[Any, CircuitWeights]]:
    """A model that has W_Q, W_K, W_V and W_O, the model itself or its standard form, left as it was; and what they are by head."""
    require_hooks(model, [])
    export = getattr(model, "to_transformer_lens", None)
    standard: Any = model if export is None else export()
    with undisturbed(standard):
        # The heads by layer, where these differ from layer to layer.
        yield standard, CircuitWeights.read(standard, None if export is None else tuple(getattr(model, "heads")))  # noqa: B009 - no model class is known here


def _weight(model: Any, name: str) -> Tensor:
    try:
        weight = getattr(model, name)
    except Exception as error:  # a bridge builds them on demand, and fails in many ways where the layers have none
        raise CausalProbeError(
            f"{type(model).__name__} does not give {name} as one tensor, so what a head does can't be read from its weights: "
            f"{error}"
        ) from error
    ndim = 2 if name in ("W_E", "W_U") else 4
    if not isinstance(weight, Tensor) or weight.ndim != ndim:
        found = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        shape = {"W_E": "d_vocab, d_model", "W_U": "d_model, d_vocab", "W_O": "layer, head, d_head, d_model"}
        raise CausalProbeError(
            f"{name} was expected to be [{shape.get(name, 'layer, head, d_model, d_head')}]; it is {found}."
        )
    if not weight.isfinite().all():
        raise CausalProbeError(f"{name} holds values that are not finite.")
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _takes_mean_away(model: Any) -> bool:
    return getattr(model.cfg, "normalization_type", None) in ("LN", "LNPre")


def _centred(model: Any, weight: Float[Tensor, "*head d_model n"]) -> Float[Tensor, "*head d_model n"]:
    # (x - mean x) W = x (W - mean of W's rows)
    return weight - weight.mean(-2, keepdim=True) if _takes_mean_away(model) else weight


def _gain(model: Any, owner: Any, name: str, *, like: Tensor) -> Float[Tensor, " d_model"]:
    """The gain of a normalization; ones where there is none, or where it has been folded into the weights already."""
    gain = None
    if getattr(model.cfg, "normalization_type", None) is not None:
        # TransformerLens 3's modules call it w, bridges weight (where w, if there, is the same).
        norm = getattr(owner, name, None)
        gain = getattr(norm, "w", None) if norm is not None else None
        gain = getattr(norm, "weight", None) if gain is None and norm is not None else gain
    if not isinstance(gain, Tensor):
        return torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
    return gain.detach().to(like) + (1 if getattr(model.cfg, "rmsnorm_uses_offset", False) else 0)
