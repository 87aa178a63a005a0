"""Edges and their ablation: one source's part of one receiver's input is replaced, and everything behind is computed anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.circuits.contrasts import Contrast
from causal_probe.circuits.known import Edge
from causal_probe.circuits.partial import SIDES, Clean, Layers
from causal_probe.circuits.prompts import Score
from causal_probe.hooks import attention_hook
from causal_probe.probes.qk_stream import StreamParts, layer_of

__all__ = ["Interventions", "Receiver", "edges_of", "placed", "receivers"]

#: So many tokens are run at once.
TOKENS = 6_000


class Receiver:
    """What reads the stream: a head's queries, a group's keys or values, an MLP, or the logits.

    Attributes
    ----------
    name
        ``L1H0.q``, ``L1.mlp``, ``logits``; keys and values that several heads share have the name of the first of them.
    layer, side, number
        The layer (that behind the last for logits); ``"q"``, ``"k"``, ``"v"``, ``"mlp"`` or ``"logits"``; the head's or group's number.
    """

    def __init__(self, name: str, layer: int, side: str, number: int = 0) -> None:
        self.name, self.layer, self.side, self.number = name, layer, side, number


def receivers(layers: Layers) -> dict[str, Receiver]:
    """All receivers of a model, in the order in which they read."""
    found = []
    for layer, count in enumerate(layers.heads):
        for side in SIDES:
            if count and side in layers.attends[layer]:
                groups = layers.groups[layer][side]
                found += [Receiver(f"L{layer}H{n * count // groups}.{side}", layer, side, n) for n in range(groups)]
        if layers.mlps[layer]:
            found.append(Receiver(f"L{layer}.mlp", layer, "mlp"))
    return {each.name: each for each in [*found, Receiver("logits", layers.n, "logits")]}


def placed(name: str) -> tuple[str, int | None]:
    """A source or receiver, and the position where it is meant, counted from 0; None for all.

    >>> placed("L1H0.k@5"), placed("embed")
    (('L1H0.k', 5), ('embed', None))
    """
    name, _, position = name.partition("@")
    return name, int(position) if position else None


def reaches(layers: Layers, source: str, receiver: Receiver) -> bool:
    """Whether a source writes before a receiver reads."""
    if source in ("embed", "pos_embed"):
        return True
    layer = layer_of(source)
    same = layer == receiver.layer and receiver.side == "mlp" and not source.endswith(".mlp") and layers.in_turn[layer]
    return layer < receiver.layer or same


def edges_of(layers: Layers, read: Mapping[str, Receiver]) -> list[Edge]:
    """All edges, receiver by receiver."""
    return [(source, name) for name, each in read.items() for source in layers.sources if reaches(layers, source, each)]


#: A part of a receiver's input: a source, at a position or all, added or taken back.
Term: TypeAlias = tuple[str, int | None, int]


class Interventions:
    """A model on some prompts, with edges ablated, at all positions or at one (``("L0H1@5", "L1H0.k@5")``).

    Attributes
    ----------
    clean
        The unedited run.
    before
        The metric there, by prompt.
    """

    def __init__(
        self, layers: Layers, clean: Clean, contrast: Contrast, score: Score, rows: Int[Tensor, " row"]
    ) -> None:
        self.layers, self.clean, self.contrast, self.score, self.rows = layers, clean, contrast, score, rows
        self.read = receivers(layers)
        self.before = self._scored(clean.logits)

    def _scored(self, logits: Tensor) -> Float[Tensor, " row"]:
        return self.score(logits, self.rows.repeat(len(logits) // len(self.rows))).double()

    # ------------------------------------------------------------------------------------------------------- edge by edge

    def effects(self, edges: Sequence[Edge], progress: Callable[[int], Any] | None = None) -> Float[Tensor, "edge row"]:
        """By how much the metric falls when each edge is ablated alone, by prompt.

        Parameters
        ----------
        progress
            Is told how many edges are done, each time.
        """
        found: dict[Edge, Tensor] = {}
        for (layer, side), group in self._grouped(edges).items():
            size = max(1, TOKENS // self.clean.tokens.numel())
            for at in range(0, len(group), size):
                some = group[at : at + size]
                after = self._ablated(layer, side, some).reshape(len(some), -1)
                found |= dict(zip(some, self.before - after, strict=True))
                if progress is not None:
                    progress(len(some))
        return torch.stack([found[edge] for edge in edges]) if edges else self.before.new_zeros(0, len(self.before))

    def _grouped(self, edges: Sequence[Edge]) -> dict[tuple[int, str], list[Edge]]:
        found: dict[tuple[int, str], list[Edge]] = defaultdict(list)
        for edge in edges:
            receiver = self.read[placed(edge[1])[0]]
            found[receiver.layer, receiver.side].append(edge)
        return found

    def _ablated(self, layer: int, side: str, edges: Sequence[Edge]) -> Float[Tensor, " rows"]:
        start = torch.zeros_like(self.clean.streams[layer])
        changes = [_sum([_term(source)], self.contrast.delta, start) for source, _ in edges]
        return self.changed(layer, side, [receiver for _, receiver in edges], changes)

    def changed(
        self, layer: int, side: str, receivers: Sequence[str], changes: Sequence[Float[Tensor, "row pos d_model"]]
    ) -> Float[Tensor, " rows"]:
        """The metric when something is added to the input of one receiver, everything behind computed anew; one after another, by row.

        Parameters
        ----------
        receivers
            Of one layer and side.
        changes
            What is added to the input of each.
        """
        n, (tokens, stream) = len(receivers), (self.clean.tokens, self.clean.streams[layer])
        change = torch.cat([*changes])
        tokens, stream = tokens.repeat(n, 1), stream.repeat(n, 1, 1)
        if side == "logits":
            return self._scored(self.layers.to_logits(tokens, layer, stream + change))
        if side == "mlp":
            z = self._z(layer, n)
            behind = self.layers.behind_mlp(tokens, layer, stream + change, z)
            return self._scored(self.layers.to_logits(tokens, layer + 1, behind - change))
        new = self.layers.sides_of(tokens, layer, stream + change)[side]
        rows = len(self.clean.tokens)
        puts = [
            (side, self.read[placed(receiver)[0]].number, new, slice(at * rows, (at + 1) * rows))
            for at, receiver in enumerate(receivers)
        ]
        return self._scored(self.layers.to_logits(tokens, layer, stream, self.layers.put(layer, puts)))

    def _z(self, layer: int, n: int) -> Tensor | None:
        z = self.clean.z.get(layer)
        return None if z is None else z.repeat(n, *[1] * (z.ndim - 1))

    # -------------------------------------------------------------------------------------------------- many edges at once

    def without(self, cut: Collection[Edge], but: Collection[Edge] = ()) -> Float[Tensor, " row"]:
        """The metric when edges are ablated together: each receiver gets the replacements of its cut edges, and what its other sources write in this run.

        Parameters
        ----------
        but
            Edges, or positions of edges, of ``cut`` that are left as they are.
        """
        layers, tokens = self.layers, self.clean.tokens
        by_receiver: dict[str, set[Term]] = defaultdict(set)
        whole, spared = set(cut), set(but)
        # A whole edge is left out; taking its sum back would round.
        for edges, sign in ((whole - spared, 1), (spared - whole, -1)):
            for source, receiver in edges:
                by_receiver[placed(receiver)[0]].add(_term(source, sign))
        stream = self.clean.streams[0]
        parts = StreamParts(
            {name: value for name, value in self.clean.parts.written.items() if name in layers.reader.embeddings},
            {},
            {},
        )
        # What replaces each source, and less what it writes now, is asked for once.
        change = _Kept(lambda source: self.contrast.delta(source, layers.part(parts, source)))
        for layer in range(layers.n):
            puts = self._puts(layer, stream, by_receiver, change)
            names = layers.of_layer(layer)
            found, _ = layers.run(tokens, start=layer, stream=stream, puts=puts, names=names, until=layer + 1)
            found[layers.reader.streams[layer]] = stream
            layers.reader.add_layer(layer, found, parts)
            behind = found[layers.reader.streams[layer + 1]]
            if terms := by_receiver.get(f"L{layer}.mlp"):
                changed = _sum(terms, change, torch.zeros_like(stream))
                z = found.get(attention_hook(layer, "z"))
                edited = layers.behind_mlp(tokens, layer, stream + changed, z) - changed
                parts.written[f"L{layer}.mlp"] = parts.written[f"L{layer}.mlp"] + edited - behind
                behind = edited
            stream = behind
        changed = _sum(by_receiver.get("logits", ()), change, torch.zeros_like(stream))
        return self._scored(layers.to_logits(tokens, layers.n, stream + changed))

    def _puts(
        self, layer: int, stream: Tensor, by_receiver: Mapping[str, set[Term]], change: Callable[[str], Tensor]
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """A layer's queries, keys and values of streams with edges cut; receivers that lose the same sources share a row."""
        sets: dict[frozenset[Term], list[Receiver]] = defaultdict(list)
        for name, terms in by_receiver.items():
            receiver = self.read[name]
            if receiver.layer == layer and receiver.side in SIDES:
                sets[frozenset(terms)].append(receiver)
        if not sets:
            return {}
        rows, everything = len(stream), list(sets)
        size = max(1, TOKENS // self.clean.tokens.numel())
        puts: list[tuple[str, int, Tensor, slice]] = []
        for at in range(0, len(everything), size):
            some = everything[at : at + size]
            edited = torch.cat([_sum(terms, change, stream) for terms in some])
            new = self.layers.sides_of(self.clean.tokens.repeat(len(some), 1), layer, edited)
            for number, lost in enumerate(some):
                own = slice(number * rows, (number + 1) * rows)
                puts += [(each.side, each.number, new[each.side][own], slice(None)) for each in sets[lost]]
        return self.layers.put(layer, puts)


def _term(source: str, sign: int = 1) -> Term:
    return (*placed(source), sign)


def _sum(terms: Iterable[Term], change: Callable[[str], Tensor], start: Tensor) -> Tensor:
    """``start`` and what is added to a receiver's input, in a fixed order, so that equal sets give equal sums."""
    total = start.clone()
    for source, position, sign in sorted(terms, key=str):
        where = slice(None) if position is None else slice(position, position + 1)
        total[:, where] += sign * change(source)[:, where]
    return total


class _Kept:
    """A function of a source that is computed once for each."""

    def __init__(self, function: Callable[[str], Tensor]) -> None:
        self.function = function
        self.found: dict[str, Tensor] = {}

    def __call__(self, source: str) -> Tensor:
        if source not in self.found:
            self.found[source] = self.function(source)
        return self.found[source]
