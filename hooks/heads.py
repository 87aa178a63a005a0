"""Which head is meant: ``"L18H6"``, ``(18, 6)``, or 18 and 6."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

from causal_probe.arguments import shown
from causal_probe.errors import CausalProbeError

__all__ = ["find_head", "find_layer", "parse_head"]


def parse_head(layer: Any, head: Any = None) -> tuple[int, int]:
    """The layer and the head that are named, in one argument or in two.

    Parameters
    ----------
    layer
        ``"L18H6"``, a pair ``(18, 6)``, or a layer, counted from 0 (negative: from the end).
    head
        The head, counted from 0, where ``layer`` is a layer alone.

    Raises
    ------
    CausalProbeError
        If that names no head.

    Examples
    --------
    >>> parse_head("L18H6"), parse_head((18, 6)), parse_head(18, 6)
    ((18, 6), (18, 6), (18, 6))
    """
    named: Any = (layer, head)
    if head is None:
        if isinstance(layer, str) and (match := re.fullmatch(r"L(\d+)H(\d+)", layer)):
            named = match.groups()
        elif isinstance(layer, (tuple, list)) and len(layer) == 2:
            named = layer
        else:
            named = ()
    try:
        if any(isinstance(part, bool) for part in named):
            raise TypeError
        its_layer, its_head = (
            int(part) if isinstance(part, str) and head is None else operator.index(part) for part in named
        )
    except (TypeError, ValueError) as error:
        found = shown(layer) if head is None else f"layer {shown(layer)}, head {shown(head)}"
        raise CausalProbeError(
            f"A head is named 'L18H6', (18, 6), or by a layer and a head such as 18, 6; found {found}."
        ) from error
    return its_layer, its_head


def find_layer(n_layers: int, layer: Any) -> int:
    """A layer counted from 0; a negative number counts from the end, and -1 is the last.

    Raises
    ------
    CausalProbeError
        If there is no such layer.

    Examples
    --------
    >>> find_layer(12, 3), find_layer(12, -1)
    (3, 11)
    """
    try:
        if isinstance(layer, bool):
            raise TypeError
        number = operator.index(layer)
    except TypeError as error:
        raise CausalProbeError(f"A layer is a whole number, counted from 0; found {shown(layer)}.") from error
    if not -n_layers <= number < n_layers:
        raise CausalProbeError(
            f"Layer {number} was asked for; there are {n_layers} layers, counted from 0 (-1 is the last)."
        )
    return number % n_layers


def find_head(heads: Mapping[int, int], layer: Any, head: Any = None) -> tuple[int, int]:
    """The head that is named (see :func:`parse_head`), if it is one of these.

    Parameters
    ----------
    heads
        By layer, the number of its heads. A negative layer counts from the last of these layers.

    Raises
    ------
    CausalProbeError
        If there is no such head.

    Examples
    --------
    >>> find_head({0: 4, 1: 4}, "L1H3"), find_head({0: 4, 1: 4}, -1, 2)
    ((1, 3), (1, 2))
    """
    asked, its_head = parse_head(layer, head)
    its_layer = asked + 1 + max(heads, default=-1) if asked < 0 else asked
    if not 0 <= its_head < heads.get(its_layer, 0):
        there = ", ".join(f"layer {each}: {n}" for each, n in sorted(heads.items()))
        raise CausalProbeError(f"There is no head L{asked}H{its_head}. Heads, counted from 0: {there}.")
    return its_layer, its_head
