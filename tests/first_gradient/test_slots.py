"""Several parents from gradients: exact where it can be, its mixed derivative against autograd, and what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.first_gradient import gradient_slots
from causal_probe.first_gradient.queries import largest_distinct, u_even
from causal_probe.first_gradient.slots import GradientSlots
from causal_probe.tasks import InContextMarkov, generator


def batches(task: InContextMarkov, n: int, *, hard: bool = False) -> list[object]:
    source = generator(0, "slots")
    drawn = [task.sample(4096, source, targets="hard" if hard else "soft") for _ in range(n // 4096)]
    if not hard:
        return list(drawn)
    return [torch.cat([batch.tokens, batch.target.argmax(-1, keepdim=True)], 1) for batch in drawn]


@pytest.fixture(scope="module")
def task() -> InContextMarkov:
    return InContextMarkov(graphs.random_dag(13, parents=2, seed=1), 3, 0.1)


@pytest.fixture(scope="module")
def found(task: InContextMarkov) -> GradientSlots:
    return gradient_slots(batches(task, 2**16), explored=2**14)


def test_both_parents_of_every_node_the_predicted_one_and_the_single_parent_too(
    found: GradientSlots, task: InContextMarkov
) -> None:
    assert found.queries == task.parents[-1]
    assert found.parents == task.parents
    assert found.compare(task.graph).exact
    assert found.swaps(task.graph) == ()
    assert len(found.gains) == 2
    assert min(found.gains) > 0
    assert found.decided


def test_own_tokens_give_the_leading_pairs_without_a_decision(task: InContextMarkov) -> None:
    own = gradient_slots(batches(task, 2**17, hard=True), explored=2**15)
    assert own.log_e_values is None
    assert own.queries == task.parents[-1]
    right = sum(len(set(own.parents[i]) & set(task.parents[i])) for i in range(2, 12))
    assert right >= 19
    assert own.parents[:2] == ((), ())  # nodes 0 and 1 have no two earlier ones
    assert "roots are not decided" in repr(own)


def test_roots_stay_roots() -> None:
    """Half of the nodes have no parents: none is claimed, and none of the others is lost."""
    parents = [(), (), (0, 1), (), (1, 2), (), (0, 4), (), (2, 6), (4, 8)]
    mixed = InContextMarkov(graphs.from_parents(parents), 3, 0.1)
    found = gradient_slots(batches(mixed, 2**16), explored=2**15)
    assert found.parents == mixed.parents


def test_a_search_that_is_cut_off_says_so(
    found: GradientSlots, task: InContextMarkov, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at T = 128 with three parents: a derivative for one more query would be too large. Here with two parents, and room for one."""
    assert not found.cut_off
    assert found.to_dict()["cut_off"] is False
    assert "cut off" not in repr(found) + found.cite().methods
    monkeypatch.setattr("causal_probe.first_gradient.queries.MAX_JOINT", task.n_positions**2)
    cut = gradient_slots(batches(task, 2**15), explored=2**14)
    assert cut.cut_off
    assert len(cut.queries) == 1
    assert not cut.decided
    assert cut.to_dict()["cut_off"] is True
    assert cut.to_dict()["decided"] is False
    assert "cut off, there may be more" in repr(cut)
    assert "roots are not decided" in repr(cut)
    assert "cut off at 1" in cut.cite().methods


def test_a_search_that_ends_for_want_of_gain_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one query, and none is of use."""
    flat = InContextMarkov(graphs.two_parent_tree(9), 3, 1e6)
    monkeypatch.setattr("causal_probe.first_gradient.queries.MAX_JOINT", flat.n_positions**2)
    assert not gradient_slots(batches(flat, 2**14), explored=2**13).cut_off


def test_other_numbers_of_parents_are_not_tested_and_appear_as_roots() -> None:
    """Node 3 has three parents, the predicted node two: there is no bet on three, and nothing is claimed of it."""
    parents = [(), (), (0, 1), (0, 1, 2), (1, 2), (2, 4), (0, 4), (2, 5), (1, 6), (4, 8)]
    other = InContextMarkov(graphs.from_parents(parents), 3, 0.1)
    found = gradient_slots(batches(other, 2**16), explored=2**15)
    assert found.queries == (4, 8)
    assert found.parents[3] == ()
    assert found.decided


def test_the_methods_sentence_claims_the_test_of_roots_alone(found: GradientSlots, task: InContextMarkov) -> None:
    said = found.cite().methods
    assert "family-wise level 0.001 for given queries" in said
    assert "which nodes are the parents is the largest evidence, not a test" in said
    own = gradient_slots(batches(task, 2**14, hard=True), explored=2**12)
    assert "not decided" in own.cite().methods


def test_no_signal_no_queries() -> None:
    """At a large alpha every row is even: no position predicts anything, and nothing is claimed."""
    flat = InContextMarkov(graphs.two_parent_tree(9), 3, 1e6)
    found = gradient_slots(batches(flat, 2**14), explored=2**13)
    assert found.queries == ()
    assert found.graph.number_of_edges() == 0


def test_the_mixed_derivative_is_autograd_s() -> None:
    """Of a two-head model in the limit of small beta, to leading order in 1 / T: second derivatives in two patterns."""
    task = InContextMarkov(graphs.two_parent_tree(7), 3, 0.5)
    batch = task.sample(50, torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, n = batch.tokens, 6
    X = one_hot(tokens, 3).double()
    w = torch.zeros(50, n, dtype=torch.float64, requires_grad=True)  # layer 2's scores
    f = (w.softmax(-1)[:, None] @ X)[:, 0]
    loss = -(batch.target * (f + 1e-8).log()).sum()
    (gradient,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(u_even(tokens, batch.target).double(), -gradient, rtol=1e-4, atol=1e-6)


def test_the_largest_entries_are_those_of_distinct_earlier_positions() -> None:
    joint = torch.randn(5, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = largest_distinct(joint)
    for child in range(2, 5):
        pairs = itertools.permutations(range(child), 2)
        assert tuple(found[:, child].tolist()) == max(pairs, key=lambda pair: float(joint[child, pair[0], pair[1]]))
    assert (found[:, :2] == -1).all()


def test_a_swap_is_counted() -> None:
    truth = graphs.from_parents([(), (), (0, 1), (0, 1)])
    shape = np.zeros((3, 3, 3))
    result = GradientSlots(
        shape, None, (0, 1), (), shape, np.array([[-1, -1, 1], [-1, -1, 0]]), np.zeros((2, 3), int),
        ((), (), (0, 1), (0, 1)), None, 2, 2,
    )  # fmt: skip
    assert result.swaps(truth) == (2,)
    assert result.compare(truth).exact


def test_it_prints_cites_and_is_plain(found: GradientSlots) -> None:
    assert "queries" in repr(found)
    assert "nichani2024" in found.cite().bibtex
    json.dumps(found.to_dict(), allow_nan=False)


def test_it_is_saved_and_comes_back(found: GradientSlots, tmp_path: Path) -> None:
    found.save(tmp_path / "a.safetensors")
    again = GradientSlots.load(tmp_path / "a.safetensors")
    assert again.to_dict() == found.to_dict()
    assert repr(again) == repr(found)
    np.testing.assert_array_equal(again.joint, found.joint)


def test_bad_input_is_refused(task: InContextMarkov) -> None:
    tree = InContextMarkov(graphs.chain(5), 3)
    with pytest.raises(CausalProbeError, match="use gradient_graph"):
        gradient_slots(tree.sample(10, torch.Generator()))
    with pytest.raises(CausalProbeError, match="fewer than 2 are left"):
        gradient_slots(task.sample(10, torch.Generator()))
    with pytest.raises(CausalProbeError, match="held_out"):
        gradient_slots([], held_out=1)
    with pytest.raises(CausalProbeError, match="no sequences"):
        gradient_slots([])
    with pytest.raises(CausalProbeError, match="one length"):
        gradient_slots([torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, 6, dtype=torch.long)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"level": 5.0}, "level must be between 0 and 1; it is 5.0"),
        ({"level": 0}, "level must be between 0 and 1"),
        ({"level": float("nan")}, "`level` is nan"),
        ({"beta": -1}, "beta must be positive and finite; it is -1"),
        ({"beta": 0}, "beta must be positive and finite"),
        ({"beta": float("inf")}, "`beta` is inf"),
        ({"explored": 1}, "explored must be at least 2; it is 1"),
    ],
)
def test_arguments_out_of_range_are_refused(task: InContextMarkov, arguments: dict[str, float], says: str) -> None:
    with pytest.raises(CausalProbeError, match=says):
        gradient_slots(task.sample(64, torch.Generator()), held_out=32, **arguments)  # type: ignore[arg-type]


def test_batches_that_do_not_go_together_are_refused(task: InContextMarkov) -> None:
    """Also where every held-out sequence lies in the first batch."""
    batch = task.sample(32, torch.Generator().manual_seed(0))
    own = torch.cat([batch.tokens, batch.target.argmax(-1, keepdim=True)], 1)
    for several in ([batch, own], [own, batch]):
        for held_out in (16, 48):
            with pytest.raises(CausalProbeError, match="known transitions and without can't be mixed"):
                gradient_slots(several, held_out=held_out)
    pairs_only = InContextMarkov(graphs.from_parents([None] * 11 + [(0, 1)] * 2), 3)
    assert pairs_only.n_positions == task.n_positions
    with pytest.raises(CausalProbeError, match=r"tables for \[1, 2\] and for \[2\]"):
        gradient_slots([batch, pairs_only.sample(32, torch.Generator())], held_out=16)
    four = InContextMarkov(task.graph, 4)
    with pytest.raises(CausalProbeError, match="batches over 3 and over 4 states"):
        gradient_slots([batch, four.sample(32, torch.Generator())], held_out=16)


@pytest.mark.parametrize("length", [1, 2])
def test_sequences_that_are_too_short_are_refused(length: int) -> None:
    with pytest.raises(CausalProbeError, match=f"Sequences of {length - 1} position.* T must be at least 2"):
        gradient_slots(torch.zeros(20, length, dtype=torch.long), held_out=4)


def test_more_than_fits_into_memory_is_refused() -> None:
    many = InContextMarkov(graphs.two_parent_tree(6), 100)
    with pytest.raises(CausalProbeError, match=r"have 8,\d+,\d+,\d+ entries .* a smaller held_out \(at most 5\d\d\)"):
        gradient_slots(many.sample(2, torch.Generator()))


def test_two_positions_are_enough() -> None:
    smallest = InContextMarkov(graphs.from_parents([(), (), (0, 1)]), 3, 0.1)
    found = gradient_slots(smallest.sample(64, generator(0, "smallest")), held_out=32)
    assert len(found.parents) == 3
