"""Directed graphs over positions: the ground floor of causal-probe.

A causal graph says from which earlier tokens each token of a sequence was generated. It is a plain
:class:`networkx.DiGraph`: its nodes are the positions ``0..n-1``, its edges go **from parent to child**, and every parent
comes before its child. So everything in networkx works on it, and there is no graph class to learn.

>>> from causal_probe.graphs import from_parents, two_parent_tree
>>> truth = from_parents([None, 0, 0, None, 2])   # nodes 0 and 3 are roots; 1 and 2 are children of 0; 4 is a child of 2
>>> list(truth.edges)
[(0, 1), (0, 2), (2, 4)]
>>> [sorted(two_parent_tree(5).predecessors(node)) for node in range(5)]
[[], [], [0, 1], [1, 2], [1, 3]]

A graph that was found, by a probe or otherwise, is compared with the truth edge by edge. Here one parent is wrong: the edge
2 -> 4 is missing and 3 -> 4 is extra.

>>> from causal_probe.graphs import compare
>>> found = from_parents([None, 0, 0, None, 3])
>>> result = compare(found, truth)
>>> result.shd, result.missing, result.extra, result.wrong_nodes
(2, ((2, 4),), ((3, 4),), (4,))
>>> result.root_accuracy, round(result.parent_accuracy, 3)
(1.0, 0.667)

The evidence behind the found graph, an array ``[child, parent]``, is ranked over all pairs parent < child as well. What is
undefined is None, with a reason beside it: without weights there is nothing to rank.

>>> import numpy as np
>>> evidence = np.zeros((5, 5))
>>> evidence[[1, 2, 4, 4], [0, 0, 3, 2]] = [0.9, 0.8, 0.5, 0.4]
>>> round(compare(found, truth, weights=evidence).auroc, 4)   # 20/21: of 3 edges x 7 other pairs one is ranked wrongly
0.9524
>>> result.auroc is None, result.undefined["auroc"]
(True, 'no weights were given')

Whatever is not a causal graph is refused with everything that is wrong with it.

>>> import networkx as nx
>>> from causal_probe.graphs import check_graph
>>> check_graph(nx.DiGraph([(0, 1), (3, 1)]))
Traceback (most recent call last):
...
causal_probe.errors.CausalProbeError: The graph can't be used: the numbering leaves out 2; the parent comes after its child \
in 3 -> 1. Its nodes must be the integers 0..n-1, its edges go from parent to child, and each parent comes before its child.
"""

from __future__ import annotations

from causal_probe.graphs.check import check_graph
from causal_probe.graphs.choice import FAMILIES, choose_graph
from causal_probe.graphs.compare import GraphComparison, compare
from causal_probe.graphs.families import chain, from_parents, lag, pairs, random_dag, random_forest, two_parent_tree
from causal_probe.graphs.files import read_graph, write_graph
from causal_probe.graphs.mixed import arrowheads, mixed_graph

__all__ = [
    "FAMILIES",
    "GraphComparison",
    "arrowheads",
    "chain",
    "check_graph",
    "choose_graph",
    "compare",
    "from_parents",
    "mixed_graph",
    "lag",
    "pairs",
    "random_dag",
    "random_forest",
    "read_graph",
    "two_parent_tree",
    "write_graph",
]


def __dir__() -> list[str]:
    return [*__all__]
