"""What :func:`graph_from_sequences` returns: what was claimed, at which level, and what can't be known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from causal_probe.discovery.sequences.counts import ROOT
from causal_probe.discovery.sequences.models import Gain
from causal_probe.discovery.sequences.swaps import SwapTest
from causal_probe.discovery.sequences.verdicts import Assumption, Node

__all__ = ["READ_AS", "SequenceGraph"]

READ_AS = (
    "A dependence forest, read causally under four assumptions: columns stand in causal order; a column has at most one parent; all edges of a "
    "sequence share one transition matrix; no column has a hidden common cause with another. The data can reject some of this, and confirm none of it: for "
    "reversible matrices (any with two states) an edge and its reverse have the same law, and a hidden column between two others looks like an edge."
)


@dataclass(frozen=True)
class SequenceGraph:
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
    """

    structure: str
    nodes: tuple[Node, ...]
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
    settings: Mapping[str, Any]

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Claimed edges, parent before child."""
        return tuple(
            (node.candidate, node.column)
            for node in self.nodes
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
    def graph(self) -> nx.DiGraph:
        """The claimed edges over all columns."""
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.nodes)))
        graph.add_edges_from(self.edges)
        return graph

    @property
    def skeleton(self) -> nx.Graph:
        """The claimed edges without direction."""
        return self.graph.to_undirected()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "structure": self.structure,
            "edges": [list(edge) for edge in self.edges],
            "roots": list(self.roots),
            "undecided": list(self.undecided),
            "not_identifiable": list(self.not_identifiable),
            "level": self.level,
            "nodes": {
                str(node.column): {
                    "verdict": node.verdict,
                    "candidate": node.candidate,
                    "p_value": node.p_value,
                    "closest_rival": "root" if node.closest_rival == ROOT else node.closest_rival,
                    "confidence_set": ["root" if item == ROOT else item for item in node.confidence_set],
                    "reason": node.reason,
                }
                for node in self.nodes
            },
            "fixed_tree": [list(edge) for edge in self.fixed_tree],
            "tests": {"in_context": vars(self.in_context_test), "fixed": vars(self.fixed_test)},
            "gains": {name: vars(gain) for name, gain in self.gains.items()},
            "assumptions": [vars(assumption) for assumption in self.assumptions],
            "concentration": self.concentration,
            "score": self.score,
            "reached": self.reached,
            "tried": self.tried,
            "n_sequences": self.n_sequences,
            "d_vocab": self.d_vocab,
            "notes": list(self.notes),
            "read_as": READ_AS,
            "settings": dict(self.settings),
        }

    def rows(self) -> list[tuple[int, str, str, str]]:
        """One row a column: column, verdict with its level, candidate, reason."""
        shown = {"edge": f"edge (level {self.level:g})", "root": f"root (level {self.level:g})"}
        return [
            (
                node.column,
                "root (no column before it)"
                if node.column == 0 and node.verdict == "root"
                else shown.get(node.verdict, node.verdict),
                "-" if node.candidate is None else str(node.candidate),
                node.reason,
            )
            for node in self.nodes
        ]

    def __repr__(self) -> str:
        lines = [
            f"Structure in {self.n_sequences:,} sequences of {len(self.nodes)} columns: {self.structure} (level {self.level:g}); "
            f"{len(self.edges)} edges, {len(self.roots)} roots, {len(self.undecided)} undecided, {len(self.not_identifiable)} not identifiable",
            f"  {'column':>6}  {'verdict':<28}  {'candidate':<9}  reason",
            *(
                f"  {column:>6}  {verdict:<28}  {candidate:<9}  {reason}".rstrip()
                for column, verdict, candidate, reason in self.rows()
            ),
            *(f"  {note}" for note in self.notes),
            f"  {READ_AS}",
        ]
        return "\n".join(lines)

    def _columns(self, verdict: str) -> tuple[int, ...]:
        return tuple(node.column for node in self.nodes if node.verdict == verdict)
