"""The null of no edge: tokens independent given each sequence's token counts and each column's.

Take two sequences and the columns where they differ by the same two tokens {a, b}. Under P(token y in sequence n, column i) ~ exp(u_n(y) + v_i(y)),
independent, the column's part cancels from the odds of (a, b) against (b, a), so all such columns have the same odds: given how many are (a, b), which
ones are is uniform. Permuting them among each other is a composition of 2x2 swaps and keeps the counts of both sequences and of all columns. So
disjoint pairs of sequences can be redrawn independently, exactly from the null, without a Markov chain. For each pair the data's statistic is one of
1 + DRAWS exchangeable values; the sum over pairs is compared with sums in which each pair's value is chosen at random (exact Monte Carlo p-value).

Pairs are formed by similar token counts, which the redrawing keeps, so the pairing is the same under the null.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from causal_probe.discovery.sequences.codes import Codes

__all__ = ["SwapTest", "redraw", "swap_test"]

#: Redrawn copies of each pair, and random choices among them.
DRAWS = 19
CHOICES = 19_999
#: Most pairs that are used.
PAIRS = 1000

Scalar = TypeVar("Scalar", bound=np.generic)
Statistic = Callable[[Codes], NDArray[np.float64]]


@dataclass(frozen=True)
class SwapTest:
    """One statistic against the null of no edge.

    Attributes
    ----------
    p_value
        Exact, one-sided; 1 if nothing can be swapped.
    z
        The sum over pairs less its mean under the null, in standard deviations under the null; None if nothing can be swapped.
    gain
        The statistic's mean over sequences less its mean under the null.
    n_pairs
        Pairs of sequences in which something can be swapped.
    """

    p_value: float
    z: float | None
    gain: float
    n_pairs: int


def swap_test(codes: Codes, statistics: list[Statistic], *, seed: int) -> list[SwapTest]:
    """Test statistics [n_sequences] that are large under dependence, each a function of the tokens."""
    rng = np.random.default_rng(seed)
    pairs = _pairs(codes, rng)[:PAIRS]
    copies = [codes.take(pairs.reshape(-1))]
    movable = np.zeros(len(pairs), bool)
    for _ in range(DRAWS):
        drawn, movable = redraw(codes, pairs, rng)
        copies.append(drawn)
    found = []
    for statistic in statistics:
        values = np.stack([statistic(copy).reshape(-1, 2).sum(1) for copy in copies], 1)  # [pair, 1 + DRAWS]
        values = values[movable]
        deviations = values - values.mean(1, keepdims=True)
        observed, variance = float(deviations[:, 0].sum()), float((deviations**2).mean(1).sum())
        if not len(values) or variance <= 0:
            found.append(SwapTest(1.0, None, 0.0, len(values)))
            continue
        larger = 1
        for start in range(0, CHOICES, 500):
            chosen = rng.integers(1 + DRAWS, size=(min(500, CHOICES - start), len(values)))
            # Ties up to rounding count as larger.
            larger += int((deviations[np.arange(len(values)), chosen].sum(1) >= observed - 1e-9 * variance**0.5).sum())
        gain = observed / (2 * len(pairs)) * (1 + 1 / DRAWS)
        found.append(SwapTest(larger / (1 + CHOICES), observed / variance**0.5, gain, len(values)))
    return found


def redraw(codes: Codes, pairs: NDArray[np.intp], rng: np.random.Generator) -> tuple[Codes, NDArray[np.bool_]]:
    """Both sequences of every pair drawn anew from the null (rows ordered pair by pair), and in which pairs more than one outcome exists."""
    n_pairs, columns = len(pairs), codes.shared.shape[1]
    one, two = codes.shared[pairs[:, 0]], codes.shared[pairs[:, 1]]
    low, high = np.minimum(one, two), np.maximum(one, two)
    size = int(codes.shared.max()) + 1
    kind = (low * size + high) + np.arange(n_pairs)[:, None] * size**2  # columns of a pair with the same two tokens
    first_is_low = one < two
    # Sort the columns by kind, then at random: the orientations, in the order of the columns, are dealt to the columns in that order.
    columns_in_order = np.argsort(kind, axis=1, kind="stable")
    at_random = np.take_along_axis(
        (order := np.argsort(rng.random((n_pairs, columns)), axis=1)),
        np.argsort(np.take_along_axis(kind, order, 1), axis=1, kind="stable"),
        1,
    )
    dealt = np.empty_like(first_is_low)
    np.put_along_axis(dealt, at_random, np.take_along_axis(first_is_low, columns_in_order, 1), 1)
    swap = (dealt != first_is_low) & (low != high)
    movable = _movable(kind, first_is_low, low != high)
    shared = np.stack([np.where(swap, two, one), np.where(swap, one, two)], 1).reshape(-1, columns)
    local = np.stack([codes.local[pairs[:, 0]], codes.local[pairs[:, 1]]], 1)
    base = np.stack([codes.base[pairs[:, 0]], codes.base[pairs[:, 1]]], 1)
    if codes.shared is codes.local or codes.ranked:
        new_local = shared
        new_base = _lookup(local.reshape(-1, columns), base.reshape(-1, columns), shared)
    else:
        old = np.stack([one, two], 1).reshape(-1, columns)
        new_local = _lookup(old, local.reshape(-1, columns), shared)
        new_base = _lookup(old, base.reshape(-1, columns), shared)
    return Codes(new_local, shared, codes.d_vocab, new_base), movable


def _lookup(keys: NDArray[np.intp], values: NDArray[Scalar], asked: NDArray[np.intp]) -> NDArray[Scalar]:
    """Each row's value of a token, for the same tokens in another order."""
    table = np.zeros((len(keys), int(keys.max()) + 1), values.dtype)
    np.put_along_axis(table, keys, values, 1)
    return np.take_along_axis(table, asked, 1)


def _movable(kind: NDArray[np.intp], first_is_low: NDArray[np.bool_], differ: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pairs in which some two columns are (a, b) and (b, a)."""
    order = np.argsort(np.where(differ, kind, -1) * 2 + first_is_low, axis=1)
    kinds, lows = np.take_along_axis(np.where(differ, kind, -1), order, 1), np.take_along_axis(first_is_low, order, 1)
    return np.asarray(((kinds[:, 1:] == kinds[:, :-1]) & (kinds[:, 1:] >= 0) & (lows[:, 1:] != lows[:, :-1])).any(1))


def _pairs(codes: Codes, rng: np.random.Generator) -> NDArray[np.intp]:
    """Disjoint pairs of sequences with similar token counts, in random order."""
    n, columns = codes.shared.shape
    size = int(codes.shared.max()) + 1
    often = np.zeros((n, size), np.intp)
    np.add.at(often, (np.repeat(np.arange(n), columns), codes.shared.reshape(-1)), 1)
    leading = np.argsort(-often, axis=1, kind="stable")[:, :3]
    keys = [rng.random(n), *(np.take_along_axis(often, leading, 1).T[::-1]), *leading.T[::-1]]
    order = np.lexsort(keys)
    pairs = order[: n // 2 * 2].reshape(-1, 2)
    return np.asarray(pairs[rng.permutation(len(pairs))])
