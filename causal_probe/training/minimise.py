"""Minimising any loss of a module on fresh data, stage by stage: for models over continuous tokens.

:func:`causal_probe.training.fit` is made for the disentangled transformer: its stages move named blocks, and its forward leaves
out what does not move. Here all weights that require gradients move together, and the loss is whatever the caller draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causal_probe.arguments import Scale, checked
from causal_probe.errors import CausalProbeError
from causal_probe.models import LinearTransformer
from causal_probe.tasks.regression import RegressionBatch
from causal_probe.training.checkpoint import Checkpoint
from causal_probe.training.loop import Begun, History, descend
from causal_probe.training.stages import Stage

__all__ = ["RegressionTask", "adam", "minimise", "regression_loss"]


@runtime_checkable
class RegressionTask(Protocol):
    """The protocol of tasks with continuous tokens."""

    d_out: int

    @property
    def n_positions(self) -> int:
        """Number of tokens."""

    @property
    def d_token(self) -> int:
        """Width of a token."""

    def sample(
        self, batch_size: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32
    ) -> RegressionBatch:
        """Draw a batch."""


@checked
def adam(
    steps: int = 5_000, *, batch_size: int = 2_048, learning_rate: float = 3e-3, warm: float = 0.5
) -> tuple[Stage, ...]:
    """Adam at a constant rate for the share ``warm`` of the steps, then falling to zero along half a cosine.

    Training begins at a saddle that takes some seeds a thousand steps to leave; the rate falls so that the end is no random walk
    about the optimum. All weights move. ``batch_size`` is the number of sequences in a step, ``learning_rate`` the constant rate.

    Examples
    --------
    >>> [(stage.name, stage.steps) for stage in adam(steps=100)]
    [('constant rate', 50), ('falling rate', 50)]
    """
    first = round(warm * steps)
    constant = Stage("constant rate", first, batch_size, "adamw", learning_rate, moves=("all",))
    falling = Stage("falling rate", steps - first, batch_size, "adamw", learning_rate, ("all",), schedule="cosine")
    return tuple(stage for stage in (constant, falling) if stage.steps)


@checked
def regression_loss(
    model: LinearTransformer, task: RegressionTask, generator: torch.Generator
) -> Callable[[int], Float[Tensor, ""]]:
    """Half the squared error for the query, summed over outputs, averaged over ``batch_size`` fresh sequences.

    Raises
    ------
    CausalProbeError
        If the model's shape is not the task's.

    Examples
    --------
    >>> from causal_probe import models, tasks
    >>> task = tasks.LinearRegression(d_x=2, n_examples=4)
    >>> loss = regression_loss(models.gradient_steps(2, 4, eta=[0.1]), task, tasks.generator(0, "training"))
    >>> loss(8).shape
    torch.Size([])
    """
    check_shapes(model, task)

    def loss(batch_size: int) -> Tensor:
        batch = task.sample(batch_size, generator, dtype=model.cfg.dtype)
        return 0.5 * (model.predict(batch.tokens) - batch.target).square().sum(-1).mean()

    return loss


def check_shapes(model: LinearTransformer, task: RegressionTask) -> None:
    """Raise unless the model reads the task's tokens and answers with its outputs."""
    wanted, found = (task.d_token, task.d_out), (model.d_token, model.d_out)
    if wanted != found or model.n_positions < task.n_positions:
        raise CausalProbeError(
            f"The task has tokens of width {task.d_token} with {task.d_out} outputs, at {task.n_positions} positions; the model "
            f"reads width {model.d_token} with {model.d_out} outputs, at up to {model.n_positions}. Build a model of the task's shape."
        )


@checked
def minimise(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    stages: Sequence[Stage],
    *,
    clip: Scale | None = None,
    callback: Callable[[int], None] | None = None,
    generator: torch.Generator | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> History:
    """Train ``model`` in place on ``loss(batch_size)``, a scalar on fresh data. All weights that require gradients move.

    Parameters
    ----------
    stages
        As for :func:`~causal_probe.training.fit`; ``moves`` is not looked at, and the optimiser's state lasts as long as
        consecutive stages name one optimiser.
    clip
        Largest norm of the gradient; larger ones are scaled down.
    callback
        Called with the step's number before every step and once after the last.
    generator, checkpoint
        Where the run is kept, as in :func:`~causal_probe.training.fit`, and the source that ``loss`` draws its data from, whose state is kept
        with it. All that ``callback`` remembers must be in the checkpoint's notes.
    progress
        Show a tqdm bar, on standard error.

    Returns
    -------
    History
        Losses are before the step, on its own fresh data. ``n_sequences`` is the requested number.

    Raises
    ------
    CausalProbeError
        If nothing requires gradients, the checkpoint has no generator to keep or is not of this run, or the loss or the weights stop being
        finite: the rate is too large.

    Examples
    --------
    >>> from causal_probe import models, tasks, training
    >>> model = models.gradient_steps(2, 4, eta=[0.1])
    >>> loss = training.regression_loss(model, tasks.LinearRegression(d_x=2, n_examples=4), tasks.generator(0, "training"))
    >>> minimise(model, loss, training.adam(steps=2, batch_size=8)).step
    (0, 1)
    """
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not moved:
        raise CausalProbeError("No weight of the model requires gradients, so there is nothing to train.")
    if checkpoint is not None and generator is None:
        raise CausalProbeError("A run that is kept needs the generator of its data: pass it beside the checkpoint.")
    losses = descend(
        stages,
        lambda stage: Begun(moved, lambda: loss(stage.batch_size)),
        fresh=False,
        clip=clip,
        callback=callback,
        model=model,
        generator=generator,
        checkpoint=checkpoint,
        progress=progress,
    )
    return History.of(stages, [loss for (loss,) in losses])
