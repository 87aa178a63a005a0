"""The result of :func:`graph_from_sequences`: what was claimed, at which level, and what can't be known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import networkx as nx

from causal_probe.discovery.sequences.counts import ROOT
from causal_probe.discovery.sequences.models import Gain
from causal_probe.discovery.sequences.swaps import SwapTest
from causal_probe.discovery.sequences.verdicts import Assumption, Node
from causal_probe.graphs import write_graph
from causal_probe.results import Result, Table

__all__ = ["READ_AS", "Beside", "SequenceGraph"]

#: Rows of the table, and members of a confidence set, that are shown.
SHOWN_ROWS = 64
SHOWN_SET = 6
READ_AS = (
    "A dependence forest, read causally under four assumptions: columns stand in causal order; a column has at most one parent; all edges of a "
    "sequence share one transition matrix; no column has a hidden common cause with another. The data can reject some of this, and confirm none of it: for "
    "reversible matrices (any with two states) an edge and its reverse have the same law, and a hidden column between two others looks like an edge."
)


@dataclass(frozen=True)
class Beside:
    """Where a model attends on the same sequences.

    Attributes
    ----------
    name
        Which model and head.
    parents
        The earlier column that each column attends to most, -1 for column 0 and for one that was held out. Attention names one whether there is a parent or not.
    agrees, of
        How many of the claimed edges it leads along.
    """

    name: str
    parents: tuple[int, ...]
    agrees: int
    of: int


@dataclass(frozen=True, eq=False, repr=False)
class SequenceGraph(Result):
    """The causal graph of sequences, as far as they tell.

    Attributes
    ----------
    structure
        ``"in-context"``, ``"fixed"``, ``"both"`` or ``"none"``.
    nodes
        One verdict for each column.
    candidates
        The best forest's parents, -1 for roots; a candidate is no claim.
    fixed_tree
        The tree of the largest mutual information over all sequences, as pairs; empty unless fixed dependence was found. It has no direction.
    in_context_test, fixed_test
        Dependence beyond sequence and column effects, along the candidate graph and along ``fixed_tree`` (found on other sequences).
    gains
        Held-out gains of the models, nats per sequence.
    assumptions
        Which were tested, and rejected.
    concentration, score
        Of the best forest: A, and the mean log Bayes factor against no edges in nats per sequence.
    reached, tried
        How many searches ended in the best forest, of how many.
    level
        Probability of any wrong claim.
    beside
        Models that were put beside the graph.
    """

    KIND = "sequence graph"
    RESULT: ClassVar[str] = "result.json"
    WORKS = ("nichani2024", "heckerman1995", "chow1968", "besag1989")
    DERIVED = ("edges", "roots", "undecided", "not_identifiable", "read_as")

    structure: str
    nodes: Mapping[int, Node]
    candidates: tuple[int, ...]
    fixed_tree: tuple[tuple[int, int], ...]
    in_context_test: SwapTest
    fixed_test: SwapTest
    gains: Mapping[str, Gain]
    assumptions: tuple[Assumption, ...]
    concentration: float | None
    score: float
    reached: int
    tried: int
    level: float
    n_sequences: int
    d_vocab: int
    notes: tuple[str, ...]
    beside: tuple[Beside, ...] = ()

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Claimed edges, parent before child."""
        return tuple(
            (node.candidate, column)
            for column, node in self.nodes.items()
            if node.verdict == "edge" and node.candidate is not None
        )

    @property
    def roots(self) -> tuple[int, ...]:
        """Columns that are claimed to have no parent among the columns."""
        return self._columns("root")

    @property
    def undecided(self) -> tuple[int, ...]:
        """Columns of which nothing is claimed."""
        return self._columns("undecided")

    @property
    def not_identifiable(self) -> tuple[int, ...]:
        """Columns of which no number of sequences would tell."""
        return self._columns("not identifiable")

    @property
    def read_as(self) -> str:
        """Under which assumptions the edges are causal."""
        return READ_AS

    @property
    def graph(self) -> nx.DiGraph:
        """The claimed edges over all columns."""
        return self._over_columns(self.edges)

    @property
    def candidate_graph(self) -> nx.DiGraph:
        """The best forest: every column's candidate, claimed or not."""
        return self._over_columns((parent, child) for child, parent in enumerate(self.candidates) if parent != ROOT)

    @property
    def skeleton(self) -> nx.Graph:
        """The claimed edges without direction."""
        return self.graph.to_undirected()

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        asked = "".join(
            f", {name}={self.settings[name]!r}"
            for name in ("level", "seed", "train", "beside")
            if self.settings.get(name)
        )
        if "data" in self.settings:
            return (
                f"from causal_probe import experiments\n\nexperiments.graph_from_file({self.settings['data']!r}{asked})"
            )
        return f"from causal_probe import discovery\n\ndiscovery.graph_from_sequences(tokens{asked})"

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"A causal forest over {len(self.nodes)} columns was learnt from {self.n_sequences:,} token sequences by the Dirichlet-multinomial score of "
            "transitions that are new in each sequence and shared by its edges; dependence was tested against redraws that keep the token counts of "
            f"sequences and columns, and each column's parent against all others, at a familywise level of {self.level:g} ({self.measured_with})."
        )

    def table(self) -> Table:
        """One row a column: verdict with its level, candidate, what can't be excluded, reason."""
        rows = [
            (
                column,
                self.shown(column),
                None if node.candidate is None else node.candidate,
                ", ".join("root" if each == ROOT else str(each) for each in node.confidence_set[:SHOWN_SET])
                + (f" and {len(node.confidence_set) - SHOWN_SET} more" * (len(node.confidence_set) > SHOWN_SET)),
                node.reason,
            )
            for column, node in self.nodes.items()
        ]
        title = (
            f"Structure in {self.n_sequences:,} sequences of {len(self.nodes)} columns: {self.structure} (level {self.level:g}); "
            f"edges {len(self.edges)}, roots {len(self.roots)}, undecided {len(self.undecided)}, not identifiable {len(self.not_identifiable)}"
        )
        columns = ("column", "verdict", "candidate", "not excluded", "reason")
        return Table(title, columns, rows, [*self.notes, *map(_said_of, self.beside), READ_AS], shown=SHOWN_ROWS)

    def shown(self, column: int) -> str:
        """A column's verdict in words."""
        verdict = self.nodes[column].verdict
        if column == 0 and verdict == "root":
            return "root (no column before it)"
        return f"{verdict} (level {self.level:g})" if verdict in ("edge", "root") else verdict

    def write_data(self, folder: Path) -> None:
        """Write ``recovered.json``, the claimed edges, and ``candidates.json``, the best forest, beside the JSON."""
        write_graph(self.graph, folder / "recovered.json")
        write_graph(self.candidate_graph, folder / "candidates.json")

    def graph_of(self, beside: Beside) -> nx.DiGraph:
        """Where a model attends, over the columns of which an edge was claimed: attention has a largest entry also where there is no parent."""
        claimed = {child for _, child in self.edges}
        pairs = ((parent, child) for child, parent in enumerate(beside.parents) if parent != ROOT and child in claimed)
        return self._over_columns(pairs)

    def _over_columns(self, edges: Iterable[tuple[int, int]]) -> nx.DiGraph:
        graph = nx.DiGraph()
        graph.add_nodes_from(self.nodes)
        graph.add_edges_from(edges)
        return graph

    def _columns(self, verdict: str) -> tuple[int, ...]:
        return tuple(column for column, node in self.nodes.items() if node.verdict == verdict)


def _said_of(beside: Beside) -> str:
    return f"Beside it, {beside.name}: attention leads along {beside.agrees} of {beside.of} claimed edges."
