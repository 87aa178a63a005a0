"""What causal discovery found: one mixed graph for each head, and everything that decided it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import pandas as pd

from causal_probe.discovery.independence import OrderCount
from causal_probe.discovery.search import Evidence, Learned
from causal_probe.errors import CausalProbeError
from causal_probe.graphs import GraphComparison, compare
from causal_probe.graphs.mixed import mixed_edges, show_mixed_edge
from causal_probe.probes.attention_correlation import Correlation
from causal_probe.results import Citation, cite, html_table, to_jsonable, write_json

__all__ = ["AttentionGraph", "Discovery"]

KINDS = ("-->", "<->", "o->", "o-o", "---", "o--")
#: A repr shows this many graphs at most.
SHOWN = 24


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
        For each pair (i < j): the test that agreed best with independence. Removed if its p exceeds alpha. None where each test was
        undefined.
    by_order
        Number of tests, and what they can tell, by size of the conditioning set.
    stopped
        The order before which the search ended for want of tests; None if it ran to its end.
    correlation
        What was tested.
    notes
        What a reader has to know: singular matrices, orders without power, a search that stopped.
    """

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
    def of(
        cls, layer: int, head: int | None, correlation: Correlation, learned: Learned, *, alpha: float
    ) -> AttentionGraph:
        """What a learner found, with its notes."""
        graph = learned.marks.to_networkx()
        for u, v in graph.edges:
            found = learned.evidence.get((min(u, v), max(u, v)))
            graph.edges[u, v]["p"] = None if found is None else found.p
        return cls(
            layer,
            head,
            graph,
            learned.separating,
            learned.evidence,
            learned.by_order,
            learned.stopped,
            correlation,
            tuple(_notes(correlation, learned)),
        )

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
class Discovery:
    """What :func:`~causal_probe.probes.discover_from_attention` found on one input.

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
    provenance
        The model's name, dtype and device, and the versions of the packages.
    """

    texts: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    graphs: tuple[AttentionGraph, ...]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The text of each node."""
        return tuple("".join(self.texts[position] for position in group) for group in self.groups)

    def of(self, head: int | None) -> AttentionGraph:
        """The graph of a head, or of the mean (None).

        Raises
        ------
        CausalProbeError
            If it is not among those that were asked for.
        """
        for each in self.graphs:
            if each.head == head:
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

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON types; edges as ``[u, v, mark at u, mark at v, p]``."""
        return dict(
            to_jsonable(
                {
                    "texts": self.texts,
                    "nodes": self.nodes,
                    "groups": self.groups,
                    "graphs": [_plain(each) for each in self.graphs],
                    "settings": self.settings,
                    "provenance": self.provenance,
                }
            )
        )

    def save(self, path: Any) -> None:
        """Write :meth:`to_dict` to a JSON file, whole or not at all."""
        write_json(path, self.to_dict())

    def cite(self) -> Citation:
        """The papers, and one sentence for a methods section."""
        s = self.settings
        keys = {"icd": ["rohekar2021"], "ordered-icd": ["rohekar2021", "rohekar2024"]}.get(s["algorithm"], [])
        return cite(
            "rohekar2023",
            *keys,
            methods=(
                f"The attention of layer {s['layer']} on one input of {len(self.texts)} tokens was read as a structural equation model "
                f"(ABCD), and a graph learned for each head from {_from(s)} by "
                f"{s['algorithm']} with Fisher's z-test (alpha {s['alpha']}, {s['samples']} samples)."
            ),
        )

    def _title(self) -> str:
        s = self.settings
        n, nodes = len(self.graphs), len(self.groups)
        return (
            f"Discovery on {self.provenance['model']}: layer {s['layer']}, {n} graph{'s' * (n != 1)} over {nodes} "
            f"node{'s' * (nodes != 1)}, {s['algorithm']} at alpha {s['alpha']} with {s['samples']} samples"
        )

    def _notes(self) -> list[str]:
        n = len(self.graphs)
        notes = Counter(note for each in self.graphs for note in each.notes)
        more = [f"and {n - SHOWN} more"] if n > SHOWN else []
        return more + [f"{note}{'' if n == 1 else f' ({count} of {n} graphs)'}" for note, count in notes.items()]

    def __repr__(self) -> str:
        lines = [self._title()]
        kinds = [kind for kind in KINDS if kind in KINDS[:4] or any(g.kinds()[kind] for g in self.graphs)]
        lines.append("  graph  edges" + "".join(f"  {kind}" for kind in kinds) + "  tests  undefined")
        for each in self.graphs[:SHOWN]:
            counts = each.kinds()
            undefined = sum(count.undefined for count in each.by_order)
            cells = "".join(f"  {counts[kind]:3}" for kind in kinds)
            lines.append(f"  {each.name:<5}  {sum(counts.values()):5}{cells}  {each.tests:5}  {undefined:9}")
        return "\n".join([*lines, *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        kinds = [kind for kind in KINDS if kind in KINDS[:4] or any(g.kinds()[kind] for g in self.graphs)]
        rows = [
            (
                each.name,
                sum(each.kinds().values()),
                *(each.kinds()[kind] for kind in kinds),
                each.tests,
                sum(count.undefined for count in each.by_order),
            )
            for each in self.graphs[:SHOWN]
        ]
        columns = ["graph", "edges", *kinds, "tests", "undefined"]
        return html_table(columns, rows, caption=self._title(), notes=self._notes())


def _from(settings: Mapping[str, Any]) -> str:
    """What the correlations come from, in words."""
    if settings["source"] != "attention":
        return "its outputs"
    r = settings["residual"]
    return f"A A^T with A the attention and {r:g} of each token's own value" if r else "A A^T"


def _kind(graph: nx.DiGraph, u: int, v: int) -> str:
    """The signs of an edge, the smaller of both ways to write it."""
    one = show_mixed_edge(graph, u, v).split(" ")[1]
    other = show_mixed_edge(graph, v, u).split(" ")[1]
    return one if one in KINDS else other


def _plain(each: AttentionGraph) -> dict[str, Any]:
    edges = [
        (u, v, each.graph.edges[v, u]["mark"], each.graph.edges[u, v]["mark"], each.graph.edges[u, v]["p"])
        for u, v in mixed_edges(each.graph)
    ]
    return {
        "layer": each.layer,
        "head": each.head,
        "edges": edges,
        "removed": [
            {"pair": pair, "given": given, "p": each.evidence[pair].p}
            for pair, given in sorted(each.separating.items())
        ],
        "tests": each.by_order,
        "stopped": each.stopped,
        "condition": each.correlation.condition,
        "rank": each.correlation.rank,
        "notes": each.notes,
    }


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
