"""Orienting a skeleton: Zhang's rules R0-R10 for graphs with latent causes, Meek's rules for graphs without.

A rule looks at a graph and proposes *changes*: groups of ``(u, v, mark)``, put that mark at v on the edge between u and v. How
they are applied is another matter:

- ``stable=True``: all proposals of a rule are collected on the graph as it is, and applied together. Only circles are
  changed. An end for which both a tail and an arrow are proposed stays a circle for good: the data contradicts itself there. So
  the result does not depend on how the nodes are numbered.
- ``stable=False``: each proposal is applied at once, over earlier marks as well, nodes in ascending order: as most
  implementations do, those of the authors of ICD among them.

Where the separating sets are right, both give the same graph.

References
----------
.. [1] J. Zhang. On the completeness of orientation rules for causal discovery in the presence of latent confounders and
   selection bias. Artificial Intelligence 172, 1873-1896, 2008. (R0-R10)
.. [2] C. Meek. Causal inference and causal explanation with background knowledge. UAI 1995.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations, islice, pairwise
from typing import TypeAlias

from causal_probe.discovery.marks import ARROW, TAIL, Marks, bits

__all__ = ["SeparatingSets", "orient_pag", "orient_pdag"]

#: For each pair of nodes (smaller, larger) that was separated: the separating set, as bits.
SeparatingSets: TypeAlias = Mapping[tuple[int, int], int]

Change: TypeAlias = tuple[int, int, str]
Proposal: TypeAlias = tuple[Change, ...]
Rule: TypeAlias = Callable[[Marks], Iterable[Proposal]]


def orient_pag(graph: Marks, separating: SeparatingSets, *, complete: bool, stable: bool) -> None:
    """Orient a graph whose marks are at their start: R0, then R1-R4 until nothing changes, then R5-R7 and R8-R10 if ``complete``.

    Pairs that are not joined and have no separating set count as separated by the empty one.
    """
    _apply([_colliders(separating)], graph, stable=stable, once=True)
    _apply([_rule_1, _rule_2, _rule_3, _rule_4(separating, every_path=stable)], graph, stable=stable)
    if complete:
        _apply([_rule_5_together if stable else _rule_5, _rule_6, _rule_7], graph, stable=stable)
        _apply([_rule_8, _rule_9, _rule_10], graph, stable=stable)


def _apply(rules: list[Rule], graph: Marks, *, stable: bool, once: bool = False) -> None:
    contradicted: set[tuple[int, int]] = set()
    changed = True
    while changed:
        changed = False
        for rule in rules:
            if stable:
                changed |= _apply_together(rule(graph), graph, contradicted)
            else:
                for proposal in rule(graph):
                    for u, v, mark in proposal:
                        graph.put(u, v, mark)
                    changed = True
        if once:
            return


def _apply_together(proposals: Iterable[Proposal], graph: Marks, contradicted: set[tuple[int, int]]) -> bool:
    wanted: dict[tuple[int, int], set[str]] = {}
    for proposal in proposals:
        for u, v, mark in proposal:
            if graph.circle[v] >> u & 1:
                wanted.setdefault((u, v), set()).add(mark)
    contradicted |= {end for end, marks in wanted.items() if len(marks) > 1}
    agreed = {end: min(marks) for end, marks in wanted.items() if end not in contradicted}
    for (u, v), mark in agreed.items():
        graph.put(u, v, mark)
    return bool(agreed)


def _colliders(separating: SeparatingSets) -> Rule:
    """R0: x *-* z *-* y with x, y apart and z not in their separating set becomes x *-> z <-* y."""

    def rule(graph: Marks) -> Iterator[Proposal]:
        for z in range(graph.n):
            for x, y in combinations(bits(graph.adjacent(z)), 2):
                if not graph.joined(x, y) and not separating.get((x, y), 0) >> z & 1:
                    yield (x, z, ARROW), (y, z, ARROW)

    return rule


# ---------------------------------------------------------------------------------------------------------- R1-R4: arrowheads


def _rule_1(graph: Marks) -> Iterator[Proposal]:
    """A *-> B o-* C with A, C apart: B --> C."""
    for b in range(graph.n):
        open_ends = graph.circle[b]
        for a in bits(graph.arrow[b]):
            for c in bits(open_ends & ~graph.adjacent(a) & ~(1 << a)):
                yield (c, b, TAIL), (b, c, ARROW)


def _rule_2(graph: Marks) -> Iterator[Proposal]:
    """A *-> B --> C or A --> B *-> C, and A *-o C: A *-> C."""
    for b in range(graph.n):
        for c in bits(graph.tail[b]):
            if graph.arrow[c] >> b & 1:
                for a in bits(graph.arrow[b]):
                    if graph.circle[c] >> a & 1:
                        yield ((a, c, ARROW),)
    for c in range(graph.n):
        for b in bits(graph.arrow[c]):
            for a in bits(graph.arrow[b]):
                if graph.tail[a] >> b & 1 and graph.circle[c] >> a & 1:
                    yield ((a, c, ARROW),)


def _rule_3(graph: Marks) -> Iterator[Proposal]:
    """A *-> B <-* C, A *-o D o-* C with A, C apart, and D *-o B: D *-> B."""
    for b in range(graph.n):
        for d in bits(graph.circle[b]):
            for a, c in combinations(bits(graph.arrow[b] & graph.circle[d]), 2):
                if not graph.joined(a, c):
                    yield ((d, b, ARROW),)


def _rule_4(separating: SeparatingSets, *, every_path: bool) -> Rule:
    """A discriminating path (D, ..., A, B, C) for B, and B o-* C: B --> C if B separates D from C, else A <-> B <-> C."""

    def rule(graph: Marks) -> Iterator[Proposal]:
        for b in range(graph.n):
            for c in bits(graph.circle[b]):
                for a in bits(graph.parents(c)):
                    if graph.arrow[a] >> b & 1:
                        # Where the data contradicts itself, paths from different nodes D can say different things.
                        for d in islice(_discriminating(graph, a, b, c), None if every_path else 1):
                            if separating.get((min(c, d), max(c, d)), 0) >> b & 1:
                                yield (b, c, ARROW), (c, b, TAIL)
                            else:
                                yield (b, a, ARROW), (a, b, ARROW), (b, c, ARROW), (c, b, ARROW)

    return rule


def _discriminating(graph: Marks, a: int, b: int, c: int) -> Iterator[int]:
    """The far ends D of paths D *-> ... <-> A <-* B *-* C, the shortest first: all between are colliders and parents of C, and D, C are apart."""
    ends = 1 << b | 1 << c
    parents = graph.parents(c)
    frontier, seen = 1 << a, ends | 1 << a
    while frontier:
        following = 0
        for here in bits(frontier):
            for d in bits(graph.arrow[here] & ~ends & ~(1 << a)):
                if not graph.joined(d, c):
                    yield d
                elif not seen >> d & 1 and parents >> d & 1 and graph.arrow[d] >> here & 1:
                    following |= 1 << d
        seen |= following
        frontier = following


# ------------------------------------------------------------------------------------------------------ R5-R7: selection bias


def _rule_5(graph: Marks) -> Iterator[Proposal]:
    """A o-o B and an uncovered circle path (A, X, ..., Y, B) with A, Y apart and X, B apart: tails all around."""
    for a, b in [(u, v) for u in range(graph.n) for v in bits(graph.circles(u))]:
        for x in bits(graph.circles(a) & ~graph.adjacent(b) & ~(1 << b)):
            for y in bits(graph.circles(b) & ~graph.adjacent(a) & ~(1 << a)):
                if (path := _uncovered(graph, a, x, y, b, Marks.circles)) is not None:
                    around = [a, *path, b, a]
                    yield tuple(change for u, v in pairwise(around) for change in ((u, v, TAIL), (v, u, TAIL)))


def _rule_5_together(graph: Marks) -> Iterator[Proposal]:
    """The same where proposals are collected: every edge around such a path is itself the A o-o B of one, so it can go alone."""
    for a in range(graph.n):
        for b in bits(graph.circles(a) >> a + 1 << a + 1):
            starts = graph.circles(a) & ~graph.adjacent(b) & ~(1 << b)
            stops = graph.circles(b) & ~graph.adjacent(a) & ~(1 << a)
            if any(_uncovered(graph, a, x, y, b, Marks.circles) is not None for x in bits(starts) for y in bits(stops)):
                yield (a, b, TAIL), (b, a, TAIL)


def _rule_6(graph: Marks) -> Iterator[Proposal]:
    """A --- B o-* C: B --* C."""
    for b in range(graph.n):
        if graph.undirected(b):
            for c in bits(graph.circle[b]):
                yield ((c, b, TAIL),)


def _rule_7(graph: Marks) -> Iterator[Proposal]:
    """A --o B o-* C with A, C apart: B --* C."""
    for b in range(graph.n):
        open_ends = graph.circle[b]
        for a in bits(open_ends):
            if graph.tail[a] >> b & 1:
                for c in bits(open_ends & ~graph.adjacent(a) & ~(1 << a)):
                    yield ((c, b, TAIL),)


# ----------------------------------------------------------------------------------------------------------------- R8-R10: tails


def _rule_8(graph: Marks) -> Iterator[Proposal]:
    """A --> B --> C or A --o B --> C, and A o-> C: A --> C."""
    for b in range(graph.n):
        children = sum(1 << c for c in bits(graph.tail[b]) if graph.arrow[c] >> b & 1)
        for a in bits(graph.arrow[b] | graph.circle[b]):
            if graph.tail[a] >> b & 1:
                for c in bits(children & graph.circle[a]):
                    if graph.arrow[c] >> a & 1:
                        yield ((c, a, TAIL),)


def _rule_9(graph: Marks) -> Iterator[Proposal]:
    """A o-> C and an uncovered possibly directed path (A, B, ..., D, C) with B, C apart: A --> C."""
    for a, c in _open_arrows(graph):
        outside = ~(1 << a | 1 << c)
        for b in bits(graph.possible_children(a) & ~graph.adjacent(c) & outside):
            lasts = graph.possible_parents(c) & outside & ~(1 << b)
            if any(_uncovered(graph, a, b, d, c, Marks.possible_children) is not None for d in bits(lasts)):
                yield ((c, a, TAIL),)
                break


def _rule_10(graph: Marks) -> Iterator[Proposal]:
    """A o-> C, B --> C <-- D, uncovered possibly directed paths from A to B and to D whose second nodes differ and are apart.

    Then A --> C. A path may be one edge; its second node is then its last.
    """
    for a, c in _open_arrows(graph):
        parents = graph.parents(c)
        seconds = {
            b: [s for s in bits(graph.possible_children(a) & ~(1 << c)) if _leads(graph, a, s, b, c)]
            for b in bits(parents & ~(1 << a))
        }
        if any(
            s != t and not graph.joined(s, t)
            for b, d in combinations(seconds, 2)
            for s in seconds[b]
            for t in seconds[d]
        ):
            yield ((c, a, TAIL),)


def _open_arrows(graph: Marks) -> Iterator[tuple[int, int]]:
    """The a o-> c."""
    for a in range(graph.n):
        for c in bits(graph.circle[a]):
            if graph.arrow[c] >> a & 1:
                yield a, c


def _leads(graph: Marks, a: int, second: int, b: int, without: int) -> bool:
    """Whether an uncovered possibly directed path leads from a over ``second`` to b, not over ``without``."""
    if second == b:
        return True
    allowed = (1 << graph.n) - 1 & ~(1 << a | 1 << without)
    return (
        _walk(graph, a, second, 1 << b, allowed & ~(1 << second), Marks.possible_children, lambda _: True) is not None
    )


# -------------------------------------------------------------------------------------------------------------- uncovered paths


def _uncovered(
    graph: Marks, a: int, first: int, last: int, b: int, step: Callable[[Marks, int], int]
) -> list[int] | None:
    """What is between a and b on a path (a, first, ..., last, b) of which no node's two neighbours are joined."""
    if first == last:
        return [first]
    allowed = (1 << graph.n) - 1 & ~(1 << a | 1 << b | 1 << first)
    return _walk(graph, a, first, 1 << last, allowed, step, lambda before: not graph.joined(before, b))


def _walk(
    graph: Marks,
    before: int,
    here: int,
    goal: int,
    allowed: int,
    step: Callable[[Marks, int], int],
    may_end: Callable[[int], bool],
) -> list[int] | None:
    """Depth first from ``here`` to ``goal``, nodes ascending; ``may_end`` is asked of the node before the goal."""
    nearby = step(graph, here) & allowed & ~graph.adjacent(before)
    if nearby & goal and may_end(here):
        return [here, goal.bit_length() - 1]
    for following in bits(nearby & ~goal):
        rest = _walk(graph, here, following, goal, allowed & ~(1 << following), step, may_end)
        if rest is not None:
            return [here, *rest]
    return None


# --------------------------------------------------------------------------------------------------------------- without latents


def orient_pdag(graph: Marks, separating: SeparatingSets, *, stable: bool) -> None:
    """Orient a graph without latent causes whose marks are at their start: colliders, then Meek's rules 1-3 until nothing changes.

    An edge that colliders orient both ways stays undirected, and so, with ``stable``, does one that a rule does. While the rules
    run, circles stand for the tails of what is undirected.
    """
    into = {(u, v) for proposal in _colliders(separating)(graph) for u, v, _ in proposal}
    for u, v in into:
        if (v, u) not in into:
            graph.put(u, v, ARROW)
            graph.put(v, u, TAIL)
    _apply([_meek_1, _meek_2, _meek_3], graph, stable=stable)
    graph.tail = [tail | circle for tail, circle in zip(graph.tail, graph.circle, strict=True)]
    graph.circle = [0] * graph.n


def _meek_1(graph: Marks) -> Iterator[Proposal]:
    """Z --> X --- Y with Z, Y apart: X --> Y."""
    for y in range(graph.n):
        for x in bits(graph.circles(y)):
            if graph.parents(x) & ~graph.adjacent(y) & ~(1 << y):
                yield (x, y, ARROW), (y, x, TAIL)


def _meek_2(graph: Marks) -> Iterator[Proposal]:
    """X --> Z --> Y and X --- Y: X --> Y."""
    for y in range(graph.n):
        for x in bits(graph.circles(y)):
            if any(graph.parents(z) >> x & 1 for z in bits(graph.parents(y))):
                yield (x, y, ARROW), (y, x, TAIL)


def _meek_3(graph: Marks) -> Iterator[Proposal]:
    """X --- W --> Y, X --- Z --> Y with W, Z apart, and X --- Y: X --> Y."""
    for y in range(graph.n):
        for x in bits(graph.circles(y)):
            shared = graph.circles(x) & graph.parents(y)
            if any(not graph.joined(w, z) for w, z in combinations(bits(shared), 2)):
                yield (x, y, ARROW), (y, x, TAIL)
