"""Fitting a disentangled transformer to a task, on fresh sequences at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.tasks import Batch, Task
from causal_probe.training.checkpoint import Checkpoint
from causal_probe.training.loop import Begun, History, check_sizes, descend
from causal_probe.training.loss import compile_step, step_loss, task_loss
from causal_probe.training.stages import Stage

__all__ = ["evaluate", "fit"]

#: Parts of layer 0's matrix that a stage may move by themselves: the (position, position) block, and all others.
PARTS_OF_A0 = frozenset({"A0.position", "A0.tokens"})

#: Called before every step with the step's number, and once after the last step.
Callback = Callable[[int, DisentangledTransformer], None]


@checked
def fit(
    model: DisentangledTransformer,
    task: Task,
    stages: Sequence[Stage],
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    probe_every: int | None = None,
    probe: Callback | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
    compiled: bool = False,
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
    compiled
        Compile the step (:func:`torch.compile`): it takes a C++ compiler and some seconds at the beginning of each stage, and pays from some thousand
        steps. Results are the same to rounding, which training may amplify.

    Raises
    ------
    CausalProbeError
        If model and task differ in shape, the generator is on another device, a stage moves what the model does not have
        (nothing is moved then), the checkpoint is not of this run, or the loss or the weights stop being finite.

    Examples
    --------
    >>> from causal_probe import graphs, models, tasks, training
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=3, concentration=0.1)
    >>> model = models.DisentangledTransformer(d_vocab=3, n_positions=task.n_positions)
    >>> stages = training.joint(steps=2, batch_size=8)
    >>> history = fit(model, task, stages, generator=tasks.generator(0, "training"))
    >>> history.step, history.n_sequences
    ((0, 1), 16)
    """
    if (probe is None) != (probe_every is None) or (probe_every is not None and probe_every < 1):
        raise CausalProbeError(
            f"`probe` is called every `probe_every` steps: give both, and `probe_every` at least 1 (found {probe_every})."
        )
    check_sizes(model, task)
    if generator.device.type != model.W_U.device.type:
        raise CausalProbeError(
            f"The generator is on {generator.device} and the model on {model.W_U.device}. Make both on one device."
        )
    names = named_weights(model)
    check_moves(stages, names, position_only=only_positions(model))
    total = sum(stage.steps for stage in stages)
    of_step = compile_step() if compiled else step_loss

    def begin(stage: Stage) -> Begun:
        moving = moved_by(stage)
        for name, parameter in names.items():
            parameter.requires_grad_(name in moving)
        # The fast forward may use the position block alone if nothing else of layer 0 is there or is to move.
        position_only = not {"A0", "A0.tokens"} & set(stage.moves) and only_positions(model)

        def loss() -> Tensor:
            batch = task.sample(stage.batch_size, generator, dtype=model.W_U.dtype)
            return of_step(batch.tokens, batch.target, model.A, model.W_U, position_only)

        return Begun([names[name] for name in moving], loss, holds_positions(stage, model, names["A0"]))

    def look(step: int) -> None:
        if callback is not None:
            callback(step, model)
        if probe is not None and probe_every is not None and (step % probe_every == 0 or step == total):
            probe(step, model)

    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        losses = descend(
            stages, begin, callback=look, model=model, generator=generator, checkpoint=checkpoint, progress=progress
        )
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
    return History.of(stages, [loss for (loss,) in losses])


@checked
@torch.no_grad()
def evaluate(model: DisentangledTransformer, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy of the model over all sequences of ``batches``, in nats.

    Raises
    ------
    CausalProbeError
        If there are no sequences, or a batch does not fit the model.

    Examples
    --------
    >>> from causal_probe import graphs, models, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=3, concentration=0.1)
    >>> model = models.DisentangledTransformer(d_vocab=3, n_positions=task.n_positions)
    >>> round(evaluate(model, [task.sample(64, tasks.generator(0, "fresh"))]), 3)  # it knows nothing yet: log 3
    1.099
    """
    if not batches:
        raise CausalProbeError("A loss was asked for and there are no sequences. Give at least one batch.")
    total = sum(float(task_loss(model.predict(batch.tokens), batch.target).double().sum()) for batch in batches)
    return total / sum(len(batch) for batch in batches)


def named_weights(model: DisentangledTransformer) -> dict[str, nn.Parameter]:
    """The weights by the names by which stages move them."""
    return {**{f"A{layer}": block.attn.A for layer, block in enumerate(model.blocks)}, "W_U": model.W_U}


def moved_by(stage: Stage) -> list[str]:
    """The names of the whole matrices that a stage moves."""
    return sorted({"A0" if name in PARTS_OF_A0 else name for name in stage.moves})


def check_moves(stages: Sequence[Stage], names: Mapping[str, nn.Parameter], *, position_only: bool) -> None:
    """Raise if a stage moves weights that the model lacks."""
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


def holds_positions(
    stage: Stage, model: DisentangledTransformer, A_0: Float[Tensor, "*model head d_query d_key"]
) -> Callable[[], object] | None:
    """Puts layer 0's (position, position) block back, where a stage moves the others: the optimiser moves whole matrices."""
    if "A0.tokens" not in stage.moves:
        return None
    position = model.subspaces(0)["position"]
    block = A_0.detach()[..., position, position]
    held = block.clone()
    return partial(block.copy_, held)


def only_positions(model: DisentangledTransformer) -> bool:
    """Whether the fast forward may take layer 0 for its (position, position) block: a last layer it computes as it is."""
    if len(model.heads) == 1:
        return False
    token = model.subspaces(0)["token"]
    A_0 = model.A[0].detach()
    return not bool(A_0[:, token].any() or A_0[:, :, token].any())
