"""Attention patterns over the tokens of one sequence, by circuitsvis."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from causal_probe.errors import CausalProbeError
from causal_probe.viz.arrays import as_array
from causal_probe.viz.palette import BLUE, VERMILLION
from causal_probe.viz.text import show_token, token_list
from causal_probe.viz.widget import Widget

__all__ = ["attention"]

_TOKEN_LIMIT = 24


def attention(
    tokens: Iterable[object],
    patterns: Any,
    *,
    head_names: Sequence[str] | None = None,
    max_positions: int = 64,
    max_heads: int = 24,
    decimals: int = 3,
) -> Widget:
    """Show the attention patterns of some heads on one sequence: hover over a head to see it large, click to keep it.

    Parameters
    ----------
    tokens
        The tokens as strings or ids, [pos]. Whatever they hold is shown as text: spaces as an open box, characters that
        can't be seen as escapes, the end of long tokens as an ellipsis.
    patterns
        Attention from query (row) to key (column), of shape [head, query, key]: an array or a tensor. Differences of
        patterns may be negative; those are shown in vermillion.
    head_names
        One name for each head. The default are the heads' numbers, H0, H1, ...
    max_positions, max_heads
        Only the first so many positions and heads are kept; a note under the picture says what was left out.
    decimals
        Decimals kept of each value; the note says so.

    Returns
    -------
    Widget
        circuitsvis' ``RenderedHTML``: a notebook shows it, without a network, and a
        :class:`~causal_probe.viz.Report` takes it as :class:`~causal_probe.viz.Attention`.

    Raises
    ------
    CausalProbeError
        If the shapes don't fit one another, a value isn't finite, or a limit isn't positive.

    Examples
    --------
    >>> import numpy as np
    >>> attention(["a", "b"], np.tril(np.full((1, 2, 2), 0.5)), head_names=["L0H0"]).note
    'Values are rounded to 3 decimals.'
    """
    texts = token_list(tokens)
    values = as_array(patterns, name="Attention patterns", axes="head query key")
    names = [f"H{head}" for head in range(len(values))] if head_names is None else [str(name) for name in head_names]
    _check(texts, values, names, max_positions=max_positions, max_heads=max_heads, decimals=decimals)

    kept = values[:max_heads, :max_positions, :max_positions]
    shown = [show_token(text, limit=_TOKEN_LIMIT) for text in texts[:max_positions]]
    limit = max(1.0, float(np.abs(values).max()))
    note = _note(texts, values, max_positions=max_positions, max_heads=max_heads, decimals=decimals)
    props = {
        "tokens": shown,
        "attention": _rounded(kept, decimals),
        "attentionHeadNames": [show_token(name, limit=_TOKEN_LIMIT) for name in names[:max_heads]],
        "minValue": -limit,
        "maxValue": limit,
        "positiveColor": BLUE,
        "negativeColor": VERMILLION,
        # Grey above the diagonal means "can't be": that must hold in every head.
        "maskUpperTri": not np.triu(values, k=1).any(),
    }
    return Widget("AttentionHeads", props, note=note, tokens=tuple(shown))


def _check(texts: list[str], values: NDArray[np.float64], names: list[str], **limits: int) -> None:
    n_heads, n_queries, n_keys = values.shape
    problems = [f"{name} = {limit}" for name, limit in limits.items() if limit < (0 if name == "decimals" else 1)]
    if not (len(texts) == n_queries == n_keys):
        problems.append(f"{len(texts)} tokens with patterns of {n_queries} queries and {n_keys} keys")
    if len(names) != n_heads:
        problems.append(f"{len(names)} head names with patterns of {n_heads} heads")
    if problems:
        raise CausalProbeError(
            f"Attention patterns [head, query, key] don't fit what came with them: {'; '.join(problems)}."
        )


def _rounded(values: NDArray[np.float64], decimals: int) -> list[Any]:
    """Nested lists; whole numbers as integers, which halves the length of a sparse pattern in JSON."""
    return [
        [[int(value) if value == int(value) else value for value in row] for row in pattern]
        for pattern in np.round(values, decimals).tolist()
    ]


def _note(texts: list[str], values: NDArray[np.float64], *, max_positions: int, max_heads: int, decimals: int) -> str:
    parts = []
    if len(texts) > max_positions:
        parts.append(f"Shown are the first {max_positions} of {len(texts)} positions, as queries and as keys.")
    if len(values) > max_heads:
        parts.append(f"Shown are the first {max_heads} of {len(values)} heads.")
    if cut := sum(
        show_token(text, limit=sys.maxsize) != show_token(text, limit=_TOKEN_LIMIT) for text in texts[:max_positions]
    ):
        parts.append(
            f"{cut} token{'s' if cut > 1 else ''} longer than {_TOKEN_LIMIT} characters {'are' if cut > 1 else 'is'} cut."
        )
    parts.append(f"Values are rounded to {decimals} decimals.")
    return " ".join(parts)
