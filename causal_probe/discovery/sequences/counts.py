"""The closed-form score of a forest: transitions integrated out, one Dirichlet-multinomial for each row and sequence.

For sequence n let b_n(y) be the smoothed frequency of token y in that sequence. A root's token has the law b_n. The transitions out
of token x are a draw from Dirichlet(A b_nx), one for each x and sequence, shared by all edges; b_nx is b_n with x itself w times as likely
(:attr:`.Codes.diagonal`), divided by its sum. Integrated out,

    score_n(G) = sum_x [ log Gamma(A) / Gamma(A + n_x) + sum_y log Gamma(A b_nx(y) + n_xy) / Gamma(A b_nx(y)) ] - sum_edges log b_n(s_child)

where n_xy counts the edges of G whose parent has token x and whose child has token y. It is the log Bayes factor of G against "no edges", in
nats, and 0 for the graph without edges. Equal scores one by one: the gain of an edge, given all other edges, is

    log [ (n_xy / b_n(y) + A b_nx(y) / b_n(y)) / (n_x + A) ]        (counts without that edge),

so a change of one parent changes the score by a difference of two such gains, exactly. Only equality of tokens enters. Where only a sum of logarithms
is asked for, a few factors are multiplied before each logarithm is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

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
#: Entries of a block of edges to which a concentration is fitted: what stays in a processor's cache.
FITTED = 2**15
#: So many factors go into one logarithm: each lies between 1e-8 and 1e8, so that their product is a normal float32.
FACTORS = 4

Parents = list[int]
Gains = NDArray[np.float32]


class Counts:
    """Transitions along a graph in every sequence, kept up to date as parents change."""

    def __init__(self, codes: Codes, parents: Sequence[int] | None = None) -> None:
        self.codes = codes
        self.n_sequences, self.n_columns = codes.local.shape
        self.distinct = int(codes.local.max()) + 1
        self._token = np.ascontiguousarray(codes.local.T)
        self._base = np.ascontiguousarray(codes.base.T)
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

    @cached_property
    def _inverse_base(self) -> NDArray[np.float32]:
        return np.asarray(1 / self._base, np.float32)

    @cached_property
    def _priors(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """[column, sequence]: how likely a token is behind the column's own, over its frequency; if it is the same token, and if it is another."""
        diagonal = np.float32(self.codes.diagonal)
        scale = 1 + self._base * (diagonal - 1)
        return np.asarray(diagonal / scale, np.float32), np.asarray(1 / scale, np.float32)

    def _prior(
        self, parents: int | slice | NDArray[np.intp], child: int | Sequence[int], rows: slice = slice(None)
    ) -> NDArray[np.float32]:
        """The expected probability of the child's token behind the parent's, over its frequency, before any edge has been seen; a single 1 where rows are alike."""
        if self.codes.diagonal == 1:
            return np.ones(1, np.float32)
        same, other = self._priors
        return np.where(
            self._token[parents, rows] == self._token[child, rows], same[parents, rows], other[parents, rows]
        )

    def _ratios(
        self, child: int, chosen: slice | NDArray[np.intp], A: np.float32, step: int
    ) -> Iterator[tuple[Gains, Gains]]:
        """Numerator and denominator of the gains' ratios, [candidate, sequence], in blocks of sequences."""
        for start in range(0, self.n_sequences, step):
            rows = slice(start, start + step)
            with self._without_edge(child, rows):
                count = np.take(self._counts, self._pair[chosen, rows] + self._token[child, rows])
                total = np.take(self._rows, self._from[chosen, rows])
            count *= self._inverse_base[child, rows]
            count += A * self._prior(chosen, child, rows)
            total += A
            yield count, total

    @contextlib.contextmanager
    def _without_edge(self, child: int, rows: slice) -> Iterator[None]:
        """The counts of all other edges, in some of the sequences."""
        parent = self.parents[child]
        if parent == ROOT:
            yield
            return
        cell, row = self._pair[parent, rows] + self._token[child, rows], self._from[parent, rows]
        self._counts[cell] -= 1
        self._rows[row] -= 1
        try:
            yield
        finally:
            self._counts[cell] += 1
            self._rows[row] += 1

    def gains(self, child: int, candidates: Sequence[int] | None, concentration: float) -> Iterator[Gains]:
        """Gain of each candidate over "root" in each sequence, given all other edges, [candidate, sequence], in blocks of sequences.

        ``None``: all columns before the child.
        """
        chosen, step = self._chosen(child, candidates)
        for count, total in self._ratios(child, chosen, np.float32(concentration), step):
            count /= total
            yield np.log(count, out=count)

    def _chosen(self, child: int, candidates: Sequence[int] | None) -> tuple[slice | NDArray[np.intp], int]:
        """The candidates as an index, and how many sequences there are in a block."""
        chosen = slice(child) if candidates is None else np.asarray(candidates, np.intp)
        return chosen, max(1, BLOCK // max(1, child if candidates is None else len(candidates)))

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
        cells = np.delete(self._from, child, 0).ravel()
        often = np.bincount(cells, minlength=self.n_sequences * self.distinct).reshape(self.n_sequences, -1)
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
        chosen, step = self._chosen(child, candidates)
        sums: Any = 0.0
        for count, total in self._ratios(child, chosen, np.float32(concentration), step):
            sums = sums + _sum_of_logs(count, total)
        return np.asarray(sums / self.n_sequences)

    def fit(self) -> float | None:
        """The concentration under which every edge is best predicted from the others; None without an edge."""
        children = [child for child, parent in enumerate(self.parents) if parent != ROOT]
        if not children:
            return None
        parents = np.asarray(self.parents, np.intp)[children]
        totals = np.zeros(len(CONCENTRATIONS))
        step = max(1, FITTED // len(children))
        for start in range(0, self.n_sequences, step):
            rows = slice(start, start + step)
            count = np.take(self._counts, self._pair[parents, rows] + self._token[children, rows])
            total = np.take(self._rows, self._from[parents, rows])
            count -= 1  # the edge itself
            total -= 1
            count *= self._inverse_base[children, rows]
            prior = self._prior(parents, children, rows)
            for index, A in enumerate(CONCENTRATIONS.astype(np.float32)):
                totals[index] += _sum_of_logs((A * prior + count).ravel(), (total + A).ravel())
        return float(CONCENTRATIONS[int(totals.argmax())])

    def scores(self, parents: Sequence[int], concentration: float) -> NDArray[np.float64]:
        """The score of a graph in each sequence, by adding edge after edge: exactly the closed form of the module's docstring."""
        counts = np.zeros(self.n_sequences * self.distinct**2, np.float32)
        rows = np.zeros(self.n_sequences * self.distinct, np.float32)
        score = np.zeros(self.n_sequences)
        product, A = np.ones(self.n_sequences, np.float32), np.float32(concentration)
        edges = [(child, parent) for child, parent in enumerate(parents) if parent != ROOT]
        for number, (child, parent) in enumerate(edges, 1):
            cell, row = self._pair[parent] + self._token[child], self._from[parent]
            seen, out_of = np.take(counts, cell), np.take(rows, row)
            counts[cell] = seen + 1
            rows[row] = out_of + 1
            seen /= self._base[child]
            seen += A * self._prior(parent, child)
            seen /= out_of + A
            product *= seen
            if number % FACTORS == 0 or number == len(edges):
                score += np.log(product)
                product[:] = 1
        return score

    def score(self, parents: Sequence[int], concentration: float) -> float:
        """Mean score of a graph over sequences, in nats."""
        return float(self.scores(parents, concentration).mean())


def polya(codes: Codes, parents: Sequence[int], concentration: float) -> NDArray[np.float64]:
    """The score of a graph in each sequence, in nats: :meth:`Counts.scores`."""
    return Counts(codes).scores(parents, concentration)


def _sum_of_logs(above: Gains, below: Gains) -> NDArray[np.float64]:
    """The sum of log(above / below) over the last axis; both are changed."""
    rest, size = np.zeros(above.shape[:-1]), 1
    while size < FACTORS and above.shape[-1] > 1:
        half, odd = divmod(above.shape[-1], 2)
        if odd:
            rest = rest + np.log(above[..., -1] / below[..., -1])
        above = above[..., :half] * above[..., half : 2 * half]
        below = below[..., :half] * below[..., half : 2 * half]
        size *= 2
    above /= below
    return np.asarray(rest + np.log(above, out=above).sum(-1, dtype=np.float64))
