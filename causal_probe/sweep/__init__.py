"""Sweeps: the same probes over many models, tasks, seeds and settings, on as many processes as there are, resumable.

A sweep is a plan of cells (:mod:`~causal_probe.sweep.plan`). A cell is a pure function of what is written in it
(:mod:`~causal_probe.sweep.cells`), its result is one Parquet file of a dataset (:mod:`~causal_probe.sweep.store`),
and joblib runs what is not there yet (:mod:`~causal_probe.sweep.run`).
"""

from causal_probe.sweep.cells import Outcome
from causal_probe.sweep.run import sweep

__all__ = ["Outcome", "sweep"]


def __dir__() -> list[str]:
    return [*__all__]
