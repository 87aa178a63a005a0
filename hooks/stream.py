"""Run a model over batches and reduce every attention pattern at its hook."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel, attention_hook, require_hooks, undisturbed
from causal_probe.hooks.record import _check_pattern, _run, _token_batches

__all__ = ["Reduce", "reduce_patterns"]

Reduced = TypeVar("Reduced")

#: What is done with a pattern [batch, head, query, key] at its hook: ``(layer, pattern) -> reduced``.
Reduce: TypeAlias = Callable[[int, Tensor], Reduced]


def reduce_patterns(
    model: HookedModel,
    batches: Any,
    reducer: Callable[[Tensor], Reduce[Reduced]],
    *,
    layers: Iterable[int] | None = None,
    batch_size: int | None = None,
) -> list[dict[int, Reduced]]:
    """What is left of every layer's attention pattern after a reduction at its hook, micro-batch by micro-batch.

    Parameters
    ----------
    model
        Any model with TransformerLens' hook points ``blocks.{layer}.attn.hook_pattern``. It is run in evaluation mode without
        gradients, with the caller's own hooks, no further than the last of ``layers`` where it can be stopped, and is
        left as it was.
    batches
        Tokens [batch, pos], or an iterable of such tensors (or of anything with ``.tokens``), all of one length.
    reducer
        Called with the tokens of each micro-batch before it is run; returns the reduction of its patterns. The pattern
        belongs to the model and must not be kept or written to.
    layers
        Which layers; all by default.
    batch_size
        Run larger batches in pieces of this size.

    Returns
    -------
    list of dict
        For each micro-batch, in order, the reduced pattern of each layer.

    Raises
    ------
    CausalProbeError
        If a hook point is missing or never fires, there are no sequences, their lengths differ, or a pattern is not made of
        probabilities (NaN, or rows that don't sum to one: padding, or a hook that carries something else).
    """
    layers = tuple(range(model.cfg.n_layers) if layers is None else layers)
    names = {layer: attention_hook(layer, "pattern") for layer in layers}
    require_hooks(model, names.values())
    found: list[dict[int, Reduced]] = []
    # A hook may fire twice in one forward (a bridge calls it once for each of a point's names): the last value counts.
    passed: dict[int, Reduced] = {}
    reduce: Reduce[Reduced]
    sequences = 0

    def recorder(layer: int, name: str) -> Callable[..., None]:
        def record(pattern: Tensor, hook: Any) -> None:
            _check_pattern(name, pattern)
            if len(pattern) == sequences:  # else it is reported as dead below
                passed[layer] = reduce(layer, pattern.detach())

        return record

    with undisturbed(model), model.hooks(fwd_hooks=[(name, recorder(layer, name)) for layer, name in names.items()]):
        for tokens in _token_batches(batches, batch_size):
            passed = {}
            sequences = len(tokens)
            reduce = reducer(tokens)
            _run(model, tokens, stop_at_layer=max(names) + 1)
            if dead := [name for layer, name in names.items() if layer not in passed]:
                raise CausalProbeError(
                    f"{', '.join(dead)} did not fire for every sequence. A Hugging Face model must be loaded with "
                    'attn_implementation="eager".'
                )
            found.append({layer: passed[layer] for layer in layers})
    if not found:
        raise CausalProbeError("There are no sequences to run. Give tokens [batch, pos], or batches of them.")
    return found
