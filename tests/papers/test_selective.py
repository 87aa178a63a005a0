"""Selective induction end to end with tiny settings; and the measurements on the weights set by hand, whose answers are known."""

from __future__ import annotations

import pytest
import torch

from causal_probe.models import selective_induction
from causal_probe.papers import reproduce, selective
from causal_probe.tasks import generator


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "STEPS": {True: 4, False: 4},
        "BATCH": 8,
        "SEQUENCES": {True: 64, False: 64},
        "SEEDS": {True: 1, False: 2},
    }
    for name, value in values.items():
        assert hasattr(selective, name)
        monkeypatch.setattr(selective, name, value)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("quick", [True, False])
def test_it_runs(quick: bool) -> None:
    result = reproduce("selective-induction", quick=quick)
    assert result.figures
    assert len({line.quantity for line in result.lines}) == len(result.lines)
    by_hand = next(line for line in result.lines if line.quantity.startswith("weights set by hand"))
    assert float(by_hand.ours or 0) > 0.8
    trained = next(line for line in result.lines if line.quantity.startswith("three layers: loss above"))
    assert not trained.holds  # four steps teach nothing


def test_what_is_measured_of_the_weights_set_by_hand() -> None:
    task = selective.task_of(0)
    assert task.matrix is not None
    found = selective.probe(selective_induction(selective.LAGS, task.matrix, selective.LENGTH), task, 128, 0)
    assert found["head"] == "L2H0"
    assert found["selectivity"] > 0.8
    assert min(found["by_lag"]) == 1  # the graph of each lag, in every row
    assert sum(share >= 0.5 for share in found["over_all"]) <= 1  # and none of them, or one, in the mean
    assert found["slope"] > 1  # it bets on one lag, where the posterior hedges
    assert 0 < found["excess"] < 0.2


def test_exact_averaging_loses_nothing_and_uniform_much() -> None:
    task = selective.task_of(0)
    batch = task.sample(32, generator(0, "a test"))
    best = task.references()["model averaging"](batch)
    assert float(selective.excess(task, best, batch).abs().max()) == 0
    assert float(selective.excess(task, torch.full_like(best, 1 / selective.D_VOCAB), batch).mean()) > 0.1
