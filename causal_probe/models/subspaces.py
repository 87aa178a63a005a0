"""Names for the parts of a residual stream that is concatenated, never summed.

The embedding of a token is ``token`` (one-hot, width d_vocab) beside ``position`` (one-hot, width n_positions). A head of
layer l copies the whole stream that it reads, so for every part ``x`` of its input it appends a part ``L{l}H{h}.x``:

    after the embedding    token  position
    after layer 0          token  position  L0H0.token  L0H0.position
    after layer 1          ...    L1H0.token  L1H0.position  L1H0.L0H0.token  L1H0.L0H0.position
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

__all__ = ["stream_widths", "subspaces"]


def stream_widths(d_vocab: int, n_positions: int, heads: Sequence[int]) -> list[int]:
    """The width of the residual stream after the embedding and after each layer.

    >>> stream_widths(3, 5, heads=[2, 1])
    [8, 24, 48]
    """
    return list(accumulate(heads, lambda width, n_heads: width * (1 + n_heads), initial=d_vocab + n_positions))


def subspaces(d_vocab: int, n_positions: int, heads: Sequence[int]) -> dict[str, slice]:
    """The parts of the residual stream after ``len(heads)`` layers, in order, as slices of its last axis.

    >>> subspaces(3, 5, heads=[1])
    {'token': slice(0, 3, None), 'position': slice(3, 8, None), 'L0H0.token': slice(8, 11, None), 'L0H0.position': slice(11, 16, None)}
    """
    widths = {"token": d_vocab, "position": n_positions}
    for layer, n_heads in enumerate(heads):
        widths |= {f"L{layer}H{head}.{name}": width for head in range(n_heads) for name, width in widths.items()}
    slices, start = {}, 0
    for name, width in widths.items():
        slices[name] = slice(start, start + width)
        start += width
    return slices
