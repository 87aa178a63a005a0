"""Circuits as programs: every component writes one variable, a symbol at each position, and reads those of others.

A program is run in two ways: by :meth:`Program.run`, with whole numbers, and as a transformer (:mod:`causal_probe.circuits.planting`). Components are named as
the heads and MLPs that they become. ``embed`` writes the token, ``pos_embed`` the position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.circuits.known import Edge, order_of
from causal_probe.errors import CausalProbeError

__all__ = ["Component", "Gate", "Match", "Offset", "Pointer", "Program", "Table"]


@dataclass(frozen=True)
class Offset:
    """A head that attends ``back`` positions back (to position 0 where there is none) and copies ``value``."""

    back: int
    value: str

    def reads(self) -> dict[str, tuple[str, ...]]:
        """By side, the sources that are read."""
        return {"q": ("pos_embed",), "k": ("pos_embed",), "v": (self.value,)}


@dataclass(frozen=True)
class Match:
    """A head that attends to the latest earlier position whose ``key`` is this position's ``query``, else to the one before, and copies ``value``."""

    query: str
    key: str
    value: str

    def reads(self) -> dict[str, tuple[str, ...]]:
        """By side, the sources that are read: positions too, for "latest" and "earlier"."""
        return {"q": (self.query, "pos_embed"), "k": (self.key, "pos_embed"), "v": (self.value,)}


@dataclass(frozen=True)
class Pointer:
    """A head that attends to the position that ``query`` holds, plus ``shift``, and copies ``value``."""

    query: str
    shift: int
    value: str

    def reads(self) -> dict[str, tuple[str, ...]]:
        """By side, the sources that are read."""
        return {"q": (self.query,), "k": ("pos_embed",), "v": (self.value,)}


@dataclass(frozen=True)
class Table:
    """An MLP that looks one or two variables up in a table: nested tuples, by the first and the second."""

    inputs: tuple[str, ...]
    table: tuple[int, ...] | tuple[tuple[int, ...], ...]
    n_out: int

    def reads(self) -> dict[str, tuple[str, ...]]:
        """The sources that are read."""
        return {"": self.inputs}


@dataclass(frozen=True)
class Gate:
    """An MLP that writes 1 if any (``"or"``) or all (``"and"``) of its inputs hold ``symbol``, else 0."""

    kind: str
    inputs: tuple[str, ...]
    symbol: int

    def reads(self) -> dict[str, tuple[str, ...]]:
        """The sources that are read."""
        return {"": self.inputs}


Component: TypeAlias = Offset | Match | Pointer | Table | Gate


@dataclass(frozen=True)
class Program:
    """Components by name, and the one whose variable is the answer at each position.

    Attributes
    ----------
    d_vocab, n_positions
        Number of tokens, and length of the sequences.
    components
        By name, ``"L0H1"`` or ``"L0.mlp"``.
    output
        The source whose variable the logits show.

    Examples
    --------
    >>> program = Program(4, 6, {"L0H0": Offset(1, "embed"), "L1H0": Match("embed", "L0H0", "embed")}, "L1H0")
    >>> program.run(torch.tensor([[0, 1, 2, 3, 1, 2]]))["L1H0"]    # at position 4, token 1: a 2 came after it
    tensor([[0, 0, 1, 2, 2, 3]])
    """

    d_vocab: int
    n_positions: int
    components: Mapping[str, Component]
    output: str

    def __post_init__(self) -> None:
        for name, component in self.components.items():
            known = self.sizes()
            for source in {each for sources in component.reads().values() for each in sources}:
                if source not in known or order_of(source) >= order_of(name):
                    raise CausalProbeError(
                        f"{name} reads {source}, which writes nothing before it. Sources: {', '.join(known)}."
                    )
            if name.endswith(".mlp") != isinstance(component, (Table, Gate)):
                raise CausalProbeError(
                    f"{name} is a {type(component).__name__}; a head is an Offset, Match or Pointer, an MLP a Table or Gate."
                )
            if problem := _problem(component, self.sizes()):
                raise CausalProbeError(f"{name} {problem}")
        if self.output not in self.components:
            raise CausalProbeError(
                f"The output is one of the components {', '.join(self.components)}; found {self.output}."
            )

    def sizes(self) -> dict[str, int]:
        """By source, the number of symbols of its variable."""
        found = {"embed": self.d_vocab, "pos_embed": self.n_positions}
        for name, component in self.components.items():
            if isinstance(component, Table):
                found[name] = component.n_out
            else:
                found[name] = 2 if isinstance(component, Gate) else found.get(component.value, 0)
        return found

    def run(
        self, tokens: Int[Tensor, "batch pos"], given: Mapping[str, Int[Tensor, "batch pos"]] | None = None
    ) -> dict[str, Int[Tensor, "batch pos"]]:
        """By source, its variable at each position; ``given`` are put in the place of what components would write."""
        n = tokens.shape[1]
        at = torch.arange(n, device=tokens.device)
        held = {"embed": tokens, "pos_embed": at.expand_as(tokens)}
        for name, component in self.components.items():
            if given and name in given:
                held[name] = given[name]
            elif isinstance(component, Table):
                held[name] = torch.tensor(component.table)[tuple(held[each] for each in component.inputs)]
            elif isinstance(component, Gate):
                holds = torch.stack([held[each] == component.symbol for each in component.inputs])
                held[name] = (holds.any(0) if component.kind == "or" else holds.all(0)).long()
            else:
                held[name] = held[component.value].gather(1, self._attended(component, held, at))
        return held

    def _attended(self, head: Offset | Match | Pointer, held: Mapping[str, Tensor], at: Tensor) -> Tensor:
        """Where a head attends to."""
        if isinstance(head, Offset):
            return (at - head.back).clamp(min=0).expand_as(held["embed"])
        if isinstance(head, Pointer):
            return torch.minimum((held[head.query] + head.shift).clamp(min=0), at)
        equal = (held[head.query][:, :, None] == held[head.key][:, None]) & (at[:, None] > at)
        latest = torch.where(equal, at, -1).amax(-1)
        return torch.where(latest < 0, (at - 1).clamp(min=0), latest)

    def relevant(self) -> set[str]:
        """The sources from which the output follows, itself included."""
        found: set[str] = set()
        waiting = [self.output]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                component = self.components.get(name)
                waiting += [] if component is None else [s for its in component.reads().values() for s in its]
        return found

    def edges(self) -> list[Edge]:
        """The edges (source, receiver) of the circuit: those into what the output follows from, and the output's into the logits."""
        relevant = self.relevant()
        found = [
            (source, f"{name}.{side}" if side else name)
            for name, component in self.components.items()
            if name in relevant
            for side, sources in component.reads().items()
            for source in sources
        ]
        return [*dict.fromkeys(found), (self.output, "logits")]


def _problem(component: Component, sizes: Mapping[str, int]) -> str | None:
    """What is wrong with a component, given the numbers of symbols of all variables; None for nothing."""
    if isinstance(component, Offset) and component.back < 0:
        return f"attends {component.back} positions back; 0 or more are allowed."
    if isinstance(component, Pointer) and sizes[component.query] != sizes["pos_embed"]:
        return f"takes {component.query} for a position, which has {sizes[component.query]} symbols, not the {sizes['pos_embed']} of positions."
    if isinstance(component, Match) and sizes[component.query] != sizes[component.key]:
        both = f"{component.query} of {sizes[component.query]} symbols with {component.key} of {sizes[component.key]}"
        return f"compares {both}; give variables of as many symbols."
    if isinstance(component, Gate):
        least = min(sizes[each] for each in component.inputs)
        if component.kind not in ("or", "and") or not 0 <= component.symbol < least:
            return f"is a gate {component.kind!r} of symbol {component.symbol}; gates are 'or' and 'and', of symbols 0 to {least - 1}."
    if isinstance(component, Table):
        wanted = tuple(sizes[each] for each in component.inputs)
        rows = component.table if len(wanted) == 2 else (component.table,)
        shape = (len(rows), *{len(row) for row in rows if isinstance(row, tuple)})[2 - len(wanted) :]
        if len(wanted) not in (1, 2) or len(set(component.inputs)) < len(wanted) or shape != wanted:
            return f"looks up {', '.join(component.inputs)}, of {' x '.join(map(str, wanted))} symbols, in a table of another shape; one or two different inputs are allowed."
        entries = {entry for row in rows if isinstance(row, tuple) for entry in row}
        if strange := [entry for entry in entries if entry not in range(component.n_out)]:
            return f"writes {strange[0]}; its symbols are 0 to {component.n_out - 1}."
    return None


def names_of(layers: Sequence[tuple[int, bool]]) -> list[str]:
    """The names of heads and MLPs, of the number of heads of each layer and whether it has an MLP.

    >>> names_of([(2, False), (1, True)])
    ['L0H0', 'L0H1', 'L1H0', 'L1.mlp']
    """
    return [
        name
        for layer, (n_heads, mlp) in enumerate(layers)
        for name in [*(f"L{layer}H{head}" for head in range(n_heads)), *([f"L{layer}.mlp"] if mlp else [])]
    ]
