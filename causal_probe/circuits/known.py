"""A model whose circuit is known: every edge from what writes into the stream to what reads it.

Sources are named as everywhere: ``embed``, ``pos_embed``, ``L0H1`` (layer 0, head 1), ``L0.mlp``. Receivers are ``L1H0.q``, ``L1H0.k``, ``L1H0.v``
(queries, keys, values of a head), ``L1.mlp`` and ``logits``. An edge is in a circuit *under a contrast*: what the source wrote there is replaced, and the
output changes. What is the same in what is replaced and in what replaces it is in no circuit, so the truth names the contrasts of each edge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import networkx as nx
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.probes.qk_stream import layer_of

__all__ = ["CONTRASTS", "MOST_SEQUENCES", "Edge", "KnownCircuit", "order_of", "receivers_of", "sources_of"]

#: By what the part of a source is replaced: that of another (sequence, position); its mean over sequences and positions; its mean over sequences at each
#: position; zero. In the first two, position 0 is neither in the pool nor replaced.
CONTRASTS = ("resample", "mean", "mean-by-position", "zero")

#: A circuit with more sequences does not list them all.
MOST_SEQUENCES = 20_000

#: A source and a receiver.
Edge: TypeAlias = tuple[str, str]


@dataclass(frozen=True, eq=False, repr=False)
class KnownCircuit:
    """A model, the edges of its circuit, and what it is good at.

    Attributes
    ----------
    name
        A short name, kebab-case.
    model
        A model with hook points, of TransformerLens' names.
    truth
        The edges (source, receiver). Each has ``kind``: ``"token"`` (what passes depends on the tokens) or ``"positional"`` (on the position
        alone) or ``"constant"``; ``contrast``: the :data:`CONTRASTS` under which it has an effect; and, where edges stand in for each other, ``redundant_with``:
        the edges without which its effect is seen (an OR gate), else ``()``. The graph's attributes: ``gates`` maps "or" and "and" to pairs of
        the receiver in which such a gate is and the sources that meet there; ``exact`` names the contrasts under which all other edges have no effect
        whatever. In a model with norms that is "resample" alone: a part of another length changes the scale of all else, and so every edge has an effect.
    constant
        Edges that carry the same at all positions but the first of all sequences, so that the truth leaves them out under every contrast but zero:
        those of a BOS token and of constants.
    sample
        ``(n, generator) -> tokens [n, pos]``.
    metric
        ``(logits, tokens) -> [n]``, signed: higher is better.
    description
        What it computes, and how.
    every
        All sequences that can be drawn, [n, pos], where they are no more than :data:`MOST_SEQUENCES`; else None.
    """

    name: str
    model: Any
    truth: nx.DiGraph
    constant: tuple[Edge, ...]
    sample: Callable[[int, torch.Generator], Int[Tensor, "n pos"]]
    metric: Callable[[Float[Tensor, "n pos d_out"], Int[Tensor, "n pos"]], Float[Tensor, " n"]]
    description: str
    every: Callable[[], Int[Tensor, "n pos"]] | None = None

    def edges(self, contrast: str = "resample") -> list[Edge]:
        """The edges that have an effect under a contrast, in the order of the model.

        Raises
        ------
        CausalProbeError
            If there is no such contrast.
        """
        if contrast not in CONTRASTS:
            raise CausalProbeError(f"Unknown contrast {contrast!r}; choose from {', '.join(CONTRASTS)}.")
        found = [(s, r) for s, r, contrasts in self.truth.edges(data="contrast") if contrast in contrasts]
        place = {edge: number for number, edge in enumerate(self.candidates())}
        return sorted(found, key=lambda edge: place[edge])

    def candidates(self) -> list[Edge]:
        """Every edge that the model has room for: each source into each receiver behind it."""
        sources = sources_of(self.model)
        return [
            (source, receiver)
            for receiver in receivers_of(self.model)
            for source in sources
            if order_of(source) < order_of(receiver)
        ]

    def __repr__(self) -> str:
        n_edges = self.truth.number_of_edges()
        return f"KnownCircuit({self.name!r}, {n_edges} of {len(self.candidates())} edges)"


def sources_of(model: Any) -> list[str]:
    """What writes into a standard stream: the embeddings, every head, every MLP.

    >>> from causal_probe.models.standard import StandardTransformer
    >>> sources_of(StandardTransformer(3, 4, d_model=2, n_layers=1, n_heads=2, d_head=2, d_mlp=2))
    ['embed', 'pos_embed', 'L0H0', 'L0H1', 'L0.mlp']
    """
    found = ["embed", "pos_embed"]
    for layer in range(model.cfg.n_layers):
        found += [f"L{layer}H{head}" for head in range(model.cfg.n_heads)]
        found += [] if model.cfg.attn_only else [f"L{layer}.mlp"]
    return found


def receivers_of(model: Any) -> list[str]:
    """What reads a standard stream: queries, keys and values of every head, every MLP, and the logits."""
    found = []
    for layer in range(model.cfg.n_layers):
        found += [f"L{layer}H{head}.{side}" for head in range(model.cfg.n_heads) for side in "qkv"]
        found += [] if model.cfg.attn_only else [f"L{layer}.mlp"]
    return [*found, "logits"]


def order_of(name: str) -> tuple[int, int]:
    """The place of a source or a receiver in a forward pass: a source reaches a receiver if its place is before.

    >>> order_of("L0H1") < order_of("L0.mlp") < order_of("L1H0.q"), order_of("L0H1") < order_of("L0H0.v")
    (True, False)
    """
    if name in ("embed", "pos_embed", "bias"):
        return (-1, 0)
    if name == "logits":
        return (10**9, 0)
    return (layer_of(name), 1 if name.endswith(".mlp") else 0)
