"""Is a node a root, and which node is its parent? Exact tests on sequences whose transitions are known.

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

That i is no root does not say which node is its parent: dependence on an ancestor or a sibling wins bets as well. So every *rival*
k < i of the candidate j is a hypothesis of its own, "k is the parent", under which s_i is drawn from pi(. | s_k) whatever else came
before; then ::

    pi(s_i | s_j) / pi(s_i | s_k)

has an expectation of at most 1, and the product of the means of it and 1 is an e-value against k. So has mu(s_i) / pi(s_i | s_k), the bet
that i is a root: which of the two is made may change with what was seen before. Of all these hypotheses about
i (root, or one of the earlier nodes) exactly one is true. So if each is given up when its e-value exceeds nodes / level, then with probability
1 - level the true one of *no* node is ever given up, without a correction for the number of rivals: what is left is a confidence set for
each node's parent. An edge may be claimed where one candidate is all that is left, and a root where "root" is.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.tasks.stationary import stationary_distribution

__all__ = ["evidence_per_edge", "evidence_per_root", "log_bets", "log_bets_against_rivals", "surprise"]

#: A rival is not given up for a state that it makes rarer than this: random numbers of 24 bits can't tell such states from impossible ones.
RAREST = 2.0**-20


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
    # A root never takes a state of probability 0, so a bet on it has no effect; none is made.
    ratio = torch.where((alone > 0) & (candidates >= 0), given / alone, 1.0)
    return ((1 + ratio) / 2).log()


def log_bets_against_rivals(
    tokens: Int[Tensor, "*batch pos"],
    transition: Float[Tensor, "*batch state state"],
    candidates: Int[Tensor, "*batch pos"],
    roots: Bool[Tensor, "*batch pos"] | None = None,
) -> Float[Tensor, "*batch pos state"]:
    """log((1 + pi(s_i | s_j) / pi(s_i | s)) / 2) for every sequence, node i and state s that a rival of the candidate j may have.

    Where ``roots`` is true, the bet is that i is a root, and mu(s_i) replaces pi(s_i | s_j); like the candidate, this must not
    depend on the sequence. By default nowhere.

    The entry at the state that position k of the sequence has is the sequence's evidence against "k is the parent of i", in nats; for
    the candidate itself it is never above 0. Summed over sequences it is the log of an e-value (the denominator is never below
    :data:`RAREST`, which only makes it smaller). Parameters are those of :func:`log_bets`; where nothing is bet, the result is 0.
    """
    d_vocab = transition.shape[-1]
    # into[..., i, s]: the probability of i's state after s.
    into = transition.mT.gather(-2, tokens[..., None].expand(*tokens.shape, d_vocab))
    of_candidate = tokens.gather(-1, candidates.clamp(min=0))
    given = into.gather(-1, of_candidate[..., None])
    silent = candidates < 0
    if roots is not None:
        mu = stationary_distribution(transition.double().reshape(-1, d_vocab, d_vocab)).reshape(transition.shape[:-1])
        given = torch.where(roots[..., None], mu.gather(-1, tokens)[..., None].to(given.dtype), given)
        silent = silent & ~roots
    bets = ((1 + given / into.clamp(min=RAREST)) / 2).log()
    return bets.masked_fill(silent[..., None], 0.0)


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


def evidence_per_root(transition: Float[Tensor, "batch state state"]) -> Float[Tensor, " batch"]:
    """The nats that a sequence adds on average against each earlier node, if the node is a root: sum_st mu(s) mu(t) log((1 + mu(t) / pi(t | s)) / 2).

    Examples
    --------
    >>> import torch
    >>> evidence_per_root(torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.1, 0.9]]])).round(decimals=3)
    tensor([0.0000, 0.4240], dtype=torch.float64)
    """
    pi = transition.double()
    mu = stationary_distribution(pi)
    gains = ((1 + mu[:, None] / pi.clamp(min=RAREST)) / 2).log()
    return (mu[:, :, None] * mu[:, None] * gains).sum((1, 2))
