"""Which mechanism does a trained model run? From a model and a task to numbers: descent, mesa-optimization, weights, learning."""

from __future__ import annotations

from causal_probe.mechanisms.descent import (
    Algorithm,
    DescentAlignment,
    descent_alignment,
    feature_descent,
    interpolate,
    reference_algorithms,
)
from causal_probe.mechanisms.dynamics import ChangePoint, Dynamics, Watch, change_point
from causal_probe.mechanisms.layer_features import LayerFeatures, function_cosine, layer_features
from causal_probe.mechanisms.mesa import MesaOptimizer, MesaTraining, mesa_optimizer, mesa_recovery, train_mesa
from causal_probe.mechanisms.weight_graphs import weight_graphs
from causal_probe.mechanisms.weight_result import BlockGraph, WeightGraphs

__all__ = [
    "Algorithm",
    "BlockGraph",
    "ChangePoint",
    "DescentAlignment",
    "Dynamics",
    "LayerFeatures",
    "MesaOptimizer",
    "MesaTraining",
    "Watch",
    "WeightGraphs",
    "change_point",
    "descent_alignment",
    "feature_descent",
    "function_cosine",
    "interpolate",
    "layer_features",
    "mesa_optimizer",
    "mesa_recovery",
    "reference_algorithms",
    "train_mesa",
    "weight_graphs",
]


def __dir__() -> list[str]:
    return [*__all__]
