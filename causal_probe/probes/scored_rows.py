"""The rows of attention that a template scores, batch by batch: those with an edge, and another key to tell it from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import describe
from causal_probe.hooks.record import token_batches
from causal_probe.probes.qk_terms import TermReader, Terms
from causal_probe.probes.templates import Template

__all__ = ["ScoredBatch", "contrast", "micro_batches", "scored_batches"]

#: As many sequences are taken apart at once as make so many numbers (128 MiB in single precision).
NUMBERS = 2**25


class ScoredBatch(NamedTuple):
    """One batch, a head's terms on it, and its scored rows.

    Attributes
    ----------
    terms
        The head's terms.
    targets, weights
        The result of :func:`contrast`.
    n_rows, used
        By sequence, the number of its scored rows, and whether there is any.
    """

    terms: Terms
    targets: Bool[Tensor, "_batch query key"]
    weights: Float[Tensor, "_batch query key"]
    n_rows: Int[Tensor, " _batch"]
    used: Bool[Tensor, " _batch"]


def scored_batches(reader: TermReader, batches: Iterable[Tensor], template: Template) -> Iterator[ScoredBatch]:
    """Take a head apart on each batch.

    Raises
    ------
    CausalProbeError
        At the end, if no row was scored.
    """
    scored = 0
    for batch in batches:
        terms = reader(batch)
        targets, weights = contrast(template, batch, terms.seen)
        n_rows = targets.any(-1).sum(-1)
        scored += int(n_rows.sum())
        yield ScoredBatch(terms, targets, weights, n_rows, n_rows > 0)
    if not scored:
        raise CausalProbeError(
            f"No row of these sequences has an edge of {template.name!r} and another visible key, so there is nothing to take apart. Give "
            "sequences in which the edges occur."
        )


def micro_batches(reader: TermReader, tokens: Any, batch_size: int | None) -> list[Int[Tensor, "batch pos"]]:
    """The sequences, on the model's device, in pieces that can be taken apart at once.

    Raises
    ------
    CausalProbeError
        If there are none, or they are not tokens of one length.
    """
    device = describe(reader.model)["device"] or "cpu"
    batches = [batch.to(device) for batch in token_batches(tokens, batch_size)]
    if not sum(map(len, batches)):
        raise CausalProbeError("There are no sequences. Give tokens [batch, pos], or batches of them.")
    if lengths := {batch.shape[1] for batch in batches} - {batches[0].shape[1]}:
        raise CausalProbeError(
            f"Sequences must be of one length; theirs are {sorted({batches[0].shape[1], *lengths})}."
        )
    if batch_size is not None:
        return batches
    size = max(1, NUMBERS // (4 * len(reader.sources) * batches[0].shape[1] * max(reader.d_head, reader.width)))
    return [piece for batch in batches for piece in torch.split(batch, size)]


def contrast(
    template: Template, tokens: Int[Tensor, "batch pos"], seen: Bool[Tensor, "batch query key"] | None = None
) -> tuple[Bool[Tensor, "batch query key"], Float[Tensor, "batch query key"]]:
    """The targets on the scored rows, and the weights with which a row's scores make "on an edge less on the others".

    A row is scored if it sees a target and a key that is none; by default it sees all of the past. The weights of a scored row sum to
    0, those of another are 0.

    >>> from causal_probe.probes import template
    >>> contrast(template("previous-token"), torch.tensor([[5, 6, 7]]))[1][0].tolist()
    [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [-0.5, 1.0, -0.5]]
    """
    targets = template(tokens)
    visible = torch.ones_like(targets).tril() if seen is None else seen.to(targets.device)
    targets, others = targets & visible, visible & ~targets
    scored = (targets.any(-1) & others.any(-1))[..., None]
    targets, others = targets & scored, others & scored
    weights = targets / targets.sum(-1, keepdim=True).clamp(min=1) - others / others.sum(-1, keepdim=True).clamp(min=1)
    return targets, weights
