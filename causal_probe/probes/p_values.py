"""Tests of means over sequences, one-sided and paired, and their correction where many are made at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import scipy
from jaxtyping import Float

__all__ = [
    "Effect",
    "Estimate",
    "corrected",
    "effects",
    "estimates",
    "holm",
    "least_p_value",
    "t_interval",
    "t_p_value",
]

K = TypeVar("K")


class Estimate(NamedTuple):
    """A mean over sequences, its standard error, and the p-value of its being above a minimum, corrected where many are tested."""

    value: float
    stderr: float
    p_value: float


class Effect(NamedTuple):
    """A mean effect over sequences, tested against a smallest effect of interest, delta; p-values are corrected where many are tested.

    Attributes
    ----------
    value, stderr
        The mean and its standard error.
    p_value
        Of the null hypothesis "the effect is at most delta".
    p_negative
        Of "the effect is at least -delta".
    p_within
        Of "the effect is delta or more, or -delta or less" (equivalence, by two one-sided tests).
    """

    value: float
    stderr: float
    p_value: float
    p_negative: float
    p_within: float


def t_p_value(mean: float, stderr: float, n: int, *, above: float = 0.0) -> float:
    """One-sided p-value of a mean being larger than ``above``: Student's t with ``n`` - 1 degrees of freedom.

    Without any spread it is 0 or 1.

    >>> round(t_p_value(2.0, 1.0, 1000), 4), t_p_value(2.0, 0.0, 9), t_p_value(0.0, 0.0, 9)
    (0.0229, 0.0, 1.0)
    """
    if stderr > 0:
        return float(scipy.stats.t.sf((mean - above) / stderr, df=n - 1))
    return 0.0 if mean > above else 1.0


def least_p_value(n: int) -> float:
    """The smallest p-value that n values with signs drawn at random can show: that all are positive. Few values that are equal have no spread, and Student's t would give 0.

    >>> least_p_value(2), least_p_value(10) < 0.001
    (0.25, True)
    """
    return 0.5**n


def t_interval(mean: float, stderr: float, n: int, *, coverage: float = 0.95) -> tuple[float, float]:
    """Two-sided confidence interval of a mean.

    >>> low, high = t_interval(1.0, 0.5, 10_000)
    >>> round(low, 2), round(high, 2)
    (0.02, 1.98)
    """
    reach = float(scipy.stats.t.ppf((1 + coverage) / 2, df=n - 1)) * stderr
    return mean - reach, mean + reach


def holm(p_values: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Holm's adjusted p-values: the k-th smallest of m times m - k + 1, made monotone, at most 1.

    Rejecting where they are at most ``level`` keeps the probability of any false rejection at ``level``, however the tests
    depend on each other (Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics
    6, 1979).

    >>> holm(np.array([0.01, 0.04, 0.03]))
    array([0.03, 0.06, 0.06])
    """
    order = p_values.argsort(kind="stable")
    scaled = p_values[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted


def corrected(
    means: Mapping[K, tuple[float, float, int]], *, above: float, family: int | None = None
) -> dict[K, Estimate]:
    """Means (with standard errors and numbers of sequences) tested for being above a minimum, corrected over all of them.

    ``family``: how many tests there are, where not all were made; the others count as tests that reject nothing.

    >>> [round(each.p_value, 3) for each in corrected({"a": (2.0, 1.0, 1000), "b": (0.0, 1.0, 1000)}, above=0.0).values()]
    [0.046, 0.5]
    >>> round(corrected({"a": (2.0, 1.0, 1000)}, above=0.0, family=10)["a"].p_value, 3)
    0.229
    """
    others = 0 if family is None else max(0, family - len(means))
    raw = np.array([*(t_p_value(*mean, above=above) for mean in means.values()), *[1.0] * others], dtype=float)
    found = holm(raw)[: len(means)]
    return {key: Estimate(*mean[:2], float(p)) for (key, mean), p in zip(means.items(), found, strict=True)}


def estimates(
    values: Mapping[K, Float[np.ndarray, " sequence"]], *, above: float, family: int | None = None
) -> dict[K, Estimate]:
    """The same of values that are given sequence by sequence."""
    means = {
        key: (float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))), len(each))
        for key, each in values.items()
    }
    return corrected(means, above=above, family=family)


def effects(values: Mapping[K, Float[np.ndarray, " sequence"]], *, delta: float) -> dict[K, Effect]:
    """Effects tested against a smallest effect of interest, each of the three questions corrected over all of them.

    >>> effects({"a": np.array([0.01, -0.01, 0.02, 0.0])}, delta=0.05)["a"].p_within < 0.01
    True
    """
    above = estimates(values, above=delta)
    below = estimates({key: -each for key, each in values.items()}, above=delta)
    n = {key: len(each) for key, each in values.items()}
    both = [
        max(t_p_value(sign * value, stderr, n[key], above=-delta) for sign in (1, -1))
        for key, (value, stderr, _) in above.items()
    ]
    within = holm(np.array(both, dtype=float))
    return {
        key: Effect(*its, below[key].p_value, float(p)) for (key, its), p in zip(above.items(), within, strict=True)
    }
