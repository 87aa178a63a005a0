"""The test engine against plain inverses, causal-learn, and hand-made matrices."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from causal_probe import CausalProbeError
from causal_probe.discovery import DSeparation, FisherZ
from causal_probe.discovery.fci import data_with_correlation
from causal_probe.discovery.independence import partial_correlations
from causal_probe.probes.attention_correlation import attention_correlation


def random_pattern(n: int, seed: int, *, causal: bool = False, spread: float = 2.0) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=(n, n)) * spread
    if causal:
        scores[np.triu_indices(n, 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("order", range(5))
def test_partial_correlations_are_those_of_the_inverse(order: int) -> None:
    matrix = attention_correlation(random_pattern(9, 0)).matrix
    cases = [
        (x, y, given)
        for x, y in combinations(range(9), 2)
        for given in combinations(sorted({*range(9)} - {x, y}), order)
    ]
    x, y = (np.array([case[k] for case in cases]) for k in (0, 1))
    given = np.array([case[2] for case in cases], dtype=np.intp).reshape(len(cases), order)
    found, least = partial_correlations(matrix, x, y, given, tolerance=1e-12)
    for (i, j, inside), r, left in zip(cases, found, least, strict=True):
        block = np.linalg.inv(matrix[np.ix_((i, j, *inside), (i, j, *inside))])
        assert r == pytest.approx(-block[0, 1] / np.sqrt(block[0, 0] * block[1, 1]), abs=1e-8)
        assert left == pytest.approx(min(_variance(matrix, i, inside), _variance(matrix, j, inside)), abs=1e-8)


def _variance(matrix: np.ndarray, i: int, given: tuple[int, ...]) -> float:
    inside = matrix[np.ix_(given, given)]
    return float(1 - matrix[i, list(given)] @ np.linalg.solve(inside, matrix[list(given), i])) if given else 1.0


def test_p_values_are_causal_learns() -> None:
    from causallearn.utils.cit import CIT

    matrix = attention_correlation(random_pattern(7, 1)).matrix
    data = data_with_correlation(matrix, 500)
    assert np.allclose(np.corrcoef(data, rowvar=False), matrix, atol=1e-12)
    theirs, ours = CIT(data, "fisherz"), FisherZ(matrix, samples=500)
    for x, y in combinations(range(7), 2):
        for given in ([], [z for z in range(7) if z not in (x, y)][:3]):
            p = ours.p_values(np.array([x]), np.array([y]), np.array([given], dtype=np.intp).reshape(1, -1))
            assert p[0] == pytest.approx(theirs(x, y, given), abs=1e-9)


def test_a_combination_of_the_others_is_undefined_and_counted() -> None:
    """Node 3 is the sum of 0 and 1: given both nothing of it is left, and a plain inverse would return noise."""
    columns = np.random.default_rng(0).normal(size=(4, 50))
    columns[3] = columns[0] + columns[1]
    test = FisherZ(np.corrcoef(columns), samples=50)
    p = test.p_values(np.array([2, 0]), np.array([3, 3]), np.array([[0, 1], [2, 1]]))
    assert np.isnan(p[0])
    assert p[1] == 0  # given 1, 3 is 0: dependent as can be
    (count,) = test.by_order()
    assert (count.order, count.tests, count.undefined) == (2, 2, 1)
    # A conditioning set that repeats itself counts once: the same as the smaller set.
    twin = np.array([[1, 0.5, 0.4, 0.4], [0.5, 1, 0.3, 0.3], [0.4, 0.3, 1, 1], [0.4, 0.3, 1, 1.0]])
    both, _ = partial_correlations(twin, np.array([0]), np.array([1]), np.array([[2, 3]]), tolerance=1e-12)
    one, _ = partial_correlations(twin, np.array([0]), np.array([1]), np.array([[2]]), tolerance=1e-12)
    assert both == pytest.approx(one)


def test_tests_are_remembered_and_counted_once() -> None:
    test = FisherZ(attention_correlation(random_pattern(5, 2)).matrix, samples=100)
    first = test.p_values(np.array([0, 1]), np.array([1, 0]), np.array([[2, 3], [3, 2]]))
    again = test.p_values(np.array([0]), np.array([1]), np.array([[2, 3]]))
    assert first[0] == first[1] == again[0]
    assert test.by_order()[0].tests == 1


def test_without_memory_the_same_p_values() -> None:
    matrix = attention_correlation(random_pattern(6, 2)).matrix
    x, y, given = np.array([0, 3, 0]), np.array([1, 2, 1]), np.array([[2, 3], [5, 0], [3, 2]])
    kept, forgot = FisherZ(matrix, samples=100), FisherZ(matrix, samples=100, remember=False)
    assert np.allclose(kept.p_values(x, y, given), forgot.p_values(x, y, given), atol=1e-12)
    assert (kept.by_order()[0].tests, forgot.by_order()[0].tests) == (2, 3)


def test_orders_without_power_are_named() -> None:
    test = FisherZ(attention_correlation(random_pattern(6, 3)).matrix, samples=6)
    test.p_values(np.array([0]), np.array([1]), np.empty((1, 0), dtype=np.intp))
    assert np.isnan(test.p_values(np.array([0]), np.array([1]), np.array([[2, 3, 4]]))).all()
    marginal, third = test.by_order()
    assert marginal.powerless is not None
    assert third.powerless == "there are too few samples for a conditioning set of this size"


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_the_level_is_checked(level: float) -> None:
    with pytest.raises(CausalProbeError, match=r"above 0 and below 1|finite number"):
        FisherZ(np.eye(3), samples=100, level=level)


def test_matrices_and_samples_are_checked() -> None:
    with pytest.raises(CausalProbeError, match="at least 4"):
        FisherZ(np.eye(3), samples=3)
    with pytest.raises(CausalProbeError, match="ones on the diagonal"):
        FisherZ(2 * np.eye(3), samples=100)
    with pytest.raises(CausalProbeError, match="more than 3 samples"):
        data_with_correlation(np.eye(3), 3)


def test_d_separation_counts() -> None:
    import networkx as nx

    test = DSeparation(nx.DiGraph([(0, 1), (1, 2)]))
    assert test.p_values(np.array([0]), np.array([2]), np.array([[1]])) == [1.0]
    assert [(count.order, count.tests) for count in test.by_order()] == [(1, 1)]
