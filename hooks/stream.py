"""Run a model over batches, and look at what passes its hook points, attention patterns above all."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import token_batches
from causal_probe.hooks.check import HookedModel, attention_hook, describe, require_hooks, undisturbed
from causal_probe.hooks.patterns import row_slack

__all__ = ["Rows", "Visit", "check_heads", "check_pattern", "run_layers", "visit_patterns", "visit_values"]

#: What is done with a value, such as a pattern [batch, head, query, key], at its hook: ``(layer, value) -> None``.
Visit: TypeAlias = Callable[[int, Tensor], None]


def visit_patterns(
    model: HookedModel,
    batches: Any,
    visitor: Callable[[Tensor], Visit],
    *,
    layers: Iterable[int] | None = None,
    batch_size: int | None = None,
    undo: Callable[[], None] | None = None,
) -> None:
    """Show every layer's attention pattern to a visitor, micro-batch by micro-batch.

    Parameters
    ----------
    model
        Any model with TransformerLens' hook points ``blocks.{layer}.attn.hook_pattern``. It is run in evaluation mode without
        gradients, with the caller's own hooks, no further than the last of ``layers`` where it can be stopped, and is
        left as it was.
    batches
        Tokens [batch, pos], or an iterable of such tensors (or of anything with ``.tokens``), all of one length; on any device.
    visitor
        Called with the tokens of each micro-batch, on the model's device, before it is run; returns what is to be done with its patterns. A pattern
        belongs to the model and must not be kept or written to. A hook may fire twice in one forward (a bridge calls it
        once for each of a point's names): what a layer's later visit leaves must replace what the earlier one left.
    layers
        Which layers; all by default.
    batch_size
        Run larger batches in pieces of this size.
    undo
        See :func:`visit_values`.

    Raises
    ------
    CausalProbeError
        If a hook point is missing or never fires, there are no sequences, their lengths differ, or a pattern is not made of
        probabilities (NaN, or rows that don't sum to one: padding, or a hook that carries something else).
    """
    layers = tuple(range(model.cfg.n_layers) if layers is None else layers)
    names = {layer: attention_hook(layer, "pattern") for layer in layers}
    visit_values(model, batches, visitor, names, check=check_pattern, batch_size=batch_size, undo=undo)


def visit_values(
    model: HookedModel,
    batches: Any,
    visitor: Callable[[Tensor], Visit],
    names: Mapping[int, str],
    *,
    check: Callable[[str, Tensor], None],
    batch_size: int | None = None,
    undo: Callable[[], None] | None = None,
) -> None:
    """Show what passes a hook point of each layer to a visitor, micro-batch by micro-batch: :func:`visit_patterns` for any value.

    Parameters
    ----------
    names
        By layer, the name of a hook point whose values are [batch, ...].
    check
        ``check(name, value)`` raises if a value is not what it should be.
    undo
        Takes back the last call of the visitor, and all that its visit has left. With it, a micro-batch for which the memory of a
        device does not suffice is run again in halves, as is then everything after it; once.
    model, batches, visitor, batch_size
        As for :func:`visit_patterns`.

    Raises
    ------
    CausalProbeError
        If a hook point is missing or never fires, there are no sequences, their lengths differ, or ``check`` says so.
    """
    require_hooks(model, names.values())
    device = describe(model)["device"] or "cpu"
    visited: set[int] = set()
    visit: Visit
    sequences = 0

    def at_hook(layer: int, name: str) -> Callable[..., None]:
        def look(value: Tensor, hook: Any) -> None:
            check(name, value)
            if len(value) == sequences:  # else it is reported as silent below
                visit(layer, value.detach())
                visited.add(layer)

        return look

    def run(tokens: Tensor) -> None:
        nonlocal visit, sequences
        tokens = tokens.to(device)
        visited.clear()
        sequences = len(tokens)
        visit = visitor(tokens)
        run_layers(model, tokens, max(names) + 1)
        if silent := [name for layer, name in names.items() if layer not in visited]:
            raise CausalProbeError(
                f"{', '.join(silent)} did not fire for every sequence. A Hugging Face model must be loaded with "
                'attn_implementation="eager".'
            )

    any_batch = False
    limit: int | None = None
    with undisturbed(model), model.hooks(fwd_hooks=[(name, at_hook(layer, name)) for layer, name in names.items()]):
        for batch in token_batches(batches, batch_size):
            any_batch = True
            for tokens in torch.split(batch, limit or len(batch)):
                try:
                    run(tokens)
                    continue
                except torch.OutOfMemoryError as error:
                    if undo is None or limit is not None or len(tokens) == 1:
                        raise CausalProbeError(_out_of_memory(tokens)) from error
                # Outside of the handler, whose traceback would keep what the forward has allocated.
                undo()
                limit = (len(tokens) + 1) // 2
                torch.cuda.empty_cache()
                for half in torch.split(tokens, limit):
                    try:
                        run(half)
                    except torch.OutOfMemoryError as error:
                        raise CausalProbeError(_out_of_memory(half)) from error
    if not any_batch:
        raise CausalProbeError("There are no sequences to run. Give tokens [batch, pos], or batches of them.")


def _out_of_memory(tokens: Tensor) -> str:
    return (
        f"The memory of {tokens.device} does not suffice for {len(tokens)} sequences of {tokens.shape[1]} tokens. Give a smaller "
        "batch_size, shorter sequences, or a model of a smaller dtype."
    )


def run_layers(model: HookedModel, tokens: Tensor, n_layers: int) -> None:
    """Run the first layers and, where the model can be stopped, no more: the unembedding can cost more than several layers.

    TransformerLens' bridges stop when they enter the next block, and so never after the last one. What they raise there to stop
    is raised here once the last block's output has passed; they catch it and tidy up.
    """
    if "stop_at_layer" not in inspect.signature(getattr(model, "forward", model)).parameters:
        model(tokens)
        return

    def stop(stream: Tensor, hook: Any) -> None:
        raise StopAtLayerException(stream)

    name = f"blocks.{n_layers - 1}.hook_resid_post"
    last = [(name, stop)] if name in model.hook_dict else []
    with contextlib.suppress(StopAtLayerException), model.hooks(fwd_hooks=last):
        model(tokens, stop_at_layer=n_layers)


class Rows:
    """An array that is written batch by batch, and grows in few large steps.

    A list of the batches' small arrays would do, if each did not stay where it was put, among the forward's large temporary
    ones: the heap can't close up behind it, and grows with every batch.

    Examples
    --------
    >>> import numpy as np
    >>> rows = Rows()
    >>> rows.write(0, np.zeros((2, 1)))
    >>> rows.write(2, np.ones((3, 1)))
    >>> rows.array.ravel()
    array([0., 0., 1., 1., 1.])
    """

    def __init__(self) -> None:
        self._held: NDArray[Any] = np.empty(0)
        self._n = 0

    def write(self, start: int, values: NDArray[Any]) -> None:
        """Put ``values`` [row, ...] where the rows from ``start`` on are or will be."""
        end = start + len(values)
        if end > len(self._held):
            larger = np.empty((max(end, 2 * len(self._held)), *values.shape[1:]), values.dtype)
            if self._n:
                larger[: self._n] = self._held[: self._n]
            self._held = larger
        self._held[start:end] = values
        self._n = max(self._n, end)

    @property
    def array(self) -> NDArray[Any]:
        """What was written."""
        return self._held[: self._n].copy()


def check_pattern(name: str, pattern: Tensor) -> None:
    """Raise unless a value is attention probabilities [batch, head, query, key]."""
    if pattern.ndim != 4 or pattern.shape[2] != pattern.shape[3]:
        raise CausalProbeError(
            f"{name} was expected to carry [batch, head, query, key] and carries {list(pattern.shape)}."
        )
    totals = pattern.sum(-1, dtype=torch.promote_types(pattern.dtype, torch.float32))
    right = (totals - 1).abs() <= row_slack(pattern.dtype)  # False for NaN
    if not right.all():
        batch, head, query = (int(i) for i in (~right).nonzero()[0])
        raise CausalProbeError(
            f"{name} does not carry attention probabilities: a row must sum to one, and that of sequence {batch}, head {head}, "
            f"query {query} sums to {float(totals[batch, head, query]):.4g}. Give sequences without padding, and check the "
            "model's weights for NaN."
        )


def check_heads(name: str, value: Tensor) -> None:
    """Raise unless a value is finite numbers [batch, pos, head, d_head]."""
    if value.ndim != 4:
        raise CausalProbeError(
            f"{name} was expected to carry [batch, pos, head, d_head] and carries {list(value.shape)}."
        )
    if not value.isfinite().all():
        raise CausalProbeError(f"{name} carries values that are not finite. Check the model's weights for NaN.")
