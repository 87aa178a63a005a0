"""Algorithm 1 of Nichani, Damian & Lee 2024: the reduced transformer, one matrix after the other, by plain gradient descent."""

from __future__ import annotations

import torch

from causal_probe.errors import CausalProbeError
from causal_probe.models import ReducedTransformer
from causal_probe.tasks import InContextMarkov
from causal_probe.training.fit import History
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
    model: ReducedTransformer,
    task: InContextMarkov,
    stages: tuple[Stage, ...] | None = None,
    *,
    generator: torch.Generator,
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
    if (model.d_vocab, model.n_positions) != (task.d_vocab, task.n_positions):
        raise CausalProbeError(
            f"The task has {task.d_vocab} states and {task.n_positions} positions; the model has {model.d_vocab} and "
            f"{model.n_positions}. Build a model of the task's shape."
        )
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
    done: list[tuple[int, str, float]] = []
    sequences = 0
    for stage in stages:
        moved = [parameters[name] for name in stage.moves]
        for step in range(stage.steps):
            batch = task.sample(stage.batch_size, generator, dtype=model.A1.dtype)
            with torch.enable_grad():
                loss = model.loss(batch.tokens, batch.target).mean()
                gradients = torch.autograd.grad(loss, moved)
            value = float(loss.detach())
            if not value < float("inf"):
                raise CausalProbeError(
                    f"The loss is {value} at step {len(done)} ({stage.name}): the weights are not finite. Take a smaller learning rate "
                    f"than {stage.learning_rate:g}, or a new model."
                )
            with torch.no_grad():
                for parameter, gradient in zip(moved, gradients, strict=True):
                    parameter.sub_(stage.rate_at(step) * (gradient + stage.weight_decay * parameter))
            sequences += stage.batch_size
            done.append((len(done), stage.name, value))
    return History(
        step=tuple(step for step, _, _ in done),
        stage=tuple(name for _, name, _ in done),
        loss=tuple(value for _, _, value in done),
        sequences=sequences,
    )
