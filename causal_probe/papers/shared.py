"""Helpers of several reproductions: keep weights in parts, thin losses, give a mean its error, draw forests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from causal_probe import viz
from causal_probe.graphs import choose_graph
from causal_probe.models.standard import StandardTransformer
from causal_probe.papers.base import Run
from causal_probe.tasks import InContextMarkov

__all__ = [
    "forest",
    "forests",
    "loss_curve",
    "mean_and_error",
    "quick_note",
    "random_weights",
    "set_weights",
    "stretches",
    "thinned",
    "weights_of",
]

Model = TypeVar("Model", bound=nn.Module)


def weights_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    """A model's weights, as a part of a run keeps them."""
    return {name.lower(): parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def set_weights(model: Model, values: Mapping[str, Any]) -> Model:
    """The model with kept weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(values[name.lower()]))
    return model


def random_weights(model: StandardTransformer, source: torch.Generator) -> StandardTransformer:
    """The model with drawn weights: embeddings of size 0.3, matrices that keep a stream's size, queries a quarter and logits half of it; gains stay one, biases zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or ".b_" in name:
                continue
            drawn = torch.randn(parameter.shape, generator=source) / math.sqrt(parameter.shape[-2])
            scale = 0.25 if "W_Q" in name else 0.5 if "W_U" in name else 1.0
            parameter.copy_(
                0.3 * drawn * math.sqrt(parameter.shape[-2])
                if name.startswith(("embed", "pos_embed"))
                else scale * drawn
            )
    return model


def thinned(losses: Sequence[float]) -> list[float]:
    """Means over at most 200 stretches of nearly equal length."""
    return [float(stretch.mean()) for stretch in np.array_split(np.asarray(losses), min(200, len(losses)))]


def stretches(losses: Sequence[float], every: int | None = None) -> list[float]:
    """Means over stretches of ``every`` steps, by default a hundredth of all; a rest is left out."""
    every = max(1, len(losses) // 100) if every is None else every
    means: list[float] = np.array(losses)[: len(losses) // every * every].reshape(-1, every).mean(1).tolist()
    return means


def loss_curve(losses: Sequence[float], steps: int) -> viz.Curve:
    """The mean losses of a training of ``steps`` steps (:func:`stretches`), each at the first step of its stretch."""
    return viz.Curve(np.linspace(0, steps, len(losses), endpoint=False), losses)


def mean_and_error(values: Any) -> tuple[float, float]:
    """The mean over seeds or graphs, and its standard error."""
    values = np.asarray(values)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def quick_note(run: Run, text: str) -> tuple[str, ...]:
    """Notes for quick runs."""
    return (f"Quick: {text}",) if run.quick else ()


def forest(
    seed: int, *, n_positions: int, d_vocab: int, concentration: float, root_probability: float
) -> InContextMarkov:
    """The task over one random forest."""
    graph = choose_graph("forest", n_positions=n_positions, root_probability=root_probability, seed=seed)
    return InContextMarkov(graph, d_vocab, concentration)


def forests(run: Run, number: int, **task: Any) -> list[InContextMarkov]:
    """The first of the run's forests (:func:`forest`)."""
    return [forest(run.seed + each, **task) for each in range(number)]
