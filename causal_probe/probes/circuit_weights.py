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

__all__ = ["CircuitWeights", "circuit_weights", "norms_of_attention"]

#: Hugging Face's name of the norm behind an attention that has none before it; elsewhere it is the one before the MLP.
BEHIND = "post_attention_layernorm"
#: The weights that every head has.
OF_HEADS = ("W_Q", "W_K", "W_V", "W_O")


@dataclass(frozen=True)
class CircuitWeights:
    """The weights of every head, by layer [head, ...], with the linear part of the normalizations folded in.

    Values may be narrower than queries and keys. ``dimension`` is that of the space that they read: d_model, or d_model - 1 where LayerNorm takes the mean away.
    """

    W_E: Float[Tensor, "d_vocab d_model"]
    W_U: Float[Tensor, "d_model d_out"]
    W_Q: list[Float[Tensor, "_head d_model d_head"]]
    W_K: list[Float[Tensor, "_head d_model d_head"]]
    W_V: list[Float[Tensor, "_head d_model d_value"]]
    W_O: list[Float[Tensor, "_head d_value d_model"]]
    dimension: int

    @classmethod
    def read(cls, model: Any, n_heads: Sequence[int] | None) -> CircuitWeights:
        """Read them; ``n_heads`` are the heads by layer, None for all. A layer without attention has none."""
        W_E, W_U = _weight(model, "W_E"), _weight(model, "W_U")
        d_model = W_E.shape[-1]
        stacked = _stacked(model)
        layers: dict[str, list[Tensor]] = {name: [] for name in OF_HEADS}
        for layer, block in enumerate(model.blocks):
            if stacked:
                of = {name: weight[layer] for name, weight in stacked.items()}
            else:
                of = {name: weight.to(W_E) for name, weight in _of_block(model, block, d_model).items()}
            # Bridges of grouped-query models have one W_K, W_V for each group of queries; query heads of a group are neighbours.
            queries = len(of["W_Q"])
            for name in ("W_K", "W_V"):
                groups = len(of[name])
                if groups and queries % groups:
                    raise CausalProbeError(f"{queries} query heads can't share the {groups} heads of {name} evenly.")
                of[name] = of[name].repeat_interleave(queries // max(groups, 1), dim=0)
            before, after = norms_of_attention(block)
            gain = _gain(model, block, before, like=W_E)
            for name in ("W_Q", "W_K", "W_V"):
                of[name] = _centred(model, gain[:, None] * of[name])
            # What a head writes is normalized once more in some models (Gemma 2 and 3).
            W_O = of["W_O"] * _gain(model, block, after, like=W_E)
            of["W_O"] = _centred(model, W_O.mT).mT  # the mean that it writes is taken away by whoever reads
            for name, weight in of.items():
                layers[name].append(weight if n_heads is None else weight[: n_heads[layer]])
        for each in layers.values():  # a layer of no head has the others' shapes
            some = next((weight for weight in each if len(weight)), None)
            each[:] = [weight if len(weight) or some is None else some[:0] for weight in each]
        W_U = _centred(model, _gain(model, model, "ln_final", like=W_E)[:, None] * W_U)
        return cls(W_E, W_U, **layers, dimension=d_model - _takes_mean_away(model))

    def gain(self, model: Any, block: Any, norm: str) -> Float[Tensor, " d_model"] | None:
        """The gain of one of a block's norms; None where it has no such norm."""
        return _gain(model, block, norm, like=self.W_E) if getattr(block, norm, None) is not None else None


@contextmanager
def circuit_weights(model: HookedModel) -> Iterator[tuple[Any, CircuitWeights]]:
    """A model that has W_Q, W_K, W_V and W_O, the model itself or its standard form, left as it was; and what they are by head."""
    require_hooks(model, [])
    export = getattr(model, "to_transformer_lens", None)
    standard: Any = model if export is None else export()
    with undisturbed(standard):
        # The heads by layer, where these differ from layer to layer.
        yield standard, CircuitWeights.read(standard, None if export is None else tuple(getattr(model, "heads")))  # noqa: B009 - no model class is known here


def norms_of_attention(block: Any) -> tuple[str, str]:
    """By the names of TransformerLens, the norm before a layer's attention and the one behind it; there may be none.

    OLMo 2's like have only the second, which TransformerLens 3.9 calls ln1 or ln2.
    """
    named = {name: getattr(getattr(block, name, None), "name", None) for name in ("ln1", "ln1_post", "ln2")}
    if getattr(block, "ln1", None) is not None and named["ln1"] != BEHIND:
        return "ln1", "ln1_post"
    return "no norm", next((name for name, its in named.items() if its == BEHIND), "ln1_post")


def _stacked(model: Any) -> dict[str, Tensor] | None:
    """The weights of all layers' heads as the model gives them; None where it doesn't, or its layers differ."""
    found = {}
    if any(getattr(block, "attn", None) is None for block in model.blocks):
        return None
    for name in OF_HEADS:
        try:
            found[name] = getattr(model, name)
        except Exception:  # a bridge builds them on demand, and fails in many ways where the layers have none
            return None
    same = all(isinstance(weight, Tensor) and len(weight) == len(model.blocks) for weight in found.values())
    return {name: _checked(name, weight, 4) for name, weight in found.items()} if same else None


def _of_block(model: Any, block: Any, d_model: int) -> dict[str, Tensor]:
    """One layer's weights, [head, ...]; of no head where it has no attention."""
    attention = getattr(block, "attn", None)
    if attention is None:
        none = torch.zeros(0, d_model, 1)
        return {"W_Q": none, "W_K": none, "W_V": none, "W_O": none.mT}
    original = getattr(attention, "original_component", None)
    if hasattr(original, "kv_a_proj_with_mqa"):
        return _latent_weights(original) | {"W_O": _own(attention, "W_O")}
    of = {name: _own(attention, name) for name in OF_HEADS if name != "W_Q"}
    q_proj, d_head = getattr(original, "q_proj", None), of["W_K"].shape[-1]
    n_heads = len(of["W_O"])
    if q_proj is not None and len(q_proj.weight) == 2 * n_heads * d_head:  # queries and output gates, head by head
        of["W_Q"] = q_proj.weight.detach().reshape(n_heads, 2, d_head, -1)[:, 0].mT
    else:
        of["W_Q"] = _own(attention, "W_Q")
    return of


def _latent_weights(attention: Any) -> dict[str, Tensor]:
    """Of latent attention (MLA), the products of the two steps, with the gain of the norm between them; rotated numbers come last."""
    nope, rotated, values = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
    if hasattr(attention, "q_a_proj"):
        W_Q = _through(attention.q_a_proj, attention.q_a_layernorm, attention.q_b_proj)
    else:
        W_Q = attention.q_proj.weight.mT
    down = attention.kv_a_proj_with_mqa.weight.mT
    up = attention.kv_b_proj.weight.mT * attention.kv_a_layernorm.weight[:, None]
    n_heads = up.shape[1] // (nope + values)
    W_KV = (down[:, :-rotated] @ up).reshape(len(down), n_heads, -1).transpose(0, 1)
    shared = down[:, -rotated:].expand(n_heads, -1, -1)
    found = {
        "W_Q": W_Q.reshape(len(W_Q), n_heads, -1).transpose(0, 1),
        "W_K": torch.cat([W_KV[..., :nope], shared], -1),
        "W_V": W_KV[..., nope:],
    }
    return {name: _checked(name, weight, 3) for name, weight in found.items()}


def _through(first: Any, norm: Any, second: Any) -> Tensor:
    weight: Tensor = first.weight.mT * norm.weight @ second.weight.mT
    return weight


def _own(attention: Any, name: str) -> Tensor:
    try:
        return _checked(name, getattr(attention, name), 3)
    except CausalProbeError:
        raise
    except Exception as error:  # a bridge builds a weight when it is named, and fails in many ways where it can't
        raise CausalProbeError(
            f"{type(attention).__name__} does not give {name} as one tensor, so what a head does can't be read from its weights: {error}"
        ) from error


def _weight(model: Any, name: str) -> Tensor:
    try:
        weight = getattr(model, name)
    except Exception as error:  # a bridge builds a weight when it is named, and fails in many ways where it can't
        raise CausalProbeError(
            f"{type(model).__name__} does not give {name} as one tensor, so what a head does can't be read from its weights: "
            f"{error}"
        ) from error
    return _checked(name, weight, 2)


def _checked(name: str, weight: Any, ndim: int) -> Tensor:
    if not isinstance(weight, Tensor) or weight.ndim != ndim:
        found = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        shape = {"W_E": "d_vocab, d_model", "W_U": "d_model, d_vocab", "W_O": "head, d_head, d_model"}
        raise CausalProbeError(
            f"{name} was expected to be [{shape.get(name, 'head, d_model, d_head')}]; it is {found}."
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
    gain, norm = None, None
    if getattr(model.cfg, "normalization_type", None) is not None:
        # TransformerLens 3's modules call it w, bridges weight (where w, if there, is the same).
        norm = getattr(owner, name, None)
        gain = getattr(norm, "w", None) if norm is not None else None
        gain = getattr(norm, "weight", None) if gain is None and norm is not None else gain
    if not isinstance(gain, Tensor):
        return torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
    return gain.detach().to(like) + _adds_one(model, norm, gain.detach())


def _adds_one(model: Any, norm: Any, gain: Float[Tensor, " d_model"]) -> bool:
    """Whether a norm multiplies by 1 + its weight: by what it does, for some bridges don't say so of all models that do."""
    original = getattr(norm, "original_component", None)
    if original is None:
        return bool(getattr(model.cfg, "rmsnorm_uses_offset", False))
    vector = torch.where(torch.arange(len(gain), device=gain.device) % 2 == 0, 100.0, -100.0).to(gain)
    with torch.no_grad():
        odd = (original(vector[None]) - original(-vector[None]))[0] / 2  # without the norm's bias
    centred = vector - vector.mean() if _takes_mean_away(model) else vector
    unit = centred / centred.square().mean().sqrt()
    plain, offset = ((odd - unit * each).abs().sum() for each in (gain, gain + 1))
    return bool(offset < plain)
