"""The one loop of all training: stages of steps, each on fresh data, that can be kept and gone on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer, ReducedTransformer
from causal_probe.tasks import Task
from causal_probe.training.checkpoint import Checkpoint, Progress
from causal_probe.training.stages import Stage

__all__ = ["Begun", "History", "check_sizes", "descend"]


@dataclasses.dataclass(frozen=True)
class History:
    """The record of every step, in order.

    Attributes
    ----------
    step : tuple[int, ...]
        0, 1, 2, ... across stages.
    stage : tuple[str, ...]
        The stage that the step belongs to.
    loss : tuple[float, ...]
        The loss (cross-entropy in nats, where nothing else was asked for) on the step's own batch before the step moved anything: the batch is
        fresh, so this is an unbiased estimate of the loss at that moment.
    n_sequences : int
        How many sequences were drawn in all.
    """

    step: tuple[int, ...]
    stage: tuple[str, ...]
    loss: tuple[float, ...]
    n_sequences: int

    @classmethod
    def of(cls, stages: Sequence[Stage], losses: Sequence[float]) -> History:
        """Of stages that ran to their end, with these losses."""
        return cls(
            step=tuple(range(len(losses))),
            stage=tuple(stage.name for stage in stages for _ in range(stage.steps)),
            loss=tuple(losses),
            n_sequences=sum(stage.steps * stage.batch_size for stage in stages),
        )


@dataclasses.dataclass(frozen=True)
class Begun:
    """What a stage that begins moves, and on which loss.

    Attributes
    ----------
    moved
        The weights.
    loss
        Draws fresh data; a scalar, or a vector of one loss for each of several models that share no weight.
    after
        Called after every step.
    """

    moved: Sequence[nn.Parameter]
    loss: Callable[[], Tensor]
    after: Callable[[], object] | None = None


def check_sizes(model: DisentangledTransformer | ReducedTransformer, task: Task) -> None:
    """Raise unless the model has the task's number of states and of positions."""
    if (model.d_vocab, model.n_positions) != (task.d_vocab, task.n_positions):
        raise CausalProbeError(
            f"The task has {task.d_vocab} states and {task.n_positions} positions; the model has {model.d_vocab} and "
            f"{model.n_positions}. Build a model of the task's shape."
        )


def optimizer_of(stage: Stage, moved: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Torch's own optimiser that the stage names."""
    kind = torch.optim.SGD if stage.optimizer == "sgd" else torch.optim.AdamW
    return kind(moved, lr=stage.learning_rate, weight_decay=stage.weight_decay)


def descend(
    stages: Sequence[Stage],
    begin: Callable[[Stage], Begun],
    *,
    fresh: bool = True,
    optimizer_of: Callable[[Stage, Sequence[nn.Parameter]], torch.optim.Optimizer] = optimizer_of,
    clip: float | None = None,
    callback: Callable[[int], None] | None = None,
    model: nn.Module | None = None,
    generator: torch.Generator | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> list[list[float]]:
    """Run stages; return the losses at every step, one for each model.

    Parameters
    ----------
    begin
        Called as each stage begins.
    fresh
        Every stage begins with a new optimiser. Without it, one lasts as long as consecutive stages name it with one weight decay.
    clip
        Largest norm of the gradient; larger ones are scaled down.
    callback
        Called with the step's number before every step and once after the last.
    model, generator, checkpoint
        Where the state is kept. A run continues from the file if it exists, and ends as if it had never been interrupted. The file is left when the
        run ends or fails, and deleted when the training diverges: it would diverge again. A run of one model can be kept.
    progress
        Show a tqdm bar, on standard error.

    Raises
    ------
    CausalProbeError
        If the checkpoint is not of this run, or the loss or the weights stop being finite.
    """
    threads = torch.get_num_threads()
    made = Progress(0, 0, [], {})
    if checkpoint is not None and model is not None and generator is not None:
        made = checkpoint.load(model, generator) or made
    losses = [[loss] for loss in made.losses]
    optimizer: torch.optim.Optimizer | None = None
    gradients_before: dict[nn.Parameter, Tensor | None] = {}
    bar = tqdm(total=sum(stage.steps for stage in stages), disable=not progress, unit="step", dynamic_ncols=True)
    bar.update(len(losses))

    def keep(index: int, step: int) -> None:
        if checkpoint is not None and model is not None and generator is not None:
            moments = {} if optimizer is None or (fresh and not step) else optimizer.state_dict()["state"]
            checkpoint.save(model, generator, Progress(index, step, [loss for (loss,) in losses], moments))

    def diverged(message: str) -> CausalProbeError:
        """The run would fail again from its checkpoint, so that goes. Whatever else fails leaves it."""
        if checkpoint is not None:
            checkpoint.delete()
        return CausalProbeError(message)

    try:
        for index, stage in enumerate(stages[made.stage :], start=made.stage):
            first = made.step if index == made.stage else 0
            begun = begin(stage)
            gradients_before |= {weight: weight.grad for weight in begun.moved if weight not in gradients_before}
            kind = (stage.optimizer, stage.weight_decay)
            goes_on = not fresh and index > 0 and kind == (stages[index - 1].optimizer, stages[index - 1].weight_decay)
            if optimizer is None or not goes_on:
                optimizer = optimizer_of(stage, begun.moved)
                if made.optimizer and index == made.stage and (first or goes_on):
                    optimizer.load_state_dict({**optimizer.state_dict(), "state": made.optimizer})
            bar.set_description(stage.name)
            for step in range(first, stage.steps):
                if checkpoint is not None and step > first and step % checkpoint.every == 0:
                    keep(index, step)
                if callback is not None:
                    callback(len(losses))
                for group in optimizer.param_groups:
                    group["lr"] = stage.rate_at(step)
                with torch.enable_grad():  # notebooks of the field often begin by turning gradients off
                    loss = begun.loss()
                    total = loss.sum()  # models share nothing: its gradient is, model by model, that of its own loss
                values = loss.detach().reshape(-1).tolist()
                if wrong := [number for number, value in enumerate(values) if not value < float("inf")]:
                    of = f" of model {wrong[0]}" if len(values) > 1 else ""
                    cause = (
                        f"learning rate {stage.learning_rate:g} is"
                        if losses
                        else "weights that the model began with are"
                    )
                    raise diverged(
                        f"The loss{of} is {values[wrong[0]]} at step {len(losses)} ({stage.name}): the {cause} too large."
                    )
                gradients = torch.autograd.grad(total, begun.moved, allow_unused=True)
                for parameter, gradient in zip(begun.moved, gradients, strict=True):
                    parameter.grad = gradient
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(begun.moved, clip)
                optimizer.step()
                if begun.after is not None:
                    begun.after()
                losses.append(values)
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{sum(values) / len(values):.4f}")
            # No later loss may tell what the stage's last step did.
            if not all(bool(torch.isfinite(parameter).all()) for parameter in begun.moved):
                raise diverged(
                    f"The weights are not finite after {len(losses)} steps ({stage.name}): the learning rate "
                    f"{stage.learning_rate:g} is too large."
                )
            keep(index + 1, 0)
        if callback is not None:
            callback(len(losses))
    finally:
        bar.close()
        torch.set_num_threads(threads)
        for parameter, before in gradients_before.items():
            parameter.grad = before
    return losses
