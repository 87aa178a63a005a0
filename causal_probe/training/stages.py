"""What a training run does, as plain values: a run is a list of stages, a stage is one optimiser moving some of the weights.

**Staged** training follows Algorithm 1 of Nichani, Damian & Lee 2024, carried over from their two-matrix model to the full
one. Two things are *given* before it starts (:func:`give_matcher`): layer 1 compares the query's state with the state that
each head of layer 0 copied (that block of its A is beta I), and the output reads the states that layer 1 attends to. Stage 1
then moves layer 0's (position, position) block alone: the graph. Stage 2 freezes it and moves everything above.
Moving all of layer 0's A in stage 1 attains less: its token blocks compete for the same gradient.

Where nodes have several parents, the comparison that is given asks for too little: the last token is at most one of the parents of the node
to be predicted, so the parents in its slot are learnt and those in other slots are not. :mod:`causal_probe.training.slots` gives
each head a slot of its own.

**Joint** training gives nothing: all weights start at zero (or at small noise) and move together.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import torch

from causal_probe.arguments import Count, checked
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer

__all__ = ["Optimizer", "Schedule", "Stage", "give_matcher", "joint", "staged"]

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["constant", "cosine"]

#: A larger learning rate or weight decay overflows float32 in a few steps, whatever the task.
LARGEST_RATE = 1e12


@checked
@dataclasses.dataclass(frozen=True)
class Stage:
    """One optimiser, moving some of the weights for some steps, each on fresh sequences.

    Attributes
    ----------
    name
        The stage's name in tables and pictures.
    steps, batch_size
        Numbers of steps, and of sequences in each.
    optimizer, learning_rate, schedule, weight_decay
        ``sgd`` (plain) or ``adamw``; the rate stays (``constant``) or falls to zero along half a cosine (``cosine``).
    moves
        The weights that move: ``"A0"``, ``"A1"``, ... the query-key matrices of a layer, ``"A0.position"`` layer 0's
        (position, position) block alone, ``"A0.tokens"`` its other blocks, ``"W_U"`` the output. All others are frozen.
    """

    name: str
    steps: int
    batch_size: int
    optimizer: Optimizer
    learning_rate: float
    moves: tuple[str, ...]
    schedule: Schedule = "constant"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        allowed = {
            "steps": (self.steps >= 0, "not be negative"),
            "batch_size": (self.batch_size >= 1, "be at least 1"),
            "optimizer": (self.optimizer in get_args(Optimizer), "be sgd or adamw"),
            "schedule": (self.schedule in get_args(Schedule), "be constant or cosine"),
            "learning_rate": (0 < self.learning_rate <= LARGEST_RATE, f"be positive and at most {LARGEST_RATE:g}"),
            "weight_decay": (0 <= self.weight_decay <= LARGEST_RATE, f"be from 0 to {LARGEST_RATE:g}"),
        }
        if problems := [
            f"{name} must {what}, not {getattr(self, name)!r}" for name, (fits, what) in allowed.items() if not fits
        ]:
            raise CausalProbeError(f"The stage {self.name!r} can't be run: " + "; ".join(problems) + ".")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2


def check_two_layers(model: DisentangledTransformer) -> None:
    """Raise unless staged training is defined for the model: one layer copies parents, and one compares."""
    if len(model.heads) != 2:
        raise CausalProbeError(
            f"Staged training is defined for two layers; the model has {len(model.heads)}. Use joint training (--training joint)."
        )


@checked
def give_matcher(model: DisentangledTransformer, *, beta: float = 1.0) -> tuple[str, ...]:
    """Set what staged training starts from; return it in words. All other weights are left as they are.

    Parameters
    ----------
    beta
        Scale of the comparison.

    Raises
    ------
    CausalProbeError
        If the model does not have two layers: the construction needs one to copy parents and one to compare.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> give_matcher(DisentangledTransformer(d_vocab=3, n_positions=4))
    ('L1H0 compares (token, L0H0.token): 1 I', 'W_U reads L1H0.token: I')
    """
    check_two_layers(model)
    with torch.no_grad():
        eye = torch.eye(model.d_vocab, dtype=model.W_U.dtype, device=model.W_U.device)
        given = []
        for head in range(model.heads[0]):
            copy = f"L0H{head}.token"
            model.block(1, 0, query="token", key=copy).copy_(beta * eye)
            given.append(f"L1H0 compares (token, {copy}): {beta:g} I")
        model.output_block("L1H0.token").copy_(eye)
    return (*given, "W_U reads L1H0.token: I")


@checked
def staged(
    *,
    n_positions: Count,
    graph_steps: int = 20,
    graph_batch_size: int = 4096,
    graph_learning_rate: float | None = None,
    steps: int = 500,
    batch_size: int = 512,
    optimizer: Optimizer = "adamw",
    learning_rate: float = 3e-2,
) -> tuple[Stage, ...]:
    """Stage 1 writes the graph into layer 0; stage 2 fits all that reads it.

    Parameters
    ----------
    n_positions
        T. The gradient of a late row is of the order 1 / T^2 (one of T positions that layer 1 reads, one of up to T that the
        row spreads over), so the default rate of stage 1 is 7.5 T^2: 3,000 at T = 20.
    graph_steps, graph_batch_size, graph_learning_rate
        Of stage 1, plain gradient descent; ``None``: that rate.
    steps, batch_size, optimizer, learning_rate
        Of stage 2, whose rate falls to zero along half a cosine.

    Examples
    --------
    >>> [(stage.name, stage.steps, stage.moves) for stage in staged(n_positions=8)]
    [('the graph', 20, ('A0.position',)), ('the rest', 500, ('A1', 'W_U'))]
    """
    graph_rate = 7.5 * n_positions**2 if graph_learning_rate is None else graph_learning_rate
    return (
        Stage("the graph", graph_steps, graph_batch_size, "sgd", graph_rate, moves=("A0.position",)),
        Stage("the rest", steps, batch_size, optimizer, learning_rate, moves=("A1", "W_U"), schedule="cosine"),
    )


@checked
def joint(
    *,
    n_layers: Count = 2,
    steps: int | None = None,
    batch_size: int | None = None,
    optimizer: Optimizer = "sgd",
    learning_rate: float | None = None,
    schedule: Schedule = "constant",
    weight_decay: float = 0.0,
) -> tuple[Stage, ...]:
    """All weights move together.

    The defaults of ``"sgd"`` are 384 steps of 4,096 sequences at the authors' rate of 1. From zero weights the true parents
    come to lead within some dozen to some hundred steps; later some of them are overtaken again by another position, often
    by position 0. The defaults of ``"adamw"`` are 1,024 steps of 1,024 at
    the authors' 0.01.

    Parameters
    ----------
    n_layers
        Of the model.
    steps, batch_size, optimizer, learning_rate, schedule, weight_decay
        As in :class:`~causal_probe.training.stages.Stage`; ``None``: the defaults above.

    Examples
    --------
    >>> [(stage.name, stage.optimizer, stage.steps) for stage in joint(steps=10, batch_size=64)]
    [('joint', 'sgd', 10)]
    """
    defaults: dict[str, tuple[int, int, float]] = {"sgd": (384, 4096, 1.0), "adamw": (1024, 1024, 1e-2)}
    usual_steps, usual_batch_size, usual_rate = defaults.get(optimizer, (0, 1, 1.0))
    return (
        Stage(
            "joint",
            usual_steps if steps is None else steps,
            usual_batch_size if batch_size is None else batch_size,
            optimizer,
            usual_rate if learning_rate is None else learning_rate,
            moves=(*(f"A{layer}" for layer in range(n_layers)), "W_U"),
            schedule=schedule,
            weight_decay=weight_decay,
        ),
    )
