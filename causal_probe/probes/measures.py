"""What is measured of a model while its heads are ablated: a loss for each sequence, and the logit of its target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import logits_of

__all__ = ["Measure", "Measured", "Rows", "mean_over_rows", "next_token", "repeated_token", "rows_of"]


@dataclass(frozen=True, eq=False)
class Measured:
    """The measurements of each sequence.

    Attributes
    ----------
    loss
        The loss, in nats.
    logit
        The target's logit, less the mean logit of the vocabulary; None where there is no one target.
    without
        By name, the loss of a predictor that does not do the task, such as an even guess. A model whose loss is not below each of these
        does not do the task. Empty where none is known.
    """

    loss: Float[Tensor, " batch"]
    logit: Float[Tensor, " batch"] | None
    without: Mapping[str, Float[Tensor, " batch"]] = field(default_factory=dict)


#: The measure of the model's performance: ``measure(logits [batch, pos, d_vocab], batch) -> Measured``.
Measure: TypeAlias = Callable[[Tensor, Any], Measured]
#: At which positions a loss predicts the next token: tokens [batch, pos] -> true or false [batch, pos].
Rows: TypeAlias = Callable[[Tensor], Tensor]
#: Of the measures made here. No attribute: ``functools.wraps`` would hand it on to a measure of the user's that does something else.
_ROWS: WeakKeyDictionary[Measure, Rows] = WeakKeyDictionary()


def rows_of(measure: Measure) -> Rows | None:
    """The rows of the logits that a measure's loss and logit are read from, where these are :func:`mean_over_rows`; None where that is not known."""
    try:
        return _ROWS.get(measure)
    except TypeError:  # a callable that can't be hashed
        return None


@checked
def next_token(queries: Sequence[int] | None = None) -> Measure:
    """The loss, and the logit, of the next token, averaged over some positions.

    Parameters
    ----------
    queries
        The positions at which the next token is predicted, negative ones counted from the end; all but the last by default.

    Returns
    -------
    callable
        ``measure(logits [batch, pos, d_vocab], batch) -> Measured``: the loss in nats (log d_vocab for an even guess) and the target's logit
        less the mean logit, each [batch], means over the positions. A model that does the task has a loss below an even guess.

    Raises
    ------
    CausalProbeError
        When it measures, if a position has no next token.

    Examples
    --------
    >>> logits = torch.zeros(1, 3, 4)
    >>> logits[0, 1, 2] = 4.0
    >>> next_token([1])(logits, torch.tensor([[0, 1, 2]])).logit     # 4, less the mean of 4, 0, 0, 0
    tensor([3.])
    """

    def rows(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        pos = tokens.shape[1]
        its = list(range(pos - 1)) if queries is None else [query % pos for query in queries if -pos <= query < pos]
        if not its or max(its) >= pos - 1 or len(its) != (len(its) if queries is None else len(queries)):
            raise CausalProbeError(
                f"The next token was to be predicted at the positions {queries}; sequences of {pos} tokens have a next token at 0 to "
                f"{pos - 2}."
            )
        chosen = torch.zeros(tokens.shape, dtype=torch.bool)
        chosen[:, its] = True
        return chosen

    def measure(logits: Any, batch: Any) -> Measured:
        tokens: Int[Tensor, "batch pos"] = getattr(batch, "tokens", batch)
        return _next_token(logits_of(logits, tokens), tokens, rows(tokens))

    _ROWS[measure] = rows
    return measure


def repeated_token(logits: Any, batch: Any) -> Measured:
    """The loss, and the logit, of the next token where the current one has occurred before, in sequences that repeat themselves.

    A model that does the task has a loss below an even guess, and below its own loss on the tokens that are not repeated.

    >>> repeated_token(torch.zeros(1, 5, 4), torch.tensor([[0, 1, 2, 0, 1]])).without["its own loss on what is not repeated"]
    tensor([1.3863])
    """
    tokens: Int[Tensor, "batch pos"] = getattr(batch, "tokens", batch)
    logits = logits_of(logits, tokens)
    before = _occurred(tokens)
    fresh = ~before & ~torch.cat([before[:, 1:], before[:, :1]], 1)
    fresh[:, -1] = False
    found = _next_token(logits, tokens, before)
    own = _next_token(logits, tokens, fresh).loss
    return Measured(found.loss, found.logit, {**found.without, "its own loss on what is not repeated": own})


def _occurred(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Where the current token has occurred before, and there is a next one."""
    before = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(-1).cpu()
    before[:, -1] = False
    return before


_ROWS[repeated_token] = _occurred


def _next_token(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], chosen: Bool[Tensor, "batch pos"]
) -> Measured:
    found = mean_over_rows(logits[chosen.to(logits.device)], tokens, chosen)
    even = torch.full_like(found.loss, math.log(logits.shape[-1]))
    return Measured(found.loss, found.logit, {"an even guess": even})


def mean_over_rows(
    logits: Float[Tensor, "row d_vocab"], tokens: Int[Tensor, "batch pos"], chosen: Bool[Tensor, "batch pos"]
) -> Measured:
    """Means over the chosen positions of each sequence, of which the logits are given, in the order of sequences and positions."""
    sequence, row = chosen.nonzero(as_tuple=True)
    its = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = tokens.to(its.device)[sequence, row + 1][:, None]
    logit = its.gather(-1, target)[:, 0]
    count = chosen.sum(1).to(its)

    def mean(values: Float[Tensor, " row"]) -> Float[Tensor, " batch"]:
        return torch.zeros_like(count).index_add_(0, sequence.to(its.device), values) / count

    return Measured(mean(its.logsumexp(-1) - logit), mean(logit - its.mean(-1)))
