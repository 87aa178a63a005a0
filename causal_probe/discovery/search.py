"""The base of the learners: a graph that loses its edges test by test, and the record of these tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
from jaxtyping import Int

from causal_probe.discovery.independence import IndependenceTest, OrderCount
from causal_probe.discovery.marks import Marks, bits

__all__ = ["Candidates", "Evidence", "Learned", "Search", "TooManyTests", "as_sets"]

#: For an edge (i < j), the conditioning sets to be tried in this order [set, order]; no set twice.
Candidates: TypeAlias = tuple[int, int, Int[np.ndarray, "_set order"]]

#: Tests that are collected before they are computed.
COLLECTED = 200_000


def as_sets(sets: list[tuple[int, ...]], order: int) -> Int[np.ndarray, "set order"]:
    """Conditioning sets of one size as an array."""
    return np.array(sets, dtype=np.intp).reshape(len(sets), order)


class TooManyTests(Exception):
    """The next order would need more tests than are allowed."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The test of a pair that agreed best with independence.

    Attributes
    ----------
    p
        Its p-value, in [0, 1]; None if no test of the pair was defined.
    given
        Its conditioning set.
    """

    p: float | None
    given: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Learned:
    """The result of a learner, over the variables 0..n-1.

    Attributes
    ----------
    marks
        The graph.
    separating
        For each pair (i < j) that is not joined: the set given which it was found independent.
    evidence
        For each pair (i < j): its largest p-value, and given what. Above level for pairs that are not joined, for the others not.
    by_order
        Number of tests by size of the conditioning set.
    stopped
        The order before which the search ended because it would have needed too many tests, None if it ran to its end. The graph is
        then right about independences of smaller orders.
    """

    marks: Marks
    separating: dict[tuple[int, int], tuple[int, ...]]
    evidence: dict[tuple[int, int], Evidence]
    by_order: tuple[OrderCount, ...]
    stopped: int | None


class Search:
    """A complete graph from which a learner removes edges.

    Parameters
    ----------
    test
        The test of conditional independence.
    stable
        All tests of an order are made on the graph as it was before them, and of the sets that separate a pair the one with the
        largest p-value is kept: the order of the variables plays no part. Otherwise edges are visited in ascending order, each
        is removed at once, and the first set that separates it is kept.
    max_tests
        How many tests may be made in all.
    """

    def __init__(self, test: IndependenceTest, *, stable: bool, max_tests: int) -> None:
        self.test, self.stable, self.left = test, stable, max_tests
        self.graph = Marks(test.n)
        self.separating: dict[tuple[int, int], int] = {}
        self.evidence: dict[tuple[int, int], Evidence] = {}
        #: Grows with each edge that is removed: what was derived from the graph holds as long as it stays.
        self.version = 0

    def edges(self) -> Iterator[tuple[int, int]]:
        """The edges i < j that are still there when their turn comes, ascending."""
        for i in range(self.graph.n):
            for j in bits(self.graph.adjacent(i) >> i + 1 << i + 1):
                if self.graph.joined(i, j):
                    yield i, j

    def afford(self, tests: int) -> None:
        """Raise :class:`TooManyTests` if so many more can't be made."""
        if tests > self.left:
            raise TooManyTests

    def prune(self, candidates: Iterable[Candidates]) -> bool:
        """Test edges given sets, remove those that are separated, and say whether there was anything to test."""
        any_set = False
        waiting: list[Candidates] = []
        separated: list[tuple[int, int, tuple[int, ...]]] = []
        collected = 0
        for each in candidates:
            if not len(each[2]):
                continue
            any_set = True
            collected += len(each[2])
            self.afford(collected)
            waiting.append(each)
            if not self.stable or collected > COLLECTED:
                separated += self._decide(waiting)
                waiting, collected = [], 0
                if not self.stable:
                    self._remove(separated)
                    separated = []
        self._remove(separated + self._decide(waiting))
        return any_set

    def _decide(self, waiting: list[Candidates]) -> list[tuple[int, int, tuple[int, ...]]]:
        """Those of the edges that a set separates, with the set."""
        if not waiting:
            return []
        sizes = np.array([len(sets) for _, _, sets in waiting])
        self.left -= int(sizes.sum())
        x = np.repeat([i for i, _, _ in waiting], sizes)
        y = np.repeat([j for _, j, _ in waiting], sizes)
        given = np.concatenate([sets for _, _, sets in waiting])
        p = self.test.p_values(x, y, given)
        # Of each edge: the first of its sets with the largest p, or, where the first that separates is kept, that.
        known = np.where(np.isnan(p), -1.0, p)  # undefined tests separate nothing
        starts = np.cumsum(sizes) - sizes
        score = known if self.stable else np.where(known > self.test.level, 2.0, known)
        at_best = np.flatnonzero(score == np.repeat(np.maximum.reduceat(score, starts), sizes))
        first = at_best[np.searchsorted(at_best, starts)]
        found = []
        for (i, j, _), best, nodes in zip(waiting, known[first].tolist(), given[first].tolist(), strict=True):
            before = self.evidence.get((i, j))
            if best < 0:
                self.evidence.setdefault((i, j), Evidence(None, ()))
                continue
            if before is None or before.p is None or best > before.p:
                self.evidence[i, j] = Evidence(best, tuple(nodes))
            if best > self.test.level:
                found.append((i, j, tuple(nodes)))
        return found

    def _remove(self, separated: Iterable[tuple[int, int, tuple[int, ...]]]) -> None:
        for i, j, given in separated:
            self.graph.remove(i, j)
            self.separating[i, j] = sum(1 << node for node in given)
            self.version += 1

    def learned(self, stopped: int | None) -> Learned:
        """The result."""
        separating = {pair: tuple(bits(given)) for pair, given in self.separating.items()}
        return Learned(self.graph, separating, self.evidence, self.test.by_order(), stopped)
