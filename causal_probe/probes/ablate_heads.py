"""Heads ablated in one call: by how much does the loss rise without them?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import BatchSize, shown
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import zero_ablate
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe, undisturbed
from causal_probe.hooks.heads import find_head
from causal_probe.hooks.record import each_batch, micro_batches
from causal_probe.probes.ablation import Head, Laboratory
from causal_probe.probes.baselines import reference_tokens, split_off_references
from causal_probe.probes.measures import Measure, next_token
from causal_probe.probes.p_values import Estimate, estimates, t_interval
from causal_probe.results import Result, Table

__all__ = ["HeadAblation", "ablate_heads"]


@dataclass(frozen=True, eq=False, repr=False)
class HeadAblation(Result):
    """The result of :func:`ablate_heads`.

    Attributes
    ----------
    heads
        The heads, (layer, head), that were ablated together.
    loss, ablated
        The loss of each sequence in nats: of the model as it is, and without these heads.
    """

    KIND = "head ablation"
    WORKS = ("olsson2022",)
    DERIVED = ("effect", "interval")

    heads: tuple[Head, ...]
    loss: Float[np.ndarray, " sequence"]
    ablated: Float[np.ndarray, " sequence"]

    @property
    def effect(self) -> Estimate:
        """Mean rise of the loss in nats, paired by sequence, with its standard error and the one-sided p-value of its being above 0."""
        return estimates({"rise": self.ablated - self.loss}, above=0.0)["rise"]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the mean rise (Student's t)."""
        return t_interval(*self.effect[:2], len(self.loss))

    @property
    def names(self) -> str:
        """Such as ``"L1H0 and L1H2"``."""
        return " and ".join(f"L{layer}H{head}" for layer, head in self.heads)

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        instead = "its mean at each position" if self.settings["by"] == "mean" else "zero"
        return (
            f"In {self.provenance['model']} the output of {self.names} was replaced by {instead}, and the loss of each of "
            f"{len(self.loss)} sequences compared with that of the unmodified model (paired t-test; {self.measured_with})."
        )

    def table(self) -> Table:
        """The losses and their paired difference."""
        (low, high), effect = self.interval, self.effect
        return Table(
            f"{self.names} of {self.provenance['model']} ablated ({self.settings['by']}), {len(self.loss)} sequences",
            ("loss", "without", "rise", "stderr", "low", "high", "p_value"),
            [(float(self.loss.mean()), float(self.ablated.mean()), *effect[:2], low, high, effect.p_value)],
            ["rise: paired by sequence, in nats; low and high: its 95% interval; p: one-sided, of its being above 0"],
        )


@probe
def ablate_heads(
    model: HookedModel,
    tokens: Any,
    heads: Any,
    *,
    by: Literal["mean", "zero"] = "mean",
    measure: Measure | None = None,
    reference: Any = None,
    batch_size: BatchSize = None,
) -> HeadAblation:
    """Replace what heads read out of the stream (``hook_z``), all at once, and take the paired difference of the losses.

    One ablation is no proof of absence: later layers repair, and heads stand in for one another. :func:`~causal_probe.probes.verify` asks
    more, against other heads.

    Parameters
    ----------
    model
        Any model with hook points ``blocks.{layer}.attn.hook_z``. It is left as it was.
    tokens
        Tokens [batch, pos], or an iterable of such tensors, all of one length; two sequences or more are to be measured.
    heads
        A head, ``"L1H0"`` or ``(1, 0)``, or several in a list.
    by
        The replacement of a head's output: its ``"mean"`` over other sequences at each position, or ``"zero"``.
    measure
        The measure of the model's performance, ``measure(logits, batch) -> Measured``; by default the loss of the next token at all positions
        (:func:`~causal_probe.probes.next_token`).
    reference
        Sequences over which the means are taken, of the same length, as many or several times as many as ``tokens``: each measured sequence has its
        own, so that the standard error holds their noise, too. By default one in four of ``tokens`` is measured, and the others are the references.
    batch_size
        Sequences in a forward pass; by default as many as keep patterns and logits within 256 MiB.

    Raises
    ------
    CausalProbeError
        If there is no such head, one is named twice, there are fewer than two sequences, the heads can't be ablated, or a loss is not finite.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> from causal_probe.probes import next_token, repeated_tokens
    >>> model = DisentangledTransformer(d_vocab=12, n_positions=24)
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)     # each token looks one back,
    >>> _ = model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)        # then for itself before a token,
    >>> _ = model.output_block("L1H0.token").diagonal().fill_(9)                           # and says that token
    >>> tokens = repeated_tokens(model, n_sequences=32, period=10).tokens
    >>> found = ablate_heads(model, tokens, "L1H0", measure=next_token(range(10, 19)))       # in the second copy
    >>> found.effect.value > 1, found.effect.p_value < 0.001
    (True, True)
    """
    if by == "mean" and reference is None:
        tokens, reference = split_off_references(tokens)
    batches = [part for batch in each_batch(tokens) for part in (micro_batches(model, batch, batch_size) if isinstance(batch, Tensor) else [batch])]  # fmt: skip
    sizes = [len(getattr(batch, "tokens", batch)) for batch in batches]
    if (n := sum(sizes)) < 2:
        raise CausalProbeError(f"A standard error needs two sequences or more; there {'is one' if n else 'are none'}.")
    references = reference_tokens(batches if reference is None else reference, batches)
    with undisturbed(model):
        laboratory = Laboratory(
            model,
            next_token() if measure is None else measure,
            reference=references,
            n_sequences=n,
            example=batches[0][:2] if isinstance(batches[0], Tensor) else batches[0],
        )
        chosen = tuple(find_head(laboratory.baselines.heads, *each) for each in _named(heads))
        if len(set(chosen)) != len(chosen) or not chosen:
            raise CausalProbeError(f"Name one head or more, and none twice; found {heads!r}.")
        losses = []
        for batch, end, size in zip(batches, itertools.accumulate(sizes), sizes, strict=True):
            its = slice(end - size, end)
            edits = [
                zero_ablate(*each) if by == "zero" else laboratory.baselines.edit("mean", *each, its) for each in chosen
            ]
            losses.append((laboratory.run(batch).loss, laboratory.run(batch, edits).loss))
    clean, ablated = (torch.cat(each).double().cpu().numpy() for each in zip(*losses, strict=True))
    settings = {
        "by": by,
        "heads": [list(each) for each in chosen],
        "n_sequences": n,
        "references": len(references) * (by == "mean"),
    }
    return HeadAblation(chosen, clean, ablated, settings=settings, provenance=describe(model))


def _named(heads: Any) -> Iterable[tuple[Any, ...]]:
    """Each head as it was named: one alone, or those of a list."""
    if not isinstance(heads, (str, tuple, list)):
        raise CausalProbeError(f"Heads are named such as 'L1H0' or (1, 0), several in a list; found {shown(heads)}.")
    pair = isinstance(heads, (tuple, list)) and len(heads) == 2 and all(isinstance(each, int) for each in heads)
    return [(heads,)] if isinstance(heads, str) or pair else [(each,) for each in heads]
