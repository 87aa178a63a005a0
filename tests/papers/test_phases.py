"""Phases and mixtures of graphs end to end with tiny settings; and the measurements on a model whose answers are known."""

from __future__ import annotations

import pytest
import torch

from causal_probe.models import selective_induction
from causal_probe.papers import phases, reproduce
from causal_probe.tasks import GraphMixture, generator


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {True: 6, False: 6}
    values = {
        "CHAIN_STEPS": both, "GRAPH_STEPS": both, "BATCH": 8, "MOMENTS": 5, "WATCHED": 16, "SEQUENCES": {True: 64, False: 64},
        "CHAINS": (2, 4), "CHAIN_LENGTH": 12, "GRAPH_SEEDS": {True: 1, False: 2},
    }  # fmt: skip
    for name, value in values.items():
        assert hasattr(phases, name)
        monkeypatch.setattr(phases, name, value)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "quick"), [("markov-phases", True), ("graph-mixture", False)])
def test_it_runs(name: str, quick: bool) -> None:
    result = reproduce(name, quick=quick)
    assert result.figures
    assert len({line.quantity for line in result.lines}) == len(result.lines)
    assert all(line.ours is not None for line in result.lines)


def test_what_is_measured_of_a_model_that_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lags in the place of three forests: the model set by hand follows each sequence's own."""
    monkeypatch.setattr(phases, "GRAPH_LENGTH", 48)
    monkeypatch.setattr(phases, "BURN_IN", 36)
    task = GraphMixture.of_lags((1, 2, 4), 48, 5, concentration=0.3, seed=2)
    assert task.matrix is not None
    found = phases.probe(selective_induction((1, 2, 4), task.matrix, 48), task, 128, 0)
    assert found["head"] == "L2H0"
    assert found["selectivity"] > 0.95
    assert min(found["by-graph"]) == 1
    assert min(found["over-all"]) < 1
    assert found["divergence"] > found["uniform"]  # it bets on one graph, where the posterior hedges
    assert 0 < found["excess"] < 0.3


def test_exact_averaging_loses_nothing() -> None:
    task = phases.graphs_of(0)
    batch = task.sample(16, generator(0, "a test"))
    law = task.references()["model averaging"](batch)

    def exact(tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([law[:, 1:], law[:, :1]], 1).log()  # row t predicts token t + 1

    assert float(phases.excess(exact, task, batch, 1).abs().max()) < 1e-9
