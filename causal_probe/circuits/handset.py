"""Small circuits set by hand, each of one idea, with its exact truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from causal_probe.circuits.known import Edge, KnownCircuit
from causal_probe.circuits.planting import plant
from causal_probe.circuits.program import Component, Gate, Match, Offset, Pointer, Program, Table

__all__ = ["HAND_SET", "PROGRAMS", "S", "T"]

#: Tokens, and positions.
S, T = 4, 10
#: By name, what makes the circuit (keywords: those of :func:`~causal_probe.circuits.planting.plant`).
HAND_SET: dict[str, Callable[..., KnownCircuit]] = {}
#: By name, its program.
PROGRAMS: dict[str, Callable[[], Program]] = {}


def handset(name: str, description: str, **more: object) -> Callable[[Callable[[], Program]], Callable[[], Program]]:
    """Name a function that returns a program."""

    def register(make: Callable[[], Program]) -> Callable[[], Program]:
        def circuit(**options: object) -> KnownCircuit:
            keywords: dict[str, Any] = {**more, **options}
            return plant(name, make(), description=description, **keywords)

        HAND_SET[name] = circuit
        PROGRAMS[name] = make
        return make

    return register


@handset(
    "key-composition",
    "Induction: the token after the latest earlier occurrence of this one, found by keys that hold the previous token.",
)
def _key_composition() -> Program:
    return Program(S, T, {"L0H0": Offset(1, "embed"), "L1H0": Match("embed", "L0H0", "embed")}, "L1H0")


@handset(
    "query-composition",
    "Induction by pointers: layer 0 writes the position of the latest earlier occurrence, layer 1 asks for the one after it.",
)
def _query_composition() -> Program:
    return Program(S, T, {"L0H0": Match("embed", "embed", "pos_embed"), "L1H0": Pointer("L0H0", 1, "embed")}, "L1H0")


@handset("value-composition", "The token three back: one back, of what two back has been copied.")
def _value_composition() -> Program:
    return Program(S, T, {"L0H0": Offset(2, "embed"), "L1H0": Offset(1, "L0H0")}, "L1H0")


def _held_before(held: Mapping[str, Tensor]) -> Tensor:
    """Positions from 1 on whose previous token is 0."""
    return (held["L0H0"] == 0) & (held["pos_embed"] >= 1)


def _either(own: str, other: str) -> dict[Edge, tuple[Edge, ...]]:
    """The edges of one head, and the other head's way out, without which their effect is seen."""
    edges = [("pos_embed", f"{own}.q"), ("pos_embed", f"{own}.k"), ("embed", f"{own}.v"), (own, "L0.mlp")]
    return dict.fromkeys(edges, ((other, "L0.mlp"),))


@handset(
    "or-gate",
    "Whether the previous token is 0: two heads say so, and the MLP takes either's word. Scored where it is, so that neither is missed alone.",
    scored=_held_before,
    redundant={**_either("L0H0", "L0H1"), **_either("L0H1", "L0H0")},
)
def _or_gate() -> Program:
    heads = {"L0H0": Offset(1, "embed"), "L0H1": Offset(1, "embed")}
    return Program(S, T, {**heads, "L0.mlp": Gate("or", ("L0H0", "L0H1"), 0)}, "L0.mlp")


@handset("and-gate", "Whether the previous token and the one before it are 0: both heads are needed.")
def _and_gate() -> Program:
    heads = {"L0H0": Offset(1, "embed"), "L0H1": Offset(2, "embed")}
    return Program(S, T, {**heads, "L0.mlp": Gate("and", ("L0H0", "L0H1"), 0)}, "L0.mlp")


@handset(
    "unread-head",
    "Key composition, beside a head that reads what the circuit writes (L1H1) and one that copies what it reads (L0H1): nobody reads them.",
)
def _unread_head() -> Program:
    heads: dict[str, Component] = {"L0H0": Offset(1, "embed"), "L0H1": Offset(3, "embed")}
    heads |= {"L1H0": Match("embed", "L0H0", "embed"), "L1H1": Offset(1, "L0H0")}
    return Program(S, T, heads, "L1H0")


@handset(
    "mlp-between",
    "Key composition through an MLP: keys hold not the previous token but the one that a table gives for it.",
)
def _mlp_between() -> Program:
    renamed = Table(("L0H0",), (1, 2, 3, 0), S)
    return Program(
        S, T, {"L0H0": Offset(1, "embed"), "L0.mlp": renamed, "L1H0": Match("embed", "L0.mlp", "embed")}, "L1H0"
    )


@handset(
    "duplicate-token",
    "Whether this token has been before: a head copies the latest equal one, else the previous, and the MLP compares.",
)
def _duplicate_token() -> Program:
    equal = tuple(tuple(int(a == b) for b in range(S)) for a in range(S))
    return Program(
        S, T, {"L0H0": Match("embed", "embed", "embed"), "L0.mlp": Table(("embed", "L0H0"), equal, 2)}, "L0.mlp"
    )
