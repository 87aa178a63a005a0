"""Alignment with known algorithms: of models that are one, and of one that is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.mechanisms import descent_alignment, feature_descent, reference_algorithms
from causal_probe.mechanisms.descent import Algorithm, interpolate
from causal_probe.models import LinearTransformer, gradient_steps
from causal_probe.tasks import LinearRegression, SineRegression, generator, one_step_optimum
from causal_probe.tasks.least_squares import least_squares


def test_a_hand_set_model_is_its_algorithm_layer_by_layer() -> None:
    task = LinearRegression(4, 6)
    algorithms = reference_algorithms(task, 2)
    gdpp = next(a for a in algorithms if a.name == "GD++, 2 steps")
    assert gdpp.descent is not None
    model = gradient_steps(4, 6, eta=gdpp.descent.eta, gamma=gdpp.descent.gamma, dtype=torch.float64)
    found = descent_alignment(model, task, algorithms=algorithms, n_sequences=300)
    assert found.best().algorithm == "GD++, 2 steps"
    line = found[-1, "GD++, 2 steps"]
    assert line.cosine == pytest.approx(1, abs=1e-12)
    assert line.prediction_distance == pytest.approx(0, abs=1e-12)
    assert line.excess == pytest.approx(0, abs=1e-12)
    gain, error = found.closer("GD++, 2 steps", "GD, 1 step")
    assert error is not None
    assert gain > 5 * error
    assert found[-1, "least squares"].algorithm_loss == pytest.approx(0, abs=1e-12)


def test_the_metrics_by_hand() -> None:
    """Both are linear in the query, so their sensitivities are weight vectors."""
    task = LinearRegression(3, 5)
    u, v = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, -1.0])
    algorithm = Algorithm("v", lambda x, y, x_query: (x_query @ v)[:, None])
    found = descent_alignment(
        lambda tokens: tokens[:, -1, :3] @ u[:, None], task, algorithms=[algorithm], n_sequences=500
    )
    line = found[0, "v"]
    assert line.cosine == pytest.approx(float(u @ v / (u.norm() * v.norm())), abs=1e-6)
    assert line.sensitivity_distance == pytest.approx(float((u - v).norm()), abs=1e-5)
    batch = task.sample(500, generator(0, "descent alignment"))
    each = (batch.x_query @ (u - v)).abs().numpy()
    assert line.prediction_distance == pytest.approx(each.mean(), rel=1e-5)
    assert line.prediction_distance_error == pytest.approx(each.std(ddof=1) / np.sqrt(500), rel=1e-4)
    assert line.model_loss == pytest.approx(
        float(0.5 * (batch.x_query @ u - batch.target[:, 0]).square().mean()), rel=1e-5
    )


def test_an_untrained_model_is_none_of_them() -> None:
    task = LinearRegression(3, 5)
    random = LinearTransformer(4, 6).initialise(generator(0, "weights"), scale=1.0)
    line = descent_alignment(random, task, n_sequences=500)[0, "GD, 1 step"]
    assert line.cosine is not None
    assert abs(line.cosine) < 0.9
    nothing = descent_alignment(LinearTransformer(4, 6), task, n_sequences=50)[0, "GD, 1 step"]
    assert nothing.cosine is None  # it predicts 0 whatever the query


def test_several_outputs() -> None:
    task = LinearRegression(3, 6, d_out=2)
    best = one_step_optimum(task)
    found = descent_alignment(gradient_steps(3, 6, eta=best.eta, d_out=2), task, n_sequences=100)
    assert found[0, "GD, 1 step"].cosine == pytest.approx(1, abs=1e-5)


def test_interpolation_between_equals_is_the_same_function() -> None:
    task = LinearRegression(3, 6)
    model = gradient_steps(3, 6, eta=[0.5])
    with torch.no_grad():
        model.blocks[0].attn.W_Q *= 4  # the factor is in another product
        model.blocks[0].attn.W_O /= 4
    middle = interpolate(model, [0.5])
    tokens = task.sample(5, generator(0, "x")).tokens
    torch.testing.assert_close(middle.predict(tokens), model.predict(tokens))
    halfway = interpolate(model, [0.1])
    torch.testing.assert_close(halfway.predict(tokens), model.predict(tokens) * 0.6)
    with pytest.raises(CausalProbeError, match="one layer for each step"):
        interpolate(model, [0.1, 0.2])


def test_descent_on_features_finds_its_step() -> None:
    task = LinearRegression(4, 8)
    raw = feature_descent(None, task, name="raw", n_sequences=50_000)
    assert raw.descent is not None
    assert raw.descent.eta[0] == pytest.approx(one_step_optimum(task).eta[0], rel=0.02)
    waves = SineRegression(8)
    fourier = feature_descent(lambda x: torch.cat([x.sin(), x.cos()], -1), waves, name="waves")
    batch = waves.sample(500, generator(1, "x"))
    losses = [
        float((algorithm.predict(batch.x, batch.y, batch.x_query) - batch.target).square().mean())
        for algorithm in (fourier, feature_descent(None, waves, name="raw"))
    ]
    assert losses[0] < 0.5 * losses[1]


def test_what_it_refuses() -> None:
    task = LinearRegression(3, 5)
    with pytest.raises(CausalProbeError, match="Build a model of the task's shape"):
        descent_alignment(LinearTransformer(5, 6), task)
    with pytest.raises(CausalProbeError, match="At least 2 sequences"):
        descent_alignment(LinearTransformer(4, 6), task, n_sequences=1)
    with pytest.raises(CausalProbeError, match="must be given"):
        descent_alignment(LinearTransformer(2, 11), SineRegression(10))
    with pytest.raises(CausalProbeError, match="no algorithm 'GD'"):
        descent_alignment(LinearTransformer(4, 6), task, n_sequences=10)[0, "GD"]


def test_it_prints_and_cites() -> None:
    solve = Algorithm("least squares", lambda x, y, q: least_squares(x, y, q))
    found = descent_alignment(
        gradient_steps(3, 5, eta=[0.5]), LinearRegression(3, 5), algorithms=[solve], n_sequences=10
    )
    assert "nearest after the last layer: least squares" in repr(found)
    assert "vonoswald2023" in found.cite().bibtex
    assert len(found.to_pandas()) == 1
