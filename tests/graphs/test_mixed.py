"""Mixed graphs, and how they are compared."""

from __future__ import annotations

import networkx as nx
import pytest

from causal_probe import CausalProbeError
from causal_probe.graphs import arrowheads, compare, mixed_graph
from causal_probe.graphs.mixed import as_mixed, mixed_edges, show_mixed_edge


def test_skeletons_are_compared_whatever_the_marks() -> None:
    found = mixed_graph(4, [(0, "o", ">", 1), (2, "<", ">", 1), (0, "-", "-", 3)])
    truth = nx.DiGraph([(0, 1), (1, 2), (2, 3)])
    result = compare(found, truth, mode="skeleton")
    assert (result.true_positives, result.missing, result.extra, result.reversed) == (2, ((2, 3),), ((0, 3),), ())
    assert result.parent_accuracy is None
    assert result.undefined["parent_accuracy"] == "skeleton have no parents"


def test_arrowheads_are_compared_one_by_one() -> None:
    found = mixed_graph(3, [(0, "o", ">", 1), (1, "<", ">", 2)])
    truth = nx.DiGraph([(0, 1), (1, 2)])
    result = compare(found, truth, mode="arrowheads")
    assert (result.true_positives, result.missing, result.extra) == (2, (), ((2, 1),))
    assert arrowheads(found) == {(0, 1), (1, 2), (2, 1)}
    assert arrowheads(truth) == set(truth.edges)


def test_skeleton_weights_rank_pairs() -> None:
    weights = [[0, 0, 0], [0.9, 0, 0], [0.1, 0.8, 0]]
    truth = nx.DiGraph([(1, 0), (1, 2)])
    assert compare(mixed_graph(3), truth, mode="skeleton", weights=weights).auroc == 1


def test_marks_and_parents_do_not_mix() -> None:
    with pytest.raises(CausalProbeError, match="mode='skeleton' or 'arrowheads'"):
        compare(mixed_graph(2, [(0, "o", "o", 1)]), nx.DiGraph([(0, 1)]))
    with pytest.raises(CausalProbeError, match="The mode 'edges' was asked for"):
        compare(nx.DiGraph(), nx.DiGraph(), mode="edges")


@pytest.mark.parametrize("edges", [[(0, "x", ">", 1)], [(0, "-", ">", 0)], [(0, "-", ">", 1), (1, "-", ">", 0)]])
def test_what_is_no_mixed_graph(edges: list[tuple[int, str, str, int]]) -> None:
    with pytest.raises(CausalProbeError):
        mixed_graph(2, edges)


def test_half_an_edge_is_refused() -> None:
    graph = nx.DiGraph()
    graph.add_edge(0, 1, mark="arrow")
    with pytest.raises(CausalProbeError, match="both arcs of every edge"):
        as_mixed(graph)


@pytest.mark.parametrize("signs", ["o>", "<>", "->", "--", "oo", "<-", "o-"])
def test_edges_are_written_as_they_were_given(signs: str) -> None:
    graph = mixed_graph(2, [(0, signs[0], signs[1], 1)])
    assert show_mixed_edge(graph, *mixed_edges(graph)[0]) == f"0 {signs[0]}-{signs[1]} 1"
