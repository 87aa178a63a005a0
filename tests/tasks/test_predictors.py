"""Reference predictors against loops in plain Python, and their losses on the paper's two-parent task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.graphs.check import parent_lists
from causal_probe.tasks import Batch, InContextMarkov, cross_entropy, reference_losses
from causal_probe.tasks.predictors import fit_one_parent, in_context_unigram, known_graph, one_parent, uniform
from tests.tasks.tiny_tasks import DAGS, TREES, make

RANDOM = {
    **{f"forest {seed}": parent_lists(graphs.random_forest(9, seed=seed)) for seed in range(4)},
    **{f"{k} parents {seed}": parent_lists(graphs.random_dag(9, parents=k, seed=seed)) for k in (2, 3) for seed in (0, 1)},
}  # fmt: skip
TASKS = TREES | DAGS | RANDOM


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted(
    parents: Sequence[Sequence[int]],
    row: list[int],
    slots: Sequence[int],
    d_vocab: int,
    concentration: float,
    weights: Sequence[float] | None = None,
) -> list[float]:
    """concentration + how often each state follows the asked-for parents, normalised; one sequence, plain loops."""
    tree = max(map(len, parents)) <= 1
    wanted = [row[-1]] if tree else [row[parent] for parent in parents[-1]]
    counts = [concentration] * d_vocab
    for node in range(len(parents) if tree else len(parents) - 1):
        its = parents[node]
        if not its or len(its) != len(wanted):
            continue  # a root is nobody's child, and other in-degrees have other tables
        if all(row[its[slot]] == wanted[slot] for slot in slots):
            counts[row[node]] += 1 if weights is None else weights[node]
    return [count / sum(counts) for count in counts]


@pytest.mark.parametrize("name", TASKS)
def test_counting_predictors_equal_plain_loops(name: str) -> None:
    parents = TASKS[name]
    task = make(parents, d_vocab=3, concentration=0.3)
    tokens = task.sample(40, seeded()).tokens
    slots = range(task.n_slots)
    predictions = {tuple(slots): known_graph(task, tokens)}
    predictions |= {(slot,): one_parent(task, tokens, slot=slot) for slot in slots}
    for used, prediction in predictions.items():
        expected = [counted(parents, row, used, 3, 0.3) for row in tokens.tolist()]
        torch.testing.assert_close(prediction, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TASKS)
def test_the_unigram_counts_nodes_and_never_the_query(name: str) -> None:
    task = make(TASKS[name], d_vocab=3)
    tokens = task.sample(40, seeded()).tokens
    found = in_context_unigram(task, tokens)
    for row, prediction in zip(tokens.tolist(), found.tolist(), strict=True):
        nodes = row[:-1] if task.is_tree else row
        assert prediction == pytest.approx([(1 + nodes.count(state)) / (len(nodes) + 3) for state in range(3)])


def test_roots_are_never_counted_as_children() -> None:
    """With -1 for "no parent" as an index, the roots here would be children of the last token."""
    task = make([(), (), (0,)], d_vocab=3, concentration=0.5)
    tokens = torch.tensor([[1, 1, 2, 0], [1, 0, 2, 1]])
    found = known_graph(task, tokens)
    # The query 0 has no child; the query 1 has the child 2.
    torch.testing.assert_close(found, torch.tensor([[1 / 3] * 3, [0.5 / 2.5, 0.5 / 2.5, 1.5 / 2.5]]))


def test_the_slot_order_matters() -> None:
    """Two children with the parents' states exchanged: only the one in the right order counts."""
    task = make([(), (), (0, 1), (1, 2), (0, 1)], d_vocab=3, concentration=1.0)
    tokens = torch.tensor([[0, 1, 0, 2]])  # contexts: (0, 1) -> 0 and (1, 0) -> 2; asked for: (0, 1)
    torch.testing.assert_close(known_graph(task, tokens), torch.tensor([[2 / 4, 1 / 4, 1 / 4]]))
    torch.testing.assert_close(one_parent(task, tokens, slot=1), torch.tensor([[2 / 4, 1 / 4, 1 / 4]]))


def test_known_graph_is_the_posterior_mean() -> None:
    """Among sequences of one prediction, the mean of the true rows is that prediction.

    In a k-parent task, for its roots are uniform; a tree's roots tell a little of the transitions, which is not counted.
    """
    task = make([(), (0,), (0,), (0, 1), (1, 2), (0, 3)], d_vocab=2, concentration=0.5)
    batch = task.sample(200_000, seeded(), dtype=torch.float64)
    prediction = known_graph(task, batch.tokens).double()
    for value in prediction[:, 0].unique():
        chosen = prediction[:, 0] == value
        rows = batch.target[chosen, 0]
        assert float(rows.mean()) == pytest.approx(float(value), abs=4 * float(rows.std()) / math.sqrt(len(rows)))


def test_uniform_and_cross_entropy() -> None:
    task = make(TREES["a late root"], d_vocab=3)
    batch = task.sample(10, seeded())
    assert torch.equal(uniform(task, batch.tokens), torch.full((10, 3), 1 / 3))
    torch.testing.assert_close(cross_entropy(uniform(task, batch.tokens), batch.target), torch.full((10,), math.log(3)))
    prediction, target = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]), torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]])
    torch.testing.assert_close(
        cross_entropy(prediction, target), torch.tensor([math.log(2), 0.5 * math.log(4) + 0.5 * math.log(2)])
    )
    assert cross_entropy(prediction[:1], target[1:]).tolist() == [math.inf]  # an impossible state that happens


def test_reference_losses_are_the_means_and_the_best_slot() -> None:
    task = make(DAGS["two parents"], d_vocab=3, concentration=0.2)
    batch = task.sample(500, seeded())
    losses = reference_losses(task, batch)

    def mean(prediction: torch.Tensor) -> float:
        return float(cross_entropy(prediction, batch.target).mean())

    assert losses["uniform"] == pytest.approx(math.log(3))
    assert losses["in-context unigram"] == pytest.approx(mean(in_context_unigram(task, batch.tokens)))
    assert losses["known-graph"] == pytest.approx(mean(known_graph(task, batch.tokens)))
    slots = [mean(one_parent(task, batch.tokens, slot=slot)) for slot in (0, 1)]
    assert slots[0] != pytest.approx(slots[1])
    assert losses["one-parent"] == pytest.approx(min(slots))


def test_in_a_tree_one_parent_is_the_known_graph() -> None:
    task = make(RANDOM["forest 0"], d_vocab=3)
    tokens = task.sample(20, seeded()).tokens
    assert torch.equal(one_parent(task, tokens, slot=0), known_graph(task, tokens))


@pytest.mark.parametrize("name", TASKS)
def test_weighted_counts_equal_plain_loops(name: str) -> None:
    parents = TASKS[name]
    task = make(parents, d_vocab=3, concentration=0.3)
    tokens, weights = task.sample(40, seeded()).tokens, torch.rand(task.n_positions, generator=seeded(1))
    for slot in range(task.n_slots):
        expected = [counted(parents, row, [slot], 3, 0.3, weights.tolist()) for row in tokens.tolist()]
        found = one_parent(task, tokens, slot=slot, weights=weights)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_fitted_weights_are_the_best_and_know_who_shares_the_other_parent() -> None:
    """Node 11 is the predicted node's sibling by slot 0: where slot 1 matches too, its child is from the very row asked for."""
    task = InContextMarkov(graphs.two_parent_tree(13), d_vocab=3, concentration=0.1)
    assert task.parents[11][0] == task.parents[12][0]
    batch = task.sample(4096, seeded(), dtype=torch.float64)
    weights = fit_one_parent(task, batch, slot=1)

    def loss(weights: torch.Tensor | None, of: Batch = batch) -> float:
        prediction = one_parent(task, of.tokens, slot=1, weights=weights)
        return float(cross_entropy(prediction.double(), of.target).mean())

    assert weights[11] == weights.max() > 3 * weights[2:11].max()
    assert (weights > 0).tolist() == [len(its) == 2 for its in task.parents[:12]]
    for node in range(2, 12):
        for factor in (0.8, 1.25):
            moved = weights.clone()
            moved[node] *= factor
            assert loss(moved) > loss(weights)
    fresh = task.sample(4096, seeded(1), dtype=torch.float64)
    assert loss(weights, fresh) < loss(None, fresh) - 0.1


def test_weights_that_cannot_be_used_or_fitted() -> None:
    task = make(DAGS["two parents"], d_vocab=3)
    batch = task.sample(10, seeded())
    with pytest.raises(CausalProbeError, match=rf"A weight for each of {task.n_positions} positions .* is \[2\]"):
        one_parent(task, batch.tokens, slot=0, weights=torch.ones(2))
    with pytest.raises(CausalProbeError, match="Parent slot 2 was asked for"):
        fit_one_parent(task, batch, slot=2)
    roots = make([(), (), ()], d_vocab=3)
    with pytest.raises(CausalProbeError, match="no child to be counted"):
        fit_one_parent(roots, roots.sample(10, seeded()), slot=0)


def test_losses_on_the_two_parent_task() -> None:
    """S = 5, T = 32, concentration = 0.1. A simulation in NumPy that shares no code gave 0.893 and 1.391, to 0.003 and 0.004."""
    task = InContextMarkov(graphs.two_parent_tree(33), d_vocab=5, concentration=0.1)
    losses = reference_losses(task, task.sample(30_000, seeded()))
    assert losses["known-graph"] == pytest.approx(0.893, abs=0.015)
    assert losses["one-parent"] == pytest.approx(1.391, abs=0.015)
    assert losses["known-graph"] < losses["one-parent"] < losses["in-context unigram"] < losses["uniform"]
    assert losses["uniform"] == pytest.approx(math.log(5))


def test_tokens_that_are_not_the_tasks() -> None:
    task = make(TREES["a late root"], d_vocab=3)
    tokens = np.zeros((2, 6), dtype=np.int64)
    for predict in (uniform, in_context_unigram, known_graph):
        with pytest.raises(CausalProbeError, match=r"sequences have 6 tokens; the shape of these is \[2, 5\]"):
            predict(task, torch.tensor(tokens[:, :5]))
        for token in (-1, 3):
            tokens[1, 2] = token
            with pytest.raises(CausalProbeError, match=f"Token {token} is outside the vocabulary; states are 0 to 2"):
                predict(task, torch.tensor(tokens))
        tokens[1, 2] = 0
    for slot in (-1, 1):
        with pytest.raises(CausalProbeError, match=f"Parent slot {slot} was asked for; .* has slots 0 to 0"):
            one_parent(task, torch.tensor(tokens), slot=slot)
