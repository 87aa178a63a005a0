"""The graph that a study names: a family by its name, a file, or a graph."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx as nx

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError, CausalProbeWarning, show_path
from causal_probe.graphs.check import check_graph, data_problems, listing
from causal_probe.graphs.families import chain, lag, pairs, random_forest, two_parent_tree
from causal_probe.graphs.files import file_form, read_graph
from causal_probe.graphs.randomness import numpy_generator

__all__ = ["FAMILIES", "Family", "check_choice", "choose_graph"]

#: Positions of a family where none are asked for.
N_POSITIONS = 20


@dataclass(frozen=True)
class Family:
    """A family of graphs that a study can name.

    Attributes
    ----------
    about
        A description in one line.
    build
        The graph of ``n_positions`` tokens, from the number in its name (None without one), the probability of a root and the seed.
    takes
        Which of these it depends on.
    """

    about: str
    build: Callable[[int, int | None, float, int], nx.DiGraph]
    takes: tuple[str, ...] = ()


#: By name; ``K`` in it stands for a whole number of at least 1. A tree over T positions has T - 1 nodes, a graph of several parents T + 1.
FAMILIES: Mapping[str, Family] = {
    "chain": Family("Each node's parent is the one before it.", lambda n, k, p, seed: chain(n - 1)),
    "pairs": Family(
        "Each odd node's parent is the one before it; the even ones are roots.", lambda n, k, p, seed: pairs(n - 1)
    ),
    "forest": Family(
        "A random forest: a node is a root with root_probability, else its parent is any earlier one.",
        lambda n, k, p, seed: random_forest(n - 1, root_probability=p, seed=numpy_generator(seed, "graph")),
        ("root_probability", "seed"),
    ),
    "two-parent": Family(
        "Each node's parents are the one before it and the one at half its place; the paper's.",
        lambda n, k, p, seed: two_parent_tree(n + 1),
    ),
    "lag-K": Family("Each node's parent is K before it.", lambda n, k, p, seed: lag(n - 1, k=k or 1), ("K",)),
}


@checked
def choose_graph(
    graph: str | os.PathLike[str] | nx.DiGraph, *, n_positions: int | None, root_probability: float = 0.5, seed: int = 0
) -> nx.DiGraph:
    """The graph of a task over ``n_positions`` tokens.

    Parameters
    ----------
    graph
        The name of a family in :data:`FAMILIES`, such as ``"forest"`` (drawn with ``root_probability`` from ``seed``) or ``"lag-2"``; a
        file in node-link JSON, GraphML or edge-list form; or a graph.
    n_positions
        Number of tokens T that the model sees. A tree has T - 1 nodes, a graph of several parents T + 1. Families and edge
        lists need it (families take 20 by default); other files and graphs fix it by their number of nodes.

    Raises
    ------
    CausalProbeError
        If the name is no family and no file, ``n_positions`` is too small or disagrees with the graph, the file is not a graph, or the
        graph's data can't be kept in a result (NaN, say).

    Warns
    -----
    CausalProbeWarning
        If the graph has no edge: all nodes are roots, and there is nothing to recover.

    Examples
    --------
    >>> sorted(choose_graph("pairs", n_positions=6).edges)
    [(0, 1), (2, 3)]
    """
    if n_positions is not None and n_positions < 2:
        raise CausalProbeError(
            f"`n_positions` is {n_positions}. A task needs at least 2: a context and the query that ends it."
        )
    found = _choose(graph, n_positions, root_probability, seed)
    if not found.number_of_edges():
        warnings.warn(
            f"The graph has no edge: all its {len(found)} nodes are roots, and there is nothing to recover.",
            CausalProbeWarning,
            stacklevel=2,
        )
    return found


def _choose(
    graph: str | os.PathLike[str] | nx.DiGraph, n_positions: int | None, root_probability: float, seed: int
) -> nx.DiGraph:
    if isinstance(graph, nx.DiGraph):
        return _checked(graph, n_positions)
    if found := _family(graph):
        family, number = found
        return family.build(N_POSITIONS if n_positions is None else n_positions, number, root_probability, seed)
    return _read(Path(graph), n_positions)


def _family(graph: str | os.PathLike[str]) -> tuple[Family, int | None] | None:
    """The family of that name, with its number if it has one; None of a file."""
    for name, family in FAMILIES.items():
        if match := re.fullmatch(name.replace("K", r"([1-9]\d{0,17})"), os.fspath(graph)):
            return family, int(match[1]) if match.groups() else None
    if not os.path.exists(os.path.expanduser(graph)):
        raise CausalProbeError(
            f"{show_path(graph)!r} is neither a family of graphs ({', '.join(FAMILIES)}) nor a file."
        )
    return None


def check_choice(*graphs: str | os.PathLike[str] | nx.DiGraph) -> None:
    """See that each is a graph, the name of a family, or a file, before anything is loaded.

    Raises
    ------
    CausalProbeError
        If a name is none of these.

    Examples
    --------
    >>> check_choice("chain", "lag-3")
    >>> check_choice("chian")
    Traceback (most recent call last):
    causal_probe.errors.CausalProbeError: 'chian' is neither a family of graphs (...) nor a file.
    """
    for graph in graphs:
        if not isinstance(graph, nx.DiGraph):
            _family(graph)


def _read(path: Path, n_positions: int | None) -> nx.DiGraph:
    if file_form(path) != "an edge list":
        return _checked(read_graph(path), n_positions)
    if n_positions is None:
        raise CausalProbeError(
            f"{show_path(path)} is an edge list, which does not say how many nodes there are. Say how many positions the model sees "
            "with `n_positions`: T - 1 nodes for a tree, T + 1 where some node has several parents."
        )
    # Which of the two it is shows only once it is read; the larger number fits both.
    graph = read_graph(path, nodes=n_positions + 1)
    return graph if _has_several_parents(graph) else read_graph(path, nodes=n_positions - 1)


def _checked(graph: nx.DiGraph, n_positions: int | None) -> nx.DiGraph:
    check_graph(graph)
    if problems := data_problems(graph):
        raise CausalProbeError(
            f"The graph can't be kept in a result: {listing(problems)}. Remove that, or give finite numbers."
        )
    fixed = len(graph) + (-1 if _has_several_parents(graph) else 1)
    if n_positions is not None and n_positions != fixed:
        raise CausalProbeError(
            f"`n_positions` is {n_positions}, but the graph's {len(graph)} nodes make {fixed}: a tree over T - 1 nodes has "
            "T positions, a graph of several parents over T + 1 nodes has T. Leave it out."
        )
    return graph


def _has_several_parents(graph: nx.DiGraph) -> bool:
    return max((degree for _, degree in graph.in_degree), default=0) > 1
