"""The result of causal discovery: one mixed graph for each head, and everything that decided it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from causal_probe.discovery.independence import OrderCount
from causal_probe.discovery.search import Evidence, Learned
from causal_probe.errors import CausalProbeError
from causal_probe.graphs import GraphComparison, compare
from causal_probe.graphs.mixed import mixed_edges, show_mixed_edge
from causal_probe.probes.attention_correlation import Correlation
from causal_probe.results import Result, Table
from causal_probe.results.lazy import pandas as pd

__all__ = ["AttentionGraph", "Discovery"]

KINDS = ("-->", "<->", "o->", "o-o", "---", "o--")


@dataclass(frozen=True, eq=False)
class AttentionGraph:
    """The graph of one head.

    Attributes
    ----------
    layer, head
        Which head; ``head`` is None for the mean of all.
    graph
        A mixed graph over the nodes (:mod:`causal_probe.graphs.mixed`): both arcs of each edge, ``mark`` the mark at its head, ``p``
        the largest p-value of the pair's tests.
    separating
        For each pair (i < j) without an edge: the set given which it was found independent. Empty for FCI.
    evidence
        For each pair (i < j): the test that agreed best with independence. Removed if its p exceeds the level. None where each test was
        undefined.
    by_order
        Number of tests, and what they can tell, by size of the conditioning set.
    stopped
        The order before which the search ended for want of tests; None if it ran to its end.
    correlation
        What was tested.
    notes
        Warnings: singular matrices, orders without power, a search that stopped.
    """

    DERIVED = ("name", "tests")

    layer: int
    head: int | None
    graph: nx.DiGraph
    separating: Mapping[tuple[int, int], tuple[int, ...]]
    evidence: Mapping[tuple[int, int], Evidence]
    by_order: tuple[OrderCount, ...]
    stopped: int | None
    correlation: Correlation
    notes: tuple[str, ...]

    @classmethod
    def of(cls, layer: int, head: int | None, correlation: Correlation, learned: Learned) -> AttentionGraph:
        """A learner's result, with its notes."""
        graph = learned.marks.to_networkx()
        for u, v in graph.edges:
            found = learned.evidence.get((min(u, v), max(u, v)))
            graph.edges[u, v]["p"] = None if found is None else found.p
        kept = (learned.separating, learned.evidence, learned.by_order, learned.stopped)
        return cls(layer, head, graph, *kept, correlation, tuple(_notes(correlation, learned)))

    @property
    def name(self) -> str:
        """Such as ``"L5H3"``, or ``"L5"`` for the mean of its heads."""
        return f"L{self.layer}" + ("" if self.head is None else f"H{self.head}")

    @property
    def tests(self) -> int:
        """How many different tests were computed."""
        return sum(count.tests for count in self.by_order)

    def kinds(self) -> Counter[str]:
        """How many edges of each kind there are: ``-->``, ``<->``, ``o->``, ``o-o``, ``---``, ``o--``."""
        return Counter(_kind(self.graph, u, v) for u, v in mixed_edges(self.graph))

    def compare(self, truth: nx.DiGraph, *, mode: Any = "skeleton") -> GraphComparison:
        """How far the graph is from a known one: :func:`causal_probe.graphs.compare` of skeletons or arrowheads."""
        return compare(self.graph, truth, mode=mode)


@dataclass(frozen=True, eq=False, repr=False)
class Discovery(Result):
    """The result of :func:`~causal_probe.probes.discover_from_attention` on one input.

    Attributes
    ----------
    texts
        The tokens as texts.
    groups
        Which positions each node stands for.
    graphs
        One for each head.
    settings
        All that was asked for, and the tokens.
    """

    KIND = "discovery"
    DERIVED = ("nodes",)

    texts: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    graphs: tuple[AttentionGraph, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The text of each node."""
        return tuple("".join(self.texts[position] for position in group) for group in self.groups)

    def of(self, head: int | str | None) -> AttentionGraph:
        """The graph of a head, by its number or its name (``"L5H3"``), or of the mean (None).

        Raises
        ------
        CausalProbeError
            If it is not among those that were asked for.
        """
        for each in self.graphs:
            if head in (each.head, each.name):
                return each
        raise CausalProbeError(
            f"There is no graph of head {head!r} here; there are {', '.join(g.name for g in self.graphs)}."
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row for each pair of nodes and head: the edge (None where there is none), p-value and conditioning set."""
        rows = []
        for each in self.graphs:
            for (u, v), found in sorted(each.evidence.items()):
                edge = show_mixed_edge(each.graph, u, v) if each.graph.has_edge(u, v) else None
                rows.append((each.layer, each.head, u, v, edge, found.p, found.given))
        return pd.DataFrame(rows, columns=["layer", "head", "u", "v", "edge", "p", "given"])

    @property
    def works(self) -> tuple[str, ...]:
        """The method, and the learner."""
        learners = {"icd": ("rohekar2021",), "ordered-icd": ("rohekar2021", "rohekar2024")}
        return ("rohekar2023", *learners.get(self.settings["algorithm"], ()))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        s = self.settings
        return (
            f"The attention of layer {s['layer']} on one input of {len(self.texts)} tokens was read as a structural equation model "
            f"(ABCD), and a graph learned for each head from {_from(s)} by {s['algorithm']} with Fisher's z-test (level {s['level']}, "
            f"{s['samples']} samples; {self.measured_with})."
        )

    def table(self) -> Table:
        """One row for each graph: its edges by kind, and its tests."""
        s, n, nodes = self.settings, len(self.graphs), len(self.groups)
        counts = [each.kinds() for each in self.graphs]
        kinds = [kind for kind in KINDS if kind in KINDS[:4] or any(count[kind] for count in counts)]
        notes = Counter(note for each in self.graphs for note in each.notes)
        return Table(
            f"Discovery on {self.provenance['model']}: layer {s['layer']}, {n} graph{'s' * (n != 1)} over {nodes} "
            f"node{'s' * (nodes != 1)}, {s['algorithm']} at level {s['level']} with {s['samples']} samples",
            ("graph", "edges", *kinds, "tests", "undefined"),
            [
                (
                    each.name,
                    sum(count.values()),
                    *(count[kind] for kind in kinds),
                    each.tests,
                    sum(order.undefined for order in each.by_order),
                )
                for each, count in zip(self.graphs, counts, strict=True)
            ],
            [f"{note}{'' if n == 1 else f' ({count} of {n} graphs)'}" for note, count in notes.items()],
        )


def _from(settings: Mapping[str, Any]) -> str:
    """The source of the correlations, in words."""
    if settings["source"] != "attention":
        return "its outputs"
    r = settings["residual"]
    return f"A A^T with A the attention and {r:g} of each token's own value" if r else "A A^T"


def _kind(graph: nx.DiGraph, u: int, v: int) -> str:
    """The signs of an edge, the smaller of both ways to write it."""
    one = show_mixed_edge(graph, u, v).split(" ")[1]
    other = show_mixed_edge(graph, v, u).split(" ")[1]
    return one if one in KINDS else other


def _notes(correlation: Correlation, learned: Learned) -> list[str]:
    n = len(correlation.matrix)
    notes = []
    if correlation.rank < n:
        notes.append(
            f"The correlation matrix has rank {correlation.rank} of {n} to working precision: tests on larger conditioning sets are "
            "undefined and remove nothing."
        )
    for count in learned.by_order:
        if (why := count.powerless) is not None:
            notes.append(f"Conditioning sets of size {count.order} have no power: {why}.")
    if learned.stopped is not None:
        notes.append(
            f"The search ended before conditioning sets of size {learned.stopped}, which would have needed more tests than max_tests."
        )
    return notes
