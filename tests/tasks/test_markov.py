"""The sampler's law against enumeration, its options, and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from scipy import stats

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.tasks import Batch, InContextMarkov
from tests.tasks.tiny_tasks import (
    DAGS,
    TREES,
    frequencies,
    law,
    make,
    random_tables,
    repeated,
    tolerance,
    total_variation,
)

N = 100_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------------- law


@pytest.mark.parametrize("name", [*TREES, *DAGS])
def test_tokens_follow_the_enumerated_law(name: str) -> None:
    parents = (TREES | DAGS)[name]
    task = make(parents, d_vocab=3 if name in TREES else 2)
    tables = random_tables(task, seed=1)
    expected = law(parents, tables, task.d_vocab, tree=name in TREES)
    found = frequencies(task.sample_tokens(repeated(tables, N), seeded()), task.d_vocab)
    assert found.shape == expected.shape
    assert total_variation(found, expected) < tolerance(expected, N)


@pytest.mark.parametrize("name", [name for name in TREES | DAGS if any((TREES | DAGS)[name][:-1])])
def test_the_test_above_tells_wrong_laws_apart(name: str) -> None:
    """Without one edge, or with the contexts' digits reversed, the law is far away."""
    parents = (TREES | DAGS)[name]
    tree = name in TREES
    task = make(parents, d_vocab=3 if tree else 2)
    tables = random_tables(task, seed=1)
    expected = law(parents, tables, task.d_vocab, tree=tree)
    seen = parents if tree else parents[:-1]
    cut = [() if node == max(i for i, its in enumerate(seen) if its) else its for node, its in enumerate(parents)]
    wrong = [law(cut, tables, task.d_vocab, tree=tree)]
    used = {len(its) for its in seen}
    if max(used) > 1:
        digits = {
            k: table.reshape((task.d_vocab,) * (k + 1)).transpose(*reversed(range(k)), k).reshape(table.shape)
            for k, table in tables.items()
        }
        wrong.append(law(parents, digits, task.d_vocab, tree=tree))
    for other in wrong:
        assert total_variation(other, expected) > 2 * tolerance(expected, N)


@pytest.mark.parametrize("parents", [*TREES.values(), *DAGS.values()])
def test_every_sequence_uses_its_own_tables(parents: list[tuple[int, ...]]) -> None:
    """With rows that allow one state each, every child is what its own sequence's table says."""
    task = make(parents, d_vocab=4)
    generator = np.random.default_rng(0)
    n = 200
    degrees = [1] if task.is_tree else sorted({len(its) for its in parents if its})
    next_state = {k: generator.integers(0, 4, (n, 4**k)) for k in degrees}
    tables = {k: torch.nn.functional.one_hot(torch.tensor(states), 4).double() for k, states in next_state.items()}
    tokens = task.sample_tokens(tables, seeded()).numpy()
    for b in range(n):
        for node in range(task.n_positions):
            its = parents[node] if node < len(parents) else ()
            if its:
                context = int(
                    "".join(str(tokens[b, parent]) for parent in its), 4
                )  # slot 0 is the most significant digit
                assert tokens[b, node] == next_state[len(its)][b, context]


@pytest.mark.parametrize("name", [*TREES, *DAGS])
def test_the_soft_target_is_the_row_that_the_context_names(name: str) -> None:
    parents = (TREES | DAGS)[name]
    task = make(parents, d_vocab=3)
    batch = task.sample(50, seeded())
    degrees = {1} if task.is_tree else {len(its) for its in parents if its}
    assert batch.tables.keys() == degrees
    for b in range(50):
        its = (task.n_positions - 1,) if task.is_tree else parents[-1]
        context = int("".join(str(int(batch.tokens[b, parent])) for parent in its), 3)
        assert torch.equal(batch.target[b], batch.tables[len(its)][b, context])


def test_tables_have_the_tasks_concentration() -> None:
    """Var of an entry of Dirichlet(a, ..., a) over S states: (S - 1) / (S^2 (S a + 1))."""
    for concentration in (0.1, 2.0):
        tables = (
            make(DAGS["one and two parents"], d_vocab=3, concentration=concentration).sample(20_000, seeded()).tables
        )
        assert {k: tuple(table.shape) for k, table in tables.items()} == {1: (20_000, 3, 3), 2: (20_000, 9, 3)}
        for table in tables.values():
            squares = (table.double() - 1 / 3) ** 2
            # The entries of one sequence depend on each other; the sequences do not.
            per_sequence = squares.mean((1, 2))
            standard_error = float(per_sequence.std()) / math.sqrt(20_000)
            assert float(squares.mean()) == pytest.approx(2 / (9 * (3 * concentration + 1)), abs=4 * standard_error)


def test_the_last_token_of_a_tree_is_uniform_and_independent() -> None:
    batch = make(TREES["a late root"], d_vocab=3, concentration=0.1).sample(N, seeded())
    query = batch.tokens[:, -1]
    assert stats.chisquare(torch.bincount(query, minlength=3).numpy()).pvalue > 1e-4
    for node in range(5):
        together = torch.bincount(3 * batch.tokens[:, node] + query, minlength=9).view(3, 3).numpy()
        assert stats.chi2_contingency(together).pvalue > 1e-4
    # Nor does it depend on the transitions: a state that is often visited is not asked for more often.
    assert abs(float((batch.tables[1].mean(1)[torch.arange(N), query] - 1 / 3).mean())) < 4 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("name", ["a late root", "two parents"])
def test_hard_targets_are_draws_from_the_soft_ones(name: str) -> None:
    task = make((TREES | DAGS)[name], d_vocab=3, concentration=0.3)
    soft, hard = (task.sample(N, seeded(), targets=targets) for targets in ("soft", "hard"))
    assert torch.equal(soft.tokens, hard.tokens)
    assert hard.target.dtype == soft.target.dtype
    assert torch.equal(hard.target.sum(-1), torch.ones(N))
    assert set(hard.target.unique().tolist()) == {0, 1}
    # Among the targets of one (tenth of a) probability, the share of ones is their mean probability: calibration.
    p, drawn = soft.target.flatten().double(), hard.target.flatten().double()
    for tenth in range(10):
        chosen = (p * 10).floor().clamp(max=9) == tenth
        spread = math.sqrt(float((p * (1 - p))[chosen].sum()))
        assert abs(float((drawn - p)[chosen].sum())) < 4 * spread + 1e-6
    assert bool((p[drawn == 1] > 0).all())


def test_a_state_of_probability_zero_is_never_drawn() -> None:
    task = make([(), (0,), (1,)], d_vocab=3)
    pi = torch.tensor([[0.0, 0.1, 0.9], [0.3, 0.7, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float32).expand(N, 3, 3)
    tokens = task.sample_tokens({1: pi}, seeded())
    taken = set(zip(tokens[:, 0].tolist(), tokens[:, 1].tolist(), strict=True))
    assert taken == {(0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 2)}


# --------------------------------------------------------------------------------------------------- shapes and streams


@pytest.mark.parametrize("parents", [*TREES.values(), *DAGS.values()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(parents: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    task = make(parents, d_vocab=4)
    tree = max(map(len, parents)) <= 1
    assert task.is_tree == tree
    assert task.n_positions == (len(parents) + 1 if tree else len(parents) - 1)
    assert task.children == range(task.n_positions - 1)
    assert task.n_slots == (1 if tree else len(parents[-1]))
    batch = task.sample(6, seeded(), dtype=dtype)
    assert len(batch) == 6
    assert batch.tokens.shape == (6, task.n_positions)
    assert batch.tokens.dtype == torch.long
    assert batch.tokens.is_contiguous()
    assert batch.target.shape == (6, 4)
    assert batch.target.dtype == dtype
    assert all(table.dtype == dtype for table in batch.tables.values())
    assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < 4


def test_the_generators_state_alone_decides() -> None:
    task = make(TREES["a late root"])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = task.sample(100, seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    second, other = task.sample(100, seeded(3)), task.sample(100, seeded(4))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.target, second.target)
    assert not torch.equal(first.tokens, other.tokens)
    generator = seeded(3)
    assert not torch.equal(task.sample(100, generator).tokens, task.sample(100, generator).tokens)


def test_the_graph_is_the_tasks_own() -> None:
    graph = graphs.chain(4)
    task = InContextMarkov(graph, 3)
    graph.add_edge(0, 3)
    assert task.parents == ((), (0,), (1,), (2,))
    assert list(task.graph.edges) == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(nx.NetworkXError, match="Frozen"):
        task.graph.add_edge(0, 3)


def test_repr() -> None:
    assert (
        repr(make(TREES["one node"], 3, 0.1)) == "InContextMarkov(2 positions, 0 edges, d_vocab=3, concentration=0.1)"
    )


# -------------------------------------------------------------------------------------------------------------- redraw


def redrawn(parents: list[tuple[int, ...]], node: int, edges: nx.DiGraph) -> tuple[Any, torch.Tensor, Any]:
    """The tables, the sequences and what they are redrawn to."""
    task = make(parents)
    tables = random_tables(task, seed=2)
    tokens = task.sample_tokens(repeated(tables, N), seeded())
    batch = Batch(tokens, torch.zeros(N, 3), repeated(tables, N))
    return tables, tokens, task.redraw(batch, node, edges, seeded(1))


@pytest.mark.parametrize("hypothesis", [None, 0, 1, 2])
def test_a_state_drawn_from_a_hypothesis_has_its_law(hypothesis: int | None) -> None:
    """Of a node before others: take the batch of a state drawn from the law that stands for a parent; all later nodes follow the edges."""
    parents = TREES["a late root"]
    node = 3
    edges = graphs.from_parents(parents)
    tables, _, again = redrawn(parents, node, edges)
    states = again.laws[:, 0 if hypothesis is None else 1 + hypothesis].multinomial(1, generator=seeded(3))[:, 0]
    tokens = torch.stack([each.tokens for each in again.batches])[states, torch.arange(N)]
    assumed = [(() if hypothesis is None else (hypothesis,)) if i == node else its for i, its in enumerate(parents)]
    expected = law(assumed, tables, 3, tree=True)
    assert total_variation(frequencies(tokens, 3), expected) < tolerance(expected, N)


def test_a_node_that_keeps_its_state_keeps_the_law_along_the_true_edges() -> None:
    parents = TREES["two roots with children"]
    tables, tokens, again = redrawn(parents, 1, graphs.from_parents(parents))
    assert torch.equal(again.states, tokens[:, 1])
    own = torch.stack([each.tokens for each in again.batches])[again.states, torch.arange(N)]
    expected = law(parents, tables, 3, tree=True)
    assert total_variation(frequencies(own, 3), expected) < tolerance(expected, N)


def test_what_comes_before_stays_and_states_share_random_numbers() -> None:
    parents = [(), (0,), (1,), (0,), (1,), ()]
    _, tokens, again = redrawn(parents, 2, nx.DiGraph([(2, 4)]))
    for state, each in enumerate(again.batches):
        assert torch.equal(each.tokens[:, [0, 1, 6]], tokens[:, [0, 1, 6]])
        assert (each.tokens[:, 2] == state).all()
    one, other = (each.tokens for each in again.batches[:2])
    assert torch.equal(one[:, [3, 5]], other[:, [3, 5]])  # no descendants of node 2
    assert (one[:, 4] != other[:, 4]).any()
    assert torch.equal(again.asked, tokens[:, :2] == tokens[:, -1:])


def test_redrawing_keeps_transitions_and_target_and_the_batch() -> None:
    task = make(TREES["a late root"])
    batch = task.sample(20, seeded())
    tokens = batch.tokens.clone()
    redrawn = task.redraw(batch, 0, task.graph, seeded(1))
    again = redrawn.batches
    assert torch.equal(batch.tokens, tokens)
    for each in again:
        torch.testing.assert_close(each.target, batch.target, rtol=0, atol=0)
        torch.testing.assert_close(each.tables, batch.tables, rtol=0, atol=0)
    rows = torch.tensor([17, 3, 4])
    some = redrawn.draw(rows)  # those that are named are what they are among all
    assert torch.equal(some.tokens, torch.cat([each.tokens[rows] for each in again]))
    assert torch.equal(some.target, batch.target[rows].repeat(3, 1))
    same = task.redraw(batch, 0, task.graph, seeded(1)).batches
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(again, same, strict=True))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: InContextMarkov(graphs.chain(3), 1), r"must hold at least 2 states; d_vocab is 1\."),
        (lambda: InContextMarkov(graphs.chain(3), True), "`d_vocab` is True"),
        (lambda: InContextMarkov(graphs.chain(3), 3, 0.0), "positive and finite, from 1e-30 to 1e.30; it is 0.0"),
        (lambda: InContextMarkov(graphs.chain(3), 3, -1.0), "it is -1.0"),
        (lambda: InContextMarkov(graphs.chain(3), 3, math.nan), "is nan"),
        (lambda: InContextMarkov(graphs.chain(3), 3, math.inf), "is inf"),
        (lambda: InContextMarkov(graphs.chain(3), 3, 1e-40), "it is 1e-40"),
        (lambda: InContextMarkov(graphs.chain(3), 3, 1e40), r"it is 1e\+40"),
        (lambda: InContextMarkov(nx.DiGraph(), 3), "it has no nodes"),
        (
            lambda: make([(), (), (0, 1), ()]),
            "node 3 is the one to be predicted, and it has no parent.*Give it parents",
        ),
        (lambda: make([(), (0,)], d_vocab=10**5), r"100000 states and 1 parent\(s\) has 100000\^2 entries"),
        (
            lambda: make([*[()] * 9, tuple(range(9))], d_vocab=10),
            r"10 states and 9 parent\(s\).*Take fewer states or parents",
        ),
        (lambda: InContextMarkov(nx.DiGraph([(1, 0)]), 3), "parent"),
        (lambda: InContextMarkov(nx.DiGraph([(0, 1), (1, 0)]), 3), "cycle"),
    ],
)
def test_a_task_that_can_not_be(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        build()


def test_a_batch_that_can_not_be() -> None:
    task = make(DAGS["one and two parents"], d_vocab=3)
    for size in (0, -3):
        with pytest.raises(CausalProbeError, match=f"at least one sequence; batch_size is {size}"):
            task.sample(size, seeded())
    tables = task.sample(4, seeded()).tables
    for wrong in ({}, {1: tables[1]}, {1: tables[1], 2: tables[1]}, {1: tables[1][:3], 2: tables[2]}):
        with pytest.raises(CausalProbeError, match=r"The tables by in-degree must have the shapes .*theirs are"):
            task.sample_tokens(wrong, seeded())


def test_a_redraw_that_can_not_be() -> None:
    task = make(TREES["a late root"])
    batch = task.sample(4, seeded())
    for node in (-1, 5):
        with pytest.raises(CausalProbeError, match=f"There is no node {node}; the nodes are 0 to 4"):
            task.redraw(batch, node, task.graph, seeded())
    for edges, node in (([(0, 1), (0, 3), (1, 3)], 0), ([(4, 3)], 2)):
        with pytest.raises(
            CausalProbeError, match=r"Node 3 can't be drawn along the edges from .*: a node has one parent at most"
        ):
            task.redraw(batch, node, nx.DiGraph(edges), seeded())
    several = make(DAGS["two parents"])
    assert several.redraw is None
