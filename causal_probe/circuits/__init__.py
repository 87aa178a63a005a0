"""Whole circuits: models whose every edge is known."""

from causal_probe.circuits.check_truth import check_truth
from causal_probe.circuits.compiled import compiled_circuit
from causal_probe.circuits.known import KnownCircuit
from causal_probe.circuits.named import known_circuit, known_circuits
from causal_probe.circuits.random_planted import random_circuit

__all__ = ["KnownCircuit", "check_truth", "compiled_circuit", "known_circuit", "known_circuits", "random_circuit"]


def __dir__() -> list[str]:
    return [*__all__]
