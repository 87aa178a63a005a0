"""Every number of a comparison against an independent computation, and the laws that the numbers obey."""

from __future__ import annotations

import dataclasses
import inspect
import json
import random
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import GraphComparison, chain, compare, from_parents, random_forest

Edges = set[tuple[int, int]]

N = 6
edge_sets = st.sets(st.sampled_from(list(permutations(range(N), 2))))
forward_edge_sets = st.sets(st.sampled_from(list(combinations(range(N), 2))))
row_sets = st.sets(st.integers(0, N - 1), min_size=1)

# The time of an example says nothing on a busy machine.
quick = settings(deadline=None, max_examples=50)


def graph_of(edges: Any, nodes: Any = range(N)) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    return graph


# ------------------------------------------------------------------------------------------------ independent computations


def distance(found: Edges, true: Edges, reversal_cost: int) -> int:
    """SHD, pair by pair of nodes."""
    total = 0
    for a, b in combinations(range(N), 2):
        in_found = ((a, b) in found, (b, a) in found)
        in_true = ((a, b) in true, (b, a) in true)
        if in_found == in_true[::-1] and sum(in_found) == 1:
            total += reversal_cost
        else:
            total += sum(x != y for x, y in zip(in_found, in_true, strict=True))
    return total


def area(positive: list[float], negative: list[float]) -> float:
    """AUROC by its meaning: how often a positive outweighs a negative, a tie counted half."""
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def average_precision(positive: list[float], negative: list[float]) -> float:
    """The precision at each threshold, weighted by the recall gained there."""
    total = 0.0
    for threshold in set(positive):
        hits, others = (sum(value >= threshold for value in values) for values in (positive, negative))
        total += positive.count(threshold) / len(positive) * hits / (hits + others)
    return total


# ------------------------------------------------------------------------------------------------------------------ numbers


@quick
@given(found=edge_sets, true=edge_sets, rows=row_sets, reversal_cost=st.sampled_from([1, 2]))
def test_counts_and_shares(found: Edges, true: Edges, rows: set[int], reversal_cost: int) -> None:
    result = compare(graph_of(found), graph_of(true), children=rows, reversal_cost=reversal_cost)
    found = {edge for edge in found if edge[1] in rows}
    true = {edge for edge in true if edge[1] in rows}

    assert result.children == tuple(sorted(rows))
    assert result.true_positives == len([edge for edge in found if edge in true])
    assert result.precision == (result.true_positives / len(found) if found else None)
    assert result.recall == (result.true_positives / len(true) if true else None)
    if result.precision and result.recall:
        harmonic = 2 / (1 / result.precision + 1 / result.recall)
        assert result.f1 == pytest.approx(harmonic)
    else:
        assert result.f1 == (0 if found or true else None)

    assert result.shd == distance(found, true, reversal_cost)
    assert result.exact is (found == true)
    # The parts are disjoint, and turn one graph into the other.
    turned = {edge[::-1] for edge in result.reversed}
    assert (found - set(result.extra) - turned) | set(result.missing) | set(result.reversed) == true
    assert len(result.missing) + len(result.extra) + reversal_cost * len(result.reversed) == result.shd

    right = {c: {p for p in range(N) if (p, c) in found} == {p for p in range(N) if (p, c) in true} for c in rows}
    children = [child for child in rows if any(edge[1] == child for edge in true)]
    roots = [child for child in rows if child not in children]
    assert result.wrong_nodes == tuple(sorted(child for child in rows if not right[child]))
    assert result.parent_accuracy == (np.mean([right[c] for c in children]) if children else None)
    assert result.root_accuracy == (np.mean([right[c] for c in roots]) if roots else None)

    names = ("precision", "recall", "f1", "parent_accuracy", "root_accuracy")
    assert {name for name in names if getattr(result, name) is None} == set(result.undefined) & set(names)


# Few different values make ties.
weight_lists = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 3.0]), min_size=N * N, max_size=N * N)


@quick
@given(true=forward_edge_sets, rows=row_sets, values=weight_lists)
def test_ranking(true: Edges, rows: set[int], values: list[float]) -> None:
    weights = np.array(values).reshape(N, N)
    weights[np.triu_indices(N)] = np.nan  # never looked at
    result = compare(graph_of(()), graph_of(true), weights=weights, children=rows)

    compared = [(parent, child) for parent, child in combinations(range(N), 2) if child in rows]
    positive = [float(weights[child, parent]) for parent, child in compared if (parent, child) in true]
    negative = [float(weights[child, parent]) for parent, child in compared if (parent, child) not in true]
    assert result.auroc == (pytest.approx(area(positive, negative)) if positive and negative else None)
    assert result.average_precision == (pytest.approx(average_precision(positive, negative)) if positive else None)
    assert result.average_precision_chance == (pytest.approx(len(positive) / len(compared)) if compared else None)

    # The same evidence on the edges of a graph; a pair without an edge weighs 0.
    heavy = [(p, c, {"weight": weights[c, p]}) for p, c in compared if weights[c, p] != 0]
    random.Random(0).shuffle(heavy)
    assert compare(graph_of(()), graph_of(true), weights=nx.DiGraph(heavy), children=rows) == result


def test_ranking_of_noise_is_at_chance() -> None:
    truth = random_forest(200, seed=0)
    noise = np.random.default_rng(0).random((200, 200))
    result = compare(truth, truth, weights=noise)
    assert result.auroc == pytest.approx(0.5, abs=5 / (12 * truth.number_of_edges()) ** 0.5)
    assert result.average_precision == pytest.approx(result.average_precision_chance, rel=0.5)


# --------------------------------------------------------------------------------------------------------------------- laws


@quick
@given(edges=forward_edge_sets)
def test_a_graph_compared_with_itself_is_perfect(edges: Edges) -> None:
    graph = graph_of(edges)
    result = compare(graph, graph, weights=nx.to_numpy_array(graph).T)
    assert (result.shd, result.missing, result.extra, result.reversed, result.wrong_nodes) == (0, (), (), (), ())
    assert result.exact
    assert result.root_accuracy == 1
    every_pair = len(edges) == N * (N - 1) // 2
    expected = 1 if edges else None
    assert result.precision == result.recall == result.f1 == result.parent_accuracy == expected
    assert result.average_precision == expected
    assert result.auroc == (None if every_pair else expected)


@quick
@given(found=edge_sets, true=edge_sets, reversal_cost=st.sampled_from([1, 2]))
def test_swapping_the_graphs(found: Edges, true: Edges, reversal_cost: int) -> None:
    there = compare(graph_of(found), graph_of(true), reversal_cost=reversal_cost)
    back = compare(graph_of(true), graph_of(found), reversal_cost=reversal_cost)
    assert there.shd == back.shd
    assert (there.precision, there.recall, there.f1) == (back.recall, back.precision, back.f1)
    assert (there.missing, there.extra) == (back.extra, back.missing)
    assert {edge[::-1] for edge in there.reversed} == set(back.reversed)
    assert there.wrong_nodes == back.wrong_nodes


@quick
@given(first=edge_sets, second=edge_sets, third=edge_sets)
def test_shd_is_a_metric(first: Edges, second: Edges, third: Edges) -> None:
    a, b, c = map(graph_of, (first, second, third))
    for cost in (1, 2):
        assert compare(a, c, reversal_cost=cost).shd <= (
            compare(a, b, reversal_cost=cost).shd + compare(b, c, reversal_cost=cost).shd
        )
    assert (compare(a, b).shd == 0) is (first == second)


@quick
@given(found=forward_edge_sets, true=forward_edge_sets, seed=st.integers(0, 1000))
def test_names_count_and_order_does_not(found: Edges, true: Edges, seed: int) -> None:
    """Nodes and edges may be added in any order, and either graph may lack nodes that have no edges in it."""
    weights = np.random.default_rng(seed).random((N, N))
    shuffle = random.Random(seed)

    def shuffled(edges: Edges, nodes: list[int]) -> nx.DiGraph:
        return graph_of(shuffle.sample(sorted(edges), len(edges)), shuffle.sample(nodes, len(nodes)))

    plain = compare(graph_of(found), graph_of(true), weights=weights)
    mentioned = sorted({node for edge in found for node in edge})
    assert compare(shuffled(found, mentioned), shuffled(true, list(range(N))), weights=weights) == plain


@quick
@given(found=edge_sets, true=edge_sets)
def test_other_names_give_the_same_numbers(found: Edges, true: Edges) -> None:
    plain = compare(graph_of(found), graph_of(true))
    named = compare(*(nx.relabel_nodes(graph_of(edges), dict(enumerate("udbcae"))) for edges in (found, true)))
    assert named.children == tuple("abcdeu")
    for name in ("true_positives", "precision", "recall", "f1", "shd", "parent_accuracy", "root_accuracy"):
        assert getattr(named, name) == getattr(plain, name)


# -------------------------------------------------------------------------------------------------------------------- cases


def test_a_reversed_edge_counts_once_or_twice() -> None:
    found, truth = graph_of({(1, 0), (1, 2)}), graph_of({(0, 1), (1, 2)})
    once, twice = compare(found, truth), compare(found, truth, reversal_cost=2)
    assert (once.shd, twice.shd) == (1, 2)
    assert once.reversed == twice.reversed == ((0, 1),)
    assert once.missing == once.extra == ()
    assert (once.precision, once.recall, once.wrong_nodes) == (0.5, 0.5, (0, 1))


def test_a_reversal_needs_both_its_rows() -> None:
    result = compare(graph_of({(1, 0)}), graph_of({(0, 1)}), children=[1])
    assert (result.missing, result.extra, result.reversed, result.shd) == (((0, 1),), (), (), 1)


def test_a_k_parent_comparison_leaves_the_predicted_node_out() -> None:
    """Four tokens, node 4 to be predicted: children 0..2 are compared, on a 4 x 4 array of patterns."""
    truth = from_parents([None, 0, [0, 1], [1, 2], [2, 3]])
    found = from_parents([None, 0, [0, 1], [0, 1]])
    result = compare(found, truth, children=range(3), weights=np.eye(4, k=-1))
    assert result.exact
    assert result.children == (0, 1, 2)
    assert result.auroc is None
    assert result.undefined["auroc"] == "every compared pair is a true edge"
    assert compare(found, truth).wrong_nodes == (3, 4)


def test_reasons() -> None:
    empty = compare(graph_of(()), graph_of(()))
    assert empty.root_accuracy == 1
    assert empty.undefined == {
        "precision": "no edge was found",
        "recall": "there is no true edge",
        "f1": "neither graph has an edge",
        "parent_accuracy": "no compared node has a true parent",
        "auroc": "no weights were given",
        "average_precision": "no weights were given",
        "average_precision_chance": "no weights were given",
    }
    child = compare(chain(3), chain(3), children=[2])
    assert child.undefined["root_accuracy"] == "every compared node has a true parent"
    first = compare(chain(3), chain(3), children=[0], weights=np.zeros((3, 3)))
    assert first.undefined["auroc"] == "no compared node has a node before it"
    root = compare(graph_of(()), graph_of(()), weights=np.zeros((N, N)))
    assert root.undefined["auroc"] == "no compared pair is a true edge"
    assert root.average_precision_chance == 0


# -------------------------------------------------------------------------------------------------------------------- shown


def test_it_prints_shows_and_saves() -> None:
    result = compare(from_parents([None, 0, 0]), from_parents([None, 0, 1]), weights=np.eye(3, k=-1))
    lines = repr(result).splitlines()
    assert lines[0] == "GraphComparison over 3 nodes: SHD 2"
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "metric value note",
        "precision 0.5 1 of 2 found edges are true",
        "recall 0.5 1 of 2 true edges are found",
        "f1 0.5",
        "parent accuracy 0.5 non-root nodes with exactly their parents",
        "root accuracy 1 roots without a parent",
        "auroc 1 chance 0.5",
        "average precision 1 chance 0.6667",
        "missing 1 1 -> 2",
        "extra 1 0 -> 2",
        "reversed 0",
    ]
    assert "<td>0.5</td>" in result._repr_html_()
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["missing"] == [[1, 2]]
    assert data["children"] == [0, 1, 2]
    assert data["undefined"] == {}
    assert set(data) == {"kind", "format", *(field.name for field in dataclasses.fields(GraphComparison))}


def test_a_saved_comparison_comes_back(tmp_path: Path) -> None:
    for result in (
        compare(from_parents([None, 0, 0]), from_parents([None, 0, 1]), weights=np.eye(3, k=-1)),
        compare(graph_of([("a", "b")], ("c",)), graph_of([("b", "a")], ("c",))),
    ):
        result.save(tmp_path / "a.safetensors")
        again = GraphComparison.load(tmp_path / "a.safetensors")
        assert again.to_dict() == result.to_dict()
        assert again.missing == result.missing
        assert repr(again) == repr(result)


def test_names_are_escaped_in_a_notebook() -> None:
    shown = compare(graph_of([("<b>", "c")], ()), graph_of((), ()))._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;" in shown


def test_it_can_be_cited() -> None:
    citation = compare(chain(3), chain(3), weights=np.eye(3, k=-1), reversal_cost=2).cite()
    assert citation.bibtex.startswith("@article{tsamardinos2006,")
    assert "incoming edges of 3 nodes" in citation.methods
    assert "2 x reversed edges" in citation.methods
    assert "AUROC" in citation.methods
    assert "AUROC" not in compare(chain(3), chain(3)).cite().methods


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((nx.Graph(), chain(2)), {}, "predicted is a Graph. It must be a networkx.DiGraph"),
        ((chain(2), nx.MultiDiGraph()), {}, "truth is a MultiDiGraph. It must be a networkx.DiGraph"),
        (([(0, 1)], chain(2)), {}, "predicted is a list."),
        ((graph_of([(1, 1), (3, 3)]), chain(4)), {}, "predicted has self loops at 1, 3."),
        ((graph_of([("0", "1")], ()), chain(2)), {}, "predicted has nodes of the types str, truth of the types int."),
        ((chain(2), chain(2)), {"children": [1, 5, "x"]}, "children has 'x', 5, which neither graph has."),
        ((chain(2), chain(2)), {"children": 1}, "children is 1. It must be a collection of nodes."),
        ((chain(2), chain(2)), {"reversal_cost": 0}, "reversal_cost is 0. It must be 1 (one wrong edge) or 2"),
        ((chain(2), chain(2)), {"reversal_cost": True}, "reversal_cost is True."),
        (
            (chain(3), chain(3)),
            {"weights": np.zeros((2, 3))},
            "weights has the shape (2, 3). It must be a square array",
        ),
        ((chain(3), chain(3)), {"weights": np.zeros((2, 2))}, "over at least 3 nodes."),
        (
            (chain(3), chain(3)),
            {"weights": np.full((3, 3), np.nan)},
            "The weights of 0 -> 1, 0 -> 2, 1 -> 2 are not finite.",
        ),
        ((chain(3), chain(3)), {"weights": np.full((3, 3), np.inf)}, "The weights of 0 -> 1"),
        ((chain(3), chain(3)), {"weights": "heavy"}, "weights can't be read as an array of numbers"),
        ((chain(3), chain(3)), {"weights": chain(3)}, "The edges 0 -> 1, 1 -> 2 of weights carry no 'weight'."),
        ((chain(3), chain(3)), {"weights": nx.Graph()}, "weights is a Graph."),
        ((chain(3), graph_of([(2, 1)])), {"weights": np.eye(N)}, "the truth has 2 -> 1."),
        ((graph_of([("a", "b")], ()), graph_of((), "a")), {"weights": np.eye(2)}, "'a', 'b' are not positions."),
        ((graph_of([(-1, 0)], ()), chain(2)), {"weights": np.eye(2)}, "-1 are not positions."),
    ],
)
def test_bad_input(arguments: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    # Without the types that pytest checks at run time: a user's session has none.
    with pytest.raises(CausalProbeError) as caught:
        inspect.unwrap(compare)(*arguments, **options)
    assert message in str(caught.value)


def test_weights_the_other_way_round_are_recognised() -> None:
    truth = from_parents([None, 0, 0, 2])
    array = nx.to_numpy_array(truth)
    behind = nx.DiGraph([(1, 0, {"weight": 1.0}), (3, 2, {"weight": 0.5})])
    for turned in (array, np.where(np.tri(4, dtype=bool), 0.5, array), behind):
        with pytest.raises(CausalProbeError, match=r"Give \[child, parent\], their transpose\."):
            compare(truth, truth, weights=turned)
    assert compare(truth, truth, weights=array.T).auroc == 1
    # Constant everywhere, or behind what is not finite, nothing tells which way round.
    for same in (np.zeros((4, 4)), np.triu(np.full((4, 4), np.nan)), np.ones((4, 4))):
        assert compare(truth, truth, weights=same).auroc == 0.5
