"""Every edge's effect, estimated from gradients: which edges are worth an intervention.

The effect of an edge is the metric's fall when the source's part of the receiver's input changes by d. To first order it is -g . d, with g the gradient of the
metric by *that input alone*: queries, keys and values of a head each have one of their own, so g is the metric's gradient by the queries (keys, values, MLP's
output), taken back through their own projection and norm. Gradients are means over points on the way from the clean embeddings to those of the contrast, so that
an edge whose effect bends, or a metric that is flat at the clean run, is seen (integrated gradients; Hanna et al. 2024, https://arxiv.org/abs/2403.17806).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.circuits.interventions import Interventions, reaches
from causal_probe.circuits.known import Edge
from causal_probe.circuits.partial import SIDES
from causal_probe.hooks import attention_hook

__all__ = ["attributions"]


def attributions(run: Interventions, *, steps: int = 4) -> dict[Edge, Float[Tensor, " pos"]]:
    """By edge, the first-order estimate of its effect at each position, a mean over prompts, in units of the metric; the edge's own is the sum over positions.

    Parameters
    ----------
    steps
        Points on the way from the clean embeddings to the contrast's; 1 for the clean run alone.

    Returns
    -------
    Of all edges.
    """
    layers, rows = run.layers, len(run.before)
    start = run.clean.streams[0]
    embedded = sum((run.contrast.delta(source) for source in layers.reader.embeddings), torch.zeros_like(start))
    points = [_backward(run, start + step / steps * embedded) for step in range(steps)]
    found: dict[Edge, Tensor] = {}
    for layer in range(layers.n + 1):
        each: dict[str, Tensor] = {}
        for point in points:
            for name, gradient in _gradients(run, layer, point):
                each[name] = each[name] + gradient if name in each else gradient
        if not each:
            continue
        stacked = torch.stack([*each.values()]).permute(2, 0, 1, 3).flatten(2)  # [pos, receiver, row and d_model]
        reached = {source: [reaches(layers, source, run.read[name]) for name in each] for source in layers.sources}
        its = [source for source, those in reached.items() if any(those)]
        # One block for a layer: small results kept one by one would lie between large ones that are freed, and hold their memory.
        values = start.new_empty(len(its), len(each), start.shape[1])
        for number, source in enumerate(its):
            change = run.contrast.delta(source).transpose(0, 1).flatten(1).to(stacked) / (-rows * steps)
            values[number] = (stacked @ change[..., None])[..., 0].T
        for source, by_receiver in zip(its, values, strict=True):
            those = zip(each, by_receiver, reached[source], strict=True)
            found |= {(source, name): value for name, value, whether in those if whether}
    return found


@dataclass(frozen=True, eq=False)
class _Point:
    """A run on given embeddings: streams and z by layer, and the gradients of the metric by queries, keys and values and by the streams."""

    streams: list[Tensor]
    z: dict[int, Tensor]
    by_side: dict[tuple[int, str], Tensor]
    by_stream: dict[int, Tensor]


def _gradients(run: Interventions, layer: int, point: _Point) -> Iterator[tuple[str, Float[Tensor, "row pos d_model"]]]:
    """The gradient of the sum of the metric by the input of each receiver of a layer."""
    layers, tokens = run.layers, run.clean.tokens
    its = [receiver for receiver in run.read.values() if receiver.layer == layer]
    if layer == layers.n:
        yield its[0].name, point.by_stream[layer]
        return
    with torch.enable_grad():
        leaf = torch.zeros_like(point.streams[layer], requires_grad=True)
        stream = point.streams[layer] + leaf
        new = layers.sides_of(tokens, layer, stream) if layers.attends.get(layer) else {}
        for receiver in its:
            if receiver.side in SIDES:
                own = new[receiver.side]
                wanted = layers.only(layer, receiver.side, receiver.number, point.by_side[layer, receiver.side])
                (through,) = torch.autograd.grad(own, leaf, wanted.reshape(own.shape), retain_graph=True)
                yield receiver.name, through
            elif receiver.side == "mlp":
                out, behind = layers.behind_mlp(tokens, layer, stream, point.z.get(layer)), point.by_stream[layer + 1]
                (through,) = torch.autograd.grad(out, leaf, behind)
                yield receiver.name, through - behind  # what passes by the MLP is no part of its input


def _backward(run: Interventions, embeddings: Tensor) -> _Point:
    layers, tokens = run.layers, run.clean.tokens
    leaves: dict[Any, Tensor] = {}
    found: dict[str, Tensor] = {}

    def watch(key: Any) -> Callable[[Tensor], Tensor]:
        made: list[Tensor] = []  # a bridge may call a hook once for each of its names

        def edit(value: Tensor) -> Tensor:
            if not made:
                leaves[key] = torch.zeros_like(value, requires_grad=True)
                made.append(value + leaves[key])
            return made[0]

        return edit

    puts = {
        layers.point(layer, side): watch((layer, side))
        for layer in layers.carriers
        for side in SIDES
        if side in layers.attends[layer]
    }
    for layer in range(layers.n):
        puts[layers.reader.streams[layer + 1]] = watch(layer + 1)
    z_names = {layer: attention_hook(layer, "z") for layer in layers.carriers}
    with torch.enable_grad():
        found, logits = layers.run(
            tokens, stream=embeddings.detach(), puts=puts, names=[*z_names.values(), *layers.reader.streams]
        )
        assert logits is not None
        total = run.score(logits, run.rows).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    by_side: dict[tuple[int, str], Tensor] = {}
    by_stream: dict[int, Tensor] = {}
    for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        value = torch.zeros_like(leaf) if gradient is None else gradient.detach()
        if isinstance(key, tuple):
            by_side[key] = value
        else:
            by_stream[key] = value
    streams = [embeddings.detach(), *(found[name].detach() for name in layers.reader.streams[1:])]
    return _Point(streams, {layer: found[name].detach() for layer, name in z_names.items()}, by_side, by_stream)
