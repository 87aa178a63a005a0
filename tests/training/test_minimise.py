"""Minimising: against a by-hand descent, and what it refuses."""

from __future__ import annotations

import pytest
from torch import nn

from causal_probe import CausalProbeError
from causal_probe.models import LinearTransformer
from causal_probe.tasks import LinearRegression, generator
from causal_probe.training import Stage, adam, minimise, regression_loss


def parabola(start: float = 3.0) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, start)
    return model


def test_sgd_by_hand() -> None:
    model, seen = parabola(), []
    stages = [Stage("one", 3, 7, "sgd", 0.1, ("all",)), Stage("two", 1, 5, "sgd", 0.5, ("all",))]
    history = minimise(
        model,
        lambda n: 0.5 * model.weight.square().sum(),
        stages,
        callback=lambda step: seen.append((step, model.weight.item())),
    )
    w, expected = 3.0, [3.0]
    for rate in (0.1, 0.1, 0.1, 0.5):
        w -= rate * w
        expected.append(w)
    assert [value for _, value in seen] == pytest.approx(expected)
    assert history.loss == pytest.approx([0.5 * value**2 for value in expected[:-1]])
    assert history.stage == ("one", "one", "one", "two")
    assert history.sequences == 3 * 7 + 5


def test_clipping_bounds_the_step() -> None:
    model = parabola()
    minimise(model, lambda n: 0.5 * model.weight.square().sum(), [Stage("one", 1, 1, "sgd", 1.0, ("all",))], clip=0.25)
    assert model.weight.item() == pytest.approx(2.75, abs=1e-4)


def test_a_layer_learns_a_small_task() -> None:
    task = LinearRegression(2, 4)
    model = LinearTransformer(3, 5).initialise(generator(0, "weights"), scale=0.05)
    history = minimise(
        model, regression_loss(model, task, generator(0, "training")), adam(200, batch_size=256, learning_rate=0.02)
    )
    assert len(history.loss) == 200
    assert sum(history.loss[-20:]) < 0.75 * sum(history.loss[:20])


def test_what_it_refuses() -> None:
    model = parabola()
    with pytest.raises(CausalProbeError, match="learning rate 1e\\+10"):
        minimise(model, lambda n: model.weight.pow(4).sum(), [Stage("one", 50, 1, "sgd", 1e10, ("all",))])
    model.weight.requires_grad_(False)
    with pytest.raises(CausalProbeError, match="nothing to train"):
        minimise(model, lambda n: model.weight.sum(), adam(1))
    with pytest.raises(CausalProbeError, match="Build a model of the task's shape"):
        regression_loss(LinearTransformer(3, 5), LinearRegression(3, 4), generator(0, "x"))
