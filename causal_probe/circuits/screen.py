"""Every edge's effect, estimated from gradients: which edges are worth an intervention.

The effect of an edge is the metric's fall when the source's part of the receiver's input changes by d. To first order it is -g . d, with g the gradient of the
metric by *that input alone*: queries, keys and values of a head each have one of their own, so g is the metric's gradient by the queries (keys, values, MLP's
output), taken back through their own projection and norm. Gradients are means over points on the way from the clean embeddings to those of the contrast, so that
an edge whose effect bends, or a metric that is flat at the clean run, is seen (integrated gradients; Hanna et al. 2024, https://arxiv.org/abs/2403.17806).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.circuits.interventions import Interventions, reaches
from causal_probe.circuits.known import Edge
from causal_probe.circuits.partial import SIDES, Clean
from causal_probe.hooks import attention_hook

__all__ = ["attributions"]


def attributions(run: Interventions, *, steps: int = 4) -> dict[Edge, float]:
    """By edge, the first-order estimate of its effect, a mean over prompts, in units of the metric.

    Parameters
    ----------
    steps
        Points on the way from the clean embeddings to the contrast's; 1 for the clean run alone.

    Returns
    -------
    Of all edges.
    """
    layers, rows = run.layers, len(run.before)
    found: dict[Edge, float] = {}
    embedded = sum(
        (run.contrast.delta(source) for source in layers.reader.embeddings), torch.zeros_like(run.clean.streams[0])
    )
    for step in range(steps):
        at = step / steps
        stream = run.clean.streams[0] + at * embedded
        for receiver, gradient in _gradients(run, stream):
            for source in layers.sources:
                if reaches(layers, source, run.read[receiver]):
                    value = -float((gradient * run.contrast.delta(source)).sum()) / rows / steps
                    found[source, receiver] = found.get((source, receiver), 0.0) + value
    return found


def _gradients(run: Interventions, embeddings: Tensor) -> Iterator[tuple[str, Float[Tensor, "row pos d_model"]]]:
    """The gradient of the sum of the metric by each receiver's input, on given embeddings."""
    layers, tokens = run.layers, run.clean.tokens
    point, by_side, by_stream = _backward(run, embeddings)
    for name, receiver in run.read.items():
        layer = receiver.layer
        if receiver.side == "logits":
            yield name, by_stream[layers.n]
            continue
        with torch.enable_grad():
            leaf = torch.zeros_like(point.streams[layer], requires_grad=True)
            if receiver.side == "mlp":
                z = point.z.get(layer)
                out = layers.behind_mlp(tokens, layer, point.streams[layer] + leaf, None if z is None else z.detach())
                (through,) = torch.autograd.grad(out, leaf, by_stream[layer + 1])
                yield name, through - by_stream[layer + 1]  # what passes by the MLP is no part of its input
                continue
            new = layers.sides_of(tokens, layer, point.streams[layer] + leaf)[receiver.side]
            wanted = layers.only(layer, receiver.side, receiver.number, by_side[layer, receiver.side])
            (through,) = torch.autograd.grad(new, leaf, wanted.reshape(new.shape))
        yield name, through


def _backward(run: Interventions, embeddings: Tensor) -> tuple[Clean, dict[tuple[int, str], Tensor], dict[int, Tensor]]:
    """A run on given embeddings, and the gradients of the metric by queries, keys and values and by the streams behind the layers."""
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
    by = {
        key: torch.zeros_like(leaf) if gradient is None else gradient.detach()
        for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    streams = [embeddings.detach(), *(found[name].detach() for name in layers.reader.streams[1:])]
    z = {layer: found[name].detach() for layer, name in z_names.items()}
    point = Clean(tokens, streams, run.clean.parts, {}, z, logits.detach())
    return (
        point,
        {key: value for key, value in by.items() if isinstance(key, tuple)},
        {key: value for key, value in by.items() if not isinstance(key, tuple)},
    )
