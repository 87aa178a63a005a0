"""Whole circuits: models whose every edge is known."""

from causal_probe.circuits.check_truth import check_truth
from causal_probe.circuits.known import KnownCircuit
from causal_probe.circuits.named import known_circuit, known_circuits

__all__ = ["KnownCircuit", "check_truth", "known_circuit", "known_circuits"]


def __dir__() -> list[str]:
    return [*__all__]
