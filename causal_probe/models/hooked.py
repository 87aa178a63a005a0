"""What this package's own models share: TransformerLens' hook names, its configuration, and a cache that knows its layers."""

# HookPoint, HookedRootModule.setup and Module._apply carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from causal_probe.errors import CausalProbeError
from causal_probe.models.states import to_states

__all__ = ["HookedAttention", "HookedBlock", "HookedModel", "HookedStates"]


class HookedAttention(nn.Module):
    """Heads with TransformerLens' hook points; by default softmax attention over the past, without a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_q = HookPoint()  # [batch, pos, head, d_key]
        self.hook_k = HookPoint()  # [batch, pos, head, d_key]
        self.hook_v = HookPoint()  # [batch, pos, head, d_value]
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key], as :meth:`hide` leaves them
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.hook_z = HookPoint()  # [batch, pos, head, d_value]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From queries, keys and values [batch, pos, head, ...] to what each head found, [batch, pos, head, d_value], through every hook.

        What is passed has memory of its own, no view of another's: patching tools write into it.
        """
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        scores = einsum(q, k.conj(), "batch query head e, batch key head e -> batch head query key")
        pattern = self.hook_pattern(self.weigh(self.hook_attn_scores(self.hide(scores))))
        z: Tensor = self.hook_z(einsum(pattern, v, "batch head query key, batch key head e -> batch query head e"))
        return z

    def hide(self, scores: Tensor) -> Tensor:
        """Scores [..., query, key] with those that are not to be seen at what :meth:`weigh` makes 0."""
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, float("-inf"))

    def weigh(self, scores: Tensor) -> Tensor:
        """The pattern of hidden scores."""
        return scores.softmax(-1)


class HookedBlock(nn.Module):
    """One layer, which is its attention, with TransformerLens' hook points on the stream."""

    def __init__(self, attention: HookedAttention) -> None:
        super().__init__()
        self.attn = attention
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_in]
        self.hook_attn_out = HookPoint()  # [batch, pos, what the heads wrote]
        self.hook_resid_post = HookPoint()  # [batch, pos, d_out]

    def forward(self, x: Tensor) -> Tensor:
        """The stream after the layer, [batch, pos, d_out]."""
        x = self.hook_resid_pre(x)
        stream: Tensor = self.hook_resid_post(self.join(x, self.hook_attn_out(self.attn(x))))
        return stream

    def join(self, x: Tensor, out: Tensor) -> Tensor:
        """The stream after the layer, with memory of its own."""
        return x + out


class HookedModel(HookedRootModule):
    """A ``HookedRootModule`` whose cache is asked as that of any TransformerLens model (``cache["pattern", 0]``), and whose ``cfg`` is kept true."""

    def make_ready(
        self,
        name: str,
        *,
        d_model: int,
        d_head: int,
        n_layers: int,
        n_heads: int,
        n_positions: int,
        d_vocab: int,
        dtype: torch.dtype,
        device: str | torch.device,
        use_attn_scale: bool = False,
    ) -> None:
        """What comes last in ``__init__``: configuration, device and dtype, hook names, eval mode."""
        # What TransformerLens' tools read. n_ctx is one above T, because detect_head wants strictly shorter sequences.
        self.cfg = TransformerBridgeConfig(
            d_model=d_model,
            d_head=d_head,
            n_layers=n_layers,
            n_ctx=n_positions + 1,
            n_heads=n_heads,
            d_vocab=d_vocab,
            model_name=name,
            attn_only=True,
            normalization_type=None,
            use_attn_scale=use_attn_scale,
            dtype=dtype,
        )
        self.to(device=device)
        if not dtype.is_complex:  # torch warns
            self.to(dtype=dtype)
        self.setup()
        self.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> HookedModel:
        # Every way of moving a module (to, cuda, double, ...) passes here: cfg must not name another device or dtype.
        super()._apply(fn, recurse)
        weight = next(self.parameters())
        self.cfg.device, self.cfg.dtype = str(weight.device), weight.dtype
        return self

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        """The output and an ``ActivationCache`` (a plain dict with ``return_cache_object=False``)."""
        output, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if return_cache_object:
            return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return output, cache


class HookedStates(HookedModel):
    """A model of few states, whose embeddings are one-hot: of the state, and of the position."""

    def __init__(self, d_vocab: int, n_positions: int) -> None:
        super().__init__()
        self.d_vocab = d_vocab
        self.n_positions = n_positions
        self.hook_embed = HookPoint()  # [batch, pos, d_vocab]
        self.hook_pos_embed = HookPoint()  # [batch, pos, n_positions]

    def _embed(self, tokens: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
        """States and positions, one-hot, through their hooks: [batch, pos, d_vocab] and [batch, pos, n_positions]."""
        dtype = next(self.parameters()).dtype
        eye = torch.eye(self.n_positions, dtype=dtype, device=tokens.device)
        token = self.hook_embed(one_hot(tokens, self.d_vocab).to(dtype))
        return token, self.hook_pos_embed(eye[: tokens.shape[1]].repeat(len(tokens), 1, 1))

    def _check_next(self, tokens: Int[Tensor, "batch pos"]) -> None:
        if len(tokens) == 0 or tokens.shape[1] == 1:
            raise CausalProbeError(
                f"The loss of the next token needs a sequence of two tokens or more; the shape is {list(tokens.shape)}."
            )

    def to_tokens(
        self, input: Tensor | str | Sequence[str], prepend_bos: bool | None = None
    ) -> Int[Tensor, "batch pos"]:
        """States as a checked tensor ``[batch, pos]`` on the model's device.

        Parameters
        ----------
        input
            States ``[batch, pos]`` or ``[pos]``, of any integer dtype; or text: states as numbers between blanks, one string
            per sequence.
        prepend_bos
            There is no beginning-of-sequence token: False and None are the same, True is an error.

        Raises
        ------
        CausalProbeError
            If a state is not a whole number in 0..d_vocab-1, there are none, there are more than ``n_positions``, or
            texts differ in length.
        """
        return to_states(
            input,
            d_vocab=self.d_vocab,
            n_positions=self.n_positions,
            prepend_bos=bool(prepend_bos),
            device=next(self.parameters()).device,
        )
