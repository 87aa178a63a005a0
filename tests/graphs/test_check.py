"""A causal graph passes; of anything else, all that is wrong is named."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import chain, check_graph, from_parents
from causal_probe.graphs.check import NAMED, find_problems, parent_lists

# The time of an example says nothing on a busy machine.
quick = settings(deadline=None, max_examples=50)


def graph_of(*edges: tuple[object, object], nodes: object = ()) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    return graph


@quick
@given(
    nodes=st.sets(st.integers(-1, 5)),
    edges=st.sets(st.tuples(st.integers(-1, 5), st.integers(-1, 5)), max_size=6),
)
def test_accepts_exactly_the_causal_graphs(nodes: set[int], edges: set[tuple[int, int]]) -> None:
    graph = graph_of(*edges, nodes=nodes)
    everything = nodes | {node for edge in edges for node in edge}
    causal = bool(everything) and everything == set(range(len(everything))) and all(u < v for u, v in edges)
    assert (find_problems(graph) == []) is causal
    if causal:
        check_graph(graph)
    else:
        with pytest.raises(CausalProbeError):
            check_graph(graph)


@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        (nx.DiGraph(), "it has no nodes"),
        (nx.Graph([(0, 1)]), "it is undirected, so nothing tells a parent from its child"),
        (nx.MultiDiGraph([(0, 1), (0, 1)]), "it is a multigraph, which may hold an edge more than once"),
        (graph_of((0, 2), (4, 9)), "the numbering leaves out 1, 3, 5-8"),
        (graph_of((0, 10**12)), "the numbering leaves out 1-999999999999"),
        (graph_of(nodes=[-2, 0, 1]), "negative: the nodes -2"),
        (graph_of(nodes=[0, "1", 2.0, True, (3,)]), "not integers: the nodes '1', 2.0, True, (3,)"),
        (graph_of((0, 1), (1, 1), (2, 2)), "self loops at 1, 2"),
        (graph_of((1, 0)), "the parent comes after its child in 1 -> 0"),
        (
            graph_of((0, 1), (3, 2), (1, 3), (2, 1)),
            "a cycle in 1 -> 3 -> 2 -> 1; the parent comes after its child in 2 -> 1, 3 -> 2",
        ),
        (
            graph_of((0, 1), (1, 0), (2, 3), (3, 2)),
            "a cycle in 0 -> 1 -> 0, 2 -> 3 -> 2; the parent comes after its child in 1 -> 0, 3 -> 2",
        ),
        # Of names that are not positions, the cycle is all that can be told.
        (graph_of(("a", "b"), ("b", "a")), "not integers: the nodes 'a', 'b'; a cycle in 'a' -> 'b' -> 'a'"),
    ],
)
def test_names_what_is_wrong(graph: nx.Graph, problem: str) -> None:
    assert "; ".join(find_problems(graph)) == problem


def test_says_everything_at_once() -> None:
    graph = graph_of((5, 2), (2, 2), (0, 2), ("x", 0))
    assert find_problems(graph, nodes=3, max_parents=1) == [
        "it has 4 nodes where 3 were expected",
        "not integers: the nodes 'x'",
        "the numbering leaves out 1, 3-4",
        "self loops at 2",
        "the parent comes after its child in 5 -> 2",
        "more than 1 parents at 2 (3)",
    ]


def test_expectations() -> None:
    graph = from_parents([None, 0, [0, 1]])
    check_graph(graph, nodes=3, max_parents=2)
    with pytest.raises(CausalProbeError, match="it has 3 nodes where 4 were expected"):
        check_graph(graph, nodes=4)
    with pytest.raises(CausalProbeError, match=r"more than 1 parents at 2 \(2\)"):
        check_graph(graph, max_parents=1)


def test_the_message_is_one_paragraph_that_says_what_to_do() -> None:
    with pytest.raises(CausalProbeError) as caught:
        check_graph(graph_of((1, 0)))
    assert str(caught.value) == (
        "The graph can't be used: the parent comes after its child in 1 -> 0. Its nodes must be the integers 0..n-1, "
        "its edges go from parent to child, and each parent comes before its child."
    )


def test_what_is_no_graph_at_all() -> None:
    assert find_problems([(0, 1)]) == ["it is a list, not a networkx.DiGraph"]


def test_a_message_stays_readable() -> None:
    (problem,) = find_problems(graph_of(*((node, node - 1) for node in range(1, 2000, 2)), nodes=range(2000)))
    assert problem.count("->") == NAMED
    assert problem.endswith("99 -> 98 and 950 more")
    (stranger,) = find_problems(graph_of(nodes=["x" * 10**6]))
    assert len(stranger) < 100


def test_numpy_integers_are_positions() -> None:
    graph = nx.relabel_nodes(chain(3), {node: np.int64(node) for node in range(3)})
    check_graph(graph)
    assert parent_lists(graph) == ((), (0,), (1,))
    assert all(type(parent) is int for parents in parent_lists(graph) for parent in parents)


def test_parent_lists_are_ascending_and_ordered_by_node() -> None:
    graph = graph_of((2, 3), (0, 3), (1, 3), (0, 1), nodes=[4])
    assert parent_lists(graph) == ((), (0,), (), (0, 1, 2), ())
    with pytest.raises(CausalProbeError, match="self loops at 0"):
        parent_lists(graph_of((0, 0)))
