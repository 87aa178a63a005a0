"""Many models of one shape, trained in one batched program.

A step of one small model is mostly the overhead of many small operations; with an axis for the model in front, it is paid once.
Each model's sequences come from a generator of its own, in the order in which :func:`~causal_probe.training.fit` draws them, and
the optimisers act entry by entry, so each model of the ensemble is the one that ``fit`` gives, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.models.fast import last_logits
from causal_probe.tasks import InContextMarkov
from causal_probe.training.fit import PARTS_OF_A0, History, _check_moves, _only_positions, _optimizer, task_loss
from causal_probe.training.stages import Stage

__all__ = ["fit_many"]


def fit_many(
    models: Sequence[DisentangledTransformer],
    tasks: Sequence[InContextMarkov],
    stages: Sequence[Stage],
    *,
    generators: Sequence[torch.Generator],
    progress: bool = False,
) -> tuple[History, ...]:
    """Train each model in place on its own task, all in one program.

    Parameters
    ----------
    models, tasks, generators
        One of each per run. Models and tasks share one shape (d_vocab, positions, heads per layer), dtype and device; graphs,
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
    >>> both = [tasks.InContextMarkov(graph, d_vocab=3, alpha=0.1) for graph in (graphs.chain(3), graphs.chain(3))]
    >>> two = [models.DisentangledTransformer(d_vocab=3, n_positions=4) for _ in both]
    >>> seeds = [tasks.generator(seed, "training") for seed in (0, 1)]
    >>> histories = fit_many(two, both, training.joint(steps=2, batch_size=8), generators=seeds)
    >>> [history.sequences for history in histories]
    [16, 16]
    """
    _check(models, tasks, generators)
    position_only = all(_only_positions(model) for model in models)
    named = [{**{f"A{i}": b.attn.A for i, b in enumerate(m.blocks)}, "W_U": m.W_U} for m in models]
    _check_moves(stages, named[0], position_only=position_only)
    weights = {name: nn.Parameter(torch.stack([own[name].detach() for own in named])) for name in named[0]}
    layers = [name for name in weights if name != "W_U"]
    position = models[0].subspaces(0)["position"]
    losses: list[list[float]] = []
    total = sum(stage.steps for stage in stages)
    with tqdm(total=total, disable=not progress, unit="step", dynamic_ncols=True) as bar:
        for stage in stages:
            moving = {"A0" if name in PARTS_OF_A0 else name for name in stage.moves}
            position_only = position_only and not {"A0", "A0.tokens"} & set(stage.moves)
            positions = weights["A0"].detach()[..., position, position]
            held = positions.clone() if "A0.tokens" in stage.moves else None
            for name, weight in weights.items():
                weight.requires_grad_(name in moving)
            moved = [weights[name] for name in sorted(moving)]
            optimizer = _optimizer(stage, moved)
            forward = torch.vmap(_forward(position_only))
            for step in range(stage.steps):
                for group in optimizer.param_groups:
                    group["lr"] = stage.rate_at(step)
                batches = [
                    task.sample(stage.batch_size, generator, dtype=weights["W_U"].dtype)
                    for task, generator in zip(tasks, generators, strict=True)
                ]
                tokens, target = (torch.stack([getattr(b, name) for b in batches]) for name in ("tokens", "target"))
                with torch.enable_grad():
                    logits = forward(tokens, [weights[name] for name in layers], weights["W_U"])
                    each = task_loss(logits.flatten(0, 1), target.flatten(0, 1)).view(len(models), -1).mean(1)
                values = each.detach().tolist()
                if wrong := [index for index, value in enumerate(values) if not value < float("inf")]:
                    raise CausalProbeError(
                        f"The loss of model {wrong[0]} is {values[wrong[0]]} at step {len(losses)} ({stage.name}): the learning rate "
                        f"{stage.learning_rate:g} is too large."
                    )
                # The models share nothing: the gradient of the sum is, model by model, that of its own loss.
                for weight, gradient in zip(moved, torch.autograd.grad(each.sum(), moved), strict=True):
                    weight.grad = gradient
                optimizer.step()
                if held is not None:  # the optimiser moves whole matrices
                    positions.copy_(held)
                losses.append(values)
                bar.update()
    if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
        raise CausalProbeError(
            "The weights of some model are not finite after the last step: a learning rate is too large."
        )
    with torch.no_grad():
        for index, own in enumerate(named):
            for name, parameter in own.items():
                parameter.copy_(weights[name][index])
    return tuple(
        History(
            step=tuple(range(total)),
            stage=tuple(stage.name for stage in stages for _ in range(stage.steps)),
            loss=tuple(values[index] for values in losses),
            sequences=sum(stage.steps * stage.batch_size for stage in stages),
        )
        for index in range(len(models))
    )


def _forward(position_only: bool):  # type: ignore[no-untyped-def]  # a closure for torch.vmap, which carries no types
    def forward(tokens: Tensor, A: list[Tensor], W_U: Tensor) -> Tensor:
        logits: Tensor = last_logits(tokens, A, W_U, position_only=position_only)
        return logits

    return forward


def _check(
    models: Sequence[DisentangledTransformer],
    tasks: Sequence[InContextMarkov],
    generators: Sequence[torch.Generator],
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
            f"{sorted(map(str, shapes))}, the tasks' (d_vocab, positions) {sorted(wanted)}."
        )
