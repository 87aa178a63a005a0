"""What a probe is given to run on: tokens, or batches of them, cut into pieces that fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.errors import CausalProbeError

__all__ = ["each_batch", "token_batches"]


def each_batch(batches: Any) -> Iterator[Any]:
    """The batches of an iterable. A tensor of tokens, or anything with ``.tokens``, is one batch by itself.

    Examples
    --------
    >>> import torch
    >>> [list(batch.shape) for batch in each_batch(torch.zeros(2, 5, dtype=torch.long))]
    [[2, 5]]
    """
    return iter([batches] if isinstance(batches, Tensor) or hasattr(batches, "tokens") else batches)


def token_batches(batches: Any, batch_size: int | None = None) -> Iterator[Int[Tensor, "batch pos"]]:
    """The tokens of each batch, in pieces of ``batch_size``.

    Raises
    ------
    CausalProbeError
        If a batch is no tensor of tokens, lengths differ, or the size is not positive.
    """
    if batch_size is not None and batch_size < 1:
        raise CausalProbeError(f"batch_size must be at least 1; it is {batch_size}.")
    length = None
    for batch in each_batch(batches):
        tokens = getattr(batch, "tokens", batch)
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            found = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise CausalProbeError(
                f"A batch must be a tensor of tokens [batch, pos], of whole numbers; this one is {found}."
            )
        if length is not None and tokens.shape[1] != length:
            raise CausalProbeError(
                f"Patterns can be averaged over sequences of one length only; there are lengths {length} and {tokens.shape[1]}."
            )
        length = tokens.shape[1]
        if len(tokens):
            yield from torch.split(tokens, batch_size or len(tokens))
