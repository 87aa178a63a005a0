"""From patterns to correlations, and what can't be one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.probes.attention_correlation import attention_correlation, output_correlation
from causal_probe.probes.discover_from_attention import learn


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


PATTERN = softmax(np.random.default_rng(0).normal(size=(6, 6)))


def test_it_is_the_correlation_of_outputs_with_independent_values() -> None:
    values = np.random.default_rng(1).normal(size=(6, 400_000))
    assert np.allclose(attention_correlation(PATTERN).matrix, np.corrcoef(PATTERN @ values), atol=0.01)
    assert np.allclose(output_correlation(PATTERN @ values).matrix, np.corrcoef(PATTERN @ values), atol=0.01)


def test_groups_merge_and_marginalise() -> None:
    values = np.random.default_rng(1).normal(size=(6, 400_000))
    outputs = PATTERN @ values
    merged = np.stack([outputs[[0, 2]].mean(axis=0), outputs[5]])
    found = attention_correlation(PATTERN, groups=[[0, 2], [5]])
    assert np.allclose(found.matrix, np.corrcoef(merged), atol=0.01)
    assert found.groups == ((0, 2), (5,))


def test_the_residual_stream_gives_each_token_a_part_of_its_own() -> None:
    """Half the token's own value beside what the head gives it, by simulation; and a sharp chain, whose A A^T joins nothing."""
    values = np.random.default_rng(1).normal(size=(6, 400_000))
    outputs = (PATTERN @ values + values) / 2
    assert np.allclose(attention_correlation(PATTERN, residual=0.5).matrix, np.corrcoef(outputs), atol=0.01)
    assert np.array_equal(attention_correlation(PATTERN, residual=0.0).matrix, attention_correlation(PATTERN).matrix)
    chain = np.eye(5)[[0, 0, 1, 2, 3]]
    assert np.count_nonzero(np.triu(attention_correlation(chain).matrix, 1)) == 1
    beside = np.triu(attention_correlation(chain, residual=0.5).matrix, 1)
    assert np.allclose(np.diagonal(beside, 1), [0.5**0.5, 0.5, 0.5, 0.5])
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(CausalProbeError, match="residual is"):
            attention_correlation(PATTERN, residual=share)


def test_condition_and_rank() -> None:
    found = attention_correlation(PATTERN)
    assert found.condition == pytest.approx(np.linalg.cond(found.matrix), rel=1e-6)
    assert found.rank == 6
    uniform = attention_correlation(np.full((4, 4), 0.25))
    assert (uniform.condition, uniform.rank) == (None, 1)
    # In float32 fewer of the same eigenvalues can be told from rounding.
    assert attention_correlation(torch.tensor(PATTERN).float()).tolerance > 1e6 * found.tolerance


DEGENERATE = {
    "one token": np.ones((1, 1)),
    "two tokens": np.array([[1.0, 0.0], [0.4, 0.6]]),
    "uniform": np.full((6, 6), 1 / 6),
    "causal uniform": np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None],
    "one-hot on the first": np.eye(6)[[0] * 6],
    "one-hot on itself": np.eye(6),
    "one-hot on the previous": np.eye(6)[[0, 0, 1, 2, 3, 4]],
}


@pytest.mark.parametrize("algorithm", ["pc", "icd", "ordered-icd"])
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_degenerate_patterns_have_a_clear_result(name: str, algorithm: str, dtype: str) -> None:
    found = attention_correlation(DEGENERATE[name].astype(dtype))
    learned = learn(found, algorithm, samples=100)
    edges = learned.marks.to_networkx().number_of_edges() // 2
    expected = {
        "one token": 0,
        "two tokens": 1,
        "uniform": 15,  # all rows are the same: nothing separates any two
        "one-hot on the first": 15,
        "one-hot on itself": 0,  # all rows are orthogonal
        "one-hot on the previous": 1,  # rows 0 and 1 are the same
    }
    if name in expected:
        assert edges == expected[name]
    assert all(each.p is None or 0 <= each.p <= 1 for each in learned.evidence.values())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (np.full((3, 3), 0.5), "row 0 sums to 1.5"),
        (np.ones((2, 3)) / 3, r"found the shape \[2, 3\]"),
        (np.array([[np.nan, 1], [0, 1]]), "holds probabilities"),
        (np.array([[-0.5, 1.5], [0, 1]]), "holds probabilities"),
        (np.empty((0, 0)), r"found the shape \[0, 0\]"),
        ("abc", "can't be read"),
    ],
)
def test_what_is_no_pattern(pattern: object, message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        attention_correlation(pattern)


@pytest.mark.parametrize("groups", [[], [[]], [[0, 1], [1]], [[7]], [[-1]]])
def test_what_are_no_groups(groups: list[list[int]]) -> None:
    with pytest.raises(CausalProbeError, match="groups of the positions"):
        attention_correlation(PATTERN, groups=groups)


def test_an_output_of_zero_has_no_correlation() -> None:
    with pytest.raises(CausalProbeError, match="Node 1 has no variance"):
        output_correlation(np.array([[1.0, 2.0], [0.0, 0.0]]))
