"""From the evidence of one head, an array [child, parent], to its candidate parents and its graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import networkx as nx
import numpy as np
from jaxtyping import Float

from causal_probe.errors import CausalProbeError
from causal_probe.graphs.check import is_integer, listing, show_edge, show_node

__all__ = [
    "REST",
    "SINKS",
    "Candidate",
    "candidates",
    "check_shift",
    "check_sink",
    "chosen_nodes",
    "compared_children",
    "mean_by_offset",
    "seen",
    "without_sink",
]

#: What may become of the attention on position 0, where many heads of language models look when they have nothing to say.
SINKS = ("exclude", "root", "keep")
#: With ``sink="exclude"``, a row with less than this share of its attention off position 0 is a root: so little is noise.
REST = 0.1


class Candidate(NamedTuple):
    """The earlier node with the most evidence for being a node's parent.

    Attributes
    ----------
    child, parent
        The node and its candidate parent, the smallest of several with the same evidence.
    value
        The evidence for the edge, after the rule for the sink.
    margin
        ``value`` minus the largest evidence for any other earlier node, >= 0; None for a node that has no other.
    """

    child: int
    parent: int
    value: float
    margin: float | None


def candidates(
    values: Float[np.ndarray, "child parent"], nodes: Sequence[int], *, first: int = 0
) -> tuple[Candidate, ...]:
    """The candidate parent of every node that has an earlier one.

    Parameters
    ----------
    nodes
        Positions, ascending: the children, and from position ``first`` on the possible parents.
    """
    possible = np.array([node for node in nodes if node >= first], dtype=int)
    found = []
    for child in nodes:
        before = possible[possible < child]
        if not len(before):
            continue
        earlier = values[child, before]
        best = int(earlier.argmax())  # the first of equals
        others = np.delete(earlier, best)
        margin = float(earlier[best] - others.max()) if len(others) else None
        found.append(Candidate(child, int(before[best]), float(earlier[best]), margin))
    return tuple(found)


def mean_by_offset(values: Float[np.ndarray, "child parent"], *, first: int = 0) -> Float[np.ndarray, " offset"]:
    """For k = 0 ... T - 1, the mean over the rows that have a position k back, from ``first`` on; 0 where there is none."""
    n = len(values)
    return np.array([np.diagonal(values, -k)[first:].mean() if k + first < n else 0.0 for k in range(n)])


def without_sink(values: Float[np.ndarray, "child parent"], sink: str) -> Float[np.ndarray, "child parent"]:
    """A head's mean attention after the rule for position 0, one of :data:`SINKS`."""
    if sink == "keep":
        return values
    at_sink = values[:, :1]
    others = np.where(np.arange(len(values)) == 0, 0.0, values)
    if sink == "root":
        return np.where(others > at_sink, others, 0.0)
    return np.where(1 - at_sink >= REST, others / np.maximum(1 - at_sink, REST), 0.0)


def check_shift(shift: int) -> int:
    """The shift, if it is 0 or 1."""
    if shift not in (0, 1):
        raise CausalProbeError(
            f"shift says in which row the edges into node i are read: 0, its own, or 1, the one before; it is {shift!r}."
        )
    return shift


def seen(children: Sequence[int], shift: int) -> list[int]:
    """The children whose row says something: with a shift of 1, row 0 stands for node 1, and sees one key.

    >>> seen([0, 1, 2], 1), seen([0, 1, 2], 0), seen([0, 1], 1)
    ([0, 2], [0, 1, 2], [0])
    """
    return [child for child in children if child != 1 or not shift]


def check_sink(sink: str) -> None:
    """Raise unless it is one of :data:`SINKS`."""
    if sink not in SINKS:
        raise CausalProbeError(f"sink is one of {', '.join(map(repr, SINKS))}; it is {sink!r}.")


def chosen_nodes(nodes: int | Iterable[int] | None, n_positions: int) -> list[int]:
    """Positions, ascending: those given, 0..nodes-1, or all.

    Raises
    ------
    CausalProbeError
        If one is no position.
    """
    if nodes is None:
        return list(range(n_positions))
    if isinstance(nodes, (int, np.integer)):
        if not 1 <= nodes <= n_positions:
            raise CausalProbeError(
                f"A graph over {nodes} nodes was asked for; the sequences have {n_positions} positions, one node each."
            )
        return list(range(nodes))
    its = sorted(nodes)
    if strangers := [node for node in its if not is_integer(node) or not 0 <= node < n_positions]:
        raise CausalProbeError(
            f"{listing(strangers, show_node)} can't be nodes: the sequences have {n_positions} positions, counted from 0."
        )
    return its


def compared_children(truth: nx.DiGraph, n_positions: int, children: Iterable[int] | None = None) -> list[int]:
    """The nodes whose rows can be compared with their edges in ``truth``.

    By default every node of ``truth`` that has a row of its own: all of them, or, where ``truth`` has nodes beyond the last position,
    those before the last position (whose row is the query for what comes next, not the row of its own node).

    Raises
    ------
    CausalProbeError
        If a node of the truth is no position, a parent comes after its child, a child was asked for that is no position or no
        node, or none is left.
    """
    if strangers := [node for node in truth if not is_integer(node) or node < 0]:
        raise CausalProbeError(
            f"The nodes of the truth are positions, counted from 0; it has {listing(strangers, show_node)}."
        )
    if backward := [edge for edge in truth.edges if edge[0] >= edge[1]]:
        raise CausalProbeError(
            f"A parent must come before its child; the truth has {listing(backward, show_edge)}. Turn the edges round."
        )
    if children is None:
        n_rows = n_positions if all(node < n_positions for node in truth) else n_positions - 1
        if rows := sorted(node for node in truth if node < n_rows):
            return rows
        raise CausalProbeError(
            f"No node of the truth has a row to compare: the sequences have {n_positions} positions, and its nodes are "
            f"{listing(sorted(truth), show_node) or 'none'}."
        )
    rows = sorted(set(children))
    if strangers := [row for row in rows if not (row in truth and 0 <= row < n_positions)]:
        raise CausalProbeError(
            f"The children {strangers} have no row to compare: the sequences have {n_positions} positions, the truth "
            f"{len(truth)} nodes."
        )
    return rows
