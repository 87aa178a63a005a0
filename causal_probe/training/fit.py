"""Fitting a disentangled transformer to a task, on fresh sequences at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from tqdm.auto import tqdm

from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.models.fast import last_logits
from causal_probe.tasks import Batch, InContextMarkov
from causal_probe.training.checkpoint import Checkpoint, Progress
from causal_probe.training.stages import Stage

__all__ = ["History", "evaluate", "fit", "task_loss"]

#: Parts of layer 0's matrix that a stage may move by themselves: the (position, position) block, and all others.
PARTS_OF_A0 = frozenset({"A0.position", "A0.tokens"})

#: Called before every step with the step's number, and once after the last step.
Callback = Callable[[int, DisentangledTransformer], None]


@dataclasses.dataclass(frozen=True)
class History:
    """What happened at every step, in order.

    Attributes
    ----------
    step : tuple[int, ...]
        0, 1, 2, ... across stages.
    stage : tuple[str, ...]
        The stage that the step belongs to.
    loss : tuple[float, ...]
        Cross-entropy in nats on the step's own batch before the step moved anything: the batch is fresh, so this is an
        unbiased estimate of the loss at that moment.
    sequences : int
        How many sequences were drawn in all.
    """

    step: tuple[int, ...]
    stage: tuple[str, ...]
    loss: tuple[float, ...]
    sequences: int


def task_loss(
    logits: Float[Tensor, "batch d_vocab"], target: Float[Tensor, "batch d_vocab"]
) -> Float[Tensor, " batch"]:
    """-sum_s target(s) log softmax(logits)(s), in nats, one per sequence.

    Examples
    --------
    >>> import torch
    >>> task_loss(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]])).round(decimals=3)
    tensor([1.0990])
    """
    return -(target * log_softmax(logits, dim=-1)).sum(-1)


def fit(
    model: DisentangledTransformer,
    task: InContextMarkov,
    stages: Sequence[Stage],
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    probe_every: int | None = None,
    probe: Callback | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> History:
    """Train ``model`` in place, stage by stage.

    Parameters
    ----------
    model
        Its shape must fit the task. It stays on its device, which must be the generator's.
    stages
        See :mod:`causal_probe.training.stages`.
    generator
        The source of all sequences; the same state gives the same model on the same machine and number of threads.
    callback
        Called with (step, model) before every step and once after the last: to probe a model while it learns. Only the
        stage's weights require gradients then.
    probe_every, probe
        A second callback that is called at step 0, every ``probe_every`` steps, and once after the last.
    checkpoint
        Where the run is kept. If the file is there, the run goes on from it, and ends as if it had never been interrupted
        (callbacks are not called again for the steps that were made). The file is left when the run ends or fails, and deleted when the
        training diverges: it would diverge again.
    progress
        Show a tqdm bar, on standard error.

    Raises
    ------
    CausalProbeError
        If model and task differ in shape, the generator is on another device, a stage moves what the model does not have
        (nothing is moved then), the checkpoint is not of this run, or the loss or the weights stop being finite.

    Examples
    --------
    >>> from causal_probe import graphs, models, tasks, training
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=3, alpha=0.1)
    >>> model = models.DisentangledTransformer(d_vocab=3, n_positions=task.n_positions)
    >>> stages = training.joint(steps=2, batch_size=8)
    >>> history = fit(model, task, stages, generator=tasks.generator(0, "training"))
    >>> history.step, history.sequences
    ((0, 1), 16)
    """
    if (probe is None) != (probe_every is None) or (probe_every is not None and probe_every < 1):
        raise CausalProbeError(
            f"A probe is called every so many steps: give probe and probe_every (at least 1, not {probe_every}) together."
        )
    if (model.d_vocab, model.n_positions) != (task.d_vocab, task.n_positions):
        raise CausalProbeError(
            f"The task has {task.d_vocab} states and {task.n_positions} positions; the model has {model.d_vocab} and "
            f"{model.n_positions}. Build a model of the task's shape."
        )
    if generator.device.type != model.W_U.device.type:
        raise CausalProbeError(
            f"The generator is on {generator.device} and the model on {model.W_U.device}. Make both on one device."
        )
    names: dict[str, nn.Parameter] = {f"A{layer}": block.attn.A for layer, block in enumerate(model.blocks)}
    names["W_U"] = model.W_U
    _check_moves(stages, names, position_only=_only_positions(model))
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    threads = torch.get_num_threads()
    made = (checkpoint.load(model, generator) if checkpoint is not None else None) or Progress(0, 0, [], {})
    losses = made.losses
    total = sum(stage.steps for stage in stages)
    bar = tqdm(total=total, disable=not progress, unit="step", dynamic_ncols=True)
    bar.update(len(losses))

    def look() -> None:
        if callback is not None:
            callback(len(losses), model)
        if probe is not None and probe_every is not None and (len(losses) % probe_every == 0 or len(losses) == total):
            probe(len(losses), model)

    def keep(index: int, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        if checkpoint is not None:
            moments = {} if optimizer is None else optimizer.state_dict()["state"]
            checkpoint.save(model, generator, Progress(index, step, losses, moments))

    def diverged(message: str) -> CausalProbeError:
        """The run would fail again from its checkpoint, so that goes. Whatever else fails leaves it."""
        if checkpoint is not None:
            checkpoint.delete()
        return CausalProbeError(message)

    try:
        for index, stage in enumerate(stages[made.stage :], start=made.stage):
            first = made.step if index == made.stage else 0
            moving = {"A0" if name in PARTS_OF_A0 else name for name in stage.moves}
            for name, parameter in names.items():
                parameter.requires_grad_(name in moving)
            # The fast forward may use the position block alone if nothing else of layer 0 is there or is to move.
            position_only = not {"A0", "A0.tokens"} & set(stage.moves) and _only_positions(model)
            held = _position_block(model).clone() if "A0.tokens" in stage.moves else None
            moved = [names[name] for name in sorted(moving)]
            optimizer = _optimizer(stage, moved)
            if first and made.optimizer:
                optimizer.load_state_dict({**optimizer.state_dict(), "state": made.optimizer})
            bar.set_description(stage.name)
            for step in range(first, stage.steps):
                if checkpoint is not None and step > first and step % checkpoint.every == 0:
                    keep(index, step, optimizer)
                look()
                for group in optimizer.param_groups:
                    group["lr"] = stage.rate_at(step)
                batch = task.sample(stage.batch_size, generator, dtype=model.W_U.dtype)
                with torch.enable_grad():  # notebooks of the field often begin by turning gradients off
                    logits = last_logits(batch.tokens, model.A, model.W_U, position_only=position_only)
                    loss = task_loss(logits, batch.target).mean()
                value = float(loss.detach())
                if not value < float("inf"):
                    cause = (
                        f"learning rate {stage.learning_rate:g} is"
                        if losses
                        else "weights that the model began with are"
                    )
                    raise diverged(f"The loss is {value} at step {len(losses)} ({stage.name}): the {cause} too large.")
                for parameter, gradient in zip(moved, torch.autograd.grad(loss, moved), strict=True):
                    parameter.grad = gradient
                optimizer.step()
                if held is not None:  # the optimiser moves whole matrices
                    _position_block(model).copy_(held)
                losses.append(value)
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{value:.4f}")
            # No later loss may tell what the stage's last step did.
            if not all(bool(torch.isfinite(parameter).all()) for parameter in moved):
                raise diverged(
                    f"The weights are not finite after {len(losses)} steps ({stage.name}): the learning rate "
                    f"{stage.learning_rate:g} is too large."
                )
            keep(index + 1, 0, None)
        look()
    finally:
        bar.close()
        torch.set_num_threads(threads)
        for parameter, flag, kept in before:
            parameter.requires_grad_(flag)
            parameter.grad = kept
    return History(
        step=tuple(range(total)),
        stage=tuple(stage.name for stage in stages for _ in range(stage.steps)),
        loss=tuple(losses),
        sequences=sum(stage.steps * stage.batch_size for stage in stages),
    )


@torch.no_grad()
def evaluate(model: DisentangledTransformer, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy of the model over all sequences, in nats.

    Raises
    ------
    CausalProbeError
        If there are no sequences, or a batch does not fit the model.

    Examples
    --------
    >>> from causal_probe import graphs, models, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=3, alpha=0.1)
    >>> model = models.DisentangledTransformer(d_vocab=3, n_positions=task.n_positions)
    >>> round(evaluate(model, [task.sample(64, tasks.generator(0, "fresh"))]), 3)  # it knows nothing yet: log 3
    1.099
    """
    if not batches:
        raise CausalProbeError("A loss was asked for and there are no sequences. Give at least one batch.")
    total = sum(float(task_loss(model.predict(batch.tokens), batch.target).double().sum()) for batch in batches)
    return total / sum(len(batch) for batch in batches)


def _check_moves(stages: Sequence[Stage], names: dict[str, nn.Parameter], *, position_only: bool) -> None:
    for stage in stages:
        unknown = sorted(set(stage.moves) - set(names) - PARTS_OF_A0)
        if unknown or not stage.moves:
            raise CausalProbeError(
                f"The stage {stage.name!r} is to move {unknown or 'nothing'}; it can move A0.position, A0.tokens, {', '.join(names)}."
            )
        if "A0.tokens" in stage.moves and ({"A0", "A0.position"} & set(stage.moves) or len(names) < 3):
            raise CausalProbeError(
                f"The stage {stage.name!r} moves layer 0's blocks but the position block (A0.tokens). That can't be together with A0 or "
                "A0.position, and needs a model of two layers or more."
            )
        position_only = position_only and not {"A0", "A0.tokens"} & set(stage.moves)
        if "A0.position" in stage.moves and not position_only:
            raise CausalProbeError(
                f"The stage {stage.name!r} moves layer 0's position block alone. That needs a model of two layers or more "
                "whose other blocks in layer 0 are zero, and no stage up to this one that moves them (A0, A0.tokens)."
            )


def _position_block(model: DisentangledTransformer) -> Float[Tensor, "head pos pos"]:
    """Layer 0's (position, position) block of every head, as a view."""
    position = model.subspaces(0)["position"]
    return model.A[0].detach()[:, position, position]


def _only_positions(model: DisentangledTransformer) -> bool:
    """Whether the fast forward may take layer 0 for its (position, position) block: a last layer it computes as it is."""
    if len(model.heads) == 1:
        return False
    token = model.subspaces(0)["token"]
    A_0 = model.A[0].detach()
    return not bool(A_0[:, token].any() or A_0[:, :, token].any())


def _optimizer(stage: Stage, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if stage.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)
    return torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)
