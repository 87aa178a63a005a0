"""Means over sequences of the values at attention hook points, in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from causal_probe.arguments import BatchSize
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, require_hooks
from causal_probe.hooks.heads import find_head, find_layer, parse_head
from causal_probe.hooks.moments import Moments, merged
from causal_probe.hooks.record import record

__all__ = ["mean_heads", "mean_patterns"]


@probe
def mean_patterns(
    model: HookedModel, tokens: Any, *, layers: Iterable[int] | None = None, batch_size: BatchSize = None
) -> dict[int, Moments]:
    """Average every head's attention pattern over sequences, in one pass.

    Parameters
    ----------
    model
        Any model with TransformerLens' hook points ``blocks.{layer}.attn.hook_pattern``.
    tokens
        Tokens [batch, pos], or an iterable of such tensors; a batch may also be anything with ``.tokens``. All sequences
        must be of one length.
    layers
        Which layers; all by default. The model is run no further than the last of them, where it can be stopped.
    batch_size
        Sequences in a forward pass; by default as many as :func:`~causal_probe.probes.scan` takes.

    Returns
    -------
    dict
        By layer, the :class:`~causal_probe.hooks.moments.Moments` of its patterns, shape [head, query, key]: rows of the mean sum to one. Layers
        may differ in their number of heads.

    Raises
    ------
    CausalProbeError
        If a hook point is missing or never fires, there are no sequences, their lengths differ, or a pattern is not made of
        probabilities (NaN, or rows that don't sum to one: padding, or a hook that carries something else).

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> found = mean_patterns(DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]] * 2))
    >>> found[0].mean[0, 3]  # untrained: it attends evenly
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    return record(model, tokens, _Sums(), layers=layers, batch_size=batch_size).total


@probe
def mean_heads(model: HookedModel, tokens: Any, *, layer: Any, batch_size: BatchSize = None) -> Moments:
    """Average what each head of a layer reads out of the stream (``hook_z``), shape [pos, head, d_head], over sequences.

    The mean is a reference for :func:`~causal_probe.hooks.mean_ablate`. Other arguments and errors are those of :func:`mean_patterns`.

    Parameters
    ----------
    layer
        A layer, counted from 0 (-1 is the last); or one head of it, as ``"L18H6"`` or ``(18, 6)``, whose mean is [pos, d_head].

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> found = mean_heads(DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]] * 2), layer=0)
    >>> list(found.mean.shape)  # [pos, head, d_head]
    [4, 1, 7]
    """
    require_hooks(model, ())
    layer, head = (layer, None) if isinstance(layer, int) else parse_head(layer)
    layer = find_layer(int(model.cfg.n_layers), layer)
    found = record(model, tokens, _Sums(), points=("z",), layers=[layer], batch_size=batch_size).total[layer]
    if head is None:
        return found
    find_head({layer: found.sums.shape[1]}, layer, head)
    return Moments(found.count, found.sums[:, head], found.squares[:, head])


class _Sums:
    """The moments over sequences, by layer."""

    def __init__(self) -> None:
        self.total: dict[int, Moments] = {}

    def start(self, tokens: Tensor) -> None:
        """Nothing depends on the tokens."""

    def reduce(self, layer: int, *values: Tensor) -> Moments:
        """The moments of one micro-batch."""
        (value,) = values
        return Moments.of(value)

    def add(self, reduced: Mapping[int, Moments]) -> None:
        """Merge them with those of the micro-batches before."""
        self.total = merged(self.total, reduced)
