"""The definition of a causal graph over positions, and the error for a graph that is none.

The nodes of a causal graph are the positions ``0..n-1``; an edge goes from parent to child, and a parent comes before
its child, because a causal transformer attends to the past only. So such a graph is acyclic and its numbering is a
topological order.
"""

from __future__ import annotations

import itertools
import numbers
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import networkx as nx

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.results import to_jsonable

__all__ = ["check_graph", "parent_lists"]

#: The most nodes of a graph, and the most edges: at some 500 bytes each, networkx takes 1 GB for as many.
LARGEST = 2**20

#: How many offenders of one kind a message names before it only counts the rest.
NAMED = 50

RULE = (
    "Its nodes must be the integers 0..n-1, its edges go from parent to child, and each parent comes before its child."
)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 40


@checked
def check_graph(graph: nx.DiGraph, *, nodes: int | None = None, max_parents: int | None = None) -> None:
    """Raise unless ``graph`` is a causal graph over positions; all that is wrong is said at once.

    Parameters
    ----------
    graph
        Edges go from parent to child, over the nodes ``0..n-1``.
    nodes
        The number of nodes that is expected, if any.
    max_parents
        The largest number of parents that a node may have: 1 for a forest.

    Raises
    ------
    CausalProbeError
        Naming the offending nodes and edges, if the graph is undirected, a multigraph or empty; has a node that is not
        an integer, a gap in the numbering, a self loop, a cycle or a parent that does not come before its child; or
        disagrees with ``nodes`` or ``max_parents``.

    Examples
    --------
    >>> import networkx as nx
    >>> check_graph(nx.DiGraph([(0, 1), (1, 2)]), nodes=3, max_parents=1)
    >>> check_graph(nx.DiGraph([(2, 1)]))
    Traceback (most recent call last):
    ...
    causal_probe.errors.CausalProbeError: The graph can't be used: the numbering leaves out 0; the parent comes after its \
child in 2 -> 1. Its nodes must be the integers 0..n-1, its edges go from parent to child, and each parent comes before \
its child.
    """
    problems = find_problems(graph, nodes=nodes, max_parents=max_parents)
    if problems:
        raise CausalProbeError(f"The graph can't be used: {'; '.join(problems)}. {RULE}")


def check_size(n: int, *, what: str = "nodes") -> None:
    """Raise where a graph would have more nodes or edges than :data:`LARGEST`, before any memory is taken for it."""
    if n > LARGEST:
        raise CausalProbeError(
            f"A graph of {n:,} {what} was asked for; a graph over positions has at most {LARGEST:,}."
        )


def data_problems(graph: nx.DiGraph) -> list[str]:
    """What the data of a graph, its nodes and its edges hold that no result can keep: NaN, infinities, and what JSON has no form for."""
    owners: list[tuple[str, Any]] = [("the graph", graph.graph)]
    owners += [(f"node {show_node(node)}", data) for node, data in graph.nodes(data=True) if data]
    owners += [(f"the edge {show_edge((u, v))}", data) for u, v, data in graph.edges(data=True) if data]
    return [
        f"{owner} has {name!r}: {_short.repr(value)}"
        for owner, data in owners
        for name, value in data.items()
        if not _is_plain(value)
    ]


def _is_plain(value: Any) -> bool:
    try:
        to_jsonable(value)
    except (CausalProbeError, TypeError, RecursionError):
        return False
    return True


def parent_lists(graph: nx.DiGraph) -> tuple[tuple[int, ...], ...]:
    """The parents of each node, ascending; a root has none.

    Raises
    ------
    CausalProbeError
        If :func:`check_graph` refuses the graph.

    Examples
    --------
    >>> import networkx as nx
    >>> parent_lists(nx.DiGraph([(0, 1), (0, 2), (1, 2)]))
    ((), (0,), (0, 1))
    """
    check_graph(graph)
    return tuple(tuple(sorted(int(parent) for parent in graph.predecessors(node))) for node in range(len(graph)))


def find_problems(graph: Any, *, nodes: int | None = None, max_parents: int | None = None) -> list[str]:
    """The problems of a graph, one phrase per kind; see :func:`check_graph`."""
    if not isinstance(graph, nx.Graph):
        return [f"it is a {type(graph).__name__}, not a networkx.DiGraph"]
    problems = _node_problems(graph, nodes)
    if graph.is_multigraph():
        problems.append("it is a multigraph, which may hold an edge more than once")
    if graph.is_directed():
        problems += _edge_problems(nx.DiGraph(graph), max_parents)
    else:
        problems.append("it is undirected, so nothing tells a parent from its child")
    return problems


def _node_problems(graph: nx.Graph, expected: int | None) -> list[str]:
    problems = []
    if len(graph) == 0:
        problems.append("it has no nodes")
    elif expected is not None and len(graph) != expected:
        problems.append(f"it has {len(graph)} nodes where {expected} were expected")
    if strangers := [node for node in graph if not is_integer(node)]:
        problems.append(f"not integers: the nodes {listing(strangers, show_node)}")
    numbering = sorted(int(node) for node in graph if is_integer(node))
    if negative := [node for node in numbering if node < 0]:
        problems.append(f"negative: the nodes {listing(negative)}")
    # Gaps are told as ranges: a node numbered 10**9 must not make a message of a billion numbers.
    steps = itertools.pairwise([-1, *(node for node in numbering if node >= 0)])
    gaps = [(below + 1, above - 1) for below, above in steps if above > below + 1]
    if gaps:
        problems.append(f"the numbering leaves out {listing(gaps, _show_range)}")
    return problems


def _edge_problems(graph: nx.DiGraph, max_parents: int | None) -> list[str]:
    problems = []
    if loops := [node for node, _ in nx.selfloop_edges(graph)]:
        problems.append(f"self loops at {listing(loops, show_node)}")
    if cycles := [_cycle(graph, knot) for knot in nx.strongly_connected_components(graph) if len(knot) > 1]:
        problems.append(f"a cycle in {listing(cycles)}")
    if backward := backward_edges(graph):
        problems.append(f"the parent comes after its child in {listing(backward, show_edge)}")
    if max_parents is not None:
        crowded = [f"{show_node(node)} ({degree})" for node, degree in graph.in_degree if degree > max_parents]
        if crowded:
            problems.append(f"more than {max_parents} parents at {listing(crowded)}")
    return problems


def backward_edges(graph: nx.DiGraph) -> list[tuple[Any, Any]]:
    """The edges between integers whose parent comes after its child, ascending."""
    return sorted((u, v) for u, v in graph.edges if is_integer(u) and is_integer(v) and u > v)


def _cycle(graph: nx.DiGraph, knot: Iterable[Any]) -> str:
    """One cycle among nodes that all reach each other, such as ``1 -> 2 -> 1``."""
    around = [edge[0] for edge in nx.find_cycle(graph.subgraph(knot))]
    return " -> ".join(show_node(node) for node in [*around, around[0]])


def _show_range(bounds: tuple[int, int]) -> str:
    first, last = bounds
    return str(first) if first == last else f"{first}-{last}"


def is_integer(node: Any) -> bool:
    """Whether a node is an integer, NumPy's included; True and False are not."""
    return isinstance(node, numbers.Integral) and not isinstance(node, bool)


def show_node(node: Any) -> str:
    """A node as a message names it: an integer plainly, anything else by its shortened repr."""
    return str(int(node)) if is_integer(node) else _short.repr(node)


def show_edge(edge: Sequence[Any]) -> str:
    """An edge as a message names it, such as ``3 -> 5``."""
    return f"{show_node(edge[0])} -> {show_node(edge[1])}"


def listing(items: Iterable[Any], show: Callable[[Any], str] = str) -> str:
    """The items behind each other; beyond :data:`NAMED` of them the rest is counted."""
    items = list(items)
    rest = len(items) - NAMED
    return ", ".join(map(show, items[:NAMED])) + (f" and {rest:,} more" if rest > 0 else "")
