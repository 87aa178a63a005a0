"""Predictors and expected losses, each against another way to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression as ScikitLinear
from sklearn.linear_model import Ridge
from torch import Tensor

from causal_probe import CausalProbeError
from causal_probe.tasks import LinearRegression, generator, one_step_optimum, predict_descent
from causal_probe.tasks.least_squares import expected_loss, fit_descent, least_squares, ridge


def batch_of(n: int = 6, d: int = 3, d_out: int = 2, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    batch = LinearRegression(d, n, d_out=d_out, noise=noise).sample(4, generator(0, "x"), dtype=torch.float64)
    return batch.x, batch.y, batch.x_query


def test_descent_is_autograd_on_the_least_squares_loss() -> None:
    x, y, query = batch_of()
    W0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = predict_descent(x, y, query, eta=[0.3, 0.2], W0=W0)
    for index in range(4):
        W = W0
        for eta in (0.3, 0.2):
            W = W.clone().requires_grad_()
            loss = 0.5 * (x[index] @ W.T - y[index]).square().sum()
            W = (W - eta * torch.autograd.grad(loss, W)[0]).detach()
        torch.testing.assert_close(found[index], W @ query[index], rtol=1e-12, atol=1e-12)


def test_curvature_correction_token_by_token() -> None:
    x, y, query = batch_of()
    found = predict_descent(x, y, query, eta=[0.3, 0.2], gamma=[0.1, 0.05])
    for index in range(4):
        tokens = [(x[index, j], y[index, j]) for j in range(6)] + [(query[index], torch.zeros(2, dtype=torch.float64))]
        for eta, gamma in ((0.3, 0.1), (0.2, 0.05)):
            examples = tokens[:-1]
            tokens = [
                (
                    a - gamma * sum(u * (u @ a) for u, _ in examples),
                    b - eta * sum(v * (u @ a) for u, v in examples),
                )
                for a, b in tokens
            ]
        torch.testing.assert_close(found[index], -tokens[-1][1], rtol=1e-12, atol=1e-12)


def test_least_squares_and_ridge_are_scikit_learns() -> None:
    x, y, query = batch_of(n=8)
    for index in range(4):
        plain = ScikitLinear(fit_intercept=False).fit(x[index], y[index]).predict(query[index][None])[0]
        np.testing.assert_allclose(least_squares(x, y, query)[index], plain, rtol=1e-9)
        shrunk = Ridge(alpha=0.7, fit_intercept=False, tol=1e-12).fit(x[index], y[index]).predict(query[index][None])[0]
        np.testing.assert_allclose(ridge(x, y, query, penalty=0.7)[index], shrunk, rtol=1e-7)


def test_many_steps_reach_least_squares() -> None:
    x, y, query = batch_of(n=20)
    many = predict_descent(x, y, query, eta=[0.2] * 800)
    torch.testing.assert_close(many, least_squares(x, y, query), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("law", "scale", "eta", "loss"),
    [("uniform", 0.5, 0.6061, 0.2062), ("uniform", 1.0, 0.1515, 0.8249), ("normal", 0.4, None, None)],
)
def test_the_closed_form_is_the_optimum_of_monte_carlo(
    law: str, scale: float, eta: float | None, loss: float | None
) -> None:
    """Whole tasks, labels and queries included: nothing of the derivation is used."""
    task = LinearRegression(10, 10, input_law=law, input_scale=scale)
    best = one_step_optimum(task)
    if eta is not None:
        assert best.eta[0] == pytest.approx(eta, abs=5e-5)
        assert best.loss == pytest.approx(loss, abs=5e-5)
    batch = task.sample(100_000, generator(3, "x"), dtype=torch.float64)
    unit = predict_descent(batch.x, batch.y, batch.x_query, eta=[1.0])
    # least squares of the target on the unit step's prediction is the best step; its error by the delta method
    pp, pt = unit.square()[:, 0], (unit * batch.target)[:, 0]
    found = float(pt.mean() / pp.mean())
    error = float((pt - found * pp).std() / pp.mean()) / math.sqrt(len(pp))
    assert abs(found - best.eta[0]) < 4 * error
    squares = 0.5 * (best.eta[0] * unit - batch.target).square()[:, 0]
    assert best.loss is not None
    assert abs(float(squares.mean()) - best.loss) < 4 * float(squares.std()) / math.sqrt(len(squares))


@pytest.mark.parametrize(("noise", "gamma"), [(0.0, (0.17, 0.17)), (0.4, (0.0, 0.0)), (0.4, (0.1, 0.2))])
def test_the_loss_by_eigenvalues_is_the_loss(noise: float, gamma: tuple[float, float]) -> None:
    task = LinearRegression(5, 8, d_out=2, noise=noise, w_scale=1.5)
    descent = expected_loss(task, [0.5, 0.4], gamma, generator=generator(0, "inputs"))
    batch = task.sample(60_000, generator(1, "tasks"), dtype=torch.float64)
    prediction = predict_descent(batch.x, batch.y, batch.x_query, eta=[0.5, 0.4], gamma=gamma)
    squares = 0.5 * (prediction - batch.target).square().sum(-1)
    assert descent.loss is not None
    assert descent.standard_error is not None
    error = math.hypot(float(squares.std()) / math.sqrt(len(squares)), descent.standard_error)
    assert abs(float(squares.mean()) - descent.loss) < 4 * error


def test_fitted_steps_are_best() -> None:
    task = LinearRegression(10, 10)
    one = fit_descent(task, 1, draws=4_000)
    assert one.eta[0] == pytest.approx(0.6061, rel=0.01)
    plain, corrected = (fit_descent(task, 2, curvature=c, shared=True, draws=4_000) for c in (False, True))
    assert plain.loss is not None
    assert corrected.loss is not None
    assert corrected.loss < plain.loss < 0.2062
    for factor in (0.9, 1.1):
        near = [factor * step for step in corrected.eta]
        assert expected_loss(task, near, corrected.gamma, draws=4_000).loss > corrected.loss * 1.001


def test_noise_asks_for_smaller_steps() -> None:
    noisy = fit_descent(LinearRegression(10, 10, noise=1.0), 1, draws=2_000)
    assert noisy.eta[0] < 0.5


def test_what_cannot_be_done() -> None:
    x, y, query = batch_of(n=2, d=3)
    with pytest.raises(CausalProbeError, match="2 examples in 3 dimensions has many solutions"):
        least_squares(x, y, query)
    assert least_squares(x, y, query, minimum_norm=True).isfinite().all()
    repeated, answers, _ = batch_of(n=2, d=3)
    repeated, answers = repeated.repeat(1, 3, 1), answers.repeat(1, 3, 1)
    with pytest.raises(CausalProbeError, match="6 examples in 3 dimensions has many solutions where they span 2"):
        least_squares(repeated, answers, query)
    assert least_squares(repeated, answers, query, minimum_norm=True).isfinite().all()
    with pytest.raises(CausalProbeError, match="diverges"):
        predict_descent(x, y, query, eta=[1e30] * 40)
    with pytest.raises(CausalProbeError, match="diverge"):
        expected_loss(LinearRegression(3, 5), [1e9] * 5)
    with pytest.raises(CausalProbeError, match="shapes are"):
        predict_descent(x[:, :0], y[:, :0], query, eta=[1.0])
    with pytest.raises(CausalProbeError, match="without noise"):
        one_step_optimum(LinearRegression(3, 5, noise=0.1))
    with pytest.raises(CausalProbeError, match="penalty"):
        ridge(x, y, query, penalty=0.0)
    with pytest.raises(CausalProbeError, match="At least one step"):
        fit_descent(LinearRegression(3, 5), 0)
