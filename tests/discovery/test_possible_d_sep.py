"""Legal sets against brute force over all subsets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from causal_probe.discovery.marks import Marks
from causal_probe.discovery.possible_d_sep import possible_d_sep


def random_graph(rng: np.random.Generator) -> Marks:
    graph = Marks(int(rng.integers(3, 8)))
    for i, j in combinations(range(graph.n), 2):
        if rng.random() < 0.5:
            graph.remove(i, j)
        else:
            for u, v in ((i, j), (j, i)):
                graph.put(u, v, str(rng.choice(["tail", "arrow", "circle"], p=[0.15, 0.6, 0.25])))
    return graph


def test_legal_sets_are_those_of_the_definition() -> None:
    """Every node of the set at the end of a branch that is all in the set; by the sum of distances, then ascending."""
    rng = np.random.default_rng(0)
    through_others = 0
    for _ in range(200):
        graph = random_graph(rng)
        tree = possible_d_sep(graph, 0)
        within = int(rng.integers(0, 1 << graph.n))
        for size in range(1, graph.n):
            expected = []
            for nodes in combinations(sorted(set(tree.branches) - {0}), size):
                inside = sum(1 << node for node in nodes)
                if not inside & ~within and all(
                    any(not branch & ~inside for branch in tree.branches[node]) for node in nodes
                ):
                    expected.append((sum(tree.distance[node] for node in nodes), nodes))
            found = tree.legal_sets(size, within)
            assert found == [nodes for _, nodes in sorted(expected)]
            through_others += any(tree.distance[node] > 1 for nodes in found for node in nodes)
            if found:
                with pytest.raises(OverflowError):
                    tree.legal_sets(size, within, limit=len(found) - 1)
    assert through_others > 10
