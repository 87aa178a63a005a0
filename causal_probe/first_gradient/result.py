"""A causal graph, read from one gradient."""

from __future__ import annotations

import dataclasses
from typing import Literal

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Float

from causal_probe import graphs
from causal_probe.graphs import GraphComparison
from causal_probe.results import Result, Table
from causal_probe.tasks.root_test import surprise

__all__ = ["GradientGraph", "Status"]

Status = Literal["edges", "no edges", "insufficient", "undecided"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GradientGraph(Result):
    """The graph that :func:`gradient_graph` found, and the evidence for it.

    Attributes
    ----------
    evidence : NDArray, [child, parent]
        Minus the mean gradient of the loss with respect to layer 0's pattern, times S T / beta: an estimate of g_ij (see
        :mod:`causal_probe.tasks.information`) that is unbiased for long sequences and small beta; 0 where the parent comes after the
        child. Within a row, differences are those of the gradient with respect to the scores A1, times
        S T (child + 1) / beta.
    stderr : NDArray, [child, parent], or None
        Its standard error, from the gradients of 16 to 32 blocks of sequences. None where there is one block.
    candidates : tuple, by child
        The earlier node with the largest evidence; None for node 0.
    margin, margin_stderr : tuple, by child
        Largest minus second-largest evidence among earlier nodes, and the standard error of that difference; None for nodes 0 and 1,
        which have no two earlier nodes.
    log_e_values : NDArray, by child, or None
        Evidence against "this node is a root", in nats: the log of an e-value (:mod:`causal_probe.tasks.root_test`), at most
        log(1 / p) with probability 1 - p if it is a root. None where transitions are not known.
    log_e_rivals : NDArray, [child, rival], or None
        In the same way, evidence against "this earlier node is the parent of the child". With probability 1 - ``level`` the truth about
        no node, root or parent, has evidence above :attr:`limit` against it, however long one looks.
    edge_value : float or None
        What ``evidence`` would be at a parent: the exact chi-square information of an edge, averaged over the sequences' transitions.
    edge_evidence, root_evidence : float or None
        What ``log_e_values`` would be on average at a node with a parent, and ``log_e_rivals`` at a root, from the same transitions.
    gradient_limits : NDArray, by child, or None
        What none of the child's entries would exceed if all were 0 in expectation, at ``level`` over all children: Student's quantile
        times the largest standard error in the row; 0 for node 0.
    n_sequences
        How many were seen.
    stable_after
        From this number of sequences on the graph did not change any more (looked at after every 16th to 32nd part).
    settings
        Shape of the task, beta, level, and whether transitions were known.
    """

    KIND = "gradient graph"
    WORKS = ("nichani2024",)
    DERIVED = ("status", "decided", "nodes", "edges", "left", "limit", "detection_limit")

    evidence: Float[np.ndarray, "_child _parent"]
    stderr: Float[np.ndarray, "_child _parent"] | None
    candidates: tuple[int | None, ...]
    margin: tuple[float | None, ...]
    margin_stderr: tuple[float | None, ...]
    log_e_values: Float[np.ndarray, " _child"] | None
    log_e_rivals: Float[np.ndarray, "_child _rival"] | None
    edge_value: float | None
    edge_evidence: float | None
    root_evidence: float | None
    gradient_limits: Float[np.ndarray, " _child"] | None
    n_sequences: int
    stable_after: int

    @property
    def nodes(self) -> int:
        """How many there are."""
        return len(self.candidates)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Of :attr:`graph`, as (parent, child)."""
        return tuple(self.graph.edges)

    @property
    def decided(self) -> bool:
        """Whether it was decided which nodes have a parent at all: only where the transitions were known."""
        return self.log_e_values is not None

    @property
    def limit(self) -> float:
        """The nats beyond which "it is a root", or a rival, is given up: log(nodes after node 0 / level)."""
        return surprise(self.settings["level"], len(self.evidence) - 1)

    @property
    def left(self) -> tuple[tuple[int | None, ...], ...] | None:
        """By node: the hypotheses that were not rejected, "root" (None) or "child of this earlier node".

        A confidence set for each node: with probability 1 - ``level`` all of them hold the truth. None where nothing was decided.
        """
        if self.log_e_values is None or self.log_e_rivals is None:
            return None
        return tuple(
            (
                *([None] if root <= self.limit else []),
                *(rival for rival in range(child) if self.log_e_rivals[child, rival] <= self.limit),
            )
            for child, root in enumerate(self.log_e_values.tolist())
        )

    @property
    def parents(self) -> tuple[int | None, ...]:
        """The parent of every node that was shown to have it: the candidate, where it is all that is :attr:`left`; else None.

        The candidates where nothing was decided.
        """
        if (left := self.left) is None:
            return self.candidates
        return tuple(
            candidate if may_be == (candidate,) else None
            for candidate, may_be in zip(self.candidates, left, strict=True)
        )

    @property
    def graph(self) -> nx.DiGraph:
        """The edges parent -> child with their evidence: the decided ones, or every candidate where nothing was decided."""
        found = graphs.from_parents(self.parents)
        for parent, child, data in found.edges(data=True):
            data["evidence"] = float(self.evidence[child, parent])
            data["margin"] = self.margin[child]
            if self.log_e_values is not None:
                data["log_e_value"] = float(self.log_e_values[child])
        return found

    @property
    def detection_limits(self) -> Float[np.ndarray, " _child"] | None:
        """By child, the smallest edge value that these sequences can show: the larger of what the gradient needs and what the tests need.

        The tests' is the edge value, scaled by the nats needed over the nats expected, of an edge or of a root, whichever are fewer.
        None where it is unknown.
        """
        if self.edge_value is None or self.edge_evidence is None or self.gradient_limits is None:
            return None
        expected, least = min(self.edge_evidence, self.root_evidence or 0.0), np.inf
        if self.edge_value:
            least = self.edge_value * self.limit / expected if expected > 0 else 2 * self.edge_value
        elif expected > 0:
            least = 0.0
        limits: Float[np.ndarray, " _child"] = np.maximum(self.gradient_limits, least)
        return limits

    @property
    def detection_limit(self) -> float | None:
        """The smallest edge value that these sequences can show at every node: the largest of :attr:`detection_limits`; None without one."""
        limits = self.detection_limits
        return None if limits is None or not np.isfinite(limits).all() else float(limits.max())

    @property
    def status(self) -> Status:
        """The decisions, node by node.

        ``"edges"``; ``"no edges"``: every node was shown to be a root, by giving up every earlier node; ``"insufficient"``: some node is not
        decided. Either it may be a root as well as a child, as where the value of an edge by the task's exact information
        lies below its detection limit at this number of sequences; or it was shown to be a child, but not whose. Edges that are shown
        are shown all the same. ``"undecided"``: the transitions are not known, every node has a candidate, and which of them are parents is not
        decided.
        """
        if not self.decided:
            return "undecided"
        if self.undecided:
            return "insufficient"
        return "edges" if any(parent is not None for parent in self.parents) else "no edges"

    @property
    def undecided(self) -> tuple[int, ...]:
        """The nodes after node 0 of which it is not decided whether they have a parent, or which."""
        nodes = range(1, len(self.candidates))
        return tuple(child for child in nodes if self._decision(child) not in ("edge", "root"))

    def compare(self, truth: nx.DiGraph) -> GraphComparison:
        """:func:`causal_probe.graphs.compare` of :attr:`graph` with the truth, ranked by the evidence."""
        return graphs.compare(self.graph, truth, weights=np.tril(self.evidence, -1))

    def to_pandas(self) -> pd.DataFrame:
        """One row per node after node 0."""
        nodes = range(1, len(self.candidates))
        log_e = self.log_e_values
        at = [(child, self.candidates[child] or 0) for child in nodes]
        return pd.DataFrame(
            {
                "child": list(nodes),
                "candidate": [self.candidates[child] for child in nodes],
                "evidence": [float(self.evidence[pair]) for pair in at],
                "stderr": [None if self.stderr is None else float(self.stderr[pair]) for pair in at],
                "margin": [self.margin[child] for child in nodes],
                "margin_stderr": [self.margin_stderr[child] for child in nodes],
                "log_e_value": [None if log_e is None else float(log_e[child]) for child in nodes],
                "left": [self._left(child) for child in nodes],
                "decision": [self._decision(child) for child in nodes],
            }
        )

    def _left(self, child: int) -> str | None:
        """The possible parents of the node, in words; None if nothing was decided."""
        left = self.left
        return None if left is None else ", ".join("root" if its is None else str(its) for its in left[child])

    def _decision(self, child: int) -> str:
        """``edge``; ``root``; ``child``: no root, but several nodes may be its parent; ``not shown``: it may be either."""
        if (left := self.left) is None:
            return "undecided"
        if left[child] == (None,):
            return "root"
        if self.parents[child] is not None:
            return "edge"
        return "not shown" if None in left[child] else "child"

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        decision = (
            "an edge is claimed where products of bets on that parent against the node's being a root, and against each other earlier node's being its "
            f"parent, exceed {1 / self.settings['level']:g} times the number of nodes (e-values; Ville's inequality)"
            if self.decided
            else "whether a node has a parent was not decided"
        )
        return (
            f"The causal graph was read from one gradient of the reduced transformer of Nichani et al. (2024) at A1 = 0, A2 = {self.settings['beta']:g} I, "
            f"over {self.n_sequences:,} sequences: the parent of a position is the earlier one with the largest entry of minus the gradient with respect to "
            f"layer 0's pattern; {decision} ({self.measured_with})."
        )

    def table(self) -> Table:
        """One row per node after node 0."""
        rows = self.to_pandas()
        return Table(
            self._title(), tuple(rows.columns), rows.astype(object).where(rows.notna(), None).to_numpy().tolist()
        )

    def _title(self) -> str:
        edges = self.graph.number_of_edges()
        found = {
            "edges": f"{edges} edges",
            "no edges": "no edges",
            "insufficient": f"insufficient: {edges} edges shown, {len(self.undecided)} nodes not decided by {self.n_sequences:,} sequences",
            "undecided": f"{edges} candidate parents; transitions unknown, so roots are not decided",
        }[self.status]
        return (
            f"Gradient graph over {len(self.candidates)} nodes: {found} ({self.n_sequences:,} sequences, unchanged "
            f"since {self.stable_after:,})"
        )
