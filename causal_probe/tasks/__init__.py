"""Data whose causal graph is known: sampling, and the exact predictors that a model is measured against."""

from collections.abc import Mapping
from typing import Any

from causal_probe.tasks.autoregressive import AutoregressiveProcess
from causal_probe.tasks.chain_mixture import MarkovMixture
from causal_probe.tasks.graph_mixture import GraphMixture
from causal_probe.tasks.least_squares import one_step_optimum, predict_descent
from causal_probe.tasks.markov import InContextMarkov
from causal_probe.tasks.randomness import generator
from causal_probe.tasks.regression import LinearRegression, SineRegression
from causal_probe.tasks.ring_walk import RingWalk
from causal_probe.tasks.task import Batch, Task, cross_entropy, reference_losses, sample_batches
from causal_probe.tasks.variable_binding import VariableBinding

__all__ = [
    "TASKS",
    "AutoregressiveProcess",
    "Batch",
    "GraphMixture",
    "InContextMarkov",
    "LinearRegression",
    "MarkovMixture",
    "RingWalk",
    "SineRegression",
    "Task",
    "VariableBinding",
    "sample_batches",
    "cross_entropy",
    "generator",
    "one_step_optimum",
    "predict_descent",
    "reference_losses",
]

#: Every task, in one line. Those over one graph follow :class:`Task`; mixtures and programs have a graph for each sequence, the last three vectors for tokens.
TASKS: Mapping[type[Any], str] = {
    InContextMarkov: "tokens along a causal graph, with fresh transitions in every sequence (Nichani et al. 2024)",
    RingWalk: "steps up or down a ring of states along a causal graph, with a fresh probability in every sequence",
    GraphMixture: "tokens along a graph that is drawn for each sequence, such as one of several lags (D'Angelo et al. 2025)",
    MarkovMixture: "tokens of one of a finite set of Markov chains (Park et al. 2025)",
    VariableBinding: "programs of assignments with a query, each with a graph of its own (Wu et al. 2025)",
    LinearRegression: "in-context regression of fresh linear functions (von Oswald et al. 2022)",
    SineRegression: "in-context regression of fresh sine waves (von Oswald et al. 2022)",
    AutoregressiveProcess: "rotations seen step by step, by a fresh unitary matrix in every sequence (Zheng et al. 2024)",
}


def __dir__() -> list[str]:
    return [*__all__]
