"""Mixed graphs: edges whose two ends carry a mark each, tail, arrow or circle.

They stand for what data can tell of a causal graph. A *CPDAG* says what all directed acyclic graphs with the same independences
have in common (``u -> v`` or undecided, ``u - v``); a *PAG* the same where some causes may be latent: an **arrow** at v on
the edge between u and v says that v is no cause of u, a **tail** that it is one, a **circle** that the data can't tell. So
``u <-> v`` is a common latent cause, and ``u o-> v`` a cause or a common latent cause.

Here a mixed graph is a :class:`networkx.DiGraph` with both arcs of every edge: ``graph.edges[u, v]["mark"]`` is the mark at
**v**, the head of the arc.

>>> graph = mixed_graph(3, [(0, "o", ">", 2), (1, "o", ">", 2)])
>>> graph.edges[0, 2]["mark"], graph.edges[2, 0]["mark"]
('arrow', 'circle')
>>> [show_mixed_edge(graph, *edge) for edge in mixed_edges(graph)]
['0 o-> 2', '1 o-> 2']
>>> sorted(arrowheads(graph))
[(0, 2), (1, 2)]

A causal graph can be read as one: parents have tails and children arrows.

>>> import networkx as nx
>>> [show_mixed_edge(as_mixed(nx.DiGraph([(0, 1)])), 0, 1)]
['0 --> 1']

References
----------
.. [1] J. Zhang. On the completeness of orientation rules for causal discovery in the presence of latent confounders and
   selection bias. Artificial Intelligence 172, 1873-1896, 2008.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, Literal, TypeAlias

import networkx as nx

from causal_probe.arguments import Count, checked
from causal_probe.errors import CausalProbeError
from causal_probe.graphs.check import listing, show_edge

__all__ = ["Mark", "arrowheads", "as_mixed", "is_mixed", "mixed_edges", "mixed_graph", "show_mixed_edge"]

#: The mark at an end of an edge.
Mark: TypeAlias = Literal["tail", "arrow", "circle"]

MARKS = ("tail", "arrow", "circle")
_OF_SIGN: dict[str, Mark] = {"-": "tail", ">": "arrow", "<": "arrow", "o": "circle"}
_AT_LEFT = {"tail": "-", "arrow": "<", "circle": "o"}
_AT_RIGHT = {"tail": "-", "arrow": ">", "circle": "o"}


@checked
def mixed_graph(nodes: Count | Iterable[Any], edges: Iterable[tuple[Hashable, str, str, Hashable]] = ()) -> nx.DiGraph:
    """A mixed graph from its edges ``(u, sign at u, sign at v, v)``; the signs are ``-``, ``o``, and ``<`` or ``>``.

    Parameters
    ----------
    nodes
        The nodes, or how many: then they are 0..n-1.
    edges
        Each edge once.

    Raises
    ------
    CausalProbeError
        For an unknown sign, an edge from a node to itself, or one that is given twice.

    Examples
    --------
    >>> graph = mixed_graph(2, [(0, "o", ">", 1)])
    >>> show_mixed_edge(graph, 0, 1)
    '0 o-> 1'
    """
    if not isinstance(nodes, int):
        nodes = list(nodes)
        if not all(isinstance(node, Hashable) for node in nodes):
            raise CausalProbeError("The nodes of a mixed graph are names or numbers, which one of these is not.")
    graph = nx.empty_graph(nodes, create_using=nx.DiGraph)
    for u, at_u, at_v, v in edges:
        if at_u not in _OF_SIGN or at_v not in _OF_SIGN:
            raise CausalProbeError(f"The signs at an edge are '-', 'o', '<' and '>'; found {at_u!r} and {at_v!r}.")
        if u == v or graph.has_edge(u, v):
            raise CausalProbeError(f"The edge between {u!r} and {v!r} is given twice, or joins a node to itself.")
        graph.add_edge(u, v, mark=_OF_SIGN[at_v])
        graph.add_edge(v, u, mark=_OF_SIGN[at_u])
    return graph


def is_mixed(graph: nx.DiGraph) -> bool:
    """Whether any edge carries a mark.

    Examples
    --------
    >>> import networkx as nx
    >>> is_mixed(nx.DiGraph([(0, 1)])), is_mixed(mixed_graph(2, [(0, "o", ">", 1)]))
    (False, True)
    """
    return any("mark" in data for _, _, data in graph.edges(data=True))


def as_mixed(graph: nx.DiGraph) -> nx.DiGraph:
    """The same graph with marks: itself if it has them, else a tail at every parent and an arrow at every child.

    Raises
    ------
    CausalProbeError
        If some edges carry marks and others don't, an edge has one arc only, or a mark is unknown.

    Examples
    --------
    >>> import networkx as nx
    >>> sorted(mixed_edges(as_mixed(nx.DiGraph([(0, 1)]))))
    [(0, 1)]
    """
    if not is_mixed(graph):
        return mixed_graph(graph.nodes, ((u, "-", ">", v) for u, v in graph.edges))
    if wrong := [
        (u, v) for u, v, data in graph.edges(data=True) if data.get("mark") not in MARKS or not graph.has_edge(v, u)
    ]:
        raise CausalProbeError(
            f"A mixed graph has both arcs of every edge, each with a mark ({', '.join(MARKS)}) at its head; not so "
            f"{listing(wrong, show_edge)}."
        )
    return graph


def mixed_edges(graph: nx.DiGraph) -> list[tuple[Any, Any]]:
    """Every edge of a mixed graph once, in the order of the nodes.

    Examples
    --------
    >>> mixed_edges(mixed_graph(3, [(1, "o", ">", 0), (1, "<", ">", 2)]))
    [(0, 1), (1, 2)]
    """
    place = {node: index for index, node in enumerate(graph)}
    return sorted(
        ((u, v) for u, v in graph.edges if place[u] < place[v]), key=lambda edge: (place[edge[0]], place[edge[1]])
    )


def show_mixed_edge(graph: nx.DiGraph, u: Any, v: Any) -> str:
    """An edge as text: ``0 o-> 2``, ``1 <-> 2``, ``1 --- 3``.

    Examples
    --------
    >>> graph = mixed_graph(3, [(0, "-", ">", 1), (1, "<", ">", 2)])
    >>> show_mixed_edge(graph, 0, 1), show_mixed_edge(graph, 1, 0), show_mixed_edge(graph, 1, 2)
    ('0 --> 1', '1 <-- 0', '1 <-> 2')
    """
    return f"{u} {_AT_LEFT[graph.edges[v, u]['mark']]}-{_AT_RIGHT[graph.edges[u, v]['mark']]} {v}"


@checked
def arrowheads(graph: nx.DiGraph) -> set[tuple[Any, Any]]:
    """The arcs (u, v) with an arrow at v: v is no cause of u. In a graph without marks, its edges.

    Examples
    --------
    >>> from causal_probe.graphs import mixed_graph
    >>> sorted(arrowheads(mixed_graph(3, [(0, "o", ">", 1), (1, "<", ">", 2)])))
    [(0, 1), (1, 2), (2, 1)]
    """
    return {(u, v) for u, v, data in as_mixed(graph).edges(data=True) if data["mark"] == "arrow"}
