"""In-context regression: the tokens are what they should be, and the law is the one that was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.tasks import LinearRegression, SineRegression, generator
from causal_probe.tasks.regression import regression_tokens


def test_joint_tokens_by_hand() -> None:
    x, y = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[5.0], [6.0]]])
    query, W0 = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 0.5]])
    tokens = regression_tokens(x, y, query, W0=W0)
    assert tokens.tolist() == [[[1, 2, 5], [3, 4, 6], [1, -1, -1.5]]]
    separate = regression_tokens(x, y, query, form="separate")
    assert separate.tolist() == [[[1, 2, 0], [0, 0, 5], [3, 4, 0], [0, 0, 6], [1, -1, 0]]]


@pytest.mark.parametrize("form", ["joint", "separate"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_batch_holds_together(form: str, noise: float) -> None:
    task = LinearRegression(3, 7, d_out=2, form=form, noise=noise)
    batch = task.sample(5, generator(0, "x"), dtype=torch.float64)
    assert len(batch) == 5
    assert torch.equal(batch.tokens, task.tokens(batch.x, batch.y, batch.x_query))
    assert batch.tokens.shape == (5, task.n_positions, task.d_token)
    W = torch.linalg.lstsq(batch.x, batch.y).solution  # 7 examples in 3 dimensions
    exact = (batch.x_query[:, None] @ W)[:, 0]
    assert torch.allclose(exact, batch.target, atol=1e-9) == (noise == 0)


@pytest.mark.parametrize(("law", "scale", "variance"), [("uniform", 0.5, 1 / 12), ("normal", 0.7, 0.49)])
def test_the_law_of_the_inputs(law: str, scale: float, variance: float) -> None:
    task = LinearRegression(2, 1000, input_law=law, input_scale=scale, w_scale=3.0)
    batch = task.sample(200, generator(1, "x"), dtype=torch.float64)
    x = batch.x.numpy().ravel()
    assert task.input_variance == pytest.approx(variance)
    assert x.var() == pytest.approx(variance, rel=0.02)
    assert abs(x.mean()) < 5 * math.sqrt(variance / x.size)
    if law == "uniform":
        assert np.abs(x).max() <= scale
    W = torch.linalg.lstsq(batch.x, batch.y).solution
    assert float(W.std()) == pytest.approx(3, rel=0.2)


def test_sine_waves() -> None:
    batch = SineRegression(8).sample(2_000, generator(0, "x"), dtype=torch.float64)
    assert batch.tokens.shape == (2_000, 9, 2)
    # a sin(x + p) solves y = A sin x + B cos x: two unknowns, eight examples
    features = torch.cat([batch.x.sin(), batch.x.cos()], -1)
    AB = torch.linalg.lstsq(features, batch.y).solution[..., 0]
    amplitude, phase = AB.norm(dim=-1), torch.atan2(AB[:, 1], AB[:, 0])
    assert 0.1 <= float(amplitude.min()) < 0.11
    assert 0.49 < float(amplitude.max()) <= 0.5
    assert 0 <= float(phase.min()) < float(phase.max()) <= math.pi


def test_over_a_whole_turn_sine_and_cosine_are_alike() -> None:
    """The coefficients a (cos p, sin p) have mean 0 and variance E a^2 / 2 = 0.0517 each; over half a turn the second is never negative."""
    moments = {}
    for phases in (math.pi, 2 * math.pi):
        batch = SineRegression(8, phases=phases).sample(20_000, generator(0, "x"), dtype=torch.float64)
        AB = torch.linalg.lstsq(torch.cat([batch.x.sin(), batch.x.cos()], -1), batch.y).solution[..., 0]
        moments[phases] = AB.mean(0), AB.square().mean(0), AB.amin(0)
    mean, square, _ = moments[2 * math.pi]
    assert mean.tolist() == pytest.approx([0, 0], abs=0.01)
    assert square.tolist() == pytest.approx([0.0517, 0.0517], rel=0.03)
    mean, _, least = moments[math.pi]
    assert float(mean[1]) == pytest.approx(0.191, rel=0.02)
    assert float(least[1]) >= -1e-9
    with pytest.raises(CausalProbeError, match="phases must be positive"):
        SineRegression(8, phases=0.0)


def test_the_same_generator_gives_the_same_batch() -> None:
    task = LinearRegression(3, 4)
    one, other, third = (task.sample(2, generator(seed, "x")).tokens for seed in (0, 0, 1))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_x": 0}, "d_x must be a whole number of at least 1, not 0"),
        ({"n_examples": 0}, "n_examples must be a whole number of at least 1, not 0"),
        ({"input_scale": 0.0}, "input_scale must be positive"),
        ({"noise": -1.0}, "noise must be a finite"),
        ({"W0": torch.zeros(2, 2)}, "W0 must have the shape"),
    ],
)
def test_no_such_task(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        LinearRegression(**{"d_x": 3, "n_examples": 3, **arguments})


def test_an_empty_batch() -> None:
    with pytest.raises(CausalProbeError, match="at least one sequence"):
        LinearRegression(2, 2).sample(0, generator(0, "x"))
