"""A graph for every attention head on every sequence: for heads whose parents depend on the tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import GraphComparison, compare
from causal_probe.probes.reading import REST
from causal_probe.probes.templates import Template, from_graph
from causal_probe.results import Citation, cite, escape, to_jsonable

__all__ = ["SequenceComparison", "SequenceGraphs", "largest_parents"]

#: A repr shows this many heads at most.
SHOWN = 24


@dataclass(frozen=True, eq=False, repr=False)
class SequenceComparison:
    """Graphs of several sequences against what a template, or a DAG, makes of their tokens.

    Attributes
    ----------
    each
        The comparison of each sequence, by :func:`causal_probe.graphs.compare`.
    """

    each: tuple[GraphComparison, ...]

    @property
    def true_positives(self) -> int:
        """Number of found edges that are true, over all sequences."""
        return sum(found.true_positives for found in self.each)

    @property
    def precision(self) -> float | None:
        """True positives over found edges, both summed over sequences, in [0, 1]. None if no edge was found."""
        return _share(self.true_positives, sum(map(_n_found, self.each)))

    @property
    def recall(self) -> float | None:
        """True positives over true edges, both summed over sequences, in [0, 1]. None if there is no true edge."""
        return _share(self.true_positives, sum(map(_n_true, self.each)))

    @property
    def f1(self) -> float | None:
        """Twice the true positives over found plus true edges, in [0, 1]. None if there is neither."""
        return _share(2 * self.true_positives, sum(map(_n_found, self.each)) + sum(map(_n_true, self.each)))

    @property
    def shd(self) -> float:
        """Structural Hamming distance, averaged over sequences."""
        return sum(found.shd for found in self.each) / len(self.each)

    def to_dict(self) -> dict[str, Any]:
        """The numbers in plain JSON types; ``each`` holds those of every sequence."""
        names = ("true_positives", "precision", "recall", "f1", "shd")
        return {**{name: getattr(self, name) for name in names}, "each": [found.to_dict() for found in self.each]}

    def __repr__(self) -> str:
        precision, recall, f1 = (
            "undefined" if value is None else f"{value:.3f}" for value in (self.precision, self.recall, self.f1)
        )
        return (
            f"SequenceComparison over {len(self.each)} sequences: precision {precision}, recall {recall}, F1 {f1}, "
            f"mean SHD {self.shd:.2f}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class SequenceGraphs:
    """What :func:`~causal_probe.probes.head_graphs` found with ``per="sequence"``.

    The rule, for row i of a head on a sequence, with attention a: its candidate c is the earlier key, other than position 0, with
    the largest attention (of equals the smallest), and

    - ``sink="root"``: c is its parent if a_c >= threshold and a_c > a_0. Attention on position 0 says "no parent".
    - ``sink="exclude"``: c is its parent if a_c / (1 - a_0) >= threshold, and 1 - a_0 >= 0.1. Attention on position 0 says nothing.
    - ``sink="keep"``: position 0 is a key as any other: the larger of a_c and a_0 decides, if it reaches the threshold.

    Otherwise the row is a root. So is row 0 always and, unless position 0 is kept, row 1.

    Attributes
    ----------
    candidates
        By layer: the candidate c of each row, [sequence, head, query]; 0 for the rows 0 and 1, which have none.
    weights
        By layer: its attention a_c, in [0, 1]; 0 where there is no candidate.
    sinks
        By layer: the attention a_0 on position 0.
    tokens
        The tokens, [sequence, pos].
    sink
        ``"exclude"``, ``"root"`` or ``"keep"``.
    provenance
        The model's name, dtype and device, and the versions of the packages.
    """

    candidates: tuple[Int[np.ndarray, "sequence _head query"], ...]
    weights: tuple[Float[np.ndarray, "sequence _head query"], ...]
    sinks: tuple[Float[np.ndarray, "sequence _head query"], ...]
    tokens: Int[np.ndarray, "sequence pos"]
    sink: str
    provenance: Mapping[str, Any]

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.tokens)

    @property
    def positions(self) -> int:
        """Number of positions of each sequence."""
        return int(self.tokens.shape[1])

    def parents(self, layer: int, head: int, *, threshold: float = 0.5) -> Int[np.ndarray, "sequence query"]:
        """The parent of each row of each sequence; -1 for a root.

        Raises
        ------
        CausalProbeError
            If there is no such head, or the threshold is not in [0, 1].
        """
        return self._decide(layer, head, threshold)[0]

    def graph(self, sequence: int, layer: int, head: int, *, threshold: float = 0.5) -> nx.DiGraph:
        """One head's graph on one sequence: edges parent -> child over positions, with the ``weight`` that decided.

        Raises
        ------
        CausalProbeError
            If there is no such sequence or head, or the threshold is not in [0, 1].
        """
        if not 0 <= sequence < self.sequences:
            raise CausalProbeError(f"There is no sequence {sequence}; there are {self.sequences}.")
        parents, weights = self._decide(layer, head, threshold)
        graph = nx.DiGraph()
        graph.add_nodes_from(range(self.positions))
        for child, (parent, weight) in enumerate(zip(parents[sequence], weights[sequence], strict=True)):
            if parent >= 0:
                graph.add_edge(int(parent), child, weight=float(weight))
        return graph

    def compare(
        self,
        truth: Template | nx.DiGraph,
        layer: int,
        head: int,
        *,
        threshold: float = 0.5,
        rows: str = "with-target",
    ) -> SequenceComparison:
        """Compare each sequence's graph with a template's, or a DAG's, by :func:`causal_probe.graphs.compare`.

        Parameters
        ----------
        truth
            A template's targets are the true parents; a query's own position is none. A DAG over positions is
            :func:`~causal_probe.probes.from_graph`; use that with ``first=1`` for a DAG whose node 0 comes after BOS.
        rows
            ``"with-target"``: only the rows that have a true parent, so that the score is of whether the parent is right;
            ``"all"``: all, so that edges into rows without one count as wrong.

        Raises
        ------
        CausalProbeError
            If there is no such head, or an argument is out of range.
        """
        if rows not in ("with-target", "all"):
            raise CausalProbeError(f"rows is 'with-target' or 'all'; it is {rows!r}.")
        template = truth if isinstance(truth, Template) else from_graph(truth)
        found = self.parents(layer, head, threshold=threshold)
        results = []
        for tokens, parents in zip(self.tokens, found, strict=True):
            true = template(torch.from_numpy(tokens)[None])[0].tril(-1).numpy()
            children = np.flatnonzero(true.any(1)) if rows == "with-target" else np.arange(len(true))
            results.append(
                compare(
                    _graph_of(len(true), ((int(parent), child) for child, parent in enumerate(parents) if parent >= 0)),
                    _graph_of(len(true), ((int(parent), int(child)) for child, parent in np.argwhere(true))),
                    children=children.tolist(),
                )
            )
        return SequenceComparison(tuple(results))

    def by_offset(self, layer: int, head: int, *, threshold: float = 0.5) -> Float[np.ndarray, " offset"]:
        """The share of rows whose parent is k positions back, for k = 0 ... positions - 1, in [0, 1].

        Of the rows that could: row i has a position k back if i >= k, and k = 0 is no parent.
        """
        parents = self.parents(layer, head, threshold=threshold)
        _, child = (parents >= 0).nonzero()
        counts = np.bincount(child - parents[parents >= 0], minlength=self.positions)
        return np.asarray(counts / (self.sequences * np.arange(self.positions, 0, -1)))

    def cite(self) -> Citation:
        """The paper whose heads hold a causal graph, and one sentence for a methods section."""
        number_of = self.provenance["versions"]
        return cite(
            "nichani2024",
            methods=(
                f"The graph of an attention head of {self.provenance['model']} was read from its attention pattern on each of "
                f"{self.sequences} sequences of {self.positions} tokens: a position's candidate parent is the earlier position, other "
                f"than the first, with the largest attention; the attention sink was read by the rule {self.sink!r}, and a position "
                "is a root unless the candidate reaches a threshold "
                f"(causal-probe {number_of.get('causal-probe', 'from source')}, TransformerLens {number_of['transformer-lens']}, "
                f"{self.provenance['dtype']} on {self.provenance['device']})."
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields in plain JSON types; arrays as nested lists [layer][sequence][head][query]."""
        names = ("candidates", "weights", "sinks", "tokens", "sink", "provenance")
        return dict(to_jsonable({name: getattr(self, name) for name in names}))

    def __repr__(self) -> str:
        lines = [f"SequenceGraphs of {self._title()}"]
        lines += [f"  {name:<7} {edges:>5.0%} {sink:>7.0%} {offset:>8}" for name, edges, sink, offset in self._rows()]
        return "\n".join([lines[0], "  head    edges    sink   offset", *lines[1:], f"  {self._legend()}"])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{name}</th><td>{edges:.0%}</td><td>{sink:.0%}</td><td>{offset}</td></tr>"
            for name, edges, sink, offset in self._rows()
        )
        return (
            f"<table><caption>Head graphs of {escape(self._title())}</caption>"
            "<thead><tr><th>head</th><th>edges</th><th>sink</th><th>offset</th></tr></thead>"
            f"<tbody>{rows}</tbody></table><p>{escape(self._legend())}</p>"
        )

    def _title(self) -> str:
        return (
            f"{self.provenance['model']}: one for each of {self.sequences:,} sequences of {self.positions} positions, "
            f"sink={self.sink!r}"
        )

    def _legend(self) -> str:
        n_heads = sum(layer.shape[1] for layer in self.weights)
        rest = f"; and {n_heads - SHOWN} more heads" if n_heads > SHOWN else ""
        return f"edges: rows with a parent; sink: mean attention on position 0; offset: the commonest, in positions back{rest}"

    def _rows(self) -> Iterator[tuple[str, float, float, str]]:
        heads = ((layer, head) for layer, weights in enumerate(self.weights) for head in range(weights.shape[1]))
        for layer, head in itertools.islice(heads, SHOWN):
            parents = self.parents(layer, head)
            offsets = self.by_offset(layer, head)
            commonest = str(int(offsets.argmax())) if offsets.any() else "-"
            sink = float(self.sinks[layer][:, head, 1:].mean()) if self.positions > 1 else 1.0
            yield f"L{layer}H{head}", float((parents >= 0).mean()), sink, commonest

    def _decide(
        self, layer: int, head: int, threshold: float
    ) -> tuple[Int[np.ndarray, "sequence query"], Float[np.ndarray, "sequence query"]]:
        """The parent of each row, -1 for a root, and the weight that was held against the threshold."""
        heads = [weights.shape[1] for weights in self.weights]
        if not 0 <= layer < len(heads) or not 0 <= head < heads[layer]:
            raise CausalProbeError(f"There is no head L{layer}H{head}; the heads by layer are {heads}.")
        if not 0 <= threshold <= 1:
            raise CausalProbeError(f"The threshold is a share of a row's attention, from 0 to 1; it is {threshold!r}.")
        candidates, weights, sinks = (
            of[layer][:, head].astype(kind)
            for of, kind in ((self.candidates, int), (self.weights, float), (self.sinks, float))
        )
        row = np.arange(self.positions)
        if self.sink == "keep":
            parents, weights = np.where(sinks >= weights, 0, candidates), np.maximum(sinks, weights)
            is_child = row >= 1
        elif self.sink == "root":
            parents, is_child = candidates, (row >= 2) & (weights > sinks)
        else:
            rest = 1 - sinks
            parents, weights = candidates, weights / np.maximum(rest, REST)
            is_child = (row >= 2) & (rest >= REST)
        return np.where(is_child & (weights >= threshold), parents, -1), weights


def largest_parents(pattern: Float[Tensor, "batch head query key"]) -> tuple[Tensor, Tensor, Tensor]:
    """For each row: the earlier key other than position 0 with the largest attention, its attention, and that on position 0.

    The first two are 0 for the rows 0 and 1, which have no such key. Each is [batch, head, query].
    """
    n = pattern.shape[-1]
    allowed = torch.ones(n, n, dtype=torch.bool, device=pattern.device).tril(-1)
    allowed[:, 0] = False
    found = [each.masked_fill(~allowed, -1).max(-1) for each in pattern]  # one sequence at a time, to save memory
    candidates = torch.stack([best.indices for best in found])
    weights = torch.stack([best.values for best in found])
    candidates[..., :2] = 0
    return candidates.int(), weights.float().clamp(min=0), pattern[..., 0].float()


def _graph_of(nodes: int, edges: Iterable[tuple[int, int]]) -> nx.DiGraph:
    graph = nx.empty_graph(nodes, create_using=nx.DiGraph)
    graph.add_edges_from(edges)
    return graph


def _n_found(found: GraphComparison) -> int:
    return found.true_positives + len(found.extra) + len(found.reversed)


def _n_true(found: GraphComparison) -> int:
    return found.true_positives + len(found.missing) + len(found.reversed)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
