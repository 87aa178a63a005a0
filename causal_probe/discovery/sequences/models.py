"""Fixed, or new in each sequence? Models by held-out log-likelihood.

Let b_n be a mixture of the token frequencies in the rest of sequence n and those of all sequences. Of a child's token y with parent's token x in sequence n:

* **margins**: b_n(y);
* **one matrix**: q(y | x) proportional to b_n(y) R(x, y), with one R for all sequences;
* **one matrix a sequence**: (n_xy + A q(y | x)) / (n_x + A) with q either of the two, counts over the other edges of the same sequence.

R, A and the mixture of each model are fitted on other sequences than the gains are measured on. Both may gain. But R gains a little also where nothing is
fixed: b_n is counted in few columns, and given which tokens a sequence's matrix favours, its mean transition does depend on x. So the gains of R are
compared with those in data from the null (:mod:`.redrawn`): matrices new in each sequence, their rows from one law whatever x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from causal_probe.discovery.sequences.agreement import mutual_information
from causal_probe.discovery.sequences.codes import Codes
from causal_probe.discovery.sequences.counts import CONCENTRATIONS, ROOT, Counts, Parents, polya
from causal_probe.discovery.sequences.redrawn import new_in_each_sequence

__all__ = ["Gain", "OneMatrix", "chow_liu", "compare_models", "one_matrix"]

#: Pseudo-counts of a cell of R, and of a token in the frequencies of all sequences.
SMOOTHING = 1.0
#: Weights of the sequence's own frequencies that are tried; concentrations beside them.
MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)
COARSE = CONCENTRATIONS[::2]
#: Sequences' worth of the common matrix in each edge's own.
TABLES = 10.0 ** np.arange(1, 7)
#: The null's matrices are drawn with these multiples of the fitted concentration, and so many sequences at most for each.
SCALES = (0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.4, 1.6)
#: Of a scatter with 6 degrees of freedom: the 97.5% point of Student's t over the normal law's.
FEW_DATA_SETS = 2.447 / 1.960
REDRAWN = 4000
#: A difference in nats of the in-context gain over the scales that is none.
FLAT = 1e-3


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


@dataclass(frozen=True)
class OneMatrix:
    """The tokens' frequencies in all sequences, the weight of the sequence's own beside them, and R; None for "margins"."""

    pooled: NDArray[np.float64]
    mixture: float
    ratio: NDArray[np.float64] | None

    def log_q(self, codes: Codes, parents: Sequence[int]) -> NDArray[np.float64]:
        """Log-probability q(y | x) of every edge, [n_sequences, edge]."""
        found = [np.zeros(len(codes.shared))]
        law, one = _laws(codes, len(self.pooled))
        law = self.mixture * law + (1 - self.mixture) * self.pooled
        normaliser = None if self.ratio is None else law @ self.ratio.T  # [n_sequences, x]
        rows = np.arange(len(law))
        for child, parent in enumerate(parents):
            if parent != ROOT:
                x, y = codes.shared[:, parent], codes.shared[:, child]
                q = law[rows, y] - self.mixture * one
                if self.ratio is not None and normaliser is not None:
                    q *= self.ratio[x, y]
                    q /= normaliser[rows, x] - self.mixture * one * self.ratio[x, y]
                found.append(np.log(q))
        return np.stack(found[1:] or found, 1)


def one_matrix(codes: Codes, parents: Sequence[int], *, margins: bool = False) -> OneMatrix:
    """The best of the mixtures, each with its R: how much oftener than by b_n does y follow x along the edges, pooled over edges and sequences?"""
    size = codes.d_vocab
    pooled = np.bincount(codes.shared.reshape(-1), minlength=size) + SMOOTHING
    pooled = pooled / pooled.sum()
    seen, own = np.zeros((size, size)), np.zeros((size, size))
    law, one = _laws(codes, size)
    for child, parent in enumerate(parents):
        if parent != ROOT:
            x, y = codes.shared[:, parent], codes.shared[:, child]
            cells = x * size + y
            seen += np.bincount(cells, minlength=size**2).reshape(size, size)
            own -= np.bincount(cells, one, minlength=size**2).reshape(size, size)
            own += (x[:, None] == np.arange(size)).T.astype(np.float64) @ law
    tried = []
    for mixture in MIXTURES:
        expected = mixture * own + (1 - mixture) * seen.sum(1, keepdims=True) * pooled
        ratio = None if margins else (seen + SMOOTHING) / (expected + SMOOTHING)
        tried.append(OneMatrix(pooled, mixture, ratio))
    return max(tried, key=lambda model: float(model.log_q(codes, parents).mean()))


def compare_models(
    fit: Codes, held_out: Codes, parents: Sequence[int], fixed_parents: Sequence[int], sure: Sequence[int], *, seed: int
) -> dict[str, Gain]:
    """Held-out gains, in nats per sequence.

    Parameters
    ----------
    fit, held_out
        Sequences that the models are fitted and measured on.
    parents, fixed_parents
        The best forest, and the tree of mutual information.
    sure
        The forest with the edges that no rival graph explains. Only these tell what R adds: along an indirect pair it stands for what lies between.
    seed
        Of the redrawn data.

    Returns
    -------
    dict with ``one_matrix`` (over margins, along ``fixed_parents``), ``one_matrix_a_sequence`` (over margins, along ``parents``), ``new_in_each``
    (one matrix a sequence over one matrix, along ``parents`` or ``fixed_parents``, whichever is closer); and, less what the same is in redrawn data
    where nothing is fixed, ``fixed_alone`` (one matrix over margins) and ``fixed_besides`` (what R adds to one matrix a sequence along ``sure``).
    Where labels mean nothing across sequences, there is no R.
    """
    if fit.ranked:
        own = Counts(fit, parents).fit()
        plain = _gain(np.zeros(len(held_out.local)) if own is None else polya(held_out, parents, own))
        return dict.fromkeys(("one_matrix_a_sequence", "new_in_each"), plain) | dict.fromkeys(
            ("one_matrix", "fixed_alone", "fixed_besides"), Gain(0.0, None)
        )
    plain, along, both = _gains(fit, held_out, parents)
    tree = _tree_gains(fit, held_out, fixed_parents)
    new = min((_gain(both - fixed) for fixed in (along, tree)), key=lambda gain: gain.z)
    alone, besides = _beyond_null(fit, held_out, parents, fixed_parents, sure, seed)
    return {
        "one_matrix_a_sequence": _gain(plain),
        "new_in_each": new,
        "one_matrix": _gain(tree),
        "fixed_alone": alone,
        "fixed_besides": besides,
    }


def _tree_gains(fit: Codes, held_out: Codes, parents: Sequence[int]) -> NDArray[np.float64]:
    """Over margins in each held-out sequence: one matrix, from which each edge's own may differ as far as its counts say.

    Along an edge that is directed against its cause, the matrix isn't that of the others.
    """
    columns, children = range(fit.local.shape[1]), [child for child, parent in enumerate(parents) if parent != ROOT]
    size, model = fit.d_vocab, one_matrix(fit, parents)
    tables = []
    for child in children:
        cells = np.bincount(fit.shared[:, parents[child]] * size + fit.shared[:, child], minlength=size**2)
        tables.append(cells.reshape(size, size).astype(np.float32))

    def counted(codes: Codes, own: int) -> _Edges:
        x, y = codes.shared[:, [parents[child] for child in children]], codes.shared[:, children]
        each = np.arange(len(children))
        table = np.stack(tables)
        return table[each, x, y] - own, table.sum(2)[each, x] - own, np.exp(model.log_q(codes, parents))

    fitted = counted(fit, 1)
    best = max(TABLES, key=lambda A: float(_predicted(*fitted, A).mean()))
    base = one_matrix(fit, columns, margins=True).log_q(held_out, columns)[:, children].sum(1)
    return np.asarray(_predicted(*counted(held_out, 0), best) - base)


def _gains(fit: Codes, held_out: Codes, parents: Sequence[int]) -> NDArray[np.float64]:
    """Over margins in each held-out sequence: one matrix a sequence, one matrix, both; [3, n_sequences]."""
    everything = one_matrix(fit, range(fit.local.shape[1]), margins=True)
    children = [child for child, parent in enumerate(parents) if parent != ROOT]
    if not children:
        return np.zeros((3, len(held_out.local)))
    one = one_matrix(fit, parents)
    plain, both = (
        _sequence_matrix(fit, held_out, parents, model) for model in (one_matrix(fit, parents, margins=True), one)
    )
    base = everything.log_q(held_out, range(held_out.local.shape[1]))[:, children].sum(1)
    return np.asarray(np.stack([plain, one.log_q(held_out, parents).sum(1), both]) - base)


def _beyond_null(
    fit: Codes,
    held_out: Codes,
    parents: Sequence[int],
    fixed_parents: Sequence[int],
    sure: Sequence[int],
    seed: int,
) -> list[Gain]:
    """Both gains of R, less those under the null at the concentration under which the in-context gain is the same as in the data."""

    def measured(fit: Codes, held_out: Codes) -> NDArray[np.float64]:
        plain, _, both = _gains(fit, held_out, sure)
        return np.stack([_gains(fit, held_out, parents)[0], _tree_gains(fit, held_out, fixed_parents), both - plain])

    frequency = np.bincount(fit.shared.reshape(-1), minlength=fit.d_vocab) / fit.shared.size
    # Rows of a matrix scatter about the same frequencies in all sequences, not about each sequence's own.
    pooled = Codes(fit.local, fit.shared, fit.d_vocab, frequency.astype(np.float32)[fit.shared])
    concentration = Counts(pooled, parents).fit() or float(CONCENTRATIONS[-1])
    rng = np.random.default_rng(seed)
    n = min(REDRAWN, len(fit.local) + len(held_out.local))
    null = []
    for scale in SCALES:
        drawn = new_in_each_sequence(parents, scale * concentration * frequency, n, rng)
        null.append(measured(drawn.take(slice(n // 2)), drawn.take(slice(n // 2, n))))
    observed, means = measured(fit, held_out).mean(1), np.stack([each.mean(1) for each in null])
    found = []
    for added in (1, 2):
        slope = 0.0
        if np.ptp(means[:, 0]) > FLAT:
            slope = float(np.clip(np.polyfit(means[:, 0], means[:, added], 1)[0], -1, 1))
        expected = means[:, added] - slope * means[:, 0]
        # The scatter of whole data sets holds also what fitting R and the matrices costs.
        stderr = FEW_DATA_SETS * expected.std(ddof=2) * (1 + 1 / len(SCALES)) ** 0.5
        found.append(Gain(float(observed[added] - slope * observed[0] - expected.mean()), float(stderr)))
    return found


def _laws(codes: Codes, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smoothed frequencies with every entry counted, [n_sequences, token], 0 for what does not occur; and what one entry weighs.

    Less that weight at an entry's own token, they are the frequencies in the rest of the sequence, and sum to 1.
    """
    one = 1 / (codes.local.shape[1] - 1 + (codes.local.max(1) + 1) / 2)
    law = np.zeros((len(codes.shared), size))
    np.put_along_axis(law, codes.shared, codes.base + one[:, None], 1)
    return law, one


def _sequence_matrix(fit: Codes, held_out: Codes, parents: Sequence[int], model: OneMatrix) -> NDArray[np.float64]:
    """Log-likelihood of one matrix a sequence about ``model`` in each held-out sequence, with A fitted on ``fit``."""
    if max(parents) == ROOT:
        return np.zeros(len(held_out.local))
    fitted, measured = (_edges(codes, parents, model) for codes in (fit, held_out))
    return _predicted(*measured, max(COARSE, key=lambda A: float(_predicted(*fitted, A).mean())))


_Edges = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]


def _edges(codes: Codes, parents: Sequence[int], model: OneMatrix) -> _Edges:
    """For each edge, [n_sequences, edge]: counts of the other edges, out of how many, and q."""
    counts = Counts(codes, parents)
    children = [child for child, parent in enumerate(parents) if parent != ROOT]
    count, total = (np.stack(each, 1) for each in zip(*map(counts.others, children), strict=True))
    return count, total, np.exp(model.log_q(codes, parents))


def _predicted(
    count: NDArray[np.float32], total: NDArray[np.float32], q: NDArray[np.float64], A: float
) -> NDArray[np.float64]:
    return np.asarray(np.log((count + A * q) / (total + A)).sum(1))


def _gain(values: NDArray[np.float64]) -> Gain:
    n = len(values)
    return Gain(float(values.mean()), float(values.std(ddof=1) / n**0.5) if n > 1 else None)
