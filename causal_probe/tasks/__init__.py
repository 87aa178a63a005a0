"""Data whose causal graph is known: sampling, and the exact predictors that a model is measured against."""

from collections.abc import Mapping
from typing import Any

from causal_probe.tasks.autoregressive import AutoregressiveProcess
from causal_probe.tasks.least_squares import one_step_optimum, predict_descent
from causal_probe.tasks.markov import InContextMarkov
from causal_probe.tasks.randomness import generator
from causal_probe.tasks.regression import LinearRegression, SineRegression
from causal_probe.tasks.ring_walk import RingWalk
from causal_probe.tasks.task import Batch, Task, cross_entropy, reference_losses, sample_batches

__all__ = [
    "TASKS",
    "AutoregressiveProcess",
    "Batch",
    "InContextMarkov",
    "LinearRegression",
    "RingWalk",
    "SineRegression",
    "Task",
    "sample_batches",
    "cross_entropy",
    "generator",
    "one_step_optimum",
    "predict_descent",
    "reference_losses",
]

#: Every task, in one line. Those over a graph follow :class:`Task`; the others have vectors for tokens.
TASKS: Mapping[type[Any], str] = {
    InContextMarkov: "tokens along a causal graph, with fresh transitions in every sequence (Nichani et al. 2024)",
    RingWalk: "steps up or down a ring of states along a causal graph, with a fresh probability in every sequence",
    LinearRegression: "in-context regression of fresh linear functions (von Oswald et al. 2022)",
    SineRegression: "in-context regression of fresh sine waves (von Oswald et al. 2022)",
    AutoregressiveProcess: "rotations seen step by step, by a fresh unitary matrix in every sequence (Zheng et al. 2024)",
}


def __dir__() -> list[str]:
    return [*__all__]
