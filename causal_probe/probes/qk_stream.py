"""Who wrote what into the stream that a layer reads: the embeddings, every head, every MLP, and layers that are neither.

What a layer adds is the difference of the stream behind it and before it, whatever stands in between (multipliers, experts, norms). A
head's part of what its attention adds is z W_O; where the model normalizes that sum (Gemma 2) or multiplies it (Granite), each head's
part is multiplied by the same number, that of this forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.hooks.check import HookedModel

__all__ = ["BIAS", "StreamParts", "StreamReader", "head_of", "layer_of", "require_small"]

#: The source that holds what depends on no token: the biases of queries and keys, and those of the heads' outputs below.
BIAS = "bias"
#: The hook point of what mixes positions beside a layer's attention.
MIXER = "blocks.{}.mamba.hook_out"
#: A sum may miss what it must give by so many times the largest value, in these precisions. (Hugging Face's RMSNorm computes
#: in single precision in a model of double precision, too.)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
#: In half precision the model itself rounds as coarsely as this.
COARSE = 0.1


def head_of(source: str) -> tuple[int, int] | None:
    """(layer, head) of a source that a head has written: all of it, or a part of it in a concatenated stream.

    >>> head_of("L3H11"), head_of("L1H0.L0H2.token"), head_of("L3.mlp"), head_of("embed")
    ((3, 11), (1, 0), None, None)
    """
    match = re.fullmatch(r"L(\d+)H(\d+)(\..+)?", source)
    return None if match is None else (int(match[1]), int(match[2]))


def layer_of(source: str) -> int:
    """The layer of a source that is no embedding, or of a receiver in a layer.

    >>> layer_of("L3H11"), layer_of("L12.mlp"), layer_of("L1H0.q")
    (3, 12, 1)
    """
    return int(source[1:].replace(".", "H").partition("H")[0])


def require_small(error: float, *, of: float, like: Tensor, what: str) -> None:
    """Raise unless a sum misses what it must give by no more than rounding, in the precision of ``like``."""
    limit = TOLERANCE.get(like.dtype, COARSE) * of
    if not error <= limit:
        raise CausalProbeError(
            f"{what} are not the sum of what the sources below have written: they differ by {error:.2g}, where {limit:.2g} "
            "would be rounding. The model does more than normalize, multiply, rotate, cap and mask, so its scores can't be taken apart exactly."
        )


@dataclass(frozen=True, eq=False)
class StreamParts:
    """What the stream before a layer is made of, on one batch.

    Attributes
    ----------
    written
        By source other than a head, what it has written.
    z
        By layer, what its heads read, which W_O takes to the stream.
    factor
        By layer, what each head's part is multiplied by; None for one.
    """

    written: dict[str, Float[Tensor, "batch pos d_model"]]
    z: dict[int, Float[Tensor, "batch pos head _d_head"]]
    factor: dict[int, Float[Tensor, "batch pos one"] | None]

    def by(
        self, source: str, writer: Float[Tensor, "_d_head d_model"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """What one source has written; of a head, ``writer`` takes its z to the stream."""
        if source in self.written:
            return self.written[source]
        place = head_of(source)
        assert place is not None
        assert writer is not None
        factor = self.factor[place[0]]
        value = self.z[place[0]][:, :, place[1]].to(writer) @ writer
        return value if factor is None else value * factor.to(value)


class StreamReader:
    """Ready to take the stream before a layer apart; that before the layer behind the last one is what the logits are read from.

    Attributes
    ----------
    names
        The sources in the order in which they write, without :data:`BIAS`.
    hooks, needed
        The hook points that are read; those that must fire.
    """

    def __init__(self, model: HookedModel, layer: int, heads: Sequence[int], gains: Sequence[Tensor | None]) -> None:
        #: By layer below, its heads (0: there is no attention), and the gain of the norm behind it.
        self.heads, self.gains = list(heads[:layer]), gains
        there = model.hook_dict
        positions = getattr(model.cfg, "positional_embedding_type", None) == "standard" and "hook_pos_embed" in there
        self.embeddings = ("embed", "pos_embed") if positions else ("embed",)
        self.has_mlps = not getattr(model.cfg, "attn_only", False)
        #: By layer that mixes positions beside its attention (Falcon-H1's Mamba), the numbers by which attention and mixer are multiplied.
        self.beside = {n: both for n in range(layer) if self.heads[n] and (both := _beside(model, n)) is not None}
        names: list[str] = [*self.embeddings]
        for n, count in enumerate(self.heads):
            names += [f"L{n}H{h}" for h in range(count)]
            names += [f"L{n}.mixer"] if not count or n in self.beside else []
            names += [f"L{n}.mlp"] if self.has_mlps else []
        self.names = tuple(names)
        self.streams = [f"blocks.{n}.hook_resid_pre" for n in range(layer + 1)]
        if layer == len(heads):  # the stream behind the last layer
            self.streams[-1] = f"blocks.{layer - 1}.hook_resid_post"
        self.needed = [*self.streams, *(attention_hook(n, "z") for n, count in enumerate(self.heads) if count)]
        each = [
            name
            for n, count in enumerate(self.heads)
            for name in (
                (f"blocks.{n}.hook_attn_out", f"blocks.{n}.attn.o.hook_out", f"blocks.{n}.attn.hook_out", f"blocks.{n}.hook_mlp_out")
                if count
                else (f"blocks.{n}.hook_resid_mid",)
            )
        ]  # fmt: skip
        mixers = [MIXER.format(n) for n in self.beside]
        self.needed += mixers
        self.hooks = [*self.needed, *each, *(["hook_pos_embed"] if positions else [])]

    def __call__(self, found: Mapping[str, Tensor]) -> StreamParts:
        """The parts, of the values at the hook points.

        Raises
        ------
        CausalProbeError
            If what a layer adds is not what its attention and its MLP write.
        """
        parts = self.embedded(found)
        for n in range(len(self.heads)):
            self.add_layer(n, found, parts)
        return parts

    def embedded(self, found: Mapping[str, Tensor]) -> StreamParts:
        """What the embeddings have written, before any layer has."""
        stream = found[self.streams[0]]
        if "pos_embed" not in self.embeddings:
            return StreamParts({"embed": stream}, {}, {})
        positions = found["hook_pos_embed"]
        return StreamParts({"embed": stream - positions, "pos_embed": positions}, {}, {})

    def add_layer(self, n: int, found: Mapping[str, Tensor], parts: StreamParts) -> None:
        """What one layer has written is put to the parts of those before it.

        Raises
        ------
        CausalProbeError
            If what the layer adds is not what its attention and its MLP write.
        """
        count, (before, behind) = self.heads[n], (found[self.streams[n]], found[self.streams[n + 1]])
        written, z, factor = parts.written, parts.z, parts.factor
        added = behind - before
        if not count:
            middle = found.get(f"blocks.{n}.hook_resid_mid") if self.has_mlps else None
            mixed = added if middle is None else middle - before
            written[f"L{n}.mixer"] = mixed
            rest = added - mixed
        else:
            values = found[attention_hook(n, "z")]
            z[n] = values.reshape(*values.shape[:2], count, -1)
            attention = found.get(f"blocks.{n}.hook_attn_out")
            raw = next(
                (found[at] for at in (f"blocks.{n}.attn.o.hook_out", f"blocks.{n}.attn.hook_out") if at in found),
                attention,
            )
            if attention is None:
                attention = raw
            if attention is None or raw is None:
                raise CausalProbeError(
                    f"What layer {n}'s attention writes passes no hook point, so the stream can't be taken apart."
                )
            if n in self.beside:
                by, mixed_by = self.beside[n]
                attention, mixed = raw * by, found[MIXER.format(n)] * mixed_by
                written[f"L{n}.mixer"], added = mixed, added - mixed
            factor[n] = None if raw.data_ptr() == attention.data_ptr() else self._factor(n, raw, attention)
            rest = added - attention
            if (mlp := found.get(f"blocks.{n}.hook_mlp_out")) is not None:
                error = float((rest - mlp).abs().max())
                require_small(error, of=float(behind.abs().max()), like=added, what=f"The outputs of layer {n}")
            elif not self.has_mlps:
                require_small(
                    float(rest.abs().max()),
                    of=float(added.abs().max()),
                    like=added,
                    what=f"The outputs of layer {n}",
                )
        if self.has_mlps:
            written[f"L{n}.mlp"] = rest

    def _factor(self, layer: int, raw: Tensor, added: Tensor) -> Float[Tensor, "batch pos one"]:
        """By what the layer's attention is multiplied at each position on its way to the stream, but for a norm's gain."""
        gain = self.gains[layer]
        through = raw if gain is None else raw * gain.to(raw)
        factor = fitted(through, added)
        require_small(
            float((added - factor * through).abs().max()), of=float(added.abs().max()), like=added, what=f"The outputs of layer {layer}'s attention"
        )  # fmt: skip
        return factor


def _beside(model: object, layer: int) -> tuple[float, float] | None:
    """Of a layer that mixes positions beside its attention, by what either is multiplied; None of others."""
    if MIXER.format(layer) not in getattr(model, "hook_dict"):  # noqa: B009 - any model
        return None
    block = getattr(model, "blocks")[layer]  # noqa: B009
    original = getattr(block, "original_component", block)
    return tuple(float(getattr(original, f"{which}_out_multiplier", 1.0)) for which in ("attn", "ssm"))  # type: ignore[return-value]


def fitted(vectors: Float[Tensor, "*any d"], to: Float[Tensor, "*any d"]) -> Float[Tensor, "*any one"]:
    """The number by which each vector comes nearest to another.

    >>> fitted(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]]))
    tensor([[3.]])
    """
    square = vectors.square().sum(-1, keepdim=True)
    return (vectors * to).sum(-1, keepdim=True) / torch.where(square > 0, square, 1)
