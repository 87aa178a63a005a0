"""Fitting models whose mechanism is known."""

from causal_probe.training.algorithm_1 import algorithm_1, algorithm_1_stages
from causal_probe.training.checkpoint import Checkpoint
from causal_probe.training.fit import History, evaluate, fit, task_loss
from causal_probe.training.many import fit_many
from causal_probe.training.minimise import adam, minimise, regression_loss
from causal_probe.training.slots import give_slots, staged_slots
from causal_probe.training.stages import Optimizer, Schedule, Stage, give_matcher, joint, staged

__all__ = [
    "Checkpoint",
    "History",
    "Optimizer",
    "Schedule",
    "Stage",
    "adam",
    "algorithm_1",
    "algorithm_1_stages",
    "evaluate",
    "fit",
    "fit_many",
    "give_matcher",
    "give_slots",
    "joint",
    "minimise",
    "regression_loss",
    "staged",
    "staged_slots",
    "task_loss",
]


def __dir__() -> list[str]:
    return [*__all__]
