"""The base of this package's own models: TransformerLens' hook names, its configuration, and a cache that knows its layers."""

# HookPoint, HookedRootModule.setup and Module._apply carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

__all__ = ["HookedAttention", "HookedBlock", "HookedModel"]


class HookedAttention(nn.Module):
    """Heads with TransformerLens' hook points. A value passed to one has its own memory, because patching tools write into it."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_q = HookPoint()  # [batch, pos, head, d_key]
        self.hook_k = HookPoint()  # [batch, pos, head, d_key]
        self.hook_v = HookPoint()  # [batch, pos, head, d_value]
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key], those that are not to be seen at -inf or 0
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.hook_z = HookPoint()  # [batch, pos, head, d_value]


class HookedBlock(nn.Module):
    """One layer, which is its attention, with TransformerLens' hook points on the stream."""

    def __init__(self, attention: HookedAttention) -> None:
        super().__init__()
        self.attn = attention
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_in]
        self.hook_attn_out = HookPoint()  # [batch, pos, what the heads wrote]
        self.hook_resid_post = HookPoint()  # [batch, pos, d_out]


class HookedModel(HookedRootModule):
    """A ``HookedRootModule`` whose cache is asked as that of any TransformerLens model (``cache["pattern", 0]``), and whose ``cfg`` is kept true."""

    #: A row of attention speaks of its own position: what is predicted is asked at the last one alone.
    row_shift = 0

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
        """The last step of ``__init__``: configuration, device and dtype, hook names, eval mode."""
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
