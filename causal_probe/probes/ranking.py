"""Is a head's effect, or that of several, larger than nearly all others'? Asked of as few ablations as can tell.

*Heads.* The question is whether at most a certain number of the unflagged heads hurt as much as a flagged one. First all unflagged heads are put in order by
the effect that the gradient predicts (:meth:`~causal_probe.probes.ablation.Experiment.first_order`). Those that are predicted to come near the weakest
flagged head are ablated. Of the others, of which more than may be could hurt as much though none is predicted to, so many are drawn at random
and ablated that if it were so, more of them would be seen but with a small probability (hypergeometric). If some are seen, more are drawn, in the end all, and
each look has half of the ``error`` that is left. What stands for the weakest stands for all that hurt more, so the error is that of all flagged
heads together.

*Random sets* are drawn one after the other until so many hurt as much that the joint effect can't stand out any more, or none is left: the answer is that of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from causal_probe.probes.ablation import Head
from causal_probe.probes.baselines import Baseline

__all__ = ["sample_size", "share_of_heads", "share_of_sets"]

#: An unflagged head is ablated if the gradient predicts so much of the weakest flagged head's effect: it predicts too little where a loss bends. (Settled on
#: one model, SmolLM2, where a tenth leaves out two of the eight that hurt most; the error does not depend on it.)
NEAR = 0.1
#: So many that are predicted to hurt most in any case, and no more than three times as many as may hurt as much.
FIRST = 8


@runtime_checkable
class Ablations(Protocol):
    """What can be asked of sets of heads: to be ablated, and then by how much that hurts, sequence by sequence."""

    def rank(self, baseline: Baseline, sets: Iterable[frozenset[Head]], *, progress: bool = False) -> None:
        """Ablate them, on the sequences that serve to rank."""

    def rise(self, baseline: Baseline, heads: Iterable[Head], *, ranked: bool = False) -> Any:
        """The rise of the loss [sequence]; ``ranked``: on these sequences."""


def allowed(total: int, rank: float) -> int:
    """How many of ``total`` may hurt as much, if more than a share ``rank`` are to hurt less.

    >>> allowed(250, 0.95), allowed(100, 0.99), allowed(7, 0.95)
    (12, 1, 0)
    """
    return math.floor(total * (1 - rank) + 1e-9)


def sample_size(total: int, many: int, error: float, *, seen: int = 0) -> int:
    """How many of ``total`` are to be drawn at random, so that of ``many`` no more than ``seen`` are among them but with probability ``error``.

    The number drawn has the hypergeometric distribution; where there are not ``many``, nothing need be drawn.

    >>> sample_size(200, 10, 0.01), sample_size(200, 10, 0.01, seen=1), sample_size(9, 1, 0.01), sample_size(9, 10, 0.01)
    (73, 100, 9, 0)
    """
    if many > total:
        return 0
    for size in range(total):
        ways = sum(math.comb(many, k) * math.comb(total - many, size - k) for k in range(min(seen, size) + 1))
        if ways / math.comb(total, size) <= error:
            return size
    return total


def share_of_heads(
    runs: Ablations,
    baseline: Baseline,
    asked: Sequence[Head],
    others: Sequence[Head],
    predicted: Mapping[Head, float],
    *,
    rank: float,
    error: float | None,
    rng: np.random.Generator,
    progress: bool = False,
) -> dict[Head, float | None]:
    """By head that is asked for, the share of other heads whose ablation hurts less, on the sequences that serve to rank; None without others.

    Where not all others were ablated, those that were drawn at random stand for the rest, and whether the share is at least ``rank`` is wrong with
    probability ``error``, for any of the heads; None: all are ablated. ``predicted``: by other head, what the gradient says.
    """
    if not asked or not others:
        return dict.fromkeys(asked)
    rises = {head: _rise(runs, baseline, [head]) for head in asked}
    order = sorted(others, key=lambda head: (-predicted.get(head, 0.0), head))
    may, near = allowed(len(others), rank), len(others)
    if error is not None:
        near = sum(predicted.get(head, 0.0) >= NEAR * min(rises.values()) for head in order)
        near = max(FIRST, min(near, 3 * may))
    first, rest = order[:near], order[near:]
    rest = [rest[i] for i in rng.permutation(len(rest))]

    theirs: dict[Head, float] = {}

    def ablate(those: Sequence[Head]) -> None:
        runs.rank(baseline, [frozenset([other]) for other in those], progress=progress)
        theirs.update({other: _rise(runs, baseline, [other]) for other in those})

    def as_much(head: Head, those: Sequence[Head]) -> int:
        return sum(theirs[other] >= rises[head] for other in those)

    ablate(first)
    drawn = 0
    while error is not None:
        open_ = [head for head in asked if as_much(head, first) + as_much(head, rest[:drawn]) <= may]
        if not open_:
            break
        weakest = min(open_, key=rises.__getitem__)
        error /= 2  # for each look half of what is left, so that all looks together have the error that was asked for
        seen = as_much(weakest, rest[:drawn])
        needed = sample_size(len(rest), may - as_much(weakest, first) + 1, error, seen=seen)
        if needed <= drawn:
            break
        ablate(rest[drawn:needed])
        drawn = needed
        if as_much(weakest, rest[:drawn]) == seen:
            break
    scale = len(rest) / drawn if drawn else 0.0
    return {
        head: (len(others) - as_much(head, first) - scale * as_much(head, rest[:drawn])) / len(others) for head in asked
    }


def share_of_sets(
    runs: Ablations,
    baseline: Baseline,
    heads: Sequence[Head],
    sets: Sequence[frozenset[Head]],
    *,
    rank: float,
    progress: bool = False,
) -> float | None:
    """The share of the random sets whose ablation hurts less than that of these heads together, of those that were needed to tell; None without sets."""
    if not sets:
        return None
    own, may, hurt, count = _rise(runs, baseline, heads), allowed(len(sets), rank), 0, 0
    for each in sets:
        runs.rank(baseline, [each], progress=progress)
        hurt += _rise(runs, baseline, each) >= own
        count += 1
        if hurt > may:
            break
    return (count - hurt) / count


def _rise(runs: Ablations, baseline: Baseline, heads: Sequence[Head] | frozenset[Head]) -> float:
    return float(runs.rise(baseline, heads, ranked=True).mean())
