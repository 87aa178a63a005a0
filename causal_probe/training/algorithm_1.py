"""Algorithm 1 of Nichani, Damian & Lee 2024: the reduced transformer, one matrix after the other, by plain gradient descent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from causal_probe.errors import CausalProbeError
from causal_probe.models import ReducedTransformer
from causal_probe.tasks import Task
from causal_probe.training.loop import Begun, History, check_sizes, descend
from causal_probe.training.stages import Stage

__all__ = ["algorithm_1", "algorithm_1_stages"]


def algorithm_1_stages(
    n_positions: int, *, graph_steps: int = 20, steps: int = 100, batch_size: int = 4096
) -> tuple[Stage, Stage]:
    """Stage 1 on A1, stage 2 on A2, both with plain gradient descent.

    The rate of stage 1 is that of :func:`causal_probe.training.staged`, 7.5 T^2, because the gradient of a late row is of the order of
    1 / T^2; that of stage 2 is 1.

    Examples
    --------
    >>> [(stage.name, stage.steps) for stage in algorithm_1_stages(8)]
    [('stage 1', 20), ('stage 2', 100)]
    """
    return (
        Stage("stage 1", graph_steps, batch_size, "sgd", 7.5 * n_positions**2, moves=("A1",)),
        Stage("stage 2", steps, batch_size, "sgd", 1.0, moves=("A2",)),
    )


def algorithm_1(
    model: ReducedTransformer, task: Task, stages: tuple[Stage, ...] | None = None, *, generator: torch.Generator
) -> History:
    """Train a reduced transformer in place, each step on fresh sequences.

    Parameters
    ----------
    model
        Of the task's shape, where the algorithm starts: A1 = 0, A2 = beta I (a new model is there).
    task
        A tree task.
    stages
        Plain gradient descent on ``"A1"`` or ``"A2"``; :func:`algorithm_1_stages` by default.
    generator
        The source of all sequences.

    Raises
    ------
    CausalProbeError
        If model and task differ in shape, the task is no tree, a stage is not of this kind, or the loss stops being finite.
    """
    check_sizes(model, task)
    if not task.is_tree:
        raise CausalProbeError(
            "The reduced model has one head in layer 1: it can learn one parent per node, and some have several."
        )
    stages = algorithm_1_stages(task.n_positions) if stages is None else stages
    for stage in stages:
        if stage.optimizer != "sgd" or not set(stage.moves) <= {"A1", "A2"} or not stage.moves:
            raise CausalProbeError(
                f"The stage {stage.name!r} moves {list(stage.moves)} by {stage.optimizer}; Algorithm 1 moves A1 or A2 by sgd."
            )
    parameters = {"A1": model.A1, "A2": model.A2}

    def begin(stage: Stage) -> Begun:
        def loss() -> Tensor:
            batch = task.sample(stage.batch_size, generator, dtype=model.A1.dtype)
            return model.loss(batch.tokens, batch.target).mean()

        return Begun([parameters[name] for name in stage.moves], loss)

    losses = descend(stages, begin, optimizer_of=_Descent)
    return History.of(stages, [loss for (loss,) in losses])


class _Descent(torch.optim.Optimizer):
    """Plain gradient descent, rounded twice: torch's own rounds product and difference at once."""

    def __init__(self, stage: Stage, moved: Sequence[nn.Parameter]) -> None:
        super().__init__(moved, {"lr": stage.learning_rate, "weight_decay": stage.weight_decay})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]  # no closure is ever given
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * (parameter.grad + group["weight_decay"] * parameter))
