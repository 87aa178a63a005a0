from __future__ import annotations

import itertools
import json

import networkx as nx
import numpy as np
import pytest

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.probes import match_heads
from causal_probe.probes.evidence import Evidence


def by_hand(weights):
    return Evidence.from_arrays([np.asarray(weights, dtype=float)])


def attending(truth, slots):
    """[head, child, parent]: each head gives 0.9 to the parent in its slot (None: to itself)."""
    weights = np.zeros((len(slots), len(truth), len(truth)))
    for head, slot in enumerate(slots):
        for child in truth:
            parents = sorted(truth.predecessors(child))
            target = parents[slot] if slot is not None and len(parents) > slot else child
            weights[head, child, target] = 0.9
    return weights


@pytest.mark.parametrize("slots", list(itertools.permutations(range(3))))
def test_heads_are_assigned_to_the_slots_they_copy(slots):
    truth = graphs.random_dag(9, parents=3, seed=0)
    found = match_heads(by_hand(attending(truth, slots)), truth)
    assert [slots[head] for head in found.heads] == [0, 1, 2]
    assert found.attention == pytest.approx((0.9, 0.9, 0.9))
    assert found.mean_parent_attention == pytest.approx(0.9)
    assert (found.swaps, found.unmatched_heads, found.unmatched_slots) == (0, (), ())


def test_the_assignment_is_the_best_of_all():
    truth = graphs.random_dag(8, parents=3, seed=1)
    weights = np.random.default_rng(0).dirichlet(np.ones(8), size=(4, 8))
    found = match_heads(by_hand(weights), truth)
    parents = {child: sorted(truth.predecessors(child)) for child in truth}

    def score(head, slot):
        return np.mean([weights[head, child, its[slot]] for child, its in parents.items() if len(its) > slot])

    best = max(itertools.permutations(range(4), 3), key=lambda heads: sum(map(score, heads, range(3))))
    assert found.heads == best
    assert found.attention == pytest.approx([score(head, slot) for slot, head in enumerate(best)])
    np.testing.assert_allclose(found.scores, [[score(head, slot) for slot in range(3)] for head in range(4)])
    assert found.unmatched_heads == tuple({0, 1, 2, 3} - set(best))
    edges = [(child, its[slot], best[slot]) for child, its in parents.items() for slot in range(len(its))]
    assert found.mean_parent_attention == pytest.approx(np.mean([weights[h, c, p] for c, p, h in edges]))
    for slot, head in enumerate(best):
        away = tuple(
            child
            for child, its in parents.items()
            if len(its) > slot and any(weights[head, child, other] > weights[head, child, its[slot]] for other in its)
        )
        assert found.swapped[slot] == away
    assert found.swaps == sum(map(len, found.swapped)) > 0


def test_a_slot_without_a_head_is_reported_and_left_out():
    truth = graphs.two_parent_tree(6)
    found = match_heads(by_hand(attending(truth, [1])), truth)
    assert found.heads == (None, 0)
    assert found.unmatched_slots == (0,)
    assert found.attention == (None, pytest.approx(0.9))
    assert found.mean_parent_attention == pytest.approx(0.9)
    assert "slot 0: no head is left for it" in repr(found)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["heads"] == [None, 0]
    assert content["undefined"] == {"attention.0": "there are fewer heads than parent slots"}


def test_a_head_without_a_slot_is_reported():
    found = match_heads(by_hand(attending(graphs.chain(5), [None, 0])), graphs.chain(5))
    assert (found.heads, found.unmatched_heads) == ((1,), (0,))
    assert "heads without a slot: L0H0" in repr(found)
    assert found._repr_html_().count("<tr>") == 2


def test_children_that_swap_the_roles_of_their_heads_are_counted():
    truth = graphs.two_parent_tree(7)
    weights = attending(truth, [0, 1])
    weights[:, 4] = weights[::-1, 4]  # at node 4 each head does the other's work
    found = match_heads(by_hand(weights), truth)
    assert found.heads == (0, 1)
    assert found.swapped == ((4,), (4,))
    assert found.swaps == 2


def test_children_can_be_chosen_and_leave_out_the_query_row_of_a_node_beyond():
    truth = graphs.random_dag(6, parents=2, seed=0)  # five tokens, node 5 is predicted
    weights = attending(truth, [0, 1])[:, :5, :5]
    weights[:, 4] = 0.2
    assert match_heads(by_hand(weights), truth).mean_parent_attention == pytest.approx(0.9)
    assert match_heads(by_hand(weights), truth, children=[4]).mean_parent_attention == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("truth", "options", "message"),
    [
        (nx.empty_graph(3, create_using=nx.DiGraph), {}, "none of the compared nodes has a parent"),
        (graphs.chain(3), {"layer": 1}, "Layer 1 was asked for; there are 1 layers"),
        (graphs.chain(3), {"children": [5]}, r"children \[5\] have no row"),
    ],
)
def test_what_can_not_be_matched_is_refused(truth, options, message):
    with pytest.raises(CausalProbeError, match=message):
        match_heads(by_hand(np.zeros((1, 3, 3))), truth, **options)
