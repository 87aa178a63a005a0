"""The gradient of a loss with respect to attention scores, recorded where it can be had and reduced there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import (
    HookedModel,
    attention_hook,
    attention_hooks,
    keep,
    live_hooks,
    require_hooks,
    undisturbed,
)
from causal_probe.hooks.moments import Moments, merged
from causal_probe.hooks.record import each_batch
from causal_probe.hooks.visible import MASKED

__all__ = ["Route", "ScoreGradientMoments", "find_routes", "record_score_gradients"]

#: Where a layer's gradient is taken: at its scores; at its pattern and carried through the softmax; or, where neither is live, at zeros
#: that are added to the mask that the layer's attention is given.
Route = Literal["scores", "pattern", "mask"]


@dataclass(frozen=True, eq=False)
class ScoreGradientMoments:
    """By layer, the :class:`Moments` [head, query, key] of minus the gradient over sequences, and the route that it took."""

    moments: dict[int, Moments]
    routes: dict[int, Route]


def record_score_gradients(
    model: HookedModel,
    batches: Any,
    loss: Callable[[Any, Any], Tensor],
    *,
    layers: Iterable[int] | None = None,
    batch_size: int | None = None,
) -> ScoreGradientMoments:
    """Minus the gradient of each sequence's loss with respect to every head's scores.

    Arguments and errors are those of :func:`causal_probe.probes.score_gradients`.
    """
    layers = tuple(layer for layer, _ in attention_hooks(model, ["pattern"], layers))
    require_hooks(model, [attention_hook(layer, "pattern") for layer in layers])
    total: dict[int, Moments] = {}
    routes: dict[int, Route] = {}
    for batch in _pieces(batches, batch_size):
        if not routes:
            routes = _choose_routes(model, batch, loss, layers)
        new = _one_batch(model, batch, loss, routes)
        if total and any(total[layer].sums.shape != new[layer].sums.shape for layer in layers):
            raise CausalProbeError("Gradients can be averaged over sequences of one length only; here lengths differ.")
        total = merged(total, new)
    if not total:
        raise CausalProbeError("There are no sequences to average over. Give tokens [batch, pos], or batches of them.")
    return ScoreGradientMoments(total, routes)


def find_routes(model: HookedModel, batch: Any, loss: Callable[[Any, Any], Tensor]) -> dict[int, Route]:
    """By layer with attention, where the gradient of a loss with respect to its scores can be taken.

    Raises
    ------
    CausalProbeError
        If it can't be in some layer: at its scores, its pattern, or its mask.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> find_routes(DisentangledTransformer(d_vocab=3, n_positions=4), torch.zeros(1, 3, dtype=torch.long), lambda model, batch: model(batch).sum((1, 2)))
    {0: 'scores', 1: 'scores'}
    """
    layers = tuple(layer for layer, _ in attention_hooks(model, ["pattern"], None))
    require_hooks(model, [attention_hook(layer, "pattern") for layer in layers])
    return _choose_routes(model, batch, loss, layers)


def _one_batch(
    model: HookedModel, batch: Any, loss: Callable[[Any, Any], Tensor], routes: dict[int, Route]
) -> dict[int, Moments]:
    values: dict[int, Tensor] = {}

    def as_leaf(layer: int) -> Callable[[Tensor, Any], Tensor]:
        def record(value: Tensor, hook: Any) -> Tensor:
            # Below the first recorded layer nothing requires grad: a leaf begins there. Above it the value depends on the layers
            # below, and must go on as it is, or their gradient would miss the paths through it. A hook that fires
            # twice sees the same value.
            if not value.requires_grad:
                value = value.detach().clone().requires_grad_()
            values[layer] = value
            return value

        return record

    at = {"scores": "attn_scores", "pattern": "pattern"}
    fwd_hooks = [(attention_hook(layer, at[route]), as_leaf(layer)) for layer, route in routes.items() if route in at]
    with undisturbed(model), torch.enable_grad(), ExitStack() as stack:
        for layer in (layer for layer, route in routes.items() if route == "mask"):
            stack.callback(_at_mask(model, layer, as_leaf(layer)).remove)
        for parameter in getattr(model, "parameters", tuple)():  # ``undisturbed`` puts their flags back
            parameter.requires_grad_(False)
        with model.hooks(fwd_hooks=fwd_hooks):
            losses = _per_sequence(loss(model, batch))
        if silent := [layer for layer in routes if layer not in values or len(values[layer]) != len(losses)]:
            raise CausalProbeError(f"The attention hooks of the layers {silent} did not fire once for every sequence.")
        gradients = torch.autograd.grad(losses.sum(), list(values.values()), allow_unused=True)
    found = {}
    for (layer, value), gradient in zip(values.items(), gradients, strict=True):
        # A last layer whose loss is zero by construction has no gradient; is_live has told dead hooks before.
        gradient = torch.zeros_like(value) if gradient is None else gradient
        value = value.detach()
        if routes[layer] == "pattern":
            gradient = value * (gradient - (value * gradient).sum(-1, keepdim=True))  # (diag p - p p^T) dL/dp
            gradient = gradient.masked_fill(value == 0, 0)
        else:
            gradient = gradient.masked_fill(value < MASKED, 0)
        if not gradient.isfinite().all():
            raise CausalProbeError(
                f"The gradient at layer {layer} is not finite. Check the model's weights and the loss for NaN."
            )
        found[layer] = Moments.of(-gradient)
    return {layer: found[layer] for layer in routes}


def _choose_routes(
    model: HookedModel, batch: Any, loss: Callable[[Any, Any], Tensor], layers: tuple[int, ...]
) -> dict[int, Route]:
    """Where each layer's gradient can be taken: at scores that are live and whose softmax is the pattern, else at the pattern."""
    scores = {layer: attention_hook(layer, "attn_scores") for layer in layers}
    patterns = {layer: attention_hook(layer, "pattern") for layer in layers}
    there = [name for name in scores.values() if name in model.hook_dict]

    def run() -> Tensor:
        return _per_sequence(loss(model, batch))

    live = live_hooks(model, there, run) if there else set()
    real = {
        layer
        for layer in layers
        if scores[layer] in live and _is_softmax_of(model, scores[layer], patterns[layer], run)
    }
    rest = [layer for layer in layers if layer not in real]
    live |= live_hooks(model, [patterns[layer] for layer in rest], run) if rest else set()
    dead = [layer for layer in rest if patterns[layer] not in live]
    if dead and all(_mask_is_live(model, layer, run) for layer in dead):
        return {layer: "scores" if layer in real else "mask" if layer in dead else "pattern" for layer in layers}
    if dead:
        raise CausalProbeError(
            f"The loss does not depend on {', '.join(patterns[layer] for layer in dead)}: neither the scores nor the pattern of that layer are live, and its "
            "attention takes no mask for each head, so a gradient would be reported as zero. Give a causal model with eager attention, and a loss that runs it."
        )
    return {layer: "scores" if layer in real else "pattern" for layer in layers}


def _at_mask(model: Any, layer: int, edit: Callable[[Tensor, Any], Tensor]) -> Any:
    """Edit the mask [batch, head, query, key] that a layer's attention is given to add to its scores, wherever it is among the arguments."""
    module = model.blocks[layer].attn
    heads = int(model.cfg.n_heads)

    def change(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def edited(value: Any) -> Any:
            is_mask = isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
            if not is_mask or value.shape[-1] != value.shape[-2] or value.shape[1] not in (1, heads):
                return value
            return edit(value.expand(-1, heads, -1, -1), None)

        return tuple(map(edited, args)), {name: edited(value) for name, value in kwargs.items()}

    return module.register_forward_pre_hook(change, with_kwargs=True)


def _mask_is_live(model: Any, layer: int, run: Callable[[], Tensor]) -> bool:
    """Whether the loss depends on what is added to a layer's scores with its mask."""
    if not isinstance(getattr(getattr(model, "blocks", [None] * (layer + 1))[layer], "attn", None), torch.nn.Module):
        return False
    leaves: list[Tensor] = []

    def to_leaf(mask: Tensor, hook: Any) -> Tensor:
        leaves.append(mask.detach().clone().requires_grad_())
        return leaves[-1]

    handle = _at_mask(model, layer, to_leaf)
    try:
        with undisturbed(model), torch.enable_grad():
            output = run().sum()
    except (RuntimeError, ValueError):  # one that takes no mask for each head
        return False
    finally:
        handle.remove()
    if not leaves or not output.requires_grad:
        return False
    return torch.autograd.grad(output, leaves, allow_unused=True)[0] is not None


def _is_softmax_of(model: HookedModel, scores: str, pattern: str, run: Callable[[], Tensor]) -> bool:
    seen: dict[str, Tensor] = {}
    with undisturbed(model), model.hooks(fwd_hooks=[(name, keep(seen, name)) for name in (scores, pattern)]):
        run()
    if scores not in seen or pattern not in seen or seen[scores].shape != seen[pattern].shape:
        return False
    return bool((seen[scores].float().softmax(-1) - seen[pattern].float()).abs().max() < 1e-3)


def _per_sequence(losses: Any) -> Float[Tensor, " batch"]:
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise CausalProbeError(
            f"loss(model, batch) must return one loss per sequence, a tensor [batch]; it returned {found}."
        )
    return losses


def _pieces(batches: Any, batch_size: int | None) -> Iterator[Any]:
    if batch_size is not None and batch_size < 1:
        raise CausalProbeError(f"batch_size must be at least 1; it is {batch_size}.")
    for batch in each_batch(batches):
        if isinstance(batch, Tensor):
            yield from (piece for piece in torch.split(batch, batch_size or max(1, len(batch))) if len(piece))
        else:
            yield batch
