"""What a task is, and a task of another law than the paper's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch

from causal_probe import graphs, tasks
from causal_probe.errors import CausalProbeError
from causal_probe.tasks.ring_walk import RingWalk
from causal_probe.tasks.task import check_task, join_batches

TREE = [None, 0, 0, None, 3]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def ring() -> RingWalk:
    return RingWalk(graphs.from_parents(TREE), d_vocab=5)


def test_a_ring_walk_steps_up_or_down_along_the_edges(ring: RingWalk) -> None:
    """The joint law of two edges: the steps of one sequence share a uniform p, so P(k ups of two) is 1/3 each."""
    n = 30_000
    batch = ring.sample(n, seeded())
    steps = (batch.tokens[:, [1, 2, 4]] - batch.tokens[:, [0, 0, 3]]) % 5
    assert set(steps.unique().tolist()) == {1, 4}
    ups = Counter((steps[:, :2] == 1).sum(1).tolist())
    assert [ups[k] / n for k in range(3)] == pytest.approx([1 / 3] * 3, abs=4 * np.sqrt(2 / 9 / n))
    for node in (0, 3, 5):  # the roots, and the query
        np.testing.assert_allclose(batch.tokens[:, node].bincount(minlength=5) / n, 0.2, atol=4 * np.sqrt(0.16 / n))
    query = batch.tokens[:, -1:]
    up, down = batch.target.gather(1, (query + 1) % 5), batch.target.gather(1, (query - 1) % 5)
    torch.testing.assert_close(up + down, torch.ones(n, 1))
    assert float(torch.corrcoef(torch.stack([up[:, 0], (steps == 1).float().mean(1)]))[0, 1]) > 0.5


def test_who_knows_the_law_of_a_ring_walk_predicts_with_laplaces_rule(ring: RingWalk) -> None:
    tokens = torch.tensor([[0, 1, 4, 2, 3, 4]])  # up, down, up; the query is 4
    batch = tasks.Batch(tokens, torch.zeros(1, 5), {})
    torch.testing.assert_close(ring.references()["known-graph"](batch), torch.tensor([[3 / 5, 0, 0, 2 / 5, 0]]))
    # Its loss is that of the posterior mean, E over k ups of the entropy of p given k, which numerical integration gives.
    p = (np.arange(20_000) + 0.5) / 20_000
    loss = 0.0
    for k, ways in enumerate((1, 3, 3, 1)):
        mean = (1 + k) / 5
        loss -= float((ways * p**k * (1 - p) ** (3 - k) * (p * np.log(mean) + (1 - p) * np.log(1 - mean))).mean())
    losses = tasks.reference_losses(ring, ring.sample(100_000, seeded()))
    assert losses == pytest.approx({"uniform": np.log(5), "in-context unigram": losses["in-context unigram"], "known-graph": loss}, abs=4e-3)  # fmt: skip


def test_a_ring_walk_is_redrawn_by_its_own_steps(ring: RingWalk) -> None:
    redraw = ring.redraw
    assert redraw is not None
    batch = ring.sample(2_000, seeded())
    found = redraw(batch, 1, ring.graph, seeded(1))
    torch.testing.assert_close(found.laws[:, 0], torch.full((2_000, 5), 0.2))  # the stationary law of a ring is uniform
    steps = found.laws[:, 1].gather(1, (batch.tokens[:, :1] + torch.tensor([[1, 4]])) % 5)
    torch.testing.assert_close(steps.sum(1), torch.ones(2_000))
    for state, each in enumerate(found.batches):
        assert (each.tokens[:, 1] == state).all()
        assert set(((each.tokens[:, 2] - each.tokens[:, 0]) % 5).unique().tolist()) == {1, 4}


def test_a_ring_walk_that_can_not_be() -> None:
    with pytest.raises(CausalProbeError, match="3 states or more"):
        RingWalk(graphs.chain(4), d_vocab=2)
    with pytest.raises(CausalProbeError, match="several"):
        RingWalk(graphs.two_parent_tree(7), d_vocab=5)
    with pytest.raises(CausalProbeError, match="at least one sequence"):
        RingWalk(graphs.chain(4)).sample(0, seeded())


def test_a_ring_walk_without_an_edge_predicts_evenly() -> None:
    ring = RingWalk(graphs.from_parents([None, None]), d_vocab=3)
    batch = ring.sample(4, seeded())
    torch.testing.assert_close(ring.references()["known-graph"](batch).amax(1), torch.full((4,), 0.5))


def test_what_is_no_task_is_told_what_it_lacks() -> None:
    class Half:
        graph, n_positions, d_vocab = graphs.chain(3), 4, 3

    with pytest.raises(CausalProbeError, match=r"Half is no task: it has no .*sample, references"):
        check_task(Half())


def test_a_task_whose_graph_has_the_wrong_nodes_is_refused(ring: RingWalk) -> None:
    ring.n_positions = 9
    with pytest.raises(CausalProbeError, match="nodes 0 to 7"):
        check_task(ring)


def test_a_task_inherits_what_follows_from_its_graph_but_no_references() -> None:
    class Bare(tasks.Task):
        description, redraw, sample = "bare", None, None  # type: ignore[assignment]

        def __init__(self, graph: nx.DiGraph, n_positions: int) -> None:
            self.graph, self.n_positions, self.d_vocab = graph, n_positions, 3

    with pytest.raises(TypeError, match="references"):
        Bare(graphs.chain(4), 5)

    class Whole(Bare):
        def references(self) -> dict[str, Any]:
            return {}

    tree, several = Whole(graphs.chain(4), 5), Whole(graphs.two_parent_tree(7), 6)
    assert (tree.is_tree, tree.n_slots, tree.children) == (True, 1, range(4))
    assert (several.is_tree, several.n_slots, several.children) == (False, 2, range(5))


def test_batches_have_the_sizes_that_were_asked_for_and_are_the_samples(ring: RingWalk) -> None:
    found = list(tasks.sample_batches(ring, 10, seeded(), batch_size=4))
    assert [len(batch) for batch in found] == [4, 4, 2]
    again = seeded()
    assert all(torch.equal(batch.tokens, ring.sample(len(batch), again).tokens) for batch in found)
    whole = join_batches(found)
    assert torch.equal(whole.tokens, torch.cat([batch.tokens for batch in found]))
    assert torch.equal(whole.target, torch.cat([batch.target for batch in found]))
    assert whole.tables == {}


def test_every_task_is_listed_in_one_line() -> None:
    assert {RingWalk, tasks.InContextMarkov} <= set(tasks.TASKS)
    assert all(line and "\n" not in line for line in tasks.TASKS.values())
