"""Whole circuits: models whose every edge is known."""

from causal_probe.circuits.known import KnownCircuit

__all__ = ["KnownCircuit"]


def __dir__() -> list[str]:
    return [*__all__]
