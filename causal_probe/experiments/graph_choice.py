"""The graph that a command names: a family by its name, or a file."""

from __future__ import annotations

import re
from pathlib import Path

import networkx as nx

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.graphs.files import file_form
from causal_probe.tasks.randomness import numpy_generator

__all__ = ["FAMILIES", "choose_graph"]

FAMILIES = ("chain", "pairs", "forest", "two-parent", "lag-K")


def choose_graph(
    graph: str | Path | nx.DiGraph, *, positions: int | None, root_probability: float = 0.5, seed: int = 0
) -> nx.DiGraph:
    """The graph of a task over ``positions`` tokens.

    Parameters
    ----------
    graph
        ``"chain"``, ``"pairs"``, ``"lag-2"`` (each node's parent is two before it; any number), ``"forest"`` (drawn with ``root_probability`` from ``seed``), ``"two-parent"``; a file in
        node-link JSON, GraphML or edge-list form; or a graph.
    positions
        Number of tokens T that the model sees. A tree has T - 1 nodes, a graph of several parents T + 1. Families and edge
        lists need it (families take 20 by default); other files and graphs fix it by their number of nodes.

    Raises
    ------
    CausalProbeError
        If the name is no family and no file, ``positions`` is too small or disagrees with the graph, or the file is not a graph.

    Examples
    --------
    >>> sorted(choose_graph("pairs", positions=6).edges)
    [(0, 1), (2, 3)]
    """
    if positions is not None and positions < 2:
        raise CausalProbeError(
            f"A task over {positions} positions was asked for; it needs at least 2: a context and the query that ends it."
        )
    if isinstance(graph, nx.DiGraph):
        return _checked(graph, positions)
    n = 20 if positions is None else positions
    if graph == "chain":
        return graphs.chain(n - 1)
    if graph == "pairs":
        return graphs.pairs(n - 1)
    if isinstance(graph, str) and (match := re.fullmatch(r"lag-([1-9]\d*)", graph)):
        return graphs.lag(n - 1, k=int(match[1]))
    if graph == "forest":
        return graphs.random_forest(n - 1, root_probability=root_probability, seed=numpy_generator(seed, "graph"))
    if graph == "two-parent":
        return graphs.two_parent_tree(n + 1)
    if not Path(graph).exists():
        raise CausalProbeError(f"{str(graph)!r} is neither a family of graphs ({', '.join(FAMILIES)}) nor a file.")
    return _read(Path(graph), positions)


def _read(path: Path, positions: int | None) -> nx.DiGraph:
    if file_form(path) != "an edge list":
        return _checked(graphs.read_graph(path), positions)
    if positions is None:
        raise CausalProbeError(
            f"{path} is an edge list, which does not say how many nodes there are. Say how many positions the model sees "
            "(--positions): T - 1 nodes for a tree, T + 1 where some node has several parents."
        )
    # Which of the two it is shows only once it is read; the larger number fits both.
    graph = graphs.read_graph(path, nodes=positions + 1)
    return graph if _has_several_parents(graph) else graphs.read_graph(path, nodes=positions - 1)


def _checked(graph: nx.DiGraph, positions: int | None) -> nx.DiGraph:
    graphs.check_graph(graph)
    fixed = len(graph) + (-1 if _has_several_parents(graph) else 1)
    if positions is not None and positions != fixed:
        raise CausalProbeError(
            f"{positions} positions were asked for, but the graph's {len(graph)} nodes make {fixed}: a tree over T - 1 nodes has "
            "T positions, a graph of several parents over T + 1 nodes has T. Leave --positions out."
        )
    return graph


def _has_several_parents(graph: nx.DiGraph) -> bool:
    return max((degree for _, degree in graph.in_degree), default=0) > 1
