"""The tree of possible d-separation: which sets could separate a node from others, where some causes may be latent.

From its root the tree follows every path of which each inner node is a collider or closes a triangle with its neighbours on the
path, and takes each edge of the graph once. A set of nodes is *legal* if each of them lies at the end of a branch that is all in the
set.

References
----------
.. [1] R. Y. Rohekar, S. Nisimov, Y. Gurwicz, G. Novik. Iterative causal discovery in the possible presence of latent confounders
   and selection bias. NeurIPS 2021. (Definitions 2-3, conditions of ICD-Sep.)
"""

from __future__ import annotations

import dataclasses
from math import comb

from causal_probe.discovery.marks import Marks, bits

__all__ = ["PossibleDSep", "possible_d_sep"]


@dataclasses.dataclass(frozen=True)
class PossibleDSep:
    """The tree of possible d-separation of a node.

    Attributes
    ----------
    root
        The node.
    branches
        For each node of the tree: the nodes of each branch that ends there, as bits, itself included and the root not.
    distance
        For each node of the tree: the length of the shortest branch to it.
    """

    root: int
    branches: dict[int, list[int]]
    distance: dict[int, int]

    @property
    def nodes(self) -> int:
        """All nodes of the tree but the root, as bits."""
        return sum(1 << node for node in self.branches if node != self.root)

    def legal_sets(self, size: int, within: int = -1, *, limit: float = float("inf")) -> list[tuple[int, ...]]:
        """The legal sets of a size whose nodes are in ``within``, by the sum of their distances, then ascending.

        Raises
        ------
        OverflowError
            If there are more than ``limit``.
        """
        direct: list[int] = []  # what is joined to the root needs no other node
        through: list[tuple[int, list[int]]] = []  # the others need the rest of one of their branches
        for node, branches in self.branches.items():
            if node == self.root or not within >> node & 1:
                continue
            bit = 1 << node
            if bit in branches:
                direct.append(bit)
            elif usable := [branch ^ bit for branch in branches if not branch & ~within]:
                through.append((bit, usable))
        if not through and comb(len(direct), size) > limit:
            raise OverflowError
        # Every legal set is reached by adding one node at a time: shorter branches first.
        found = {0}
        for _ in range(size):
            larger = {chosen | bit for chosen in found for bit in direct if not chosen & bit}
            for bit, needed in through:
                for chosen in found:
                    if not chosen & bit and any(not need & ~chosen for need in needed):
                        larger.add(chosen | bit)
            found = larger
            if len(found) > limit:
                raise OverflowError
        sets = [tuple(bits(chosen)) for chosen in found]
        return sorted(sets, key=lambda nodes: (self.total_distance(nodes), nodes))

    def total_distance(self, nodes: tuple[int, ...]) -> int:
        """The sum of the nodes' distances from the root."""
        return sum(self.distance[node] for node in nodes)


def possible_d_sep(
    graph: Marks, root: int, *, depth: int | None = None, within: int = -1, stable: bool = True
) -> PossibleDSep:
    """The tree of a node, to a depth (by default to its end), over the nodes in ``within``.

    With ``stable`` all branches of a length grow together, and an edge is used up once they have: the order of the nodes plays no
    part. Otherwise branches grow one after the other, nodes ascending, and each uses up its edge at once, as in the authors' code.

    Examples
    --------
    >>> found = possible_d_sep(Marks(3), 0)
    >>> found.distance, found.legal_sets(2)
    ({1: 1, 2: 1}, [(1, 2)])
    """
    adjacent = [graph.adjacent(node) & within for node in range(graph.n)]
    unused = list(adjacent)
    branches: dict[int, list[int]] = {}
    distance: dict[int, int] = {}

    def use_up(edges: list[tuple[int, int]]) -> None:
        for u, v in edges:
            unused[u] &= ~(1 << v)
            unused[v] &= ~(1 << u)

    def note(node: int, branch: int, length: int) -> None:
        if branch not in (known := branches.setdefault(node, [])):
            known.append(branch)
        distance.setdefault(node, length)  # breadth first: the shortest comes first

    level = [(root, node, 1 << node) for node in bits(adjacent[root])]
    use_up([(root, node) for _, node, _ in level])
    length = 1
    while level:
        for _, node, branch in level:
            note(node, branch, length)
        if depth is not None and length >= depth:
            break
        following: list[tuple[int, int, int]] = []
        used: list[tuple[int, int]] = []
        for before, node, branch in level:
            passable = adjacent[before] | (graph.arrow[node] if graph.arrow[node] >> before & 1 else 0)
            for onward in bits(unused[node] & passable & ~(1 << before)):
                following.append((node, onward, branch | 1 << onward))
                if stable:
                    used.append((node, onward))
                else:
                    use_up([(node, onward)])
        use_up(used)
        # Two branches over the same nodes that end with the same edge grow alike.
        level, length = list(dict.fromkeys(following)), length + 1
    return PossibleDSep(root, branches, distance)
