"""The test for roots: exactly one in expectation under the null, by enumeration, and never above its level in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from causal_probe import graphs
from causal_probe.tasks import InContextMarkov
from causal_probe.tasks.root_test import (
    evidence_per_edge,
    evidence_per_root,
    log_bets,
    log_bets_against_rivals,
    surprise,
)
from tests.tasks.tiny_tasks import TREES, law, make, random_tables


def every_sequence(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All sequences of a tiny tree, their probabilities and their transitions."""
    task = make(TREES[name])
    tables = random_tables(task, 0)
    probability = law(TREES[name], tables, 3, tree=True)
    tokens = torch.tensor(list(np.ndindex(probability.shape)))
    pi = torch.tensor(tables[1]).expand(len(tokens), -1, -1)
    return tokens, torch.tensor(probability.ravel()), pi


@pytest.mark.parametrize("candidate", [0, 1, 2])
def test_a_root_s_bet_is_worth_one_whatever_is_bet_on(candidate: int) -> None:
    tokens, probability, pi = every_sequence("a late root")  # node 3 is a root and has a child
    candidates = torch.tensor([-1, -1, -1, candidate, -1, -1]).expand(len(tokens), -1)
    worth = log_bets(tokens, pi, candidates).exp()
    assert float((probability * worth[:, 3]).sum()) == pytest.approx(1, abs=1e-12)
    assert (worth[:, [0, 1, 2, 4, 5]] == 1).all()
    assert (worth >= 0.5).all()


def test_an_edge_gains_what_is_said() -> None:
    tokens, probability, pi = every_sequence("a late root")
    candidates = torch.tensor([-1, 0, 1, -1, 3, -1]).expand(len(tokens), -1)
    gains = (probability[:, None] * log_bets(tokens, pi, candidates)).sum(0)
    expected = float(evidence_per_edge(pi[:1]))
    assert expected > 0
    assert gains[[1, 2, 4]].tolist() == pytest.approx([expected] * 3, abs=1e-12)


def test_the_level_is_kept_at_every_moment() -> None:
    """Ville: over 2,000 runs, the evidence of a root ever exceeds log(1 / 0.05) in at most about 100 of them."""
    task = InContextMarkov(graphs.from_parents([None, None]), 3, 0.1)
    runs, length = 2000, 100
    batch = task.sample(runs * length, torch.Generator().manual_seed(0))
    candidates = torch.tensor([-1, 0, -1]).expand(runs * length, -1)
    path = log_bets(batch.tokens, batch.tables[1], candidates)[:, 1].reshape(runs, length).cumsum(1)
    ever = int((path.amax(1) > surprise(0.05, 1)).sum())
    assert ever <= 100 + 3 * math.sqrt(100)
    assert float(path[:, -1].mean()) < -3  # and a root loses in the long run


def test_states_of_no_probability_are_not_bet_on() -> None:
    pi = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    bets = log_bets(torch.tensor([[1, 1, 0]]), pi, torch.tensor([[-1, 0, 1]]))
    assert bets.isfinite().all()
    assert evidence_per_edge(pi).tolist() == pytest.approx([0.0], abs=1e-12)


def test_a_bet_against_the_true_parent_is_worth_one_whatever_is_bet_on() -> None:
    """By enumeration; and against another node it gains if the true parent is bet on."""
    tokens, probability, pi = every_sequence("a late root")
    parent, child = 1, 2
    for candidate in (0, 1):
        candidates = torch.tensor([-1, -1, candidate, -1, -1, -1]).expand(len(tokens), -1)
        bets = log_bets_against_rivals(tokens, pi, candidates)
        assert (bets[:, [0, 1, 3, 4, 5]] == 0).all()
        against = bets[:, child].gather(1, tokens)  # [sequence, rival]
        assert float((probability * against[:, parent].exp()).sum()) == pytest.approx(1, abs=1e-9)
        assert float((probability * against[:, candidate]).abs().sum()) == pytest.approx(0, abs=1e-12)
    assert float((probability * against[:, 0]).sum()) > 0.01


def test_a_bet_on_a_root_against_the_true_parent_is_worth_one_and_gains_what_is_said_at_a_root() -> None:
    tokens, probability, pi = every_sequence("a late root")  # node 2 is a child of 1; node 3 is a root
    nobody = torch.full_like(tokens, -1)
    roots = torch.tensor([False, False, True, True, False, False]).expand(len(tokens), -1)
    bets = log_bets_against_rivals(tokens, pi, nobody, roots)
    assert (bets[:, [0, 1, 4, 5]] == 0).all()
    assert float((probability * bets[:, 2].gather(1, tokens[:, 1:2])[:, 0].exp()).sum()) == pytest.approx(1, abs=1e-9)
    expected = float(evidence_per_root(pi[:1]))
    assert expected > 0.01
    for rival in (0, 1, 2):
        gain = float((probability * bets[:, 3].gather(1, tokens[:, rival : rival + 1])[:, 0]).sum())
        assert gain == pytest.approx(expected, abs=1e-9)


def test_states_too_rare_to_be_drawn_decide_nothing() -> None:
    """Random numbers of 24 bits may draw a state of probability 1e-30: that is no proof of 70 nats."""
    pi = torch.tensor([[[1 - 1e-30, 1e-30], [0.5, 0.5]]])
    bets = log_bets_against_rivals(torch.tensor([[0, 1, 1, 0]]), pi, torch.tensor([[-1, -1, 1, -1]]))
    assert bets[0, 2, 0] < 14
    assert bets[0, 2, 1] == 0
