"""Fixed, or new in each sequence? Three models by held-out log-likelihood.

Of a child's token y with parent's token x in sequence n, given the sequence's token frequencies b_n:

* **margins**: b_n(y);
* **one matrix**: proportional to b_n(y) R(x, y), with one R for all sequences;
* **one matrix a sequence**: (n_xy + A q(y | x)) / (n_x + A) with q either of the two, counts over the other edges of the same sequence.

R and A are fitted on other sequences than the gains are measured on. Both may gain: in data whose transitions are new in each sequence the *mean*
transition can still depend on x (heavier diagonals, for one), and is then counted as fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from causal_probe.discovery.sequences.agreement import mutual_information
from causal_probe.discovery.sequences.codes import Codes
from causal_probe.discovery.sequences.counts import CONCENTRATIONS, ROOT, Parents

__all__ = ["Gain", "chow_liu", "compare_models", "fixed_ratio", "ratio_gains"]

#: Pseudo-counts of a cell of R.
SMOOTHING = 1.0


@dataclass(frozen=True)
class Gain:
    """A mean difference of held-out log-likelihoods in nats per sequence, its standard error (None for one sequence)."""

    mean: float
    stderr: float | None

    @property
    def z(self) -> float:
        """The mean in standard errors; 0 where it has none."""
        return self.mean / self.stderr if self.stderr else 0.0


def chow_liu(shared: NDArray[np.intp]) -> tuple[Parents, NDArray[np.float64]]:
    """The spanning tree of the largest mutual information over all sequences, directed from column 0, and the information in nats.

    Which end of an edge is the cause can't be told; the direction away from column 0 is a way to write the tree, not a claim.

    References
    ----------
    Chow & Liu (1968), Approximating discrete probability distributions with dependence trees.
    """
    onehot = (shared[:, :, None] == np.arange(shared.max() + 1)).astype(np.float32)
    information = mutual_information(onehot)
    columns = shared.shape[1]
    parents, best, inside = [ROOT] * columns, information[0].copy(), np.zeros(columns, bool)
    inside[0] = True
    nearest = np.zeros(columns, np.intp)
    while not inside.all():
        column = int(np.where(inside, -np.inf, best).argmax())
        parents[column], inside[column] = int(nearest[column]), True
        closer = information[column] > best
        best, nearest = np.where(closer, information[column], best), np.where(closer, column, nearest)
    return parents, information


def fixed_ratio(codes: Codes, parents: Sequence[int]) -> NDArray[np.float64]:
    """R(x, y): how much oftener than by the sequences' frequencies y follows x along the edges, pooled over edges and sequences."""
    size = int(codes.shared.max()) + 1
    seen, expected = np.full((size, size), SMOOTHING), np.full((size, size), SMOOTHING)
    law = _laws(codes, size)
    for child, parent in enumerate(parents):
        if parent != ROOT:
            x, y = codes.shared[:, parent], codes.shared[:, child]
            np.add.at(seen, (x, y), 1)
            for token in range(size):
                expected[token] += law[x == token].sum(0)
    return np.asarray(seen / expected)


def ratio_gains(codes: Codes, parents: Sequence[int], ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-likelihood of "one matrix" over "margins" in each sequence, nats."""
    return np.asarray(_one_matrix(codes, parents, ratio)[0].sum(1))


def compare_models(
    fit: Codes, held_out: Codes, parents: Sequence[int], fixed_parents: Sequence[int]
) -> dict[str, Gain]:
    """Held-out gains, in nats per sequence.

    Returns
    -------
    dict with ``one_matrix`` (over margins, along ``fixed_parents``), ``one_matrix_a_sequence`` (over margins, along ``parents``), ``new_in_each``
    (one matrix a sequence over one matrix, along ``parents``) and ``fixed_besides`` (what R adds to one matrix a sequence there). Where labels
    mean nothing across sequences, there is no R.
    """
    gains = {}
    ratio = None if fit.ranked else fixed_ratio(fit, parents)
    plain, _ = _sequence_matrix(fit, held_out, parents, None)
    gains["one_matrix_a_sequence"] = _gain(plain)
    if ratio is None:
        gains["new_in_each"] = gains["one_matrix_a_sequence"]
        gains["one_matrix"] = gains["fixed_besides"] = Gain(0.0, None)
        return gains
    along = _one_matrix(held_out, parents, ratio)[0].sum(1)
    both, _ = _sequence_matrix(fit, held_out, parents, ratio)
    gains["new_in_each"] = _gain(both - along)
    gains["fixed_besides"] = _gain(both - plain)
    gains["one_matrix"] = _gain(ratio_gains(held_out, fixed_parents, fixed_ratio(fit, fixed_parents)))
    return gains


def _laws(codes: Codes, size: int) -> NDArray[np.float64]:
    """Each sequence's smoothed frequencies, [n_sequences, token], 0 for what does not occur in it."""
    law = np.zeros((len(codes.shared), size))
    np.put_along_axis(law, codes.shared, codes.base.astype(np.float64), 1)
    return np.asarray(law / law.sum(1, keepdims=True))


def _one_matrix(
    codes: Codes, parents: Sequence[int], ratio: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each edge: log q(y | x) - log b(y), and log q(y | x), [n_sequences, edge]."""
    law = _laws(codes, len(ratio))
    normaliser = law @ ratio.T  # [n_sequences, x]
    rows = np.arange(len(law))
    gains, logs = [np.zeros(len(law))], [np.zeros(len(law))]
    for child, parent in enumerate(parents):
        if parent != ROOT:
            x, y = codes.shared[:, parent], codes.shared[:, child]
            gains.append(np.log(ratio[x, y] / normaliser[rows, x]))
            logs.append(gains[-1] + np.log(law[rows, y]))
    return np.stack(gains[1:] or gains, 1), np.stack(logs[1:] or logs, 1)


def _sequence_matrix(
    fit: Codes, held_out: Codes, parents: Sequence[int], ratio: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], float]:
    """Gain of one matrix a sequence over margins on ``held_out``, nats per sequence, with A fitted on ``fit``."""
    concentration = max(
        (float(A) for A in CONCENTRATIONS), key=lambda A: float(_leave_one_out(fit, parents, ratio, A).mean())
    )
    return _leave_one_out(held_out, parents, ratio, concentration), concentration


def _leave_one_out(
    codes: Codes, parents: Sequence[int], ratio: NDArray[np.float64] | None, A: float
) -> NDArray[np.float64]:
    edges = [(parent, child) for child, parent in enumerate(parents) if parent != ROOT]
    if not edges:
        return np.zeros(len(codes.local))
    log_q = None if ratio is None else _one_matrix(codes, parents, ratio)[1]
    source = codes.local[:, [parent for parent, _ in edges]]
    target = codes.local[:, [child for _, child in edges]]
    same = source[:, :, None] == source[:, None, :]
    total = same.sum(2) - 1
    count = (same & (target[:, :, None] == target[:, None, :])).sum(2) - 1
    base = codes.base[:, [child for _, child in edges]].astype(np.float64)
    q = base if log_q is None else np.exp(log_q)
    return np.asarray(np.log((count + A * q) / ((total + A) * base)).sum(1))


def _gain(values: NDArray[np.float64]) -> Gain:
    n = len(values)
    return Gain(float(values.mean()), float(values.std(ddof=1) / n**0.5) if n > 1 else None)
