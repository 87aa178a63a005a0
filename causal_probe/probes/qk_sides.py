"""From the stream to the query or the key that meets the other in the score: the pieces in between, each linear in a forward pass.

    the stream's norm      a number for each position (its scale), and its gain, folded into the matrix
    W_Q or W_K             a matrix; of latent attention (MLA) two, with a norm between them: another number, and its gain
    a norm of queries      (QK-norm) another number for each position; its gain and its centring are part of what follows
    the rotation           a matrix for each position, the gain before or behind it

The last two are not read from weights: unit vectors are put in the place of the queries, and what becomes of them is the matrix,
whatever the model does in between. A norm gives all unit vectors the same length, so the matrix is right up to a number, and the
number of each position follows from what the model itself makes of its query there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.hooks.caught import catch
from causal_probe.hooks.check import HookedModel
from causal_probe.hooks.values import read_values
from causal_probe.probes.qk_stream import fitted, require_small

__all__ = ["Side", "Turn", "read", "sides", "turns"]


@dataclass(frozen=True, eq=False)
class Turn:
    """What becomes of a query, or a key, between the projection and the scores.

    Attributes
    ----------
    matrix
        By position; None where it is the identity.
    shift
        By position, what is added, a norm's bias; None for nothing.
    normed
        Whether each vector is also multiplied by a number of its own.
    """

    matrix: Float[Tensor, "pos d_head d_head"] | None
    shift: Float[Tensor, "pos d_head"] | None = None
    normed: bool = False

    def __call__(self, vectors: Float[Tensor, "*any pos d_head"]) -> Float[Tensor, "*any pos d_head"]:
        """Vectors, one at each position, as they meet in the scores, but for shift and number."""
        return vectors if self.matrix is None else einsum(vectors, self.matrix, "... pos d, pos d e -> ... pos e")

    def factor(
        self,
        raw: Float[Tensor, "batch pos d_head"],
        final: Float[Tensor, "batch pos d_head"] | None,
        like: Tensor,
        what: str,
    ) -> Tensor:
        """The numbers that the norm has multiplied this batch's vectors by; 1 without a norm."""
        if not self.normed or final is None:
            return raw.new_ones(1, 1, 1)
        turned, final = self(raw), final if self.shift is None else final - self.shift
        factor = fitted(turned, final)
        require_small(float((final - factor * turned).abs().max()), of=float(final.abs().max()), like=like, what=what)
        return factor


class Side(ABC):
    """One side of a layer's heads, queries or keys: where they are carried, and by what the stream was multiplied on its way."""

    def __init__(self, what: str, layer: int, n_heads: int) -> None:
        self.what, self.layer, self.n_heads = what, layer, n_heads
        #: Whether what meets in the scores passes no hook point, and is caught where it goes into the attention.
        self.caught = False

    def hook(self, name: str) -> str:
        """A hook point of the layer's attention."""
        return f"blocks.{self.layer}.attn.{name}"

    @property
    @abstractmethod
    def carried(self) -> tuple[str, ...]:
        """The hook points that carry the projections, which must fire."""

    @abstractmethod
    def raw(self, found: Mapping[str, Tensor], head: int) -> Float[Tensor, "batch pos d_head"]:
        """One head's queries or keys as they were projected."""

    @abstractmethod
    def scales(self, found: Mapping[str, Tensor], inverse: Tensor, d_head: int) -> list[tuple[slice, Tensor]]:
        """By which numbers the stream, times the matrix, gives each stretch of the projections, but for biases."""

    @abstractmethod
    def units(self, rows: Float[Tensor, "row head d_head"]) -> dict[str, Callable[[Tensor], Tensor]]:
        """The edits that put given vectors, the same at all positions, in the projections' place."""

    def final(self, found: Mapping[str, Tensor], head: int) -> Tensor | None:
        """One head's queries or keys as they meet in the scores; None where no hook point behind the projection shows them."""
        shown = self.behind[-1:] if self.caught else self.behind
        name = next((name for name in reversed(list(found)) if name in shown), None)
        if name is None:
            return None
        value = found[name]
        if value.ndim == 3:
            value = value.reshape(*value.shape[:2], -1, self.raw(found, head).shape[-1])
        elif not name.startswith(self.hook("hook_rot")):  # only what is rotated is shown with the positions first
            value = value.transpose(1, 2)
        return value[:, :, head * value.shape[2] // self.n_heads]

    @property
    def behind(self) -> tuple[str, ...]:
        """The hook points behind the projection, of which the last to fire shows what meets in the scores."""
        return (self.hook(f"hook_{self.what}_normed"), self.hook(f"hook_rot_{self.what}"))


class _Projected(Side):
    """Queries or keys of one projection."""

    @property
    def carried(self) -> tuple[str, ...]:
        return (attention_hook(self.layer, self.what),)

    def raw(self, found: Mapping[str, Tensor], head: int) -> Float[Tensor, "batch pos d_head"]:
        value = found[self.carried[0]]
        at = head * value.shape[2] // self.n_heads
        return value[
            :, :, at
        ]  # queries of a group share a key; of queries and gates, head by head, the query comes first

    def scales(self, found: Mapping[str, Tensor], inverse: Tensor, d_head: int) -> list[tuple[slice, Tensor]]:
        return [(slice(d_head), inverse)]

    def units(self, rows: Float[Tensor, "row head d_head"]) -> dict[str, Callable[[Tensor], Tensor]]:
        def edit(value: Float[Tensor, "row pos head d_head"]) -> Float[Tensor, "row pos head d_head"]:
            value = value.clone()
            step = max(1, value.shape[2] // self.n_heads)
            ours = rows[:, :: max(1, self.n_heads // value.shape[2])][:, : value.shape[2] // step]
            value[:, :, ::step] = ours[:, None].to(value).expand(-1, value.shape[1], -1, -1)
            return value

        return {self.carried[0]: edit}


class _Latent(Side):
    """Queries or keys of latent attention (MLA), whose last numbers are rotated and, in keys, shared by all heads."""

    def __init__(self, what: str, layer: int, n_heads: int, attention: Any) -> None:
        super().__init__(what, layer, n_heads)
        self.nope, self.rotated = int(attention.qk_nope_head_dim), int(attention.qk_rope_head_dim)
        #: The norm between the two steps, and where what goes in and comes out passes; None where there is one step.
        self.norm = getattr(attention, "q_a_layernorm" if what == "q" else "kv_a_layernorm", None)
        first, latent = ("q_a_proj", "hook_q_latent") if what == "q" else ("kv_a_proj_with_mqa", "hook_kv_latent")
        self.steps: tuple[str, ...] = () if self.norm is None else (self.hook(f"{first}.hook_out"), self.hook(latent))
        last = "kv_b_proj" if what == "k" else "q_proj" if self.norm is None else "q_b_proj"
        self.last = self.hook(f"{last}.hook_out")

    @property
    def carried(self) -> tuple[str, ...]:
        return (self.last, *self.steps)

    def raw(self, found: Mapping[str, Tensor], head: int) -> Float[Tensor, "batch pos d_head"]:
        own = found[self.last].reshape(*found[self.last].shape[:2], self.n_heads, -1)[:, :, head]
        return (
            own
            if self.what == "q"
            else torch.cat([own[..., : self.nope], found[self.steps[0]][..., -self.rotated :]], -1)
        )

    def scales(self, found: Mapping[str, Tensor], inverse: Tensor, d_head: int) -> list[tuple[slice, Tensor]]:
        within = inverse
        if self.norm is not None:
            before, latent = (found[name].to(inverse) for name in self.steps)
            within = inverse * fitted(before[..., : latent.shape[-1]] * self.norm.weight.detach().to(inverse), latent)
        if self.what == "q":
            return [(slice(d_head), within)]
        return [(slice(self.nope), within), (slice(self.nope, d_head), inverse)]

    def units(self, rows: Float[Tensor, "row head d_head"]) -> dict[str, Callable[[Tensor], Tensor]]:
        def edit(value: Float[Tensor, "row pos width"]) -> Float[Tensor, "row pos width"]:
            return rows.flatten(1)[:, None].to(value).expand_as(value).clone()

        return {self.last: edit}

    @property
    def behind(self) -> tuple[str, ...]:
        return (attention_hook(self.layer, self.what),)


def sides(model: Any, layer: int, n_heads: int) -> tuple[Side, Side]:
    """The two sides of a layer's heads."""
    blocks = getattr(model, "blocks", None)
    original = None if blocks is None else getattr(getattr(blocks[layer], "attn", None), "original_component", None)
    if hasattr(original, "kv_a_proj_with_mqa"):
        return _Latent("q", layer, n_heads, original), _Latent("k", layer, n_heads, original)
    return _Projected("q", layer, n_heads), _Projected("k", layer, n_heads)


def read(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    names: Iterable[str],
    both: tuple[Side, Side],
    *,
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """The values at hook points up to a layer; of one whose queries and keys are caught, these where hook points behind the projection would show them."""
    layer = both[0].layer
    if not both[0].caught:
        return read_values(model, tokens, names, n_layers=layer + 1, edits=edits)
    with catch(model, layer) as caught:
        found = read_values(model, tokens, names, n_layers=layer + 1, edits=edits)
    return found | {side.behind[-1]: caught[side.what] for side in both if side.what in caught}


def turns(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], both: tuple[Side, Side], head: int, like: Tensor
) -> tuple[Turn, Turn]:
    """What becomes of unit vectors in the place of one head's queries and keys, at each position of tokens of this length."""
    query, key = both
    layer, n_heads, d_head = query.layer, query.n_heads, like.shape[-1]
    caught = query.caught or key.caught
    normed = caught or any(f"blocks.{layer}.attn.hook_{what}_normed" in model.hook_dict for what in "qk")
    # Where a norm mixes a head's numbers, or all heads', every head carries the same vector; else each another one, to save rows.
    eye = torch.eye(d_head, dtype=like.dtype, device=like.device)
    if normed:
        rows = torch.cat([eye, -eye[:1]])[:, None].expand(-1, n_heads, -1)
    else:
        n_rows = math.ceil(d_head / n_heads)
        rows = eye.repeat(1 + n_rows * n_heads // d_head, 1)[: n_rows * n_heads].reshape(n_rows, n_heads, d_head)
    edits = {name: edit for side in (both if normed else (query,)) for name, edit in side.units(rows).items()}
    angles = [attention_hook(layer, name) for name in ("cos", "sin")]
    names = [name for side in both for name in (*side.behind, *side.carried)]
    found = read(model, tokens[:1].expand(len(rows), -1), [*names, *angles], both, edits=edits)
    if normed:
        return _normed(query, found, head, like), _normed(key, found, head, like)
    each = [query.final(found, h) for h in range(n_heads)]
    if all(final is not None for final in each):
        turned = torch.stack([final for final in each if final is not None], 1).flatten(0, 1)[
            :d_head
        ]  # [unit vector, pos, d_head]
        both_turns = Turn(turned.transpose(0, 1).to(like).contiguous())
    elif all(name in found for name in angles):  # some bridges show the angles alone
        cos, sin = (found[name].to(like).reshape(-1, tokens.shape[1], found[name].shape[-1])[0] for name in angles)
        both_turns = Turn(_half_turns(cos, sin, d_head))
    else:
        both_turns = Turn(None)
    return both_turns, both_turns


def _normed(side: Side, found: Mapping[str, Tensor], head: int, like: Tensor) -> Turn:
    final = side.final(found, head)
    if final is None:
        raise CausalProbeError(
            f"{side.behind[0]} does not fire, so what a norm makes of layer {side.layer}'s {side.what} can't be read."
        )
    final = final.transpose(0, 1).to(like)  # [pos, unit vector, d_head]
    shift = (final[:, :1] + final[:, -1:]) / 2
    return Turn((final[:, :-1] - shift).contiguous(), shift[:, 0], normed=True)


def _half_turns(cos: Float[Tensor, "pos d_turned"], sin: Float[Tensor, "pos d_turned"], d_head: int) -> Tensor:
    """By position, the rotation of the first numbers of a head that pairs each one of their first half with one of the second."""
    half = cos.shape[1] // 2
    number = torch.arange(half, device=cos.device)
    turned = torch.eye(d_head, dtype=cos.dtype, device=cos.device).repeat(len(cos), 1, 1)
    turned[:, : 2 * half, : 2 * half] = torch.diag_embed(cos)
    turned[:, number + half, number] = -sin[:, :half]
    turned[:, number, number + half] = sin[:, half:]
    return turned
