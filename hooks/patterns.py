"""Attention patterns that are there already: of a cache, of ``output_attentions``, of nnsight, of NumPy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.record import row_slack

__all__ = ["attention_on_nothing", "given_patterns"]

#: A layer's pattern in the names of TransformerLens.
HOOK = re.compile(r"blocks\.(\d+)\.attn\.hook_pattern")


def given_patterns(patterns: Any, *, low: float | None = 0.0, high: float | None = None) -> dict[int, Tensor]:
    """Patterns, or what has their axes, by layer.

    Parameters
    ----------
    patterns
        A list with an array or tensor for each layer; a mapping from the layer to it; or a mapping with TransformerLens' names, such as
        an ``ActivationCache``, of which only the patterns are looked at. Each is [batch, head, query, key], or [head, query, key] (means).
    low, high
        The range of the values, if it has such ends.

    Raises
    ------
    CausalProbeError
        If there are none, one has another shape or length than the others, or is not finite real numbers in range.

    Examples
    --------
    >>> {layer: list(its.shape) for layer, its in given_patterns([np.ones((2, 4, 3, 3)) / 3]).items()}
    {0: [2, 4, 3, 3]}
    """
    if hasattr(patterns, "keys"):
        by_layer = {key: patterns[key] for key in patterns.keys() if isinstance(key, int)}  # noqa: SIM118 - a cache is no mapping
        by_layer |= {int(named[1]): patterns[key] for key in patterns.keys() if (named := HOOK.fullmatch(str(key)))}  # noqa: SIM118
    elif isinstance(patterns, (Tensor, np.ndarray)) and patterns.ndim != 5:
        raise CausalProbeError(
            f"One array of the shape {list(patterns.shape)} doesn't say which axis is the layer: give a list, with one array for each."
        )
    else:
        by_layer = dict(enumerate(patterns)) if isinstance(patterns, Iterable) else {}
    if not by_layer:
        raise CausalProbeError(
            "There are no patterns: give a list with one array for each layer, or a mapping from the layer, or with the names "
            "blocks.{layer}.attn.hook_pattern."
        )
    found = {layer: _tensor(layer, by_layer[layer]) for layer in sorted(by_layer)}
    first = next(iter(found.values()))
    for layer, its in found.items():
        if its.ndim not in (3, 4) or its.shape[-1] != its.shape[-2]:
            raise CausalProbeError(
                f"Patterns are [batch, head, query, key] or, means, [head, query, key]; that of layer {layer} is {list(its.shape)}."
            )
        if (its.ndim, its.shape[:-3], its.shape[-1]) != (first.ndim, first.shape[:-3], first.shape[-1]):
            raise CausalProbeError(
                f"The layers' patterns must be of the same sequences; their shapes are {[list(each.shape) for each in found.values()]}."
            )
        if not its.isfinite().all():
            raise CausalProbeError(f"The values of layer {layer} are not finite.")
        least, most, slack = float(its.min()), float(its.max()), row_slack(its.dtype)
        if (low is not None and least < low - slack) or (high is not None and most > high + slack):
            raise CausalProbeError(
                f"Values from {low} to {'any' if high is None else high} were expected; in layer {layer} they run from {least:.4g} to {most:.4g}."
            )
    return found


def attention_on_nothing(patterns: dict[int, Tensor], *, slack: float | None = None) -> dict[int, Tensor] | None:
    """By layer, what the rows of patterns leave to one, [head, query], mean over sequences; None where all sum to one.

    ``slack`` is what rounding may take from a row; by default that of the patterns' dtype.

    Raises
    ------
    CausalProbeError
        If a row sums to more than one.
    """
    rests = {}
    some = False
    for layer, its in patterns.items():
        totals = its.sum(-1, dtype=torch.promote_types(its.dtype, torch.float64))
        room = row_slack(its.dtype) if slack is None else slack
        if bool((totals > 1 + room).any()):
            raise CausalProbeError(
                f"A row of attention sums to one or less; in layer {layer} one sums to {float(totals.max()):.4g}."
            )
        some |= bool((totals < 1 - room).any())
        rest = (1 - totals).clamp(min=0)
        rests[layer] = rest.mean(0) if its.ndim == 4 else rest
    return rests if some else None


def _tensor(layer: int, value: Any) -> Tensor:
    if not isinstance(value, (Tensor, np.ndarray)):
        raise CausalProbeError(
            f"The pattern of layer {layer} is a {type(value).__name__}, where an array or a tensor was expected. A Hugging Face "
            'model gives none unless it is loaded with attn_implementation="eager".'
        )
    tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
    if not tensor.is_floating_point():
        raise CausalProbeError(f"The pattern of layer {layer} holds {tensor.dtype}, where real numbers were expected.")
    return tensor
