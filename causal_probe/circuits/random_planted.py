"""Circuits drawn at random and written into a standard transformer, as many as there are seeds, at any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causal_probe.arguments import Count, Seed, checked
from causal_probe.circuits.check_truth import Runs
from causal_probe.circuits.known import KnownCircuit, order_of
from causal_probe.circuits.planting import plant
from causal_probe.circuits.program import Component, Match, Offset, Program, Table, names_of
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import undisturbed

__all__ = ["random_circuit"]

#: So often a circuit is drawn again where an edge has next to no effect.
TRIES = 100
#: A circuit is drawn again if one of its edges changes the metric, which is 1, by less on each of so many sequences.
LEAST, LOOKED_AT = 0.05, 32


@checked
def random_circuit(
    seed: Seed,
    *,
    n_layers: Count = 3,
    n_heads: Count = 3,
    mlps: bool = True,
    d_vocab: Count = 4,
    n_positions: Count = 10,
    size: Count = 5,
    norm: bool = True,
    rotate: bool = True,
) -> KnownCircuit:
    """Draw a sparse circuit, and distractors beside it.

    Every head and MLP that the model has room for writes something. Those of the circuit are what the answer follows from; each reads one to three
    variables of others, at least one of them a token's. All others are distractors: they read variables too, those of the circuit among them, and
    write into directions that nobody in the circuit reads. A circuit is drawn again while some edge, resampled, changes the metric by less than
    0.05 (of 1) on each of 32 sequences: planted, but without effect, as where a table gives the same for all that its other input
    leaves possible.

    Parameters
    ----------
    seed
        Every seed is a circuit.
    n_layers, n_heads, mlps
        The model's layers, heads in each, and whether layers have an MLP.
    d_vocab, n_positions
        Number of tokens, and length of the sequences; both 3 or more.
    size
        How many heads and MLPs the circuit has at least, where the draw allows; the rest are distractors.
    norm
        Whether the model has RMSNorm, of random gains where it is rotated.
    rotate
        Whether the stream is turned by a random rotation, so that no variable lies on its axes.

    Raises
    ------
    CausalProbeError
        If the model is too small for a circuit of that size, or none was found in 100 draws.

    Examples
    --------
    >>> circuit = random_circuit(0)
    >>> circuit
    KnownCircuit('planted-0', 20 of 203 edges)
    """
    names = names_of([(n_heads, mlps)] * n_layers)
    if d_vocab < 3 or n_positions < 3 or not 1 <= size <= len(names):
        raise CausalProbeError(
            f"`d_vocab` and `n_positions` are 3 or more, `size` is 1 to {len(names)}, the heads and MLPs of the model; found {d_vocab}, {n_positions}, {size}."
        )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(TRIES):
        program = _draw(names, d_vocab, n_positions, size, generator)
        if program is None:
            continue
        circuit = plant(
            f"planted-{seed}",
            program,
            description=f"A random circuit of {sum(name in program.components for name in program.relevant())} of {len(names)} heads and MLPs.",
            norm=norm,
            rotation=generator if rotate else None,
        )
        with undisturbed(circuit.model):
            looked_at = torch.Generator().manual_seed(0)
            runs = Runs(circuit, circuit.sample(LOOKED_AT, looked_at), "resample", looked_at, 1)
            weakest = min(runs.change([edge]) for edge in circuit.edges())
        if weakest >= LEAST:
            return circuit
    raise CausalProbeError(
        f"None of {TRIES} random circuits of size {size} had an effect of every edge; ask for a smaller size or more layers."
    )


def _draw(
    names: Sequence[str], d_vocab: int, n_positions: int, size: int, generator: torch.Generator
) -> Program | None:
    """Components for all names, and an output whose circuit has the size; None if there is none."""

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    components: dict[str, Component] = {}
    #: Variables over tokens, which may be matched, looked up and shown; each depends on the tokens.
    symbols = ["embed"]
    for name in names:
        before = [each for each in symbols if order_of(each) < order_of(name)]

        def some(n: int, before: Sequence[str] = before) -> list[str]:
            # The later of two draws, so that circuits become deep.
            return [before[max(below(len(before)), below(len(before)))] for _ in range(n)]

        if name.endswith(".mlp"):
            inputs = tuple(dict.fromkeys(some(1 + below(2))))
            components[name] = Table(inputs, _table(len(inputs), d_vocab, generator), d_vocab)
        elif below(2):
            components[name] = Offset(1 + below(3), *some(1))
        else:
            components[name] = Match(*some(3))
        symbols.append(name)
    sizes = {}
    for name in names:
        relevant = Program(d_vocab, n_positions, components, name).relevant()
        sizes[name] = sum(each in components for each in relevant)
    fitting = [name for name, its in sizes.items() if size <= its <= size + 2]
    return Program(d_vocab, n_positions, components, fitting[below(len(fitting))]) if fitting else None


def _table(n_inputs: int, d_vocab: int, generator: torch.Generator) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """Of one input, a permutation; of two, a square whose rows are permutations, so that both matter."""

    def permutation() -> Tensor:
        return torch.randperm(d_vocab, generator=generator)

    if n_inputs == 1:
        return tuple(permutation().tolist())
    return tuple(tuple(permutation().tolist()) for _ in range(d_vocab))
