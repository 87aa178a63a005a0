"""Stationary distributions against eigenvectors, exact rational arithmetic and what is known of reducible chains."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch

from causal_probe.tasks.dirichlet import dirichlet
from causal_probe.tasks.stationary import stationary_distribution


def random_chains(concentration: float, n: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return dirichlet(concentration, (n, d, d), generator=torch.Generator().manual_seed(0), dtype=dtype)


def assert_stationary(mu: torch.Tensor, transition: torch.Tensor, atol: float) -> None:
    mu, transition = mu.double(), transition.double()
    assert bool((mu >= 0).all())
    torch.testing.assert_close(mu.sum(-1), torch.ones(len(mu), dtype=torch.float64), rtol=0, atol=atol)
    torch.testing.assert_close((mu[:, None] @ transition)[:, 0], mu, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 3, 10])
@pytest.mark.parametrize("concentration", [1e-3, 0.1, 1.0])
def test_fixed_by_the_chain(concentration: float, d: int, dtype: torch.dtype) -> None:
    transition = random_chains(concentration, 3000, d, dtype)
    mu = stationary_distribution(transition)
    assert mu.dtype == dtype
    assert_stationary(mu, transition, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_the_chains_of_the_test_above_are_nearly_reducible() -> None:
    """Many have a second eigenvalue of 1 to float32's precision: a linear solver has nothing to hold on to there."""
    moduli = np.sort(np.abs(np.linalg.eigvals(random_chains(1e-3, 300, 3, torch.float64).numpy())), axis=-1)
    assert np.mean(moduli[:, -2] > 1 - 1e-7) > 0.2


@pytest.mark.parametrize("d", [2, 3, 10])
def test_the_eigenvector_where_that_is_well_conditioned(d: int) -> None:
    transition = random_chains(5.0, 50, d, torch.float64)
    found = stationary_distribution(transition).numpy()
    for mu, pi in zip(found, transition.numpy(), strict=True):
        values, vectors = np.linalg.eig(pi.T)
        vector = vectors[:, np.argmin(np.abs(values - 1))].real
        np.testing.assert_allclose(mu, vector / vector.sum(), rtol=1e-10)


def exact_stationary(rates: list[list[Fraction]]) -> list[Fraction]:
    """mu_i is proportional to the minor of I - pi without row and column i; the diagonal of pi is 1 minus the rest."""
    n = len(rates)
    laplacian = [[sum(row) - row[i] if i == j else -row[j] for j in range(n)] for i, row in enumerate(rates)]
    minors = []
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        minors.append(
            sum(
                parity(columns)
                * math.prod(
                    (laplacian[row][column] for row, column in zip(rest, columns, strict=True)), start=Fraction(1)
                )
                for columns in permutations(rest)
            )
        )
    return [minor / sum(minors) for minor in minors]


def parity(order: tuple[int, ...]) -> int:
    return (-1) ** sum(a > b for i, a in enumerate(order) for b in order[i + 1 :])


@pytest.mark.parametrize("seed", range(5))
def test_every_entry_is_accurate_however_small(seed: int) -> None:
    """Rates over 60 orders of magnitude: all digits of all entries, against rational arithmetic."""
    generator = np.random.default_rng(seed)
    rates = 10.0 ** generator.uniform(-60, -1, (4, 4))
    np.fill_diagonal(rates, 0)
    transition = rates + np.diag(1 - rates.sum(1))
    exact = exact_stationary([[Fraction(float(rate)) for rate in row] for row in rates])
    mu = stationary_distribution(torch.tensor(transition)[None])[0]
    np.testing.assert_allclose(mu.numpy(), [float(entry) for entry in exact], rtol=1e-13)


REDUCIBLE = {
    "identity": torch.eye(4),
    "two closed classes": torch.block_diag(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.125, 0.875], [0.875, 0.125]])),
    "one absorbing state": torch.tensor([[0.5, 0.5, 0.0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1]]),
    "absorbing, the other way": torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]),
    "two absorbing states": torch.tensor([[1.0, 0, 0, 0], [0.3, 0, 0.3, 0.4], [0, 0, 1, 0], [0, 1, 0, 0]]),
    "a cycle": torch.eye(4).roll(1, 1),
    "a cycle that is entered": torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 0]]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", REDUCIBLE)
def test_reducible_and_periodic_chains(name: str, dtype: torch.dtype) -> None:
    transition = REDUCIBLE[name].to(dtype)[None]
    assert_stationary(stationary_distribution(transition), transition, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one absorbing state", [0, 0, 0, 1]),
        ("absorbing, the other way", [1, 0, 0, 0]),
        ("a cycle", [0.25, 0.25, 0.25, 0.25]),
        ("a cycle that is entered", [0, 0, 0.5, 0.5]),
    ],
)
def test_where_the_limit_is_unique(name: str, expected: list[float]) -> None:
    found = stationary_distribution(REDUCIBLE[name][None])[0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-12)


def test_chains_of_a_batch_do_not_mix() -> None:
    transition = random_chains(0.1, 20, 5)
    together = stationary_distribution(transition)
    for chain, mu in zip(transition, together, strict=True):
        torch.testing.assert_close(stationary_distribution(chain[None])[0], mu)
