"""What is fed to a model of few states, checked: a tensor of states, or text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.errors import CausalProbeError

__all__ = ["to_states"]


def to_states(
    input: Tensor | str | Sequence[str],
    *,
    d_vocab: int,
    n_positions: int,
    prepend_bos: bool,
    device: torch.device,
) -> Int[Tensor, "batch pos"]:
    """States as a checked tensor ``[batch, pos]``: see :meth:`causal_probe.models.DisentangledTransformer.to_tokens`."""
    if prepend_bos:
        raise CausalProbeError("A disentangled transformer has no beginning-of-sequence token; leave prepend_bos out.")
    if not isinstance(input, Tensor):
        input = _parse([input] if isinstance(input, str) else list(input))
    if input.is_floating_point() or input.is_complex() or input.dtype == torch.bool:
        raise CausalProbeError(f"Tokens must be whole numbers; the tensor's dtype is {input.dtype}.")
    tokens = (input[None] if input.ndim == 1 else input).long()
    if tokens.ndim != 2:
        raise CausalProbeError(f"Tokens must have the shape [batch, pos]; theirs is {list(input.shape)}.")
    if not 1 <= tokens.shape[1] <= n_positions:
        raise CausalProbeError(
            f"A sequence must hold 1 to {n_positions} tokens, the model's n_positions; these hold {tokens.shape[1]}."
        )
    if tokens.numel():
        low, high = (int(bound) for bound in torch.aminmax(tokens))
        if low < 0 or high >= d_vocab:
            raise CausalProbeError(
                f"Token {low if low < 0 else high} is outside the vocabulary; states are 0 to {d_vocab - 1}."
            )
    return tokens.to(device)


def _parse(texts: list[str]) -> Tensor:
    try:
        rows = [[int(word) for word in text.split()] for text in texts]
    except (AttributeError, ValueError) as error:
        raise CausalProbeError(
            f"A disentangled transformer reads states, written as whole numbers between blanks; got {texts!r:.80}."
        ) from error
    if len({len(row) for row in rows}) != 1:
        raise CausalProbeError(
            f"Sequences of one batch must be of one length; theirs are {[len(row) for row in rows]}."
        )
    return torch.tensor(rows, dtype=torch.long)
