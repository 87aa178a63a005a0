"""The definition of the disentangled transformer as plain loops over NumPy arrays: what the models are tested against."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from causal_probe.models import DisentangledTransformer

#: (d_vocab, n_positions, heads): one to three layers, one head and several, as many in each layer and not.
SHAPES = [
    (3, 5, (1,)),
    (3, 6, (1, 1)),
    (4, 7, (2, 1)),
    (2, 5, (1, 2)),
    (5, 4, (3,)),
    (2, 4, (1, 2, 1)),
    (10, 12, (1, 1)),
]


def random_model(
    d_vocab: int = 3,
    n_positions: int = 6,
    heads: tuple[int, ...] = (1, 1),
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> DisentangledTransformer:
    """Weights drawn from a normal law; the same numbers in every dtype, up to rounding."""
    model = DisentangledTransformer(d_vocab, n_positions, heads, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def random_tokens(
    model: DisentangledTransformer, batch: int = 4, n: int | None = None, *, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.d_vocab, (batch, n or model.n_positions), generator=generator)


def define(model: DisentangledTransformer, tokens: list[int]) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Logits [pos, d_vocab] and, layer by layer, patterns [head, query, key] for one sequence."""
    n = len(tokens)
    h = np.zeros((n, model.d_vocab + model.n_positions))
    for i, state in enumerate(tokens):
        h[i, state] = 1
        h[i, model.d_vocab + i] = 1
    patterns = []
    for layer_A in model.A:
        pattern = np.zeros((len(layer_A), n, n))
        copied = [h]
        for head, A in enumerate(layer_A.detach().double().numpy()):
            out = np.zeros_like(h)
            for i in range(n):
                scores = np.array([h[i] @ A @ h[j] for j in range(i + 1)])
                weights = np.exp(scores - scores.max())
                pattern[head, i, : i + 1] = weights / weights.sum()
                for j in range(i + 1):
                    out[i] += pattern[head, i, j] * h[j]
            copied.append(out)
        h = np.concatenate(copied, axis=1)
        patterns.append(pattern)
    return h @ model.W_U.detach().double().numpy(), patterns
