"""The families are what their definitions say, and the random ones have the law they state."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.graphs.check import parent_lists

# The time of an example says nothing on a busy machine.
quick = settings(deadline=None, max_examples=50)

GOLDEN = {
    "chain": (graphs.chain(5), [(), (0,), (1,), (2,), (3,)]),
    "lag-1": (graphs.lag(3, k=1), [(), (0,), (1,)]),
    "lag-3": (graphs.lag(5, k=3), [(), (), (), (0,), (1,)]),
    "lag-9": (graphs.lag(3, k=9), [(), (), ()]),
    "pairs, odd": (graphs.pairs(5), [(), (0,), (), (2,), ()]),
    "pairs, even": (graphs.pairs(4), [(), (0,), (), (2,)]),
    "two parents": (graphs.two_parent_tree(9), [(), (), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5), (3, 6), (3, 7)]),
    "all roots": (graphs.random_forest(4, root_probability=1, seed=0), [(), (), (), ()]),
    "complete": (graphs.random_dag(4, parents=9, seed=0), [(), (0,), (0, 1), (0, 1, 2)]),
    # What --seed 0 draws is part of a published result: a change of these two must be noticed.
    "forest of seed 0": (graphs.random_forest(10, seed=0), [(), (), (), (), (2,), (0,), (2,), (6,), (4,), (0,)]),
    "dag of seed 0": (graphs.random_dag(6, parents=2, seed=0), [(), (0,), (0, 1), (0, 1), (0, 3), (0, 4)]),
}


@pytest.mark.parametrize(("graph", "expected"), GOLDEN.values(), ids=GOLDEN)
def test_golden(graph: nx.DiGraph, expected: list[tuple[int, ...]]) -> None:
    assert list(graph) == list(range(len(expected)))
    assert [tuple(sorted(graph.predecessors(node))) for node in graph] == expected


@quick
@given(n=st.integers(1, 30), seed=st.integers(0, 2**32), parents=st.integers(1, 4), rate=st.floats(0, 1))
def test_every_family_gives_causal_graphs(n: int, seed: int, parents: int, rate: float) -> None:
    for graph, most in [
        (graphs.chain(n), 1),
        (graphs.pairs(n), 1),
        (graphs.two_parent_tree(n), 2),
        (graphs.random_forest(n, root_probability=rate, seed=seed), 1),
        (graphs.random_dag(n, parents=parents, seed=seed), parents),
    ]:
        graphs.check_graph(graph, nodes=n, max_parents=most)
        assert type(graph) is nx.DiGraph
        assert all(type(node) is int for edge in graph.edges for node in edge)
        assert nx.utils.graphs_equal(graphs.from_parents(parent_lists(graph)), graph)


def test_forest_has_the_stated_law() -> None:
    draws = 3_000
    generator = np.random.default_rng(5)
    parent_of_4 = Counter(
        next(graphs.random_forest(5, root_probability=0.2, seed=generator).predecessors(4), None) for _ in range(draws)
    )
    # 0.2 of being a root, 0.2 for each of the four earlier nodes; five standard deviations.
    assert set(parent_of_4) == {None, 0, 1, 2, 3}
    assert all(abs(count - 0.2 * draws) < 5 * (draws * 0.2 * 0.8) ** 0.5 for count in parent_of_4.values())


def test_dag_has_the_stated_law() -> None:
    draws = 2_000
    generator = np.random.default_rng(5)
    parents_of_4 = Counter(parent_lists(graphs.random_dag(5, parents=2, seed=generator))[4] for _ in range(draws))
    assert set(parents_of_4) == set(combinations(range(4), 2))
    assert all(abs(count - draws / 6) < 5 * (draws * 5 / 36) ** 0.5 for count in parents_of_4.values())


@quick
@given(seed=st.integers(0, 2**32), low=st.floats(0, 1), high=st.floats(0, 1))
def test_forests_of_one_seed_are_nested(seed: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    more = graphs.random_forest(20, root_probability=low, seed=seed)
    fewer = graphs.random_forest(20, root_probability=high, seed=seed)
    assert set(fewer.edges) <= set(more.edges)


def test_an_integer_seed_repeats_and_a_generator_goes_on() -> None:
    def draw(seed: int | np.random.Generator) -> list[tuple[int, int]]:
        return list(graphs.random_forest(30, seed=seed).edges)

    generator = np.random.default_rng(7)
    assert draw(7) == draw(7) == draw(generator) != draw(generator)


def test_from_parents_takes_every_way_to_name_parents() -> None:
    expected = [(0, 2), (0, 3), (1, 4), (2, 3), (2, 4)]
    assert list(graphs.from_parents([None, -1, 0, [2, 0], {1, 2}]).edges) == expected
    assert list(graphs.from_parents([(), [], np.int64(0), np.array([0, 2]), range(1, 3)]).edges) == expected
    assert list(graphs.from_parents(np.array([-1, -1, 0, 0])).edges) == [(0, 2), (0, 3)]


def test_from_parents_names_every_wrong_entry() -> None:
    # Without the types that pytest checks at run time: a user's session has none.
    from_parents = inspect.unwrap(graphs.from_parents)
    with pytest.raises(CausalProbeError) as caught:
        from_parents([0, [-1], 7, "12", 1.0, [0, 0], [[1], 2], np.array(2.0), 0, True])
    assert str(caught.value) == (
        "The parents of a node must be distinct integers, each smaller than the node (a root has None or -1). Found: 0 has 0, "
        "1 has -1, 2 has 7, 3 has '12', 4 has 1.0, 5 has 0, 0, 6 has [1], 2, 7 has array(2.), 9 has True."
    )
    with pytest.raises(CausalProbeError, match="at least one node"):
        from_parents([])
    for nothing in (5, "012"):
        with pytest.raises(CausalProbeError, match="one entry per node"):
            from_parents(nothing)


@pytest.mark.parametrize("n", [0, -3, 2.0, True, "5", None])
def test_sizes_must_be_positive_integers(n: object) -> None:
    message = rf"^n is {n!r}\. It must be an integer of at least 1\.$"
    for name, options in [
        ("chain", {}),
        ("pairs", {}),
        ("two_parent_tree", {}),
        ("random_forest", {"seed": 0}),
        ("random_dag", {"parents": 1, "seed": 0}),
    ]:
        with pytest.raises(CausalProbeError, match=message):
            inspect.unwrap(getattr(graphs, name))(n, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "random_forest",
            {"seed": 0, "root_probability": 1.5},
            "root_probability is 1.5. It must be a number from 0 to 1.",
        ),
        ("random_forest", {"seed": 0, "root_probability": float("nan")}, "root_probability is nan."),
        ("random_forest", {"seed": 0, "root_probability": "0.5"}, "root_probability is '0.5'."),
        (
            "random_forest",
            {"seed": None},
            "seed is None. It must be a non-negative integer or a numpy.random.Generator.",
        ),
        ("random_forest", {"seed": -1}, "seed is -1."),
        ("random_dag", {"seed": 0.5, "parents": 1}, "seed is 0.5."),
        ("random_dag", {"seed": 0, "parents": 0}, "parents is 0. It must be an integer of at least 1."),
    ],
)
def test_options_are_checked(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(CausalProbeError) as caught:
        inspect.unwrap(getattr(graphs, name))(4, **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: graphs.chain(n),
        lambda n: graphs.lag(n, k=2),
        lambda n: graphs.pairs(n),
        lambda n: graphs.random_forest(n, seed=0),
        lambda n: graphs.random_dag(n, parents=1, seed=0),
        lambda n: graphs.random_dag(10**5, parents=n, seed=0),
        lambda n: graphs.two_parent_tree(n),
        lambda n: graphs.from_parents(itertools.repeat(None)),
        lambda n: graphs.from_parents([None] * 10 + [range(10)] * 2**19),
    ],
)
@pytest.mark.parametrize("n", [2**31, 10**25])
def test_sizes_are_checked_before_memory_is_taken(make: Callable[[int], nx.DiGraph], n: int) -> None:
    with pytest.raises(CausalProbeError, match=r"A graph of [\d,]+ (nodes|edges) was asked for|that fits into 64 bits"):
        make(n)
