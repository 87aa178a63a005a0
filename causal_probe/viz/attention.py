"""Attention patterns over the tokens of one sequence, by circuitsvis."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.viz.arrays import as_array
from causal_probe.viz.palette import BLUE, VERMILLION
from causal_probe.viz.text import show_number, show_token, token_list
from causal_probe.viz.widget import HeadNotes, Widget

__all__ = ["attention"]

_TOKEN_LIMIT = 24
#: Edges of one head that are listed.
_MOST_EDGES = 64


@checked
def attention(
    tokens: Iterable[object],
    patterns: Any,
    *,
    head_names: Sequence[str] | None = None,
    graphs: Sequence[nx.Graph] | None = None,
    scores: Mapping[str, Sequence[float | None]] | None = None,
    sort_by: str | None = None,
    max_positions: int = 64,
    max_heads: int = 24,
    decimals: int = 3,
) -> Widget:
    """Show the attention patterns of some heads on one sequence: hover over a head to see it large, click to keep it.

    Beside the picture stand, head by head, its scores and the edges of its graph, where they are given; and the reader can put
    the heads in the order of any of the scores.

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
    graphs
        One graph for each head, over the positions of the sequence: the edges that were read out of it (by
        :meth:`Evidence.graph() <causal_probe.probes.Evidence.graph>`, say). An edge's ``weight``, where there is one, is shown.
    scores
        By name, one number for each head, None where it is undefined.
    sort_by
        The name of the score by which the heads are sorted to begin with, largest first; the default is the order given.
    max_positions, max_heads
        At most this many positions and heads are kept, the first ones; a note under the picture says what was left out.
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
        If the shapes don't fit one another, a value isn't finite, a limit isn't positive, a graph has nodes that are no positions,
        or ``sort_by`` names no score.

    Examples
    --------
    >>> import numpy as np
    >>> attention(["a", "b"], np.tril(np.full((1, 2, 2), 0.5)), head_names=["L0H0"]).note
    'Values are rounded to 3 decimals.'
    """
    texts = token_list(tokens)
    values = as_array(patterns, name="Attention patterns", axes="head query key")
    names = [f"H{head}" for head in range(len(values))] if head_names is None else [str(name) for name in head_names]
    scores = {str(name): [*of_heads] for name, of_heads in (scores or {}).items()}
    _check(texts, values, names, max_positions=max_positions, max_heads=max_heads, decimals=decimals)
    _check_beside(values, graphs, scores, sort_by)

    order = _by_score(range(len(values)), None if sort_by is None else scores[sort_by])[:max_heads]
    kept = values[order][:, :max_positions, :max_positions]
    shown = [show_token(text, limit=_TOKEN_LIMIT) for text in texts[:max_positions]]
    titles = [show_token(names[head], limit=_TOKEN_LIMIT) for head in order]
    limit = max(1.0, float(np.abs(values).max()))
    notes = _note(texts, values, max_positions=max_positions, max_heads=max_heads, decimals=decimals, sort_by=sort_by)
    listed: list[list[tuple[int, int]] | None] = [None] * len(order)
    if graphs is not None:
        every = [sorted(graphs[head].edges, key=lambda edge: edge[::-1]) for head in order]
        listed = [[edge for edge in edges if max(edge) < len(shown)][:_MOST_EDGES] for edges in every]
        if left := sum(len(edges) for edges in every) - sum(len(edges or ()) for edges in listed):
            notes.append(f"{left} edge{'s are' if left > 1 else ' is'} not listed.")
    props = {
        "tokens": shown,
        "attention": _rounded(kept, decimals),
        "attentionHeadNames": titles,
        "minValue": -limit,
        "maxValue": limit,
        "positiveColor": BLUE,
        "negativeColor": VERMILLION,
        # Grey above the diagonal means "can't be": that must hold in every head.
        "maskUpperTri": not np.triu(values, k=1).any(),
    }
    heads = tuple(
        HeadNotes(
            title,
            tuple((_name(name), show_number(of_heads[head], decimals)) for name, of_heads in scores.items()),
            None if edges is None or graphs is None else _edges(graphs[head], edges, shown, decimals),
        )
        for head, title, edges in zip(order, titles, listed, strict=True)
    )
    return Widget(
        "AttentionHeads",
        props,
        note=" ".join(notes),
        tokens=tuple(shown),
        heads=heads if scores or graphs is not None else (),
        scores={_name(name): [of_heads[head] for head in order] for name, of_heads in scores.items()},
    )


def _by_score(heads: Iterable[int], scores: Sequence[float | None] | None) -> list[int]:
    """The heads, those with the largest score first and those without one last; of equals the first."""
    if scores is None:
        return [*heads]

    def place(head: int) -> float:
        score = scores[head]
        return math.inf if score is None else -score

    return sorted(heads, key=place)


def _edges(
    graph: nx.Graph, edges: Iterable[tuple[int, int]], shown: Sequence[str], decimals: int
) -> tuple[tuple[int, str, int, str, str], ...]:
    def weight(parent: int, child: int) -> str:
        value = graph.edges[parent, child].get("weight")
        return "" if value is None else show_number(value, decimals)

    return tuple((p, shown[p], c, shown[c], weight(p, c)) for p, c in edges)


def _name(name: str) -> str:
    return show_token(name, limit=40).replace("␣", " ")


def _check_beside(
    values: NDArray[np.float64],
    graphs: Sequence[nx.Graph] | None,
    scores: Mapping[str, Sequence[float | None]],
    sort_by: str | None,
) -> None:
    n_heads, positions = len(values), range(values.shape[1])
    problems = []
    if graphs is not None and len(graphs) != n_heads:
        problems.append(f"{len(graphs)} graphs came with {n_heads} heads")
    for head, graph in enumerate(graphs or ()):
        if not isinstance(graph, nx.DiGraph):
            problems.append(f"the graph of head {head} is a {type(graph).__name__}, not a networkx.DiGraph")
        elif foreign := [node for node in graph if node not in positions]:
            problems.append(
                f"the graph of head {head} has the node {foreign[0]!r}, which is none of {len(positions)} positions"
            )
    for name, of_heads in scores.items():
        if len(of_heads) != n_heads:
            problems.append(f"{name} has {len(of_heads)} scores for {n_heads} heads")
        elif any(score is not None and not math.isfinite(score) for score in of_heads):
            problems.append(f"{name} has a score that is NaN or infinite (what is undefined is None)")
    if sort_by is not None and sort_by not in scores:
        problems.append(f"the heads were to be sorted by {sort_by!r}, and the scores are {', '.join(scores) or 'none'}")
    if problems:
        raise CausalProbeError(f"What was to stand beside attention patterns doesn't fit them: {'; '.join(problems)}.")


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


def _note(
    texts: list[str],
    values: NDArray[np.float64],
    *,
    max_positions: int,
    max_heads: int,
    decimals: int,
    sort_by: str | None,
) -> list[str]:
    parts = []
    if len(texts) > max_positions:
        parts.append(f"Shown are the first {max_positions} of {len(texts)} positions, as queries and as keys.")
    if len(values) > max_heads:
        by = "" if sort_by is None else f", by {_name(sort_by)}"
        parts.append(f"Shown are the first {max_heads} of {len(values)} heads{by}.")
    if cut := sum(
        show_token(text, limit=sys.maxsize) != show_token(text, limit=_TOKEN_LIMIT) for text in texts[:max_positions]
    ):
        parts.append(
            f"{cut} token{'s' if cut > 1 else ''} longer than {_TOKEN_LIMIT} characters {'are' if cut > 1 else 'is'} cut."
        )
    parts.append(f"Values are rounded to {decimals} decimals.")
    return parts
