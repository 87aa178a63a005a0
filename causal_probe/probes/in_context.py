"""What a model gains from its context: the loss late in a text against early, and on the second copy of a text against the first.

The loss of the token at position i is that of predicting it from all tokens before it, -log p(token i | tokens 0..i-1), in nats;
position 0 has none. Numbers are means over sequences with standard errors over sequences; differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from causal_probe.arguments import BatchSize
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe, logits_of, require_hooks, undisturbed
from causal_probe.hooks.moments import Moments
from causal_probe.hooks.record import micro_batches
from causal_probe.results import Result, Table, merge_provenance
from causal_probe.results.lazy import pandas as pd

__all__ = ["CopyLosses", "InContextScore", "copy_losses", "in_context_score", "token_losses"]

Same = TypeVar("Same", bound="_Losses")


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """The loss of each token but the first, in nats: entry i is the loss of the token at position i + 1.

    >>> logits = torch.zeros(1, 3, 4)
    >>> logits[0, 1, 2] = 30.0
    >>> token_losses(logits, torch.tensor([[1, 0, 2]]))
    tensor([[1.3863, -0.0000]])
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    each = [  # sequence by sequence: a copy of all logits in another dtype or order is what can't be afforded
        cross_entropy(logit[:-1].to(exact), token[1:].to(logit.device), reduction="none")
        for logit, token in zip(logits, tokens, strict=True)
    ]
    return torch.stack(each)


# ------------------------------------------------------------------------------------------------------- late against early


class _Losses(Result):
    """Results whose fields are moments over sequences, and where these were taken."""

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return next(its.count for its in vars(self).values() if isinstance(its, Moments))

    def merge(self: Same, other: Same) -> Same:
        """The same over the sequences of both.

        Raises
        ------
        CausalProbeError
            If they were taken at other positions, or the sequences differ in length.
        """
        mine, theirs = (
            {
                field.name: getattr(one, field.name)
                for field in fields(one)
                if field.name not in ("settings", "provenance")
            }
            for one in (self, other)
        )
        moments: dict[str, Any] = {
            name: its.merge(theirs[name]) for name, its in mine.items() if isinstance(its, Moments)
        }
        if differing := [name for name in mine.keys() - moments.keys() if mine[name] != theirs[name]]:
            raise CausalProbeError(f"Losses that differ in {' and '.join(sorted(differing))} can't be merged.")
        return replace(self, **moments, provenance=merge_provenance(self.provenance, other.provenance))

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no standard error."""
        return {"stderr": "a standard error needs two sequences or more"} if self.n_sequences < 2 else {}


@dataclass(frozen=True, eq=False, repr=False)
class InContextScore(_Losses):
    """The result of :func:`in_context_score`.

    Attributes
    ----------
    early, late
        Positions whose losses are compared.
    difference
        :class:`~causal_probe.hooks.moments.Moments` over sequences of the loss at ``late`` minus that at ``early``.
    losses
        Moments over sequences of the loss at positions 1, 2, ...
    """

    KIND = "in-context score"
    WORKS = ("olsson2022",)
    DERIVED = ("score", "stderr", "n_sequences")

    early: int
    late: int
    difference: Moments
    losses: Moments

    @property
    def score(self) -> float:
        """Mean loss at ``late`` minus mean loss at ``early``, in nats; negative where context helps, 0 by chance."""
        return float(self.difference.mean)

    @property
    def stderr(self) -> float | None:
        """Standard error of ``score`` over sequences, paired. None for one sequence."""
        return None if self.difference.stderr is None else float(self.difference.stderr)

    def to_pandas(self) -> pd.DataFrame:
        """One row per position from 1: position, loss, stderr (NaN for one sequence)."""
        return _table(self.losses, first=1)

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The in-context-learning score of {self.provenance['model']} is its loss on the token at position {self.late} minus that at "
            f"position {self.early}, averaged over {self.n_sequences} sequences ({self.measured_with})."
        )

    def table(self) -> Table:
        """The score."""
        return Table(
            f"InContextScore of {self.provenance['model']} over {self.n_sequences:,} sequences",
            ("early position", "late position", "late minus early (nats)", "stderr"),
            [(self.early, self.late, self.score, self.stderr)],
        )


@probe
def in_context_score(
    model: HookedModel, tokens: Any, *, early: int = 50, late: int = 500, batch_size: BatchSize = None
) -> InContextScore:
    """How much better a model predicts late in a text than early: its loss at one position minus that at another.

    Parameters
    ----------
    model
        A TransformerLens model, or any HookedRootModule that returns logits. It is run in evaluation mode without gradients, with
        the caller's own hooks, and is left as it was.
    tokens
        Tokens [batch, pos] of natural texts, or an iterable of such tensors, all of one length.
    early, late
        Positions, counted from 0: 0 < early < late < pos. Olsson et al. compare the 500th token with the 50th.
    batch_size
        Sequences in a forward pass; by default as many as keep patterns and logits within 256 MiB.

    Raises
    ------
    CausalProbeError
        If the positions don't fit the sequences, there are none, or a loss is not finite.

    References
    ----------
    Olsson et al., "In-context Learning and Induction Heads", Transformer Circuits Thread, 2022.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=9)      # all weights zero: every loss is log 3
    >>> in_context_score(model, torch.zeros(4, 9, dtype=torch.long), early=2, late=8)
    InContextScore of disentangled-transformer over 4 sequences
      early position  late position  late minus early (nats)  stderr
                   2              8                        0       0
    """

    def reduce(losses: Float[Tensor, "batch pos"], tokens: Int[Tensor, "batch _"]) -> tuple[Moments, ...]:
        pos = losses.shape[1] + 1
        if not 0 < early < late < pos:
            raise CausalProbeError(
                f"The loss at position {late} was to be compared with that at {early}; in sequences of {pos} tokens they must be "
                f"0 < early < late < {pos}."
            )
        return Moments.of(losses[:, late - 1] - losses[:, early - 1]), Moments.of(losses)

    difference, losses = _over_batches(model, tokens, reduce, batch_size)
    return InContextScore(early, late, difference, losses, provenance=describe(model))


# -------------------------------------------------------------------------------------------------------- first and second copy


@dataclass(frozen=True, eq=False, repr=False)
class CopyLosses(_Losses):
    """The result of :func:`copy_losses`.

    Attributes
    ----------
    period
        Tokens in a copy.
    start
        Position of the first copy's first token.
    first_by_token, second_by_token
        :class:`~causal_probe.hooks.moments.Moments` over sequences of the loss of tokens 1, ..., period - 1 of a copy, counted from 0.
    first_mean, second_mean, gain_mean
        Moments over sequences of the mean over these tokens: on the first copy, on the second, and of the difference.
    """

    KIND = "copy losses"
    WORKS = ("olsson2022",)
    DERIVED = ("first", "first_stderr", "second", "second_stderr", "gain", "gain_stderr", "n_sequences")

    period: int
    start: int
    first_by_token: Moments
    second_by_token: Moments
    first_mean: Moments
    second_mean: Moments
    gain_mean: Moments

    @property
    def first(self) -> float:
        """Mean loss on the first copy, in nats."""
        return float(self.first_mean.mean)

    @property
    def second(self) -> float:
        """Mean loss on the second copy, in nats. By chance it is ``first``."""
        return float(self.second_mean.mean)

    @property
    def gain(self) -> float:
        """``first`` minus ``second``: what having seen the text is worth, in nats; 0 by chance."""
        return float(self.gain_mean.mean)

    @property
    def first_stderr(self) -> float | None:
        """Standard error of ``first`` over sequences. None for one sequence."""
        return None if self.first_mean.stderr is None else float(self.first_mean.stderr)

    @property
    def second_stderr(self) -> float | None:
        """Standard error of ``second`` over sequences. None for one sequence."""
        return None if self.second_mean.stderr is None else float(self.second_mean.stderr)

    @property
    def gain_stderr(self) -> float | None:
        """Standard error of ``gain`` over sequences, paired. None for one sequence."""
        return None if self.gain_mean.stderr is None else float(self.gain_mean.stderr)

    def to_pandas(self) -> pd.DataFrame:
        """One row per copy and token: copy (1 or 2), token (from 1), loss, stderr (NaN for one sequence)."""
        copies = [_table(self.first_by_token, first=1), _table(self.second_by_token, first=1)]
        for copy, table in enumerate(copies, start=1):
            table.insert(0, "copy", copy)
        return pd.concat(copies, ignore_index=True).rename(columns={"position": "token"})

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The loss of {self.provenance['model']} on repeated sequences was averaged over the tokens of each copy but its first "
            f"({self.period - 1} tokens, {self.n_sequences} sequences; {self.measured_with})."
        )

    def table(self) -> Table:
        """The loss on each copy, and the gain."""
        return Table(
            f"CopyLosses of {self.provenance['model']} over {self.n_sequences:,} sequences of period {self.period}",
            ("copy", "loss (nats a token)", "stderr"),
            [
                ("first", self.first, self.first_stderr),
                ("second", self.second, self.second_stderr),
                ("first minus second", self.gain, self.gain_stderr),
            ],
        )


@probe
def copy_losses(
    model: HookedModel, tokens: Any, *, period: int, start: int | None = None, batch_size: BatchSize = None
) -> CopyLosses:
    """The loss on the first and on the second copy of a repeated text, token by token.

    The first token of each copy is left out: nothing tells that a copy begins. So both means are over the same ``period`` - 1
    tokens.

    Parameters
    ----------
    model, batch_size
        As for :func:`in_context_score`.
    tokens
        Tokens [batch, pos], or an iterable of such tensors, all of one length, whose tokens from ``start`` on repeat after
        ``period``: ``repeated_tokens(model).tokens`` of :func:`~causal_probe.probes.repeated_tokens`.
    period
        Tokens in a copy, >= 2.
    start
        Position of the first copy's first token; by default what two copies at the end of the sequences leave: 1 after a BOS.

    Raises
    ------
    CausalProbeError
        If two copies don't fit, the tokens don't repeat, there are no sequences, or a loss is not finite.

    References
    ----------
    Olsson et al., "In-context Learning and Induction Heads", Transformer Circuits Thread, 2022.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=6)
    >>> for i in range(1, 6):                                          # an ideal induction circuit
    ...     model.block(0, 0, query="position", key="position")[i, i - 1] = 40.0
    >>> _ = model.block(1, 0, query="token", key="L0H0.token").fill_diagonal_(40.0)
    >>> _ = model.block(1, 0, query="token", key="position")[:, 0].fill_(-80.0)    # nothing comes before position 0
    >>> _ = model.output_block("L1H0.token").fill_diagonal_(40.0)
    >>> found = copy_losses(model, torch.tensor([[0, 1, 2, 0, 1, 2], [2, 0, 1, 2, 0, 1]]), period=3)
    >>> round(found.first, 1), round(found.second, 4)
    (40.0, 0.0)
    """
    begin = -1

    def reduce(losses: Float[Tensor, "batch pos"], tokens: Int[Tensor, "batch _"]) -> tuple[Moments, ...]:
        nonlocal begin
        begin = tokens.shape[1] - 2 * period if start is None else start
        end = begin + 2 * period
        if period < 2 or begin < 0 or end > tokens.shape[1]:
            raise CausalProbeError(
                f"Two copies of {period} tokens from position {begin} don't fit into sequences of {tokens.shape[1]}; a copy has "
                "two tokens at least."
            )
        if not torch.equal(tokens[:, begin : begin + period], tokens[:, begin + period : end]):
            raise CausalProbeError(
                f"The tokens from position {begin} on don't repeat after {period}. Give period and start as they were made."
            )
        # The loss of the token at position i is losses[:, i - 1].
        first, second = losses[:, begin : begin + period - 1], losses[:, begin + period : end - 1]
        means = first.mean(1), second.mean(1), (first - second).mean(1)
        return Moments.of(first), Moments.of(second), *(Moments.of(mean) for mean in means)

    first_by_token, second_by_token, first, second, gain = _over_batches(model, tokens, reduce, batch_size)
    return CopyLosses(period, begin, first_by_token, second_by_token, first, second, gain, provenance=describe(model))


# --------------------------------------------------------------------------------------------------------------- helpers


def _over_batches(
    model: HookedModel, batches: Any, reduce: Callable[[Tensor, Tensor], tuple[Moments, ...]], batch_size: int | None
) -> tuple[Moments, ...]:
    """The moments that ``reduce`` makes of each micro-batch's losses, merged."""
    require_hooks(model, [])
    total: tuple[Moments, ...] | None = None
    with undisturbed(model):
        for tokens in micro_batches(model, batches, batch_size):
            losses = token_losses(logits_of(model(tokens), tokens), tokens)
            if not losses.isfinite().all():
                raise CausalProbeError(
                    "A loss is not finite: the model gives a token no probability, or its weights hold NaN."
                )
            new = reduce(losses, tokens)
            total = new if total is None else tuple(one.merge(other) for one, other in zip(total, new, strict=True))
    if total is None:
        raise CausalProbeError("There are no sequences to measure the loss on.")
    return total


def _table(losses: Moments, *, first: int) -> pd.DataFrame:
    mean = losses.mean.cpu().numpy()
    stderr = np.full_like(mean, np.nan) if losses.stderr is None else losses.stderr.cpu().numpy()
    return pd.DataFrame({"position": np.arange(first, first + len(mean)), "loss": mean, "stderr": stderr})
