"""Many models of one shape, trained in one batched program.

A step of one small model is mostly the overhead of many small operations; with an axis for the model in front, it is paid once.
Each model's sequences come from a generator of its own, in the order in which :func:`~causal_probe.training.fit` draws them, and
the optimisers act entry by entry, so each model of the ensemble is the one that ``fit`` gives, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.models.fast import last_logits
from causal_probe.tasks import Task
from causal_probe.training.fit import check_moves, holds_positions, moved_by, named_weights, only_positions
from causal_probe.training.loop import Begun, History, descend
from causal_probe.training.loss import task_loss
from causal_probe.training.stages import Stage

__all__ = ["fit_many"]


@checked
def fit_many(
    models: Sequence[DisentangledTransformer],
    tasks: Sequence[Task],
    stages: Sequence[Stage],
    *,
    generators: Sequence[torch.Generator],
    progress: bool = False,
) -> tuple[History, ...]:
    """Train each model in place on its own task, all in one program.

    Parameters
    ----------
    models, tasks, generators
        One of each per run. Models and tasks share one shape (d_vocab, n_positions, heads per layer), dtype and device; graphs,
        weights and generators are their own.
    stages
        The same for all; see :mod:`causal_probe.training.stages`.
    progress
        Show a tqdm bar, on standard error.

    Returns
    -------
    tuple[History, ...]
        As from :func:`~causal_probe.training.fit`, one per model.

    Raises
    ------
    CausalProbeError
        If the numbers of models, tasks and generators or their shapes differ, a stage moves what the models do not have (nothing is
        moved then), or a loss stops being finite (the models are then as they were).

    Examples
    --------
    >>> from causal_probe import graphs, models, tasks, training
    >>> both = [tasks.InContextMarkov(graph, d_vocab=3, concentration=0.1) for graph in (graphs.chain(3), graphs.chain(3))]
    >>> two = [models.DisentangledTransformer(d_vocab=3, n_positions=4) for _ in both]
    >>> seeds = [tasks.generator(seed, "training") for seed in (0, 1)]
    >>> histories = fit_many(two, both, training.joint(steps=2, batch_size=8), generators=seeds)
    >>> [history.n_sequences for history in histories]
    [16, 16]
    """
    _check(models, tasks, generators)
    named = [named_weights(model) for model in models]
    position_only = all(only_positions(model) for model in models)
    check_moves(stages, named[0], position_only=position_only)
    weights = {name: nn.Parameter(torch.stack([own[name].detach() for own in named])) for name in named[0]}
    layers = [name for name in weights if name != "W_U"]

    def begin(stage: Stage) -> Begun:
        nonlocal position_only
        position_only = position_only and not {"A0", "A0.tokens"} & set(stage.moves)
        moving = moved_by(stage)
        for name, weight in weights.items():
            weight.requires_grad_(name in moving)
        forward = torch.vmap(partial(last_logits, position_only=position_only))

        def loss() -> Tensor:
            batches = [
                task.sample(stage.batch_size, generator, dtype=weights["W_U"].dtype)
                for task, generator in zip(tasks, generators, strict=True)
            ]
            tokens, target = (torch.stack([getattr(b, name) for b in batches]) for name in ("tokens", "target"))
            logits = forward(tokens, [weights[name] for name in layers], weights["W_U"])
            return task_loss(logits.flatten(0, 1), target.flatten(0, 1)).view(len(models), -1).mean(1)

        return Begun([weights[name] for name in moving], loss, holds_positions(stage, models[0], weights["A0"]))

    losses = descend(stages, begin, progress=progress)
    with torch.no_grad():
        for index, own in enumerate(named):
            for name, parameter in own.items():
                parameter.copy_(weights[name][index])
    return tuple(History.of(stages, [values[index] for values in losses]) for index in range(len(models)))


def _check(
    models: Sequence[DisentangledTransformer], tasks: Sequence[Task], generators: Sequence[torch.Generator]
) -> None:
    if not len(models) == len(tasks) == len(generators) or not models:
        raise CausalProbeError(
            f"Each run needs a model, a task and a generator; there are {len(models)}, {len(tasks)} and {len(generators)}."
        )
    if len({id(generator) for generator in generators}) < len(generators) or len({id(m) for m in models}) < len(models):
        raise CausalProbeError("Each run needs a model and a generator of its own; one was given twice.")
    shapes = {(m.d_vocab, m.n_positions, m.heads, m.W_U.dtype, m.W_U.device) for m in models}
    wanted = {(task.d_vocab, task.n_positions) for task in tasks}
    if len(shapes) > 1 or wanted != {next(iter(shapes))[:2]}:
        raise CausalProbeError(
            "Models that are trained together, and their tasks, must share one shape, dtype and device; the models' are "
            f"{sorted(map(str, shapes))}, the tasks' (d_vocab, n_positions) {sorted(wanted)}."
        )
