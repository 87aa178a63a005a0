"""What each source gives to a head's queries and keys, and the check that its sum is the score that the model uses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causal_probe.probes.qk_sides import Turn
from causal_probe.probes.qk_stream import require_small

__all__ = ["Terms", "checked_terms"]

#: Entries of a capped score this near to the cap are not turned back into the score before the cap.
SATURATED = 0.95


@dataclass(frozen=True, eq=False)
class Terms:
    """What each source gives to a head's queries and keys, on one batch.

    Attributes
    ----------
    query, key
        By source, its part of the queries and of the keys, as they meet in the scores: rotated, and the factor c in the query; with one
        number more where the model adds to its scores (ALiBi), the source of which meets itself there.
        ``scores[i, j]`` is the sum over all pairs of sources of ``query[s, i] . key[t, j]``.
    unrotated_query, unrotated_key
        The same before what depends on the position alone, and without c.
    factor
        c.
    turns
        What depends on the position alone, of the query and of the key: rotations, and the gains of their norms.
    pattern
        The head's attention.
    seen
        Which keys each query sees.
    cap
        The soft cap; None where there is none.
    sink
        The logit of attention on nothing; None where there is none.
    error
        By how much the scores that the model uses differ from the sums, at most, after each row's mean difference was taken away
        (what is added to all scores of a row does not change its attention); behind the cap, if there is one.
    """

    query: Float[Tensor, "source batch pos _d_head"]
    key: Float[Tensor, "source batch pos _d_head"]
    unrotated_query: Float[Tensor, "source batch pos d_head"]
    unrotated_key: Float[Tensor, "source batch pos d_head"]
    factor: float
    turns: tuple[Turn, Turn]
    pattern: Float[Tensor, "batch pos pos"]
    seen: Bool[Tensor, "batch pos pos"]
    cap: float | None
    sink: float | None
    error: float

    @property
    def scores(self) -> Float[Tensor, "batch pos pos"]:
        """The sum over all pairs of sources, of every query with every key, also those that it doesn't see."""
        return self.query.sum(0) @ self.key.sum(0).mT

    def capped(self, scores: Float[Tensor, "batch pos pos"]) -> Float[Tensor, "batch pos pos"]:
        """Scores as the softmax gets them."""
        return scores if self.cap is None else self.cap * (scores / self.cap).tanh()

    def attention(self, scores: Float[Tensor, "batch pos pos"]) -> Float[Tensor, "batch pos pos"]:
        """The attention that scores give, before the cap: over the keys that are seen, and the sink."""
        used = self.capped(scores).masked_fill(~self.seen, -torch.inf)
        if self.sink is None:
            return used.softmax(-1)
        return torch.cat([used, torch.full_like(used[..., :1], self.sink)], -1).softmax(-1)[..., :-1]


def checked_terms(
    terms: Terms,
    scores: Float[Tensor, "batch head pos pos"] | None,
    like: Float[Tensor, "batch head pos pos"],
    head: int,
    added: Float[Tensor, " pos"] | None,
) -> Terms:
    """Terms that are not turned yet, turned, with the factor c, once their sum has been seen to be the score that the model uses, and to give its attention."""
    pattern, seen, cap = terms.pattern, terms.seen, terms.cap
    query, key = (turn(part) for turn, part in zip(terms.turns, (terms.query, terms.key), strict=True))
    for part, turn in zip((query, key), terms.turns, strict=True):
        if turn.shift is not None:  # a norm's own bias
            part[-1] += turn.shift
    sums = query.sum(0) @ key.sum(0).mT
    rest = 0 if added is None else added
    # Some bridges show the pattern in the scores' place. Its logarithm is the score, but for a number for each row.
    shown = None if scores is None else scores[:, head].to(pattern)
    used = pattern.log() if shown is None or bool((shown == pattern).all()) else shown
    compared = seen & (pattern > torch.finfo(pattern.dtype).tiny)
    fitting, target = compared, used
    if cap is not None:
        fitting = compared & (used.abs() < SATURATED * cap)
        target = cap * (used / cap).clamp(-SATURATED, SATURATED).atanh()
    ours, theirs = (_less_row_mean(values, fitting) for values in (sums, target - rest))
    power = float((ours * ours).sum())
    c = float((ours * theirs).sum()) / power if power > 0 else 1.0
    query = c * query
    if added is not None:  # it meets itself in one more number
        query, key = (torch.nn.functional.pad(part, (0, 1)) for part in (query, key))
        query[-2, ..., -1], key[-2, ..., -1] = 1, added
    terms = replace(terms, query=query, key=key, factor=c)
    ours, theirs = (_less_row_mean(values, compared) for values in (terms.capped(terms.scores), used))
    error = float((theirs - ours).abs().max())
    require_small(error, of=1 + float(theirs.abs().max()), like=like, what="The head's scores")
    require_small(
        float((terms.attention(terms.scores) - pattern).abs().max()), of=1.0, like=like, what="The head's attention"
    )
    return replace(terms, error=error)


def _less_row_mean(values: Float[Tensor, "batch pos pos"], seen: Tensor) -> Float[Tensor, "batch pos pos"]:
    values = torch.where(seen, values, 0).double()
    mean = values.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(seen, values - mean, 0)
