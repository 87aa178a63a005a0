"""Pairs of sources one by one: where each would have a head attend to, and what is left of it when norms are computed anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.graphs import GraphComparison, compare
from causal_probe.hooks.moments import Moments
from causal_probe.probes.qk_terms import TermReader
from causal_probe.probes.scored_rows import scored_batches
from causal_probe.probes.templates import Template
from causal_probe.results import BINARY

__all__ = ["PairGraph", "pair_graphs", "together"]


@dataclass(frozen=True, eq=False)
class PairGraph:
    """One pair of sources: what it alone would have the head attend to, and what the head's scores lose without it.

    Attributes
    ----------
    query, key
        The sources.
    hits
        Share of the rows whose largest score, of this pair alone, is on an edge: in [0, 1], mean over rows, then sequences.
    stderr
        Its standard error over sequences; None for one.
    scores
        The pair's score from query to key, mean over sequences; minus infinity where the query doesn't see the key.
    queries
        The rows that have an edge in some sequence.
    predicted
        The pair's contribution, with the norms' scales of the forward pass held fixed: any sign, in units of the score.
    intervened
        The same by intervention, every norm computed anew: let q be the queries as they meet in the scores, q' those of a run in which the
        query's source was taken out of the stream that the layer reads, k and k' likewise for the key's source; then the pair is
        c (q - q') . (k - k'), that is S(q, k) - S(q', k) - S(q, k') + S(q', k'). Without norms, or where the source is a small part of the stream,
        it equals ``predicted``; where the source makes most of a norm it doesn't. None where a source is not in the stream (``bias``, ``alibi``).
    intervened_stderr
        Its standard error over sequences; None for one.
    """

    query: str
    key: str
    hits: float
    stderr: float | None
    scores: Float[np.ndarray, "pos pos"] = field(metadata=BINARY)  # JSON holds no infinities
    queries: tuple[int, ...]
    predicted: float
    intervened: float | None
    intervened_stderr: float | None

    @property
    def graph(self) -> nx.DiGraph:
        """Key -> query for the largest mean score of each row in ``queries``."""
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.scores)))
        graph.add_edges_from((int(self.scores[query].argmax()), query) for query in self.queries)
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))
        return graph

    def compare(self, truth: nx.DiGraph) -> GraphComparison:
        """:func:`causal_probe.graphs.compare` of :attr:`graph` with a graph over the same positions, for the rows in ``queries``."""
        return compare(self.graph, truth, children=list(self.queries))


def together(
    terms: Float[Tensor, "source batch pos d"], members: list[int], n: int
) -> Float[Tensor, "group batch pos d"]:
    """The sums of the terms of each group; ``members`` are the groups of the sources.

    >>> together(torch.tensor([[[[1.0]]], [[[2.0]]], [[[4.0]]]]), [0, 1, 0], 2).flatten()
    tensor([5., 2.])
    """
    if n == len(members):
        return terms
    index = torch.tensor(members, device=terms.device)
    return terms.new_zeros(n, *terms.shape[1:]).index_add_(0, index, terms)


def pair_graphs(
    reader: TermReader,
    batches: list[Tensor],
    template: Template,
    names: tuple[str, ...],
    members: list[int],
    chosen: list[tuple[int, int]],
) -> Iterator[PairGraph]:
    """Look at the chosen pairs (query group, key group) one by one."""
    numbers: dict[str, dict[tuple[int, int], list[Tensor]]] = {
        what: {pair: [] for pair in chosen} for what in ("hits", "predicted", "intervened")
    }
    sums: dict[tuple[int, int], Any] = dict.fromkeys(chosen, 0)
    queries: Any = False
    count = 0
    wanted = sorted({group for pair in chosen for group in pair})
    of_group = [[reader.sources[number] for number, its in enumerate(members) if its == group] for group in wanted]
    rows = zip(batches, scored_batches(reader, batches, template), strict=True)
    for batch, (terms, targets, weights, n_rows, used) in rows:
        scored = targets.any(-1)
        queries, count = scored.any(0) | queries, count + len(scored)
        query, key = (together(x, members, len(names)) for x in (terms.query, terms.key))
        lost = dict(zip(wanted, reader.lost_without(batch, of_group, terms), strict=True)) if used.any() else {}
        for pair in chosen:
            scores = query[pair[0]] @ key[pair[1]].mT
            seen = scores.masked_fill(~terms.seen, -torch.inf)
            best = targets.gather(-1, seen.argmax(-1, keepdim=True))[..., 0]
            numbers["hits"][pair].append(((best & scored).sum(-1) / n_rows)[used].double())
            sums[pair] = sums[pair] + seen.sum(0).double()
            numbers["predicted"][pair].append(_contrast(scores, weights, n_rows)[used])
            through = (lost.get(pair[0]), lost.get(pair[1]))
            if through[0] is not None and through[1] is not None:
                numbers["intervened"][pair].append(_contrast(through[0][0] @ through[1][1].mT, weights, n_rows)[used])
    for pair in chosen:
        hits = Moments.of(torch.cat(numbers["hits"][pair]))
        parts = numbers["intervened"][pair]
        intervened = Moments.of(torch.cat(parts)) if parts else None
        yield PairGraph(
            query=names[pair[0]],
            key=names[pair[1]],
            hits=float(hits.mean),
            stderr=_number(hits.stderr),
            scores=(sums[pair] / count).cpu().numpy(),
            queries=tuple(queries.nonzero().flatten().tolist()),
            predicted=float(torch.cat(numbers["predicted"][pair]).mean()),
            intervened=None if intervened is None else float(intervened.mean),
            intervened_stderr=None if intervened is None else _number(intervened.stderr),
        )


def _contrast(
    scores: Float[Tensor, "batch pos pos"], weights: Float[Tensor, "batch pos pos"], n_rows: Tensor
) -> Float[Tensor, " batch"]:
    return (scores.double() * weights.to(scores.device).double()).sum((-2, -1)) / n_rows


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)
