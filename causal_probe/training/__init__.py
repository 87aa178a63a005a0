"""Fitting models whose mechanism is known."""

from causal_probe.training.fit import evaluate, fit
from causal_probe.training.loss import task_loss
from causal_probe.training.many import fit_many
from causal_probe.training.minimise import adam, minimise, regression_loss
from causal_probe.training.stages import give_matcher, joint, staged

__all__ = [
    "adam",
    "evaluate",
    "fit",
    "fit_many",
    "give_matcher",
    "joint",
    "minimise",
    "regression_loss",
    "staged",
    "task_loss",
]


def __dir__() -> list[str]:
    return [*__all__]
