"""Is a node a root? An exact test on sequences whose transitions are known.

If node i is a root, its token is drawn from mu, independently of all earlier tokens given pi. Then for *any* earlier node j,
chosen in whatever way before the sequence is looked at, the ratio ::

    x = pi(s_i | s_j) / mu(s_i) - 1

has expectation exactly 0 (its mean over sequences is an unbiased estimate of g_ij, see :mod:`causal_probe.tasks.information`), and
it is at least -1. So the product of (1 + x / 2) over sequences has expectation exactly 1 at every length, and by Ville's
inequality it *ever* exceeds 1 / level with a probability of at most ``level``. It is an e-value: evidence against "i is a root" that
needs no normal approximation (x is heavy-tailed: mu may be tiny), no constant, and no number of sequences fixed beforehand
(Shafer 2021, *Testing by betting*; Waudby-Smith & Ramdas 2024, *Estimating means of bounded random variables by betting*).

The half is a bet on an even mixture of "j is the parent" and "i is a root". Betting everything on j (the likelihood ratio) would
grow faster if j is the parent, and be ruined by one token that j can't give if it is not. In Shannon's terms, an edge gains
E log(1 + x / 2) nats per sequence, between 3/8 of its chi-square information (small ones) and I - log 2.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.tasks.stationary import stationary_distribution

__all__ = ["evidence_per_edge", "log_bets", "surprise"]


def surprise(level: float, nodes: int) -> float:
    """Nats that a node's evidence must exceed for any of ``nodes`` nodes to be no root, at a family-wise ``level`` (Bonferroni).

    >>> round(surprise(1e-3, 18), 2)
    9.8
    """
    return math.log(max(1, nodes) / level)


def log_bets(
    tokens: Int[Tensor, "*batch pos"],
    transition: Float[Tensor, "*batch state state"],
    candidates: Int[Tensor, "*batch pos"],
) -> Float[Tensor, "*batch pos"]:
    """log(1 + x / 2) for every sequence and node, in nats, at least -log 2; the sum over sequences is the log of an e-value.

    Parameters
    ----------
    tokens, transition
        Sequences and their transition matrices.
    candidates
        For each node i the earlier node j that is bet on; it must not depend on the sequence. Where it is negative, nothing is
        bet, and the result is 0.
    """
    d_vocab = transition.shape[-1]
    pi = transition.double()
    mu = stationary_distribution(pi.reshape(-1, d_vocab, d_vocab)).reshape(pi.shape[:-1])
    of_candidate = tokens.gather(-1, candidates.clamp(min=0))
    given = pi.flatten(-2).gather(-1, of_candidate * d_vocab + tokens)
    alone = mu.gather(-1, tokens)
    # A root never takes a state of probability 0, so what is bet on that is no matter; nothing is bet.
    ratio = torch.where((alone > 0) & (candidates >= 0), given / alone, 1.0)
    return ((1 + ratio) / 2).log()


def evidence_per_edge(transition: Float[Tensor, "batch state state"]) -> Float[Tensor, " batch"]:
    """The nats that a sequence adds on average if the candidate is the parent: sum_s mu(s) pi(t | s) log(1 + x / 2).

    Examples
    --------
    >>> import torch
    >>> evidence_per_edge(torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]])).round(decimals=3)
    tensor([0.0000, 0.4050], dtype=torch.float64)
    """
    pi = transition.double()
    mu = stationary_distribution(pi)
    ratio = torch.where(mu[:, None] > 0, pi / mu[:, None], 1.0)
    return (mu[:, :, None] * pi * ((1 + ratio) / 2).log()).sum((1, 2))
