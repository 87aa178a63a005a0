"""A mixed graph to work on: the neighbours of every node by the mark at the node, as bits of an integer.

Learners ask millions of times which nodes are adjacent, and with which marks; sets as bits make that one operation each.
"""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx

__all__ = ["ARROW", "CIRCLE", "TAIL", "Marks", "bits", "reach"]

TAIL, ARROW, CIRCLE = "tail", "arrow", "circle"


def bits(mask: int) -> Iterator[int]:
    """The elements of a set of bits, ascending.

    >>> list(bits(0b1011))
    [0, 1, 3]
    """
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def reach(start: int, steps: list[int], within: int = -1) -> int:
    """All nodes that can be reached from those of ``start``, themselves included, one step from i going to ``steps[i]``.

    >>> bin(reach(0b001, [0b010, 0b100, 0b000]))
    '0b111'
    """
    found = frontier = start
    while frontier:
        nearby = 0
        for node in bits(frontier):
            nearby |= steps[node]
        frontier = nearby & within & ~found
        found |= frontier
    return found


class Marks:
    """A mixed graph over the nodes 0..n-1 that can be changed.

    Attributes
    ----------
    tail, arrow, circle
        For each node v, the neighbours u with that mark **at v** on the edge between u and v.
    """

    def __init__(self, n: int) -> None:
        """The complete graph, with circles everywhere."""
        self.n = n
        everything = (1 << n) - 1
        self.tail = [0] * n
        self.arrow = [0] * n
        self.circle = [everything & ~(1 << node) for node in range(n)]

    @classmethod
    def from_networkx(cls, graph: nx.DiGraph) -> Marks:
        """From a mixed graph over the nodes 0..n-1, as :meth:`to_networkx` gives it."""
        marks = cls(len(graph))
        marks.circle = [0] * marks.n
        for u, v, data in graph.edges(data=True):
            marks.put(u, v, data["mark"])
        return marks

    def adjacent(self, node: int) -> int:
        """The neighbours of a node."""
        return self.tail[node] | self.arrow[node] | self.circle[node]

    def joined(self, u: int, v: int) -> bool:
        """Whether there is an edge between two nodes."""
        return bool(self.adjacent(v) >> u & 1)

    def mark(self, u: int, v: int) -> str | None:
        """The mark at v on the edge between u and v, None where there is none."""
        for mark, at in ((TAIL, self.tail), (ARROW, self.arrow), (CIRCLE, self.circle)):
            if at[v] >> u & 1:
                return mark
        return None

    def put(self, u: int, v: int, mark: str) -> None:
        """Put a mark at v on the edge between u and v."""
        bit = 1 << u
        for name, at in ((TAIL, self.tail), (ARROW, self.arrow), (CIRCLE, self.circle)):
            if name == mark:
                at[v] |= bit
            else:
                at[v] &= ~bit

    def remove(self, u: int, v: int) -> None:
        """Remove the edge between two nodes."""
        for at in (self.tail, self.arrow, self.circle):
            at[v] &= ~(1 << u)
            at[u] &= ~(1 << v)

    def reset(self, mark: str = CIRCLE) -> None:
        """Keep the edges, with the same mark at every end."""
        adjacent = [self.adjacent(node) for node in range(self.n)]
        for name in (TAIL, ARROW, CIRCLE):
            setattr(self, name, list(adjacent) if name == mark else [0] * self.n)

    def parents(self, node: int) -> int:
        """The u with u --> node: an arrow at the node, a tail at u."""
        return sum(1 << u for u in bits(self.arrow[node]) if self.tail[u] >> node & 1)

    def undirected(self, node: int) -> int:
        """The u with u --- node: a tail at both."""
        return sum(1 << u for u in bits(self.tail[node]) if self.tail[u] >> node & 1)

    def circles(self, node: int) -> int:
        """The u with u o-o node: a circle at both."""
        return sum(1 << u for u in bits(self.circle[node]) if self.circle[u] >> node & 1)

    def possible_children(self, node: int) -> int:
        """The v such that the edge can be node --> v: no arrow at the node, no tail at v."""
        candidates = self.tail[node] | self.circle[node]
        return sum(1 << v for v in bits(candidates) if not self.tail[v] >> node & 1)

    def possible_parents(self, node: int) -> int:
        """The u such that the edge can be u --> node: no arrow at u, no tail at the node."""
        candidates = self.arrow[node] | self.circle[node]
        return sum(1 << u for u in bits(candidates) if not self.arrow[u] >> node & 1)

    def to_networkx(self) -> nx.DiGraph:
        """As the package shows mixed graphs: both arcs of every edge, the mark at its head as ``mark``."""
        graph = nx.empty_graph(self.n, create_using=nx.DiGraph)
        for v in range(self.n):
            for mark, at in ((TAIL, self.tail), (ARROW, self.arrow), (CIRCLE, self.circle)):
                graph.add_edges_from(((u, v) for u in bits(at[v])), mark=mark)
        return graph
