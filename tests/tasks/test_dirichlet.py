"""Dirichlet rows and gamma variates against scipy's distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from causal_probe.tasks.dirichlet import CONCENTRATIONS, dirichlet, log_gamma_variates

#: A right sampler fails one such test in ten thousand seeds, and the seeds are fixed.
LEVEL = 1e-4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("concentration", [1e-3, 0.1, 1.0, 5.0, 1e4])
def test_gamma_variates_have_scipys_law(concentration: float, dtype: torch.dtype) -> None:
    """On the logarithmic scale: at concentration = 1e-3 nearly all variates are 0 in float32."""
    log_variates = log_gamma_variates(concentration, (20_000,), generator=seeded(), dtype=dtype).double().numpy()
    assert stats.kstest(log_variates, stats.loggamma(concentration).cdf).pvalue > LEVEL


def test_gamma_variates_of_a_large_shape_are_not_shifted() -> None:
    """At 1e6 the acceptance test subtracts numbers that agree to six digits; the mean tells whether it still decides."""
    concentration, n = 1e6, 400_000
    variates = log_gamma_variates(concentration, (n,), generator=seeded(), dtype=torch.float32).double().exp()
    z = (variates - concentration) / math.sqrt(concentration)
    # Float32 holds log(1e6) to 5e-7, a thousandth of the variates' spread of 1e-3.
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert float(z.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / n))


@pytest.mark.parametrize("concentration", [0.1, 1.0, 5.0])
def test_an_entry_of_a_row_is_beta(concentration: float) -> None:
    rows = dirichlet(concentration, (20_000, 4), generator=seeded(), dtype=torch.float64).numpy()
    for entry in rows.T:
        assert stats.kstest(entry, stats.beta(concentration, 3 * concentration).cdf).pvalue > LEVEL


@pytest.mark.parametrize("concentration", [1e-3, 0.1, 1.0, 5.0])
def test_moments_of_rows(concentration: float) -> None:
    """Mean and covariance of Dirichlet(concentration, ..., concentration), each within four standard errors."""
    n, d = 40_000, 3
    rows = dirichlet(concentration, (n, d), generator=seeded(1), dtype=torch.float64).numpy()
    law = stats.dirichlet([concentration] * d)
    deviation = rows - law.mean()
    assert np.all(np.abs(deviation.mean(0)) < 4 * np.sqrt(law.var() / n))
    products = deviation[:, :, None] * deviation[:, None, :]
    standard_error = products.std(0) / math.sqrt(n)
    assert np.all(np.abs(products.mean(0) - law.cov()) < 4 * standard_error)


def test_rows_are_independent_of_each_other() -> None:
    first, second = dirichlet(0.5, (20_000, 2, 3), generator=seeded(), dtype=torch.float64).numpy().transpose(1, 2, 0)
    correlation = np.corrcoef(first, second)[:3, 3:]
    assert np.all(np.abs(correlation) < 4 / math.sqrt(20_000))


def test_at_a_small_alpha_every_corner_is_as_likely() -> None:
    rows = dirichlet(1e-3, (20_000, 5), generator=seeded())
    # P(largest entry > 1/2) by scipy: the entry is Beta(concentration, 4 concentration), and at most one exceeds a half.
    in_a_corner = rows.amax(-1) > 0.5
    expected = 5 * stats.beta(1e-3, 4e-3).sf(0.5)
    assert float(in_a_corner.double().mean()) == pytest.approx(
        expected, abs=4 * math.sqrt(expected * (1 - expected) / 20_000)
    )
    counts = torch.bincount(rows.argmax(-1), minlength=5).numpy()
    assert stats.chisquare(counts).pvalue > LEVEL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("concentration", [*CONCENTRATIONS, 1e-3, 1e12])
def test_rows_lie_on_the_simplex_at_every_alpha(concentration: float, dtype: torch.dtype) -> None:
    rows = dirichlet(concentration, (1000, 7, 3), generator=seeded(), dtype=dtype)
    assert rows.shape == (1000, 7, 3)
    assert rows.dtype == dtype
    assert bool((rows >= 0).all())
    torch.testing.assert_close(rows.sum(-1), torch.ones(1000, 7, dtype=dtype))
    if concentration == CONCENTRATIONS[0]:
        assert set(rows.unique().tolist()) == {0, 1}
    if concentration == CONCENTRATIONS[1]:
        torch.testing.assert_close(rows, torch.full_like(rows, 1 / 3))


def test_the_generator_alone_decides() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = dirichlet(0.1, (50, 3), generator=seeded(7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(dirichlet(0.1, (50, 3), generator=seeded(7)), first)
    assert not torch.equal(dirichlet(0.1, (50, 3), generator=seeded(8)), first)
