"""Which mechanism does a trained model run? From a model and a task to numbers: descent, mesa-optimization, weights, learning."""

from __future__ import annotations

from causal_probe.mechanisms.descent import descent_alignment, feature_descent, reference_algorithms
from causal_probe.mechanisms.dynamics import Watch
from causal_probe.mechanisms.layer_features import layer_features
from causal_probe.mechanisms.mesa import mesa_optimizer, mesa_recovery, train_mesa
from causal_probe.mechanisms.phases import WatchPhases
from causal_probe.mechanisms.weight_graphs import weight_graphs

__all__ = [
    "Watch",
    "WatchPhases",
    "descent_alignment",
    "feature_descent",
    "layer_features",
    "mesa_optimizer",
    "mesa_recovery",
    "reference_algorithms",
    "train_mesa",
    "weight_graphs",
]


def __dir__() -> list[str]:
    return [*__all__]
