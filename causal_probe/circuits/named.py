"""Known circuits by their names."""

from __future__ import annotations

import difflib
import re

from causal_probe.arguments import checked
from causal_probe.circuits.compiled import compiled_circuit
from causal_probe.circuits.handset import HAND_SET
from causal_probe.circuits.known import KnownCircuit
from causal_probe.circuits.random_planted import random_circuit
from causal_probe.circuits.rasp_programs import PROGRAMS
from causal_probe.circuits.trained import TRAINED, trained_circuit
from causal_probe.errors import CausalProbeError

__all__ = ["known_circuit", "known_circuits"]

#: What stands before the name of a program compiled by tracr, before the seed of a random circuit, and before the name of a program that a model is trained to.
COMPILED, RANDOM, BY_TRAINING = "tracr-", "planted-", "trained-"


def known_circuits() -> tuple[str, ...]:
    """The names of the circuits: those set by hand, then those compiled by tracr. Random ones are ``"planted-0"``, ``"planted-1"``, ... without end; and
    ``"trained-duplicate-token"`` and others (:data:`~causal_probe.circuits.trained.TRAINED`) are trained when they are asked for, in minutes.

    >>> len([name for name in known_circuits() if name.startswith("tracr-")]), "or-gate" in known_circuits()
    (19, True)
    """
    return (*HAND_SET, *(f"{COMPILED}{name}" for name in PROGRAMS))


@checked
def known_circuit(name: str) -> KnownCircuit:
    """A model of known circuit, by its name.

    Parameters
    ----------
    name
        One of :func:`known_circuits`; ``"planted-"`` and a seed; ``"trained-"`` and the name of a circuit set by hand.

    Raises
    ------
    CausalProbeError
        If there is none of that name; or it is compiled by tracr, which is not installed.

    Examples
    --------
    >>> circuit = known_circuit("key-composition")
    >>> circuit.edges()
    [('pos_embed', 'L0H0.q'), ('pos_embed', 'L0H0.k'), ('embed', 'L0H0.v'), ('embed', 'L1H0.q'), ('pos_embed', 'L1H0.q'), ('pos_embed', 'L1H0.k'),
     ('L0H0', 'L1H0.k'), ('embed', 'L1H0.v'), ('L1H0', 'logits')]
    >>> circuit.truth.edges["L0H0", "L1H0.k"]["kind"], circuit.truth.edges["pos_embed", "L0H0.q"]["contrast"]
    ('token', ('resample', 'mean', 'zero'))
    """
    if name in HAND_SET:
        return HAND_SET[name]()
    if name.removeprefix(COMPILED) in PROGRAMS and name.startswith(COMPILED):
        return compiled_circuit(name.removeprefix(COMPILED))
    if seed := re.fullmatch(rf"{RANDOM}(\d+)", name):
        return random_circuit(int(seed[1]))
    if name.startswith(BY_TRAINING) and name.removeprefix(BY_TRAINING) in (*HAND_SET, *TRAINED):
        return trained_circuit(name.removeprefix(BY_TRAINING))
    near = difflib.get_close_matches(name, known_circuits(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise CausalProbeError(
        f"Unknown circuit {name!r}.{hint} Circuits: {', '.join(known_circuits())}; {RANDOM}0, {RANDOM}1, ...; {', '.join(f'{BY_TRAINING}{each}' for each in TRAINED)}"
    )
