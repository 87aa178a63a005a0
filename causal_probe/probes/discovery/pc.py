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
from itertools import combinations
from math import comb

from causal_probe.probes.discovery.independence import IndependenceTest
from causal_probe.probes.discovery.marks import TAIL, bits
from causal_probe.probes.discovery.orientation import orient_pdag
from causal_probe.probes.discovery.search import Candidates, Learned, Search, TooManyTests

__all__ = ["pc"]


def pc(
    test: IndependenceTest, *, stable: bool = True, max_order: int | None = None, max_tests: int = 5_000_000
) -> Learned:
    """Learn a CPDAG: ``u --> v``, or ``u --- v`` where the independences don't tell the direction.

    Parameters
    ----------
    test
        The test of conditional independence.
    stable
        Whether the result is independent of the order of the variables; see :class:`~causal_probe.probes.discovery.Search`.
    max_order
        The largest conditioning set; by default no limit.
    max_tests
        The search ends before the order that would need more tests than are left of these.
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
    search.graph.reset(TAIL)
    orient_pdag(search.graph, search.separating, stable=stable)
    return search.learned(stopped)


def _candidates(search: Search, order: int) -> Iterator[Candidates]:
    """Subsets of the neighbours of either end."""
    graph = search.graph
    for i, j in search.edges():
        sides = [tuple(bits(graph.adjacent(i) & ~(1 << j))), tuple(bits(graph.adjacent(j) & ~(1 << i)))]
        search.afford(max(comb(len(side), order) for side in sides))
        yield i, j, list(dict.fromkeys(each for side in sides for each in combinations(side, order)))
