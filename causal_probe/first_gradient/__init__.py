"""The causal graph from the first gradient of an untrained model: from data to a graph, without a trained model."""

from __future__ import annotations

from causal_probe.first_gradient.graph import gradient_graph, gradient_graphs
from causal_probe.first_gradient.lemma import measure_lemma
from causal_probe.first_gradient.sample_complexity import gradient_sample_complexity
from causal_probe.first_gradient.slots import gradient_slots

__all__ = ["gradient_graph", "gradient_graphs", "gradient_sample_complexity", "gradient_slots", "measure_lemma"]


def __dir__() -> list[str]:
    return [*__all__]
