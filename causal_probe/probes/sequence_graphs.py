"""A graph for every attention head on every sequence: for heads whose parents depend on the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import GraphComparison, compare
from causal_probe.graphs.compare import told_shift
from causal_probe.hooks.heads import find_head
from causal_probe.hooks.record import Rows
from causal_probe.probes.reading import REST, check_shift
from causal_probe.probes.templates import Template, from_graph
from causal_probe.results import Result, Table

__all__ = ["LargestParents", "SequenceComparison", "SequenceGraphs", "largest_parents"]


@dataclass(frozen=True, eq=False, repr=False)
class SequenceComparison(Result):
    """Graphs of several sequences against what a template, or a DAG, makes of their tokens.

    Attributes
    ----------
    each
        The comparison of each sequence, by :func:`causal_probe.graphs.compare`.
    shift
        Of a DAG, the edges into node i were read in row i - shift. None for templates, which say of a row itself where it attends.
    """

    KIND = "comparison by sequence"
    DERIVED = ("true_positives", "precision", "recall", "f1", "shd")

    each: tuple[GraphComparison, ...]
    shift: int | None = None

    @property
    def true_positives(self) -> int:
        """Number of found edges that are true, over all sequences."""
        return sum(found.true_positives for found in self.each)

    @property
    def precision(self) -> float | None:
        """True positives over found edges, both summed over sequences, in [0, 1]. None if no edge was found."""
        return self._share(1, "extra")

    @property
    def recall(self) -> float | None:
        """True positives over true edges, both summed over sequences, in [0, 1]. None if there is no true edge."""
        return self._share(1, "missing")

    @property
    def f1(self) -> float | None:
        """Twice the true positives over found plus true edges, in [0, 1]. None if there is neither."""
        return self._share(2, "extra", "missing")

    def _share(self, times: int, *wrong: str) -> float | None:
        """``times`` the true positives over as many plus the edges that are wrong in these ways; reversed ones are in each."""
        others = sum(len(getattr(found, name)) + len(found.reversed) for found in self.each for name in wrong)
        whole = times * self.true_positives + others
        return times * self.true_positives / whole if whole else None

    @property
    def shd(self) -> float:
        """Structural Hamming distance, averaged over sequences."""
        return sum(found.shd for found in self.each) / len(self.each)

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no precision, recall or F1."""
        reasons = {"precision": "no edge was found", "recall": "there is no true edge", "f1": "there is no edge at all"}
        return {name: reason for name, reason in reasons.items() if getattr(self, name) is None}

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The graph of each of {len(self.each)} sequences was compared with the true one by the precision, recall and F1 of directed "
            f"edges, summed over sequences, and the mean structural Hamming distance ({self.measured_with})."
        )

    def table(self) -> Table:
        """The four numbers."""
        numbers = (self.precision, self.recall, self.f1, self.shd)
        notes = [f"{name}: {reason}" for name, reason in self.undefined.items()]
        return Table(
            f"SequenceComparison over {len(self.each)} sequences",
            ("precision", "recall", "F1", "mean SHD"),
            [numbers],
            [*notes, *([] if self.shift is None else [told_shift(self.shift, None)])],
        )


@dataclass(frozen=True, eq=False, repr=False)
class SequenceGraphs(Result):
    """The result of :func:`~causal_probe.probes.head_graphs` with ``per="sequence"``.

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
    """

    KIND = "graphs by sequence"
    WORKS = ("nichani2024",)

    candidates: tuple[Int[np.ndarray, "sequence _head query"], ...]
    weights: tuple[Float[np.ndarray, "sequence _head query"], ...]
    sinks: tuple[Float[np.ndarray, "sequence _head query"], ...]
    tokens: Int[np.ndarray, "sequence pos"]
    sink: str

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return len(self.tokens)

    @property
    def n_positions(self) -> int:
        """Number of positions of each sequence."""
        return int(self.tokens.shape[1])

    def parents(self, layer: Any, head: Any = None, *, threshold: float = 0.5) -> Int[np.ndarray, "sequence query"]:
        """The parent of each row of each sequence; -1 for a root.

        Parameters
        ----------
        layer, head
            A layer and a head, counted from 0; or the head alone, as ``"L1H2"`` or ``(1, 2)``. So in all methods.
        threshold
            What the candidate's weight must reach, in [0, 1].

        Raises
        ------
        CausalProbeError
            If there is no such head, or the threshold is not in [0, 1].
        """
        return self._decide(layer, head, threshold)[0]

    def graph(self, sequence: int, layer: Any, head: Any = None, *, threshold: float = 0.5) -> nx.DiGraph:
        """One head's graph on one sequence: edges parent -> child over positions, with the ``weight`` that decided.

        Raises
        ------
        CausalProbeError
            If there is no such sequence or head, or the threshold is not in [0, 1].
        """
        if not 0 <= sequence < self.n_sequences:
            raise CausalProbeError(f"There is no sequence {sequence}; there are {self.n_sequences}.")
        parents, weights = self._decide(layer, head, threshold)
        graph = nx.DiGraph()
        graph.add_nodes_from(range(self.n_positions))
        for child, (parent, weight) in enumerate(zip(parents[sequence], weights[sequence], strict=True)):
            if parent >= 0:
                graph.add_edge(int(parent), child, weight=float(weight))
        return graph

    def compare(
        self,
        truth: Template | nx.DiGraph,
        layer: Any,
        head: Any = None,
        *,
        threshold: float = 0.5,
        rows: str = "with-target",
        shift: int | None = None,
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
        shift
            Of a DAG: the edges into node i are read in row i - shift. The default follows from the model's task, as in
            :meth:`Evidence.compare <causal_probe.probes.evidence.Evidence.compare>`. With 1 an edge from node i - 1 is left out: a row's own position is no
            candidate. Of a template: None.

        Raises
        ------
        CausalProbeError
            If there is no such head, or an argument is out of range.
        """
        if rows not in ("with-target", "all"):
            raise CausalProbeError(f"rows is 'with-target' or 'all'; it is {rows!r}.")
        dag = not isinstance(truth, Template)
        if shift is not None and not dag:
            raise CausalProbeError("A template says of each row where it attends: `shift` is for a DAG over positions.")
        shift = check_shift(int(self.provenance.get("shift", 0)) if shift is None else shift) if dag else None
        template = from_graph(truth) if isinstance(truth, nx.DiGraph) else truth
        found = self.parents(layer, head, threshold=threshold)
        results = []
        for tokens, parents in zip(self.tokens, found, strict=True):
            true = template(torch.from_numpy(tokens)[None])[0].numpy()
            true = np.tril(np.roll(true, -1, 0) if shift else true, -1)
            children = np.flatnonzero(true.any(1)) if rows == "with-target" else np.arange(len(true))
            results.append(
                compare(
                    _graph_of(len(true), ((int(parent), child) for child, parent in enumerate(parents) if parent >= 0)),
                    _graph_of(len(true), ((int(parent), int(child)) for child, parent in np.argwhere(true))),
                    children=children.tolist(),
                )
            )
        return SequenceComparison(tuple(results), shift)

    def by_offset(self, layer: Any, head: Any = None, *, threshold: float = 0.5) -> Float[np.ndarray, " offset"]:
        """The share of rows whose parent is k positions back, for k = 0 ... positions - 1, in [0, 1].

        Of the rows that could: row i has a position k back if i >= k, and k = 0 is no parent.
        """
        parents = self.parents(layer, head, threshold=threshold)
        _, child = (parents >= 0).nonzero()
        counts = np.bincount(child - parents[parents >= 0], minlength=self.n_positions)
        return np.asarray(counts / (self.n_sequences * np.arange(self.n_positions, 0, -1)))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The graph of an attention head of {self.provenance['model']} was read from its attention pattern on each of "
            f"{self.n_sequences} sequences of {self.n_positions} tokens: a position's candidate parent is the earlier position, other "
            f"than the first, with the largest attention; the attention sink was read by the rule {self.sink!r}, and a position "
            f"is a root unless the candidate reaches a threshold ({self.measured_with})."
        )

    def table(self) -> Table:
        """By head: the share of rows with a parent, the mean attention on position 0, and the commonest offset."""
        rows = []
        for layer, weights in enumerate(self.weights):
            for head in range(weights.shape[1]):
                offsets = self.by_offset(layer, head)
                sink = float(self.sinks[layer][:, head, 1:].mean()) if self.n_positions > 1 else 1.0
                commonest = int(offsets.argmax()) if offsets.any() else None
                rows.append((f"L{layer}H{head}", float((self.parents(layer, head) >= 0).mean()), sink, commonest))
        return Table(
            f"SequenceGraphs of {self.provenance['model']}: one for each of {self.n_sequences:,} sequences of {self.n_positions} "
            f"positions, sink={self.sink!r}",
            ("head", "edges", "sink", "offset"),
            rows,
            [
                "edges: share of rows with a parent; sink: mean attention on position 0; offset: the commonest, in positions back"
            ],
        )

    def _decide(
        self, layer: Any, head: Any, threshold: float
    ) -> tuple[Int[np.ndarray, "sequence query"], Float[np.ndarray, "sequence query"]]:
        """The parent of each row, -1 for a root, and the weight that was held against the threshold."""
        layer, head = find_head({number: its.shape[1] for number, its in enumerate(self.weights)}, layer, head)
        if not 0 <= threshold <= 1:
            raise CausalProbeError(f"The threshold is a share of a row's attention, from 0 to 1; it is {threshold!r}.")
        candidates, weights, sinks = (
            of[layer][:, head].astype(kind)
            for of, kind in ((self.candidates, int), (self.weights, float), (self.sinks, float))
        )
        row = np.arange(self.n_positions)
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


class LargestParents(Rows):
    """Of every row of every sequence, what :func:`largest_parents` finds."""

    def start(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Keep the tokens."""
        self.of_batch = {"tokens": tokens.cpu().numpy()}

    def reduce(self, layer: int, *values: Float[Tensor, "batch head query key"]) -> dict[str, np.ndarray]:
        """The candidates, their attention, and that on position 0, [sequence, head, query]."""
        (pattern,) = values
        found = zip(("candidates", "weights", "sinks"), largest_parents(pattern), strict=True)
        return {name: its.cpu().numpy() for name, its in found}

    def graphs(self, sink: Literal["exclude", "root", "keep"], provenance: Mapping[str, Any]) -> SequenceGraphs:
        """The graphs of all sequences that have passed."""
        arrays = self.arrays()
        layers = sorted(name[1] for name in arrays if name[0] == "sinks")
        candidates, weights, sinks = (
            tuple(arrays[name, layer] for layer in layers) for name in ("candidates", "weights", "sinks")
        )
        return SequenceGraphs(candidates, weights, sinks, arrays["tokens"], sink, provenance=provenance)


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
