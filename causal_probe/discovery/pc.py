"""PC: the CPDAG where no cause is latent.

An edge is removed when its ends are independent given some of the neighbours of either, for sets of growing size; then colliders
and Meek's rules orient what is left.

References
----------
.. [1] P. Spirtes, C. Glymour, R. Scheines. Causation, Prediction, and Search. MIT Press, 2nd edition, 2000.
.. [2] D. Colombo, M. H. Maathuis. Order-independent constraint-based causal structure learning. JMLR 15, 3741-3782, 2014.
   (Removing the edges of an order together.)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, combinations
from math import comb

import numpy as np
from jaxtyping import Int

from causal_probe.arguments import Count, Natural, checked
from causal_probe.discovery.independence import IndependenceTest
from causal_probe.discovery.marks import bits
from causal_probe.discovery.orientation import orient_pdag
from causal_probe.discovery.search import Candidates, Learned, Search, TooManyTests

__all__ = ["pc"]


@checked
def pc(
    test: IndependenceTest, *, stable: bool = True, max_order: Natural | None = None, max_tests: Count = 5_000_000
) -> Learned:
    """Learn a CPDAG: ``u --> v``, or ``u --- v`` where the independences don't tell the direction.

    Parameters
    ----------
    test
        The test of conditional independence.
    stable
        Whether the result is independent of the order of the variables; see :class:`~causal_probe.discovery.Search`.
    max_order
        The largest conditioning set; by default no limit.
    max_tests
        The search ends before the order that would need more tests than are left of these.

    Examples
    --------
    Two causes of one effect:

    >>> import networkx as nx
    >>> from causal_probe import graphs
    >>> from causal_probe.discovery import DSeparation
    >>> found = pc(DSeparation(nx.DiGraph([(0, 2), (1, 2)]))).marks.to_networkx()
    >>> [graphs.mixed.show_mixed_edge(found, *edge) for edge in graphs.mixed.mixed_edges(found)]
    ['0 --> 2', '1 --> 2']
    """
    search = Search(test, stable=stable, max_tests=max_tests)
    order, stopped = 0, None
    while any(search.graph.adjacent(node).bit_count() > order for node in range(test.n)):
        if max_order is not None and order > max_order:
            break
        try:
            search.prune(_candidates(search, order))
        except TooManyTests:
            stopped = order
            break
        order += 1
    search.graph.reset()
    orient_pdag(search.graph, search.separating, stable=stable)
    return search.learned(stopped)


def _candidates(search: Search, order: int) -> Iterator[Candidates]:
    """Subsets of the neighbours of either end."""
    graph = search.graph
    inside = np.zeros(graph.n, dtype=bool)
    for i, j in search.edges():
        sides = [(near := _elements(graph.adjacent(at)))[near != other] for at, other in ((i, j), (j, i))]
        search.afford(max(comb(len(side), order) for side in sides))
        first, second = (side[_subsets(len(side), order)] for side in sides)
        inside[:] = False
        inside[sides[0]] = True
        again = inside[second].all(axis=1)  # subsets of both sides
        yield i, j, np.concatenate([first, second[~again]])


@lru_cache(maxsize=1024)
def _elements(mask: int) -> Int[np.ndarray, " node"]:
    """The elements of a set of bits, ascending."""
    return np.array([*bits(mask)], dtype=np.intp)


@lru_cache(maxsize=256)
def _subsets(size: int, order: int) -> Int[np.ndarray, "subset order"]:
    """All subsets of 0..size-1 with ``order`` elements, in lexicographic order."""
    flat = chain.from_iterable(combinations(range(size), order))
    return np.fromiter(flat, dtype=np.intp, count=comb(size, order) * order).reshape(comb(size, order), order)
