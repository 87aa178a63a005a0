"""Families of causal graphs over the positions ``0..n-1``.

Each returns a plain :class:`networkx.DiGraph` whose edges go from parent to child and whose nodes stand in their order.
``pairs``, the random forests and the two-parent tree are the graphs of Nichani, Damian & Lee (2024, arXiv 2402.14735).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import networkx as nx
import numpy as np

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.graphs.check import LARGEST, check_size, is_integer, listing, show_node

__all__ = ["chain", "from_parents", "lag", "pairs", "random_dag", "random_forest", "two_parent_tree"]


@checked
def chain(n: int) -> nx.DiGraph:
    """Every node's parent is the node before it; node 0 is the root.

    Raises
    ------
    CausalProbeError
        If ``n`` is not an integer of at least 1.

    Examples
    --------
    >>> list(chain(4).edges)
    [(0, 1), (1, 2), (2, 3)]
    """
    _check_size(n)
    return from_parents([None, *range(n - 1)])


@checked
def lag(n: int, *, k: int) -> nx.DiGraph:
    """Every node's parent is the node ``k`` before it; the first ``k`` nodes are roots. ``k = 1`` is the chain.

    Raises
    ------
    CausalProbeError
        If ``n`` or ``k`` is not a positive integer.

    Examples
    --------
    >>> sorted(lag(5, k=2).edges)
    [(0, 2), (1, 3), (2, 4)]
    """
    _check_size(n)
    _check_size(k, name="k")
    return from_parents([None if child < k else child - k for child in range(n)])


@checked
def pairs(n: int) -> nx.DiGraph:
    """Every odd node's parent is the node before it; the even nodes are roots ("icl" in the authors' code).

    Raises
    ------
    CausalProbeError
        If ``n`` is not an integer of at least 1.

    Examples
    --------
    >>> list(pairs(5).edges)
    [(0, 1), (2, 3)]
    """
    _check_size(n)
    return from_parents([node - 1 if node % 2 else None for node in range(n)])


@checked
def random_forest(n: int, *, root_probability: float = 0.5, seed: int | np.random.Generator) -> nx.DiGraph:
    """A random forest: node 0 is a root, every other node is one too with ``root_probability``, else it has one parent.

    Parameters
    ----------
    n
        Number of nodes, at least 1.
    root_probability
        Between 0 (a random recursive tree) and 1 (no edges).
    seed
        An integer, or a NumPy generator, which is advanced. A parent is uniform over the earlier nodes. Under one integer
        seed the graphs of different ``root_probability`` are nested: the edges of the larger are among the smaller's.

    Raises
    ------
    CausalProbeError
        If an argument is out of its range.

    Examples
    --------
    >>> parents = [set(random_forest(6, seed=seed).predecessors(5)) for seed in range(100)]
    >>> sorted({len(found) for found in parents}), set.union(*parents) == {0, 1, 2, 3, 4}
    ([0, 1], True)
    """
    _check_size(n)
    if not (isinstance(root_probability, (float, int, np.number)) and 0 <= root_probability <= 1):
        raise CausalProbeError(f"root_probability is {root_probability!r}. It must be a number from 0 to 1.")
    generator = _generator(seed)
    is_child = generator.random(n) >= root_probability
    parent = generator.integers(np.maximum(np.arange(n), 1))
    return from_parents([int(parent[node]) if node > 0 and is_child[node] else None for node in range(n)])


@checked
def random_dag(n: int, *, parents: int, seed: int | np.random.Generator) -> nx.DiGraph:
    """A random DAG: node i has ``min(parents, i)`` distinct parents, uniform over the earlier nodes.

    Parameters
    ----------
    n
        Number of nodes, at least 1.
    parents
        Number of parents of a node that has that many earlier nodes, at least 1.
    seed
        An integer, or a NumPy generator, which is advanced.

    Raises
    ------
    CausalProbeError
        If an argument is out of its range.

    Examples
    --------
    >>> graph = random_dag(6, parents=2, seed=0)
    >>> [degree for _, degree in graph.in_degree]
    [0, 1, 2, 2, 2, 2]
    """
    _check_size(n)
    _check_size(parents, name="parents")
    check_size(int(n) * min(int(parents), int(n)), what="edges")
    generator = _generator(seed)
    return from_parents([generator.choice(i, size=min(parents, i), replace=False) if i else None for i in range(n)])


@checked
def two_parent_tree(n: int) -> nx.DiGraph:
    """Node i >= 2 has the parents ``{floor((i-1)/2), i-1}``; nodes 0 and 1 are roots.

    From node 2 on the two parents differ, so every child has exactly two.

    Raises
    ------
    CausalProbeError
        If ``n`` is not an integer of at least 1.

    Examples
    --------
    >>> [sorted(two_parent_tree(6).predecessors(node)) for node in range(6)]
    [[], [], [0, 1], [1, 2], [1, 3], [2, 4]]
    """
    _check_size(n)
    return from_parents([{(node - 1) // 2, node - 1} if node >= 2 else None for node in range(n)])


@checked
def from_parents(parents: Iterable[Any]) -> nx.DiGraph:
    """The graph in which node i has the parents that the i-th entry names.

    Parameters
    ----------
    parents
        For each node None or -1 (a root), its one parent, or an iterable of its parents; NumPy's integers will do.

    Raises
    ------
    CausalProbeError
        Naming every entry whose parents are not distinct integers before the node itself; or if there is no entry.

    Examples
    --------
    >>> list(from_parents([None, 0, -1, [0, 2]]).edges)
    [(0, 1), (0, 3), (2, 3)]
    """
    if isinstance(parents, str) or not isinstance(parents, Iterable):
        raise CausalProbeError(f"parents is {show_node(parents)}. It must hold one entry per node.")
    entries = [_listed(entry) for entry in islice(parents, LARGEST + 1)]
    check_size(len(entries))
    check_size(sum(map(len, entries)), what="edges")
    wrong = [
        f"{node} has {listing(entry, show_node)}"
        for node, entry in enumerate(entries)
        if not all(is_integer(parent) and 0 <= parent < node for parent in entry) or len(set(entry)) < len(entry)
    ]
    if wrong:
        raise CausalProbeError(
            "The parents of a node must be distinct integers, each smaller than the node (a root has None or -1). "
            f"Found: {listing(wrong)}."
        )
    if not entries:
        raise CausalProbeError("A graph needs at least one node, and no entry was given.")
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(entries)))
    graph.add_edges_from((int(parent), node) for node, entry in enumerate(entries) for parent in sorted(entry))
    return graph


def _listed(entry: Any) -> list[Any]:
    """One entry of a parent list as a list of parents; entries that can't be parents are left to the check."""
    if entry is None or (is_integer(entry) and entry == -1):
        return []
    if isinstance(entry, str):
        return [entry]
    try:
        return list(entry)
    except TypeError:
        return [entry]


def _check_size(value: Any, *, name: str = "n") -> None:
    if not is_integer(value) or value < 1:
        raise CausalProbeError(f"{name} is {show_node(value)}. It must be an integer of at least 1.")
    if name == "n":
        check_size(value)


def _generator(seed: Any) -> np.random.Generator:
    # None would draw a graph that nobody can draw again.
    if not isinstance(seed, np.random.Generator) and not (is_integer(seed) and seed >= 0):
        raise CausalProbeError(f"seed is {seed!r}. It must be a non-negative integer or a numpy.random.Generator.")
    return np.random.default_rng(seed)
