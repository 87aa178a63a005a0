"""Data whose causal graph is known: sampling, and the exact predictors that a model is measured against."""

from causal_probe.tasks.autoregressive import AutoregressiveBatch, AutoregressiveProcess, Flow
from causal_probe.tasks.batches import batches
from causal_probe.tasks.dirichlet import dirichlet
from causal_probe.tasks.information import Information, information, joint_law, predicted_information
from causal_probe.tasks.least_squares import (
    Descent,
    expected_loss,
    fit_descent,
    least_squares,
    one_step_optimum,
    predict_descent,
    ridge,
)
from causal_probe.tasks.markov import Batch, InContextMarkov, Targets
from causal_probe.tasks.predictors import (
    cross_entropy,
    fit_one_parent,
    in_context_unigram,
    known_graph,
    one_parent,
    reference_losses,
    uniform,
)
from causal_probe.tasks.randomness import generator, numpy_generator
from causal_probe.tasks.regression import LinearRegression, RegressionBatch, SineRegression, regression_tokens
from causal_probe.tasks.root_test import (
    evidence_per_edge,
    evidence_per_root,
    log_bets,
    log_bets_against_rivals,
    surprise,
)
from causal_probe.tasks.stationary import stationary_distribution

__all__ = [
    "AutoregressiveBatch",
    "AutoregressiveProcess",
    "Batch",
    "Descent",
    "Flow",
    "InContextMarkov",
    "LinearRegression",
    "RegressionBatch",
    "SineRegression",
    "Information",
    "Targets",
    "batches",
    "cross_entropy",
    "dirichlet",
    "expected_loss",
    "fit_descent",
    "fit_one_parent",
    "evidence_per_edge",
    "evidence_per_root",
    "generator",
    "information",
    "joint_law",
    "log_bets",
    "log_bets_against_rivals",
    "predicted_information",
    "surprise",
    "numpy_generator",
    "in_context_unigram",
    "known_graph",
    "least_squares",
    "one_parent",
    "one_step_optimum",
    "predict_descent",
    "reference_losses",
    "regression_tokens",
    "ridge",
    "stationary_distribution",
    "uniform",
]

#: What tab completion offers: where a notebook begins. The rest of ``__all__``, most of it classes of results, is as public.
_OFFERED = (
    "AutoregressiveProcess",
    "InContextMarkov",
    "LinearRegression",
    "SineRegression",
    "cross_entropy",
    "fit_descent",
    "fit_one_parent",
    "generator",
    "in_context_unigram",
    "information",
    "known_graph",
    "least_squares",
    "one_parent",
    "predict_descent",
    "reference_losses",
    "ridge",
)


def __dir__() -> list[str]:
    return [*_OFFERED]
