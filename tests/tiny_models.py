"""Tiny random models of every kind that a hook or a probe must work on."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from causal_probe.models import DisentangledTransformer

D_VOCAB = 5
N_POSITIONS = 7


def disentangled(heads: tuple[int, ...] = (2, 1), *, scale: float = 1.0) -> DisentangledTransformer:
    """Random weights; the layers differ in their number of heads."""
    model = DisentangledTransformer(D_VOCAB, N_POSITIONS, heads, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def transformer_lens() -> Any:
    """HookedTransformer on TransformerLens 3.9, a native bridge on 4.3: attention only, two layers of two heads."""
    shape = {
        "d_model": 16, "d_head": 8, "n_layers": 2, "n_ctx": N_POSITIONS, "n_heads": 2, "d_vocab": D_VOCAB,
        "attn_only": True, "normalization_type": None, "seed": 0,
    }  # fmt: skip
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        model = native_bridge(shape)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # 3.9 says that 4.0 removes it, which is why it is tested
            model = HookedTransformer(shape)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # larger weights than a fresh model's, so that patterns are far from uniform
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


def native_bridge(shape: dict[str, Any]) -> Any:
    """A native bridge; on TransformerLens 3.9 its patterns can be read, and edits of them change nothing."""
    import transformer_lens.model_bridge.sources.native  # noqa: F401 - puts boot_native there
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_native(shape)


MODELS = {"disentangled": disentangled, "transformer-lens": transformer_lens}


def random_tokens(batch: int, *, seed: int = 0, n: int = N_POSITIONS) -> torch.Tensor:
    return torch.randint(D_VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))
