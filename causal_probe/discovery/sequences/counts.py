"""The closed-form score of a forest: transitions integrated out, one Dirichlet-multinomial for each row and sequence.

For sequence n let b_n(y) be the smoothed frequency of token y in that sequence. A root's token has the law b_n. The transitions out
of token x are a draw from Dirichlet(A b_nx), one for each x and sequence, shared by all edges; b_nx is b_n with x itself w times as likely
(:attr:`.Codes.diagonal`), divided by its sum. Integrated out,

    score_n(G) = sum_x [ log Gamma(A) / Gamma(A + n_x) + sum_y log Gamma(A b_nx(y) + n_xy) / Gamma(A b_nx(y)) ] - sum_edges log b_n(s_child)

where n_xy counts the edges of G whose parent has token x and whose child has token y. It is the log Bayes factor of G against "no edges", in
nats, and 0 for the graph without edges. Equal scores one by one: the gain of an edge, given all other edges, is

    log [ (n_xy / b_n(y) + A b_nx(y) / b_n(y)) / (n_x + A) ]        (counts without that edge),

so a change of one parent changes the score by a difference of two such gains, exactly. Only equality of tokens enters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from causal_probe.discovery.sequences.codes import Codes

__all__ = ["CONCENTRATIONS", "ROOT", "Counts", "Parents", "polya"]

#: The parent of a root.
ROOT = -1
#: Concentrations A that are tried.
CONCENTRATIONS = 2.0 ** np.arange(-2, 11, 0.5)
#: A probability below this is none.
LEAST = 1e-30
#: Entries of a block of gains, [candidate, sequence].
BLOCK = 2**18

Parents = list[int]
Gains = NDArray[np.float32]


class Counts:
    """Transitions along a graph in every sequence, kept up to date as parents change."""

    def __init__(self, codes: Codes, parents: Sequence[int] | None = None) -> None:
        self.codes = codes
        self.n_sequences, self.n_columns = codes.local.shape
        self.distinct = int(codes.local.max()) + 1
        self._token = np.ascontiguousarray(codes.local.T)
        self._inverse_base = np.ascontiguousarray(1 / codes.base.T)
        self._diagonal = np.float32(codes.diagonal)
        self._share = np.ascontiguousarray(1 / (1 + codes.base.T * (self._diagonal - 1)))
        row = np.arange(self.n_sequences)
        self._from = self._token + row * self.distinct
        self._pair = self._token * self.distinct + row * self.distinct**2
        self.set([ROOT] * self.n_columns if parents is None else parents)

    def set(self, parents: Sequence[int]) -> None:
        """Count along another graph."""
        self.parents: Parents = [ROOT] * self.n_columns
        self._counts = np.zeros(self.n_sequences * self.distinct**2, np.float32)
        self._rows = np.zeros(self.n_sequences * self.distinct, np.float32)
        for child, parent in enumerate(parents):
            self.move(child, parent)

    def move(self, child: int, parent: int) -> None:
        """Give a child another parent."""
        for other, sign in ((self.parents[child], -1), (parent, 1)):
            if other != ROOT:
                # Each sequence has cells of its own, so no index occurs twice.
                self._counts[self._pair[other] + self._token[child]] += sign
                self._rows[self._from[other]] += sign
        self.parents[child] = parent

    def gains(self, child: int, candidates: Sequence[int] | None, concentration: float) -> Iterator[Gains]:
        """Gain of each candidate over "root" in each sequence, given all other edges, [candidate, sequence], in blocks of sequences.

        ``None``: all columns before the child.
        """
        chosen = np.arange(child) if candidates is None else np.asarray(candidates, np.intp)
        A = np.float32(concentration)
        own = self.parents[child]
        step = max(1, BLOCK // max(1, len(chosen)))
        for start in range(0, self.n_sequences, step):
            rows = slice(start, start + step)
            count = np.take(self._counts, self._pair[chosen, rows] + self._token[child, rows])
            total = np.take(self._rows, self._from[chosen, rows])
            if own != ROOT:
                shared = self._token[chosen, rows] == self._token[own, rows]
                count -= shared
                total -= shared
            count *= self._inverse_base[child, rows]
            if self._diagonal == 1:
                count += A
            else:
                same = self._token[chosen, rows] == self._token[child, rows]
                count += A * np.where(same, self._diagonal, np.float32(1)) * self._share[chosen, rows]
            total += A
            count /= total
            yield np.log(count, out=count)

    def others(self, child: int) -> tuple[Gains, Gains]:
        """In each sequence, how many other edges go from the parent's token to the child's, and how many from the parent's token at all."""
        parent = self.parents[child]
        return self._counts[self._pair[parent] + self._token[child]] - 1, self._rows[self._from[parent]] - 1

    def over_root(self, child: int, concentration: float) -> NDArray[np.float64]:
        """Gain of the child's parent over "root" in each sequence, less its mean had the token been drawn from the rest of the sequence.

        If the child is a root, its token is such a draw, up to the error of the frequencies. Of rows that are alike (w = 1), as :meth:`sibling_gains`.
        """
        rows, law = np.arange(self.n_sequences), self._rest(child)
        counts = self._without(child)[rows, self._token[self.parents[child]]]
        expected = np.where(law > 0, law, 1)
        gains = np.log((counts / expected + concentration) / (counts.sum(1, keepdims=True) + concentration))
        return np.asarray(gains[rows, self._token[child]] - (law * gains).sum(1))

    def sibling_gains(self, child: int, concentration: float) -> NDArray[np.float64]:
        """Gain over "root" in each sequence if the column and an earlier one had a common parent that is no column, [earlier, sequence].

        That parent's token is drawn from the rest of the sequence, both children from its row.
        """
        rows, law = np.arange(self.n_sequences), self._rest(child)
        counts = self._without(child)
        matrix = (counts + concentration * law[:, None]) / (counts.sum(2, keepdims=True) + concentration)
        weights = law[:, :, None] * matrix  # [sequence, hidden token, earlier column's token]
        own = matrix[rows, :, self._token[child]]
        expected = np.einsum("nh,nhx->nx", own, weights) / np.maximum(weights.sum(1), LEAST)
        shown = np.stack([expected[rows, self._token[column]] for column in range(child)])
        return np.asarray(np.log(np.maximum(shown * self._inverse_base[child], LEAST)))

    def _rest(self, child: int) -> NDArray[np.float64]:
        """Smoothed token frequencies in the rest of each sequence, [sequence, token]."""
        rows = np.arange(self.n_sequences)
        often = np.zeros((self.n_sequences, self.distinct))
        np.add.at(often, (rows[:, None], np.delete(self._token, child, 0).T), 1)
        occurs = often > 0
        occurs[rows, self._token[child]] = True
        law = np.where(occurs, often + 0.5, 0)
        return np.asarray(law / law.sum(1, keepdims=True))

    def _without(self, child: int) -> NDArray[np.float64]:
        """Counts of all edges but the child's, [sequence, parent's token, child's token]."""
        counts = self._counts.reshape(self.n_sequences, self.distinct, self.distinct).astype(np.float64)
        if self.parents[child] != ROOT:
            counts[np.arange(self.n_sequences), self._token[self.parents[child]], self._token[child]] -= 1
        return counts

    def mean_gains(self, child: int, candidates: Sequence[int] | None, concentration: float) -> NDArray[np.float64]:
        """:meth:`gains`, averaged over sequences."""
        blocks = self.gains(child, candidates, concentration)
        return np.asarray(sum(block.sum(1, dtype=np.float64) for block in blocks) / self.n_sequences)

    def fit(self) -> float | None:
        """The concentration under which every edge is best predicted from the others; None without an edge."""
        children = [child for child, parent in enumerate(self.parents) if parent != ROOT]
        if not children:
            return None
        totals = np.zeros(len(CONCENTRATIONS))
        for child in children:
            count, total = self.others(child)
            count *= self._inverse_base[child]
            prior = self.codes.prior(self.parents[child], child)
            for index, A in enumerate(CONCENTRATIONS.astype(np.float32)):
                totals[index] += np.log((count + A * prior) / (total + A)).sum(dtype=np.float64)
        return float(CONCENTRATIONS[int(totals.argmax())])

    def score(self, parents: Sequence[int], concentration: float) -> float:
        """Mean score of a graph over sequences, in nats; the counts are left along that graph."""
        return float(polya(self.codes, parents, concentration).mean())


def polya(codes: Codes, parents: Sequence[int], concentration: float) -> NDArray[np.float64]:
    """The score of a graph in each sequence, by adding edge after edge: exactly the closed form of the module's docstring."""
    local, base = codes.local, codes.base
    n, distinct = len(local), int(local.max()) + 1
    rows = np.arange(n)
    counts = np.zeros((n, distinct, distinct), np.float32)
    totals = np.zeros((n, distinct), np.float32)
    score = np.zeros(n)
    for child, parent in enumerate(parents):
        if parent == ROOT:
            continue
        x, y = local[:, parent], local[:, child]
        prior = concentration * codes.prior(parent, child)
        score += np.log((counts[rows, x, y] / base[:, child] + prior) / (totals[rows, x] + concentration))
        counts[rows, x, y] += 1
        totals[rows, x] += 1
    return score
