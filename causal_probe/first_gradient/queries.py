"""The parts of :mod:`causal_probe.first_gradient.slots`: the mixed derivative, the choice of queries, the test of nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from causal_probe.models.reduced import EPSILON
from causal_probe.probes.p_values import t_p_value
from causal_probe.tasks.root_test import surprise

__all__ = ["QueryChoice", "Together", "largest_distinct", "confirm_nodes", "u_even"]

#: How many sets of queries of one size are extended.
BEAM = 8
#: Entries of a mixed derivative, T^(k + 1) for k queries (3 queries at T = 64, 2 at T = 128), and of the matches that are worked on
#: at once.
MAX_JOINT = 2**27
JOINT_AT_ONCE = 2**22


class Together:
    """The mixed derivative of several queries, summed over sequences."""

    def __init__(self, n: int, queries: tuple[int, ...]) -> None:
        self.n, self.queries = n, queries
        self.product = torch.zeros(n, n ** len(queries), dtype=torch.float64)
        self.matched = torch.zeros(n ** len(queries), dtype=torch.float64)

    def add(self, tokens: Tensor, target: Tensor) -> None:
        """Add a batch."""
        size = max(1, JOINT_AT_ONCE // len(self.matched))
        for some, its in zip(torch.split(tokens, size), torch.split(target, size), strict=True):
            matches = torch.ones(len(some), 1)
            for query in self.queries:
                m = (some == some[:, query, None]).float()
                matches = (matches[:, :, None] * m[:, None]).flatten(1)
            self.product += u_even(some, its).mT @ matches
            self.matched += matches.sum(0)

    def mean(self) -> Tensor:
        """[child, parent, parent, ...]: mean of T u where all match."""
        n = self.n
        return (self.product / self.matched.clamp(min=1) * n).reshape(n, *[n] * len(self.queries))


def u_even(tokens: Tensor, target: Tensor) -> Tensor:
    """Minus the derivative of the loss with respect to layer 1's scores where its pattern is even (beta towards 0): [batch, pos]."""
    n = tokens.shape[1]
    f = torch.zeros(target.shape).scatter_add_(1, tokens, torch.full(tokens.shape, 1 / n))
    c = (target / (f + EPSILON)).gather(1, tokens)
    return (c - c.mean(1, keepdim=True)) / n


def largest_distinct(joint: Tensor) -> Tensor:
    """For every child the distinct earlier positions, one per axis, at which its entry is largest: [slot, child]; -1 where there are too few."""
    n, k = len(joint), joint.ndim - 1
    found = torch.full((k, n), -1)
    for child in range(k, n):
        its = joint[child][tuple([slice(0, child)] * k)].clone()
        for a, b in itertools.combinations(range(k), 2):
            its.diagonal(dim1=a, dim2=b).fill_(float("-inf"))
        if k:
            found[:, child] = torch.tensor(np.unravel_index(int(its.argmax()), its.shape))
    return found


class QueryChoice:
    """Which set of queries predicts unseen sequences best."""

    def __init__(self, tokens: Tensor, target: Tensor, first: Tensor) -> None:
        self.tokens, self.target, self.first = tokens, target, first
        self.X = one_hot(tokens, target.shape[1]).float()

    def losses(self, queries: Sequence[int], led: Tensor, *, elsewhere: int | None = None) -> Float[Tensor, " batch"]:
        """Of the head that counts where the leading positions carry the queries' tokens; ``led`` is [query, child].

        ``elsewhere``: this one of the queries carries the token of another sequence.
        """
        counted = (led >= 0).all(0)
        # Two queries that name one position for a child can't both be right there.
        for a, b in itertools.combinations(range(len(queries)), 2):
            counted = counted & (led[a] != led[b])
        matches = counted.expand(self.tokens.shape)
        for i, query in enumerate(queries):
            wanted = self.tokens[:, query] if i != elsewhere else self.tokens[:, query].roll(1)
            matches = matches & (self.tokens[:, led[i].clamp(min=0)] == wanted[:, None])
        counts = (matches[:, None].float() @ self.X)[:, 0] + 0.5
        return -(self.target * (counts / counts.sum(-1, keepdim=True)).log()).sum(-1)

    def unigram(self) -> Float[Tensor, " batch"]:
        """The losses of a prediction that counts every position."""
        counts = self.X.sum(1) + 0.5
        return -(self.target * (counts / counts.sum(-1, keepdim=True)).log()).sum(-1)

    def _useless(self, queries: Sequence[int], led: Tensor) -> float:
        """The largest p-value of "this query might as well carry another sequence's token", over the queries.

        Fewer matches alone make a smoother prediction, which can be the better one where there is nothing to predict; with the
        token of another sequence there are as few.
        """
        after = self.losses(queries, led)
        return max(_p_value(self.losses(queries, led, elsewhere=i) - after) for i in range(len(queries)))

    def run(
        self, lead_together: Callable[[tuple[int, ...]], Tensor], *, level: float
    ) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
        """The chosen set, what each step gained, and whether larger sets were not tried because their derivatives have too many entries.

        ``lead_together`` gives the positions that a set's mixed derivative names: the best sets of one size by the first gradients are
        ranked once more with these.
        """
        n = self.tokens.shape[1]
        chosen: tuple[int, ...] = ()
        before = self.unigram()
        gains: list[float] = []
        beam: list[tuple[int, ...]] = [()]
        while len(chosen) < n:
            if n ** (len(chosen) + 2) > MAX_JOINT:
                return chosen, tuple(gains), True
            larger = sorted({tuple(sorted((*its, query))) for its in beam for query in range(n) if query not in its})
            beam = sorted(larger, key=lambda its: float(self.losses(its, self.first[list(its)]).mean()))[:BEAM]
            # Sets in which some query is of no use even so are not worth the larger derivative.
            beam = [its for its in beam if self._useless(its, self.first[list(its)]) <= level]
            led = {its: lead_together(its) for its in beam}
            beam.sort(key=lambda its: float(self.losses(its, led[its]).mean()))
            if not beam:
                break
            best = beam[0]
            after = self.losses(best, led[best])
            if max(_p_value(before - after), self._useless(best, led[best])) > level / len(larger):
                break
            gains.append(float((before - after).mean()))
            chosen, before = best, after
        return chosen, tuple(gains), False


def _p_value(gain: Float[Tensor, " batch"]) -> float:
    return t_p_value(float(gain.mean()), float(gain.std()) / len(gain) ** 0.5, len(gain))


def confirm_nodes(
    tokens: Tensor, tables: Mapping[int, Tensor], parents: Sequence[tuple[int, ...]], *, level: float
) -> tuple[list[tuple[int, ...]], NDArray[np.float64]]:
    """Parents of the nodes that are no roots: those that lead if their bet wins, else the single one with the best bet that wins, else none.

    The null of every bet is that the node is a root, and so uniform; all bets on all nodes share the level (Bonferroni). That is the
    probability of taking any root for a child, if ``parents`` do not depend on these tokens. Which nodes are the parents is not tested: no
    other earlier node is the null. Sets of another size than those in ``parents``, and than one, are not bet on: a node with so many
    parents is returned as a root.
    """
    d_vocab = tables[max(tables)].shape[-1]
    tried = [
        [its] * (len(its) in tables) + [(j,) for j in range(node) if 1 in tables and (j,) != its]
        for node, its in enumerate(parents)
    ]
    limit = surprise(level, sum(map(len, tried)))
    found, log_e = [], np.zeros(len(parents))
    for node, candidates in enumerate(tried):
        values = []
        for its in candidates:
            context = torch.zeros(len(tokens), dtype=torch.long)
            for parent in its:
                context = context * d_vocab + tokens[:, parent]
            given = tables[len(its)][torch.arange(len(tokens)), context, tokens[:, node]].double()
            values.append(float(((1 + d_vocab * given) / 2).log().sum()))
        confirmed = [its for its, value in zip(candidates, values, strict=True) if value > limit]
        # The gradient's own candidates first; where they fail, the single parent with the most evidence.
        best = max(zip(values, candidates, strict=True), default=(0.0, ()))
        found.append(candidates[0] if confirmed and confirmed[0] == candidates[0] else best[1] if confirmed else ())
        log_e[node] = max(values, default=0.0)
    return found, log_e
