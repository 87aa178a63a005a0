"""The figures of von Oswald et al. 2022, each end to end with tiny settings; growing a model; a standard model on vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from causal_probe.mechanisms import descent_alignment
from causal_probe.models import LinearTransformer
from causal_probe.papers import descent, reproduce, standard, waves
from causal_probe.tasks import LinearRegression, SineRegression, generator
from causal_probe.training import adam

TINY: dict[Any, dict[str, Any]] = {
    waves: {"STARTS": 2, "STEPS": {quick: {"first": 5, "rest": 5} for quick in (True, False)}, "SEQUENCES": {True: 50, False: 50}},
    standard: {"TRAINING": {True: {"steps": 4, "batch_size": 8}}, "SEQUENCES": {True: 50}},
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, values in TINY.items():
        for name, value in values.items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "quick"), [("sine", True), ("sine", False), ("softmax", True)])
def test_each_runs(name: str, quick: bool) -> None:
    result = reproduce(name, quick=quick)
    assert result.to_dict()["settings"]["quick"] is quick
    assert result.figures
    assert len({line.quantity for line in result.lines}) == len(result.lines)
    assert any(line.quantity.startswith("half a turn") for line in result.lines) == (name == "sine" and not quick)


@pytest.mark.usefixtures("tiny")
def test_the_initialisation_with_the_lowest_loss_goes_on() -> None:
    run = standard.Run(quick=True)
    kept = waves.train(run, SineRegression(10), 0)
    assert len(kept["starts"]) == 2
    assert len(kept["losses"]) == 5


def test_layers_are_grown_one_by_one() -> None:
    """The deeper model begins with the weights of the shallower one: untrained, it holds them."""
    task = LinearRegression(3, 5)
    one = descent.grown(task, [(1, 1.0, adam(3, batch_size=16))], seed=0, scale=0.1)
    stages = adam(1, batch_size=16, learning_rate=1e-9)
    two = descent.grown(task, [(1, 1.0, adam(3, batch_size=16)), (2, 1.0, stages)], seed=0, scale=0.1)
    assert len(one.kinds) == 1
    assert len(two.kinds) == 2
    assert two.shared
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        grown = getattr(two, name)
        torch.testing.assert_close(grown[0], grown[1])
        torch.testing.assert_close(grown[0], getattr(one, name)[0], rtol=1e-4, atol=1e-6)
    untouched = LinearTransformer(4, 6).initialise(generator(0, "weights"), scale=0.1)
    assert not torch.equal(one.W_Q, untouched.W_Q)


def test_a_standard_model_reads_vectors_and_is_trained_through_the_stream() -> None:
    task = LinearRegression(3, 4, form="separate")
    model = standard.OnVectors(task, generator(0, "weights"))
    tokens = task.sample(6, generator(1, "x")).tokens
    answer = model(tokens)
    assert answer.shape == (6, 1)
    answer.sum().backward()
    moved = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert {"read_in", "read_out"} <= moved
    assert any("blocks.0" in name for name in moved)
    swapped = tokens.clone()
    swapped[:, [0, 2]] = swapped[:, [2, 0]]
    assert not torch.allclose(model(swapped), answer)  # it has positions
    assert descent_alignment(model, task, n_sequences=20)[0, "GD, 1 step"].cosine is not None
