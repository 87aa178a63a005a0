"""Circuits that gradient descent has made: a transformer trained to a program, so that its weights look like weights and every edge is known all the same.

Three losses are added, cross-entropies of the right answer at the scored positions, after Geiger et al. 2022 and Gupta et al. 2024 (strict interchange intervention training), here with edges in the
place of whole components:

- *behaviour*: as the model is;
- *strict*: with all edges ablated together that the program doesn't have, each replaced by its source's part at another sequence and position. What the program doesn't read then
  can't be needed;
- *interchange*: with one variable of the program replaced, in all edges that carry it, by the same component's part in another sequence; right is what the program answers with that sequence's
  variable. So the component holds the variable, and not something else that would do.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from causal_probe.arguments import Count, Seed, checked
from causal_probe.circuits.check_truth import Donor, ablate, parts_of
from causal_probe.circuits.handset import HAND_SET, PROGRAMS, S, T
from causal_probe.circuits.known import Edge, KnownCircuit
from causal_probe.circuits.planting import plant
from causal_probe.circuits.program import Component, Offset, Program, Table
from causal_probe.errors import CausalProbeError
from causal_probe.models.standard import StandardTransformer
from causal_probe.training import adam, minimise

__all__ = ["TRAINED", "trained_circuit"]

#: The programs that are trained: two that are set by hand, too, and one with an MLP between two heads.
TRAINED = ("value-composition", "duplicate-token", "renamed-copy")
WIDTH, HEADS, D_HEAD, HIDDEN = 48, 2, 24, 96
RATE, CLIP = 3e-3, 1.0


@checked
def trained_circuit(
    name: str, *, strict: bool = True, steps: Count = 2_000, batch_size: Count = 64, seed: Seed = 0
) -> KnownCircuit:
    """Train a transformer to a program: two heads a layer and an MLP, no norms, whatever the program needs of them; what it doesn't need is there too, and is not to be used.

    Parameters
    ----------
    name
        One of :data:`TRAINED`, or another circuit set by hand.
    strict
        Whether the strict and the interchange loss are added; without them the model learns the behaviour alone, in whatever way.
    steps, batch_size, seed
        Of Adam, and of its random numbers; the rate falls along half a cosine in the second half.

    Returns
    -------
    circuit
        ``exact`` is ``("resample",)`` as far as it was trained; :func:`~causal_probe.circuits.check_truth` tells how far. Under other contrasts edges may have effects that nobody asked for.

    Raises
    ------
    CausalProbeError
        If there is no such program.
    """
    if name not in HAND_SET and name not in TRAINED:
        raise CausalProbeError(
            f"There is no program {name!r} to train; choose from {', '.join(TRAINED)}, or another of {', '.join(HAND_SET)}."
        )
    program = PROGRAMS[name]() if name in PROGRAMS else _renamed_copy()
    planted = HAND_SET[name]() if name in HAND_SET else plant(name, program, description=RENAMED)
    n_layers = planted.model.cfg.n_layers
    full = f"trained-{name}" if strict else f"untaught-{name}"
    model = StandardTransformer(
        program.d_vocab, program.n_positions, d_model=WIDTH, n_layers=n_layers, n_heads=HEADS, d_head=D_HEAD, d_mlp=HIDDEN, d_out=program.sizes()[program.output], name=full
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    _draw(model, generator)
    truth = planted.truth.copy()
    truth.graph.update(name=full, exact=("resample",))
    description = f"{planted.description} Trained{' to the behaviour alone' if not strict else ''}, {steps} steps of {batch_size} sequences."
    circuit = replace(planted, name=full, model=model, truth=truth, description=description)
    # First what is right, whatever is ablated; then, that the logits don't move at all.
    for still, rate in ((False, adam(steps // 2, batch_size=batch_size, learning_rate=RATE, warm=1)), (strict, adam(steps - steps // 2, batch_size=batch_size, learning_rate=RATE, warm=0))):  # fmt: skip
        minimise(model, partial(_loss, circuit, program, generator, strict, still), rate, clip=CLIP)
    return circuit


#: What the program of that name computes.
RENAMED = "The token two back, renamed by a table: one back, of what an MLP has looked up for the token before."


def _renamed_copy() -> Program:
    heads: dict[str, Component] = {
        "L0H0": Offset(1, "embed"),
        "L0.mlp": Table(("L0H0",), (1, 2, 3, 0), S),
        "L1H0": Offset(1, "L0.mlp"),
    }
    return Program(S, T, heads, "L1H0")


def _draw(model: StandardTransformer, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            kind = name.rpartition(".")[2]
            if kind.startswith("W_"):
                inputs = 1.0 if kind in ("W_E", "W_pos") else weight.shape[-2] * (2 if kind == "W_Q" else 1)
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(inputs))


def _loss(
    circuit: KnownCircuit, program: Program, generator: torch.Generator, strict: bool, still: bool, batch_size: int
) -> Float[Tensor, ""]:
    model, tokens = circuit.model, circuit.sample(batch_size, generator)
    right = program.run(tokens)[program.output]
    logits = model(tokens)
    loss = _wrong(logits, right).mean()
    if not strict:
        return loss
    parts = parts_of(model, tokens)
    others = [edge for edge in circuit.candidates() if edge not in circuit.truth.edges]
    donors: dict[Edge, Donor] = {edge: _elsewhere(parts[edge[0]], generator) for edge in others}

    def unchanged(after: Tensor, _: Tensor) -> Float[Tensor, " batch"]:
        return _wrong(after, right) + (_moved(after, logits) if still else 0)

    loss = loss + ablate(model, tokens, donors, unchanged).mean()
    variables = [name for name in program.components if name in program.relevant()]
    chosen = variables[int(torch.randint(len(variables), (), generator=generator))]
    order = torch.randperm(batch_size, generator=generator)
    swapped = program.run(tokens, {chosen: program.run(tokens)[chosen][order]})[program.output]
    carried: dict[Edge, Donor] = {
        edge: lambda: parts[chosen][order] for edge in circuit.truth.edges if edge[0] == chosen
    }
    return loss + ablate(model, tokens, carried, lambda after, _: _wrong(after, swapped)).mean()


def _elsewhere(part: Float[Tensor, "batch pos d_model"], generator: torch.Generator) -> Donor:
    later = part[:, 1:]
    taken = torch.randperm(later.shape[0] * later.shape[1], generator=generator)
    return lambda: torch.cat([part[:, :1], later.flatten(0, 1)[taken].reshape(later.shape)], 1)


def _moved(
    after: Float[Tensor, "batch pos d_out"], before: Float[Tensor, "batch pos d_out"]
) -> Float[Tensor, " batch"]:
    """Mean squared change of the logits over their own mean square (and 1, for the start), both but for what all logits of a row have in common; from position 2 on."""
    own, change = (each[:, 2:] - each[:, 2:].mean(-1, keepdim=True) for each in (before, after - before))
    return change.square().mean((1, 2)) / (1 + own.square().mean().detach())


def _wrong(logits: Float[Tensor, "batch pos d_out"], right: Int[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    """Cross-entropy from position 2 on, where programs are scored."""
    return functional.cross_entropy(logits[:, 2:].mT, right[:, 2:], reduction="none").mean(1)
