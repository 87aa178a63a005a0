"""Known circuits by their names."""

from __future__ import annotations

import difflib

from causal_probe.arguments import checked
from causal_probe.circuits.handset import HAND_SET
from causal_probe.circuits.known import KnownCircuit
from causal_probe.errors import CausalProbeError

__all__ = ["known_circuit", "known_circuits"]


def known_circuits() -> tuple[str, ...]:
    """The names of the circuits."""
    return tuple(HAND_SET)


@checked
def known_circuit(name: str) -> KnownCircuit:
    """A circuit."""
    if name not in HAND_SET:
        raise CausalProbeError(f"Unknown circuit {name!r}. {difflib.get_close_matches(name, HAND_SET)}")
    return HAND_SET[name]()
