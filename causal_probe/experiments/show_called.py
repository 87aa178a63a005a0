"""The attention of heads on one sequence, beside what a scan said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe import viz
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.hooks.check import HookedModel
from causal_probe.hooks.values import read_values
from causal_probe.probes import repeated_tokens
from causal_probe.probes.evidence import Evidence
from causal_probe.probes.head_scores import HeadScores
from causal_probe.viz.widget import Widget

__all__ = ["attention_beside_scores", "patterns_of", "show_called", "words_of"]


def show_called(
    scores: HeadScores, model: HookedModel, tokens: Any = None, *, template: str | None = None, max_heads: int = 24
) -> Widget:
    """The heads that a template describes, in circuitsvis: their attention on one sequence, with their scores and edges beside it.

    Parameters
    ----------
    scores
        The result of :func:`causal_probe.probes.scan` on this model.
    model
        The model.
    tokens
        A sequence, [pos] or [1, pos]; by default one as the scan's first: repeated random tokens.
    template
        Only the heads that this template describes; by default those of every template.
    max_heads
        So many heads are shown, those of the largest excess.

    Raises
    ------
    CausalProbeError
        If no head is called, or ``tokens`` are more than one sequence.

    Examples
    --------
    >>> from causal_probe import models, probes
    >>> model = models.DisentangledTransformer(d_vocab=12, n_positions=24)
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    >>> scores = probes.scan(model, templates="previous-token", n_sequences=4, period=10)
    >>> show_called(scores, model)
    <AttentionHeads: 1 head, 20 tokens; a notebook shows it, local_src is its HTML>
    """
    called = sorted(scores.called(template), key=lambda found: -(found.excess or 0))
    heads = list(dict.fromkeys((found.layer, found.head) for found in called))[:max_heads]
    if not heads:
        which = "any of its templates" if template is None else repr(template)
        raise CausalProbeError(
            f"No head is called: none has an excess surely above one half for {which}. See scores.of(template) for all heads."
        )
    if tokens is None:
        made: Mapping[str, Any] = next(
            (each for each in scores.settings.get("tokens", ()) if each["kind"] == "repeated"), {}
        )
        asked = {name: made[name] for name in ("period", "bos", "seed") if name in made}
        tokens = repeated_tokens(model, n_sequences=1, **asked).tokens
    one = torch.as_tensor(tokens)
    if one.ndim == 2 and len(one) == 1:
        one = one[0]
    if one.ndim != 1:
        raise CausalProbeError(f"One sequence is shown: tokens of shape [pos] or [1, pos]; found {list(one.shape)}.")
    return attention_beside_scores(scores, heads, words_of(model, one), patterns_of(model, one, heads))


def attention_beside_scores(
    scores: HeadScores, heads: Sequence[tuple[int, int]], words: Sequence[str], patterns: Float[np.ndarray, "_head query key"]
) -> Widget:  # fmt: skip
    """The heads' patterns on a sequence; beside them each head's excess by template, and the edges that are read there."""
    read = Evidence.from_arrays([patterns], sink="root")
    excess = {
        template: [float(scores.heatmap(template)[layer][head]) for layer, head in heads]
        for template in scores.names
        if template not in scores.undefined
    }
    return viz.attention(
        words,
        patterns,
        head_names=[f"L{layer}H{head}" for layer, head in heads],
        graphs=[read.graph(0, place) for place in range(len(heads))],
        scores=excess,
    )


def patterns_of(
    model: HookedModel, tokens: Int[Tensor, " pos"], heads: Sequence[tuple[int, int]]
) -> Float[np.ndarray, "_head query key"]:
    """The attention of some heads on one sequence."""
    names = [attention_hook(layer, "pattern") for layer, _ in heads]
    found = read_values(model, tokens[None], names, n_layers=1 + max(layer for layer, _ in heads))
    return np.stack([found[name][0, head].float().cpu().numpy() for name, (_, head) in zip(names, heads, strict=True)])


def words_of(model: HookedModel, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Each token as text; its id where there is no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    ids = [int(token) for token in tokens]
    return tuple(str(token) if tokenizer is None else tokenizer.decode([token]) for token in ids)
