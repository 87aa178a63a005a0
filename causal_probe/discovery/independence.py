"""Tests of conditional independence, many at once: partial correlations of a given matrix, and d-separation in a known graph.

**Partial correlations of nearly singular matrices.** Causal attention gives correlation matrices whose condition number exceeds
1e16 at twenty tokens: a plain inverse of a submatrix then returns noise, and a test of noise calls most pairs independent. Here
each conditioning set is swept out by symmetric elimination with diagonal pivoting (pivoted Cholesky): the variable with the
largest share of unexplained variance first, and none whose share is below ``tolerance``, because it is a combination of the
others as far as the arithmetic can tell (leaving it out is what a pseudo-inverse does). If what is left of x or y is below
``tolerance``, their partial correlation is 0/0: the test is **undefined**, decides nothing, and is counted.

The tolerance follows from the precision of the numbers: 10 n eps, with eps of the dtype in which the pattern was computed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Protocol, runtime_checkable

import networkx as nx
import numpy as np
import scipy
from jaxtyping import Float, Int

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError

__all__ = ["DSeparation", "FisherZ", "IndependenceTest", "OrderCount", "partial_correlations"]

#: Numbers that are worked on at a time: 32 MB.
AT_ONCE = 4_000_000


@runtime_checkable
class IndependenceTest(Protocol):
    """A test of independence: how well do the data agree with x and y being independent given a set?"""

    level: float

    @property
    def n(self) -> int:
        """Number of variables."""
        ...

    def p_values(
        self, x: Int[np.ndarray, " test"], y: Int[np.ndarray, " test"], given: Int[np.ndarray, "test order"]
    ) -> Float[np.ndarray, " test"]:
        """A p-value for each test, NaN where it is undefined. Independent is what exceeds ``level``."""
        ...

    def by_order(self) -> tuple[OrderCount, ...]:
        """The results so far, by the size of the conditioning set."""
        ...


@dataclasses.dataclass(frozen=True)
class OrderCount:
    """The tests with conditioning sets of one size.

    Attributes
    ----------
    order
        Size of the conditioning sets.
    tests
        How many tests were computed: each different one once, unless the test was asked not to remember.
    undefined
        How many of them were undefined: given the set, nothing is left of one of the two variables that the arithmetic can tell
        from zero.
    detectable
        The smallest absolute partial correlation that this test can tell from zero, tanh(z / sqrt(n - order - 3)) with z the
        normal quantile at 1 - level / 2, in [0, 1]. None where n is too small for any, or the test is exact.
    least_variance
        The smallest share of variance that a conditioning set left of x or y in a test that was defined. Rounding errors of a
        partial correlation grow as its inverse. None where there is no such test, or the test is exact.
    """

    order: int
    tests: int
    undefined: int
    detectable: float | None
    least_variance: float | None

    @property
    def powerless(self) -> str | None:
        """Why no test of this order can find a dependence, None where some can."""
        if self.tests and self.undefined == self.tests:
            if self.detectable is None:
                return "there are too few samples for a conditioning set of this size"
            return "given any of the sets, nothing is left of the variables that the arithmetic can tell from zero"
        if self.detectable is not None and self.detectable > 0.9:
            return f"only partial correlations above {self.detectable:.2f} can be told from zero"
        return None


def partial_correlations(
    correlation: Float[np.ndarray, "n n"],
    x: Int[np.ndarray, " test"],
    y: Int[np.ndarray, " test"],
    given: Int[np.ndarray, "test order"],
    *,
    tolerance: float,
) -> tuple[Float[np.ndarray, " test"], Float[np.ndarray, " test"]]:
    """The partial correlations of x and y given sets, and the smaller share of variance that the set leaves of the two.

    See the module's text for how; NaN where that share is at most ``tolerance``.

    Examples
    --------
    >>> chain = np.array([[1, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 1]])  # 0 - 1 - 2
    >>> r, left = partial_correlations(chain, np.array([0]), np.array([2]), np.array([[1]]), tolerance=1e-12)
    >>> r.round(12), left
    (array([0.]), array([0.75]))
    """
    order = given.shape[1]
    places = np.concatenate([given, x[:, None], y[:, None]], axis=1)
    rest = correlation[places[:, :, None], places[:, None, :]]
    here = np.arange(len(places))
    waiting = np.ones((len(places), order), dtype=bool)
    for _ in range(order):
        left = np.where(waiting, np.diagonal(rest, axis1=1, axis2=2)[:, :order], -np.inf)
        pivot = left.argmax(axis=1)
        variance = left[here, pivot]
        scale = np.where(variance > tolerance, 1 / np.sqrt(np.maximum(variance, tolerance)), 0.0)
        column = rest[here, :, pivot] * scale[:, None]
        rest -= column[:, :, None] * column[:, None, :]
        waiting[here, pivot] = False
    of_x, of_y, together = rest[:, order, order], rest[:, order + 1, order + 1], rest[:, order, order + 1]
    least = np.minimum(of_x, of_y)
    defined = least > tolerance
    product = np.where(defined, of_x * of_y, 1.0)
    return np.where(defined, np.clip(together / np.sqrt(product), -1, 1), np.nan), least


@checked
class FisherZ:
    """Fisher's z-test that a partial correlation is zero, on a correlation matrix.

    The p-value is 2 (1 - Phi(sqrt(samples - order - 3) |atanh r|)). Two variables with |r| = 1 are dependent (p = 0).

    Parameters
    ----------
    correlation
        [n, n], symmetric, with ones on the diagonal.
    samples
        How many samples the correlations count as having been estimated from.
    level
        Independent is what has a p-value above it; in (0, 1).
    tolerance
        The share of variance below which a variable counts as a combination of others; by default 10 n eps of float64.
    remember
        Compute each different test once; asked again, it is remembered. Our learners never ask twice, and are faster without.

    Raises
    ------
    CausalProbeError
        If ``level`` or ``samples`` is out of range, or the matrix holds numbers that are not finite or has no ones on its diagonal.

    References
    ----------
    .. [1] R. A. Fisher. The distribution of the partial correlation coefficient. Metron 3, 329-332, 1924.

    Examples
    --------
    >>> test = FisherZ(np.array([[1, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 1]]), samples=100, level=0.01)
    >>> test.p_values(np.array([0, 0]), np.array([1, 2]), np.empty((2, 0), int)).round(4)
    array([0.    , 0.0119])
    >>> test.p_values(np.array([0]), np.array([2]), np.array([[1]]))
    array([1.])
    """

    def __init__(
        self,
        correlation: Float[np.ndarray, "n n"],
        *,
        samples: int,
        level: float = 0.01,
        tolerance: float | None = None,
        remember: bool = True,
    ) -> None:
        if not 0 < level < 1:
            raise CausalProbeError(f"level is {level!r}. It must be above 0 and below 1, such as 0.01.")
        if samples < 4:
            raise CausalProbeError(f"samples is {samples!r}. Fisher's z-test needs at least 4.")
        self.correlation = np.asarray(correlation, dtype=np.float64)
        if not np.isfinite(self.correlation).all() or not np.allclose(np.diagonal(self.correlation), 1, atol=1e-6):
            raise CausalProbeError(
                "A correlation matrix holds finite numbers, with ones on the diagonal. This one doesn't."
            )
        if (
            not np.allclose(self.correlation, self.correlation.T, atol=1e-6)
            or np.abs(self.correlation).max() > 1 + 1e-6
        ):
            raise CausalProbeError("A correlation matrix is symmetric, with numbers from -1 to 1. This one isn't.")
        self.samples, self.level, self.remember = samples, level, remember
        self.tolerance = 10 * self.n * float(np.finfo(np.float64).eps) if tolerance is None else tolerance
        self._known: dict[Any, float] = {}  # by the bytes of (x, y, *given)
        self._counts: dict[int, list[float]] = {}  # tests, undefined, least variance

    @property
    def n(self) -> int:
        """Number of variables."""
        return len(self.correlation)

    def p_values(
        self, x: Int[np.ndarray, " test"], y: Int[np.ndarray, " test"], given: Int[np.ndarray, "test order"]
    ) -> Float[np.ndarray, " test"]:
        """A p-value for each test, NaN where it is undefined."""
        if not len(x):
            return np.empty(0)
        pair = np.stack([np.minimum(x, y), np.maximum(x, y)], axis=1)
        if not self.remember:
            return self._compute(np.concatenate([pair, given], axis=1))
        rows = np.ascontiguousarray(np.concatenate([pair, np.sort(given, axis=1)], axis=1), dtype=np.int32)
        keys: list[Any] = rows.view(np.dtype((np.void, 4 * rows.shape[1]))).ravel().tolist()
        known = self._known
        fresh = {key: row for row, key in enumerate(keys) if key not in known}
        if fresh:
            known.update(zip(fresh, self._compute(rows[list(fresh.values())]).tolist(), strict=True))
        return np.array([known[key] for key in keys])

    def _compute(self, rows: Int[np.ndarray, "test columns"]) -> Float[np.ndarray, " test"]:
        order = rows.shape[1] - 2
        step = max(1, AT_ONCE // (order + 2) ** 2)
        parts = [
            partial_correlations(self.correlation, part[:, 0], part[:, 1], part[:, 2:], tolerance=self.tolerance)
            for part in (rows[start : start + step] for start in range(0, len(rows), step))
        ]
        r, least = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        freedom = self.samples - order - 3
        if freedom <= 0:
            r = np.full_like(r, np.nan)
        with np.errstate(divide="ignore"):  # atanh 1 is infinite, and its p-value 0
            p: Float[np.ndarray, " test"] = scipy.special.erfc(np.sqrt(max(freedom, 0) / 2) * np.arctanh(np.abs(r)))
        defined = ~np.isnan(p)
        count = self._counts.setdefault(order, [0, 0, np.inf])
        count[0] += len(p)
        count[1] += int((~defined).sum())
        count[2] = min(count[2], float(least[defined].min(initial=np.inf)))
        return p

    def by_order(self) -> tuple[OrderCount, ...]:
        """The results so far, by the size of the conditioning set."""
        quantile = float(scipy.stats.norm.isf(self.level / 2))
        found = []
        for order, (tests, undefined, least) in sorted(self._counts.items()):
            freedom = self.samples - order - 3
            detectable = float(np.tanh(quantile / np.sqrt(freedom))) if freedom > 0 else None
            found.append(
                OrderCount(order, int(tests), int(undefined), detectable, float(least) if np.isfinite(least) else None)
            )
        return tuple(found)


@checked
class DSeparation:
    """A perfect test: x and y are independent given a set if a known graph d-separates them (p-value 1, else 0).

    Parameters
    ----------
    graph
        A directed acyclic graph.
    observed
        The nodes that are variables, in order; the others are latent. All by default.

    Examples
    --------
    >>> test = DSeparation(nx.DiGraph([(0, 1), (2, 1)]))
    >>> test.p_values(np.array([0, 0]), np.array([2, 2]), np.array([[1], [1]])), test.p_values(
    ...     np.array([0]), np.array([2]), np.empty((1, 0), int))
    (array([0., 0.]), array([1.]))
    """

    level = 0.5

    def __init__(self, graph: nx.DiGraph, observed: list[int] | None = None) -> None:
        self.graph = graph
        self.observed = sorted(graph) if observed is None else observed
        self._known: dict[tuple[int, int, frozenset[int]], float] = {}

    @property
    def n(self) -> int:
        """Number of variables."""
        return len(self.observed)

    def p_values(
        self, x: Int[np.ndarray, " test"], y: Int[np.ndarray, " test"], given: Int[np.ndarray, "test order"]
    ) -> Float[np.ndarray, " test"]:
        """1 for each test that finds d-separation, else 0."""
        return np.array([self._separated(*each) for each in zip(x.tolist(), y.tolist(), given.tolist(), strict=True)])

    def _separated(self, x: int, y: int, given: list[int]) -> float:
        key = (min(x, y), max(x, y), frozenset(given))
        if key not in self._known:
            name = self.observed.__getitem__
            self._known[key] = float(nx.is_d_separator(self.graph, name(x), name(y), set(map(name, given))))
        return self._known[key]

    def by_order(self) -> tuple[OrderCount, ...]:
        """The results so far, by the size of the conditioning set."""
        counts = Counter(len(given) for _, _, given in self._known)
        return tuple(OrderCount(order, tests, 0, None, None) for order, tests in sorted(counts.items()))
