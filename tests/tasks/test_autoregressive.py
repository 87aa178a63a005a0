"""The process, and its population loss against exact integration: roots of unity for phases, Gauss-Hermite for normal starts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.tasks import AutoregressiveProcess, generator


@pytest.mark.parametrize("start", ["normal", "sparse", "ones"])
def test_states_follow_the_rotation(start: str) -> None:
    process = AutoregressiveProcess(3, 9, start=start, scale=0.5)
    batch = process.sample(6, generator(0, "x"))
    x, W = batch.x, batch.eigenvalues
    torch.testing.assert_close(x[:, 1:], x[:, :-1] * W[:, None], rtol=0, atol=1e-5)
    torch.testing.assert_close(W.abs(), torch.ones(6, 3), rtol=0, atol=1e-6)
    assert torch.equal(batch.tokens[:, :, :3], x[:, :-1])
    assert torch.equal(batch.tokens[:, 1:, 3:], x[:, :-2])
    assert not batch.tokens[:, 0, 3:].any()
    assert torch.equal(batch.target, x[:, 1:])
    if start == "sparse":
        assert (x[:, 0].abs() > 0).sum(-1).tolist() == [1] * 6
        assert set(x[:, 0].real.flatten().tolist()) <= {-0.5, 0.0, 0.5}


def test_real_form_is_the_same_numbers() -> None:
    plain, real = (AutoregressiveProcess(2, 5, real=real).sample(3, generator(0, "x")) for real in (False, True))
    now, before = plain.tokens[..., :2], plain.tokens[..., 2:]
    assert torch.equal(real.tokens, torch.cat([now.real, now.imag, before.real, before.imag], -1))
    assert torch.equal(real.target, torch.cat([plain.target.real, plain.target.imag], -1))


def exact_coefficients(process: AutoregressiveProcess) -> tuple[float, float]:
    """E sum_t Re<M_t, x_{t+1}> and E sum_t |M_t|^2, by exact quadrature over starts and phases."""
    d, T = process.d_x, process.length
    if process.start == "normal":
        nodes, weights = np.polynomial.hermite_e.hermegauss(8)  # exact to degree 15
        weights = weights / weights.sum()
        starts = [
            (np.array(x) * process.scale, float(np.prod(w)))
            for x, w in zip(itertools.product(nodes, repeat=d), itertools.product(weights, repeat=d), strict=True)
        ]
    elif process.start == "sparse":
        starts = [(sign * process.scale * np.eye(d)[j], 0.5 / d) for j in range(d) for sign in (-1, 1)]
    else:
        starts = [(np.full(d, process.scale), 1.0)]
    n = 4 * T  # the integrands are trigonometric polynomials of degree below 2 T in each phase
    phases = np.exp(2j * np.pi * np.arange(n) / n)
    cross = square = 0.0
    grid = np.array(list(itertools.product(phases, repeat=d)))  # [phase, d]
    for first, weight in starts:
        x = first * grid[:, None] ** np.arange(T)[:, None]  # [phase, T, d]
        for t in range(2, T):
            M = np.einsum("pjs,pjr,pr->ps", x[:, 1:t], x[:, : t - 1].conj(), x[:, t - 1]) / (t - 1)
            cross += weight * float((M.conj() * x[:, t]).real.sum(-1).mean())
            square += weight * float((np.abs(M) ** 2).sum(-1).mean())
    return cross, square


@pytest.mark.parametrize("start", ["normal", "sparse", "ones"])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_limit_is_the_optimum_of_the_exact_population_loss(start: str, scale: float) -> None:
    process = AutoregressiveProcess(2, 5, start=start, scale=scale)
    cross, square = exact_coefficients(process)
    assert process.limit == pytest.approx(cross / square, rel=1e-10)
    for a, b in ((0.1, 0.1), (0.3, 0.03), (2.0, 0.5)):
        assert process.flow(a, b).product[-1] == pytest.approx(cross / square, rel=1e-4)


def test_the_limits_that_are_known() -> None:
    assert [round(AutoregressiveProcess(5, 30, scale=s).limit, 3) for s in (0.5, 1, 2)] == [0.719, 0.18, 0.045]
    assert [AutoregressiveProcess(5, 30, start="sparse", scale=s).limit for s in (0.5, 1, 2)] == [4, 1, 0.25]
    ones = [round(AutoregressiveProcess(5, T, start="ones").limit, 3) for T in (30, 100, 1000)]
    assert ones == [0.641, 0.826, 0.971]


def test_the_moment_condition() -> None:
    for start, satisfied in (("normal", False), ("sparse", True), ("ones", True)):
        process = AutoregressiveProcess(4, 10, start=start, scale=0.7)
        k1, k2, _ = process.moments
        modulus = process.sample(200, generator(0, "x")).x[:, 0].abs()
        allowed = (modulus < 1e-6) | ((modulus - (k2 / k1) ** 0.5).abs() < 1e-5)
        assert bool(allowed.all()) == satisfied == process.satisfies_moment_condition


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_x": 0}, "d_x must be a whole number of at least 1"),
        ({"length": 2}, "length must be a whole number of at least 3"),
        ({"scale": 0.0}, "scale must be positive"),
    ],
)
def test_no_such_process(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        AutoregressiveProcess(**arguments)


def test_a_flow_that_learns_nothing() -> None:
    for a, b in ((0.0, 0.0), (0.3, -0.3)):
        with pytest.raises(CausalProbeError, match="saddle"):
            AutoregressiveProcess().flow(a, b)
