"""Does a head turn a member of an order into the next one, or copy it? Read from its weights, on the members as the first layer leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causal_probe.arguments import Count
from causal_probe.circuits.partial import Layers
from causal_probe.circuits.prompt_tasks import ordered_words
from causal_probe.circuits.prompts import token_ids
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe, undisturbed
from causal_probe.results import Result, Table

__all__ = ["NextScores", "next_scores"]

#: Rows of the table.
LISTED = 20


@dataclass(frozen=True, eq=False, repr=False)
class NextScores(Result):
    """The result of :func:`next_scores`; shares of the members, by head, 0 to 1.

    Attributes
    ----------
    heads
        ``(layer, head)``.
    next
        By head, the share of the members (without the last) whose successor is among the ``top`` tokens that the head writes for it.
    copy
        By head, the share of the members that are themselves among the tokens that the head writes for them.
    other
        By head, how often a member, another than the one itself and the next, is there: the score of a head that writes any member for any.
    words
        The members, as texts.
    """

    KIND = "next scores"
    WORKS = ("lan2024", "gould2024")

    heads: tuple[tuple[int, int], ...]
    next: Float[np.ndarray, " head"]
    copy: Float[np.ndarray, " head"]
    other: Float[np.ndarray, " head"]
    words: tuple[str, ...]

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Next and copy scores of all {len(self.heads)} heads of {self.provenance['model']}: each of {len(self.words)} ordered words was taken after the first layer through the head's "
            f"values and output and to the logits; a score is the share of words whose successor (or which itself) is among the {self.settings['top']} largest ({self.measured_with})."
        )

    def listed(self, n: int = LISTED) -> list[tuple[str, float, float, float]]:
        """The heads of the largest next scores (of equal ones, of the largest copy scores): name, next, copy, other."""
        order = np.lexsort((-self.copy, -self.next))[:n]
        return [
            (f"L{self.heads[i][0]}H{self.heads[i][1]}", float(self.next[i]), float(self.copy[i]), float(self.other[i]))
            for i in order
        ]

    def table(self) -> Table:
        """One row per head, the largest next score first."""
        return Table(
            f"NextScores of {self.provenance['model']}: {len(self.heads)} heads, {len(self.words)} words",
            ("head", "next", "copy", "other"),
            self.listed(),
            (
                f"shares of words among the {self.settings['top']} largest logits; other: of another word than these, what a head reaches that writes any",
            ),
        )


@probe
def next_scores(model: HookedModel, words: str | Sequence[str], *, top: Count = 5, bos: str = "auto") -> NextScores:
    """The share of ordered words whose successor a head writes, and of those that it copies.

    A word's vector behind the first layer, alone after what texts of this model start with, goes through the norm of the head's layer, its values and its output, the last norm and the
    unembedding, whatever the head attends to. Nothing here is an estimate: the words are all that is asked for, and the weights alone decide.

    Parameters
    ----------
    model
        A causal model with a tokenizer, whose sources add to one stream.
    words
        ``"numerals"``, ``"number-words"``, ``"months"``, ``"weekdays"`` or ``"letters"``; or texts of your own in their order, one token each: ``" one"``, ``" two"``, ...
    top
        So many of the largest logits count.
    bos
        Whether a BOS token comes first: ``"yes"``, ``"no"``, or ``"auto"``, what the tokenizer does by itself.

    Raises
    ------
    CausalProbeError
        If there are fewer than 3 words, one is no single token or occurs twice, or the model can't be taken apart.

    References
    ----------
    Lan, Torr & Barez, "Towards Interpretable Sequence Continuation", 2024 (from the vector behind the first layer, top 5); Gould et al., "Successor Heads", 2024.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> next_scores(DisentangledTransformer(d_vocab=3, n_positions=4), [" a", " b", " c"])
    Traceback (most recent call last):
    causal_probe.errors.CausalProbeError: Words are text, and the model has no tokenizer.
    """
    if getattr(model, "tokenizer", None) is None:
        raise CausalProbeError("Words are text, and the model has no tokenizer.")
    texts = ordered_words(model, words) if isinstance(words, str) else list(words)
    if len(texts) < 3:
        raise CausalProbeError(f"{len(texts)} words make no order: give 3 at least.")
    start = len(token_ids(model, "", bos))
    rows = [token_ids(model, text, bos) for text in texts]
    if long := [text for text, row in zip(texts, rows, strict=True) if len(row) != start + 1]:
        raise CausalProbeError(
            f"{long[0]!r} is {len(rows[texts.index(long[0])]) - start} tokens. Give words of one token each, with the space that they begin with."
        )
    tokens = torch.tensor(rows)
    ids = tokens[:, -1]
    if len(set(ids.tolist())) < len(ids):
        raise CausalProbeError("A word occurs twice, so it has no one successor.")
    with undisturbed(model):
        tokens = tokens.to(describe(model)["device"] or "cpu")
        layers = Layers(model, tokens)
        heads, found = _written(layers, tokens, ids, top)
    n = len(texts)
    same, after = np.eye(n, dtype=bool), np.eye(n, k=1, dtype=bool)
    rest = ~(same | after)
    return NextScores(
        heads=tuple(heads),
        next=found[:, after].mean(1),
        copy=found[:, same].mean(1),
        other=found[:, rest].mean(1),
        words=tuple(texts),
        settings={"words": words if isinstance(words, str) else "own", "top": top, "bos": bos},
        provenance=describe(model),
    )


def _written(
    layers: Layers, tokens: Tensor, ids: Tensor, top: int
) -> tuple[list[tuple[int, int]], Bool[np.ndarray, "head word word"]]:
    """For each head and word, which words are among the largest logits of what the head writes for it."""
    stream = layers.clean(tokens).streams[1]
    heads: list[tuple[int, int]] = []
    found: list[np.ndarray] = []
    for layer in layers.carriers:
        values = layers.sides_of(tokens, layer, stream)["v"][:, -1]
        count, groups = layers.heads[layer], layers.groups[layer]["v"]
        values = values.reshape(len(tokens), groups, -1).repeat_interleave(count // groups, 1)
        written = torch.einsum("whd,hdm->hwm", values.to(layers.W_O[layer]), layers.W_O[layer])
        # Norm and unembedding see one position at a time, so the last one is enough.
        rows = tokens[:, -1:].repeat(count, 1)
        logits = layers.to_logits(rows, layers.n, written.reshape(len(rows), 1, -1).to(stream))[:, -1].float()
        logits = logits.reshape(count, len(tokens), -1)
        if not bool(logits.isfinite().all()):
            raise CausalProbeError(
                f"The logits of what layer {layer}'s heads write are no numbers. Check the model's weights for NaN."
            )
        largest = logits.topk(min(top, logits.shape[-1])).indices
        heads += [(layer, head) for head in range(count)]
        found += [*(largest[..., None] == ids.to(largest)).any(2).cpu().numpy()]
    return heads, np.stack(found)
