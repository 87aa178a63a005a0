"""Iterative causal discovery: the PAG where some causes may be latent, with and without a known causal order.

Round r conditions on sets of size r that lie within distance r of the edge in the tree of possible d-separation and are possible
ancestors of one of its ends, and then orients anew. So each round ends with a graph that is right about all independences up to
its order: stopped early, it is right about less, not wrong.

References
----------
.. [1] R. Y. Rohekar, S. Nisimov, Y. Gurwicz, G. Novik. Iterative causal discovery in the possible presence of latent confounders
   and selection bias. NeurIPS 2021.
.. [2] R. Y. Rohekar, Y. Gurwicz, S. Yu, E. Aflalo, V. Lal. A causal world model underlying next token prediction: exploring GPT in
   a controlled environment. arXiv 2412.07446. (Ordered ICD.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from causal_probe.arguments import Count, Natural, checked
from causal_probe.discovery.independence import IndependenceTest
from causal_probe.discovery.marks import ARROW, Marks, bits, reach
from causal_probe.discovery.orientation import orient_pag
from causal_probe.discovery.possible_d_sep import PossibleDSep, possible_d_sep
from causal_probe.discovery.search import Candidates, Learned, Search, TooManyTests, as_sets

__all__ = ["icd", "ordered_icd"]

T = TypeVar("T")


@checked
def icd(
    test: IndependenceTest, *, stable: bool = True, max_order: Natural | None = None, max_tests: Count = 5_000_000
) -> Learned:
    """Learn a PAG.

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
    >>> found = icd(DSeparation(nx.DiGraph([(0, 2), (1, 2)]))).marks.to_networkx()
    >>> [graphs.mixed.show_mixed_edge(found, *edge) for edge in graphs.mixed.mixed_edges(found)]
    ['0 o-> 2', '1 o-> 2']
    """
    search = Search(test, stable=stable, max_tests=max_tests)
    order, stopped, unfinished = 0, None, True
    while unfinished and (max_order is None or order <= max_order) and order <= max(test.n - 2, 0):
        graph_before = search.version
        try:
            unfinished = search.prune(_near_sets(search, order)) or order == 0
        except TooManyTests:
            stopped = order
            break
        if order <= 1 or search.version != graph_before:
            search.graph.reset()
            orient_pag(search.graph, search.separating, complete=order == 1, stable=stable)
        order += 1
    search.graph.reset()
    orient_pag(search.graph, search.separating, complete=True, stable=stable)
    return search.learned(stopped)


def _near_sets(search: Search, order: int) -> Iterator[Candidates]:
    graph = search.graph
    if order == 0:
        for i, j in search.edges():
            yield i, j, as_sets([()], 0)
    elif order == 1:
        for i, j in search.edges():
            sides = (graph.adjacent(i) & ~(1 << j), graph.adjacent(j) & ~(1 << i))
            first, second = (list(bits(side)) for side in (sides[0], sides[1] & ~sides[0]))
            yield i, j, as_sets([(node,) for node in first + second], 1)
    else:
        trees = Remembered(search, lambda node: possible_d_sep(graph, node, depth=order, stable=search.stable))
        parents = Remembered(search, graph.possible_parents)
        ancestors = Remembered(search, lambda node: reach(1 << node, [parents.of(each) for each in range(graph.n)]))
        for i, j in search.edges():
            allowed = (ancestors.of(i) | ancestors.of(j)) & ~(1 << i | 1 << j)
            try:
                found = [
                    (tree.total_distance(nodes), side, nodes)
                    for side, tree in enumerate((trees.of(i), trees.of(j)))
                    for nodes in tree.legal_sets(order, allowed, limit=search.left)
                ]
            except OverflowError:
                raise TooManyTests from None
            yield i, j, as_sets(list(dict.fromkeys(nodes for _, _, nodes in sorted(found))), order)


@checked
def ordered_icd(
    test: IndependenceTest, *, stable: bool = True, max_order: Natural | None = None, max_tests: Count = 5_000_000
) -> Learned:
    """Learn a PAG whose nodes are in a causal order: none is a cause of an earlier one, as tokens of a causal model are.

    Only sets of nodes before the later end of an edge are conditioned on, and every edge has an arrow at its later end. Parameters
    (``test``, ``stable``, ``max_order``, ``max_tests``) are those of :func:`icd`; ``stable`` makes the result independent of the order in
    which *edges* are visited.

    Examples
    --------
    Two causes of one effect:

    >>> import networkx as nx
    >>> from causal_probe import graphs
    >>> from causal_probe.discovery import DSeparation
    >>> found = ordered_icd(DSeparation(nx.DiGraph([(0, 2), (1, 2)]))).marks.to_networkx()
    >>> [graphs.mixed.show_mixed_edge(found, *edge) for edge in graphs.mixed.mixed_edges(found)]
    ['0 o-> 2', '1 o-> 2']
    """
    search = Search(test, stable=stable, max_tests=max_tests)
    n = test.n
    finished: set[tuple[int, int]] = set()
    stopped = None
    last = n - 2 if max_order is None else min(max_order, n - 2)
    for order in range(last + 1):
        version = search.version
        try:
            any_set = search.prune(_earlier_sets(search, order, finished))
        except TooManyTests:
            stopped = order
            break
        if order <= 1 or search.version != version:
            _orient_ordered(search, complete=False)
        if order > 1 and not any_set:
            break
    _orient_ordered(search, complete=True)
    return search.learned(stopped)


def _earlier_sets(search: Search, order: int, finished: set[tuple[int, int]]) -> Iterator[Candidates]:
    graph = search.graph
    for later in range(order + 1, graph.n):
        before = (1 << later) - 1
        tree: PossibleDSep | None = None
        for earlier in bits(graph.adjacent(later) & before):
            if not graph.joined(earlier, later) or (earlier, later) in finished:
                continue
            if order == 0:
                yield earlier, later, as_sets([()], 0)
            elif order == 1:
                others = bits(graph.adjacent(later) & before & ~(1 << earlier))
                yield earlier, later, as_sets([(node,) for node in others], 1)
            else:
                # The tree of a node is grown once in a round, before any of its edges is tested.
                tree = tree or possible_d_sep(
                    graph, later, depth=order, within=before | 1 << later, stable=search.stable
                )
                allowed = _possible_ancestors(graph, later, before | 1 << later)
                allowed |= _possible_ancestors(graph, earlier, (1 << earlier + 1) - 1)
                try:
                    sets = tree.legal_sets(order, allowed & ~(1 << earlier | 1 << later), limit=search.left)
                except OverflowError:
                    raise TooManyTests from None
                if not sets:  # nor will there be larger ones
                    finished.add((earlier, later))
                yield earlier, later, as_sets(sets, order)


def _orient_ordered(search: Search, *, complete: bool) -> None:
    graph = search.graph
    graph.reset()
    for later in range(graph.n):
        for earlier in bits(graph.adjacent(later) & (1 << later) - 1):
            graph.put(earlier, later, ARROW)
    orient_pag(graph, search.separating, complete=complete, stable=search.stable)


def _possible_ancestors(graph: Marks, node: int, within: int = -1) -> int:
    """The nodes from which a possibly directed path over nodes in ``within`` leads to a node, itself included."""
    return reach(1 << node, [graph.possible_parents(each) for each in range(graph.n)], within)


class Remembered(Generic[T]):
    """What is grown of each node, once as long as the graph stays."""

    def __init__(self, search: Search, grow: Callable[[int], T]) -> None:
        self._search, self._grow, self._version, self._found = search, grow, -1, dict[int, T]()

    def of(self, node: int) -> T:
        """What is grown of a node."""
        if self._version != self._search.version:
            self._version, self._found = self._search.version, {}
        if node not in self._found:
            self._found[node] = self._grow(node)
        return self._found[node]
