"""Passing over layers: a run whose stream is put in before a layer has no need of those before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["Skips"]


class Skips:
    """A model's layers, which can be made to pass on what they get.

    The layers' own code is not known: what a layer returns is what it has returned before, with the stream in its first place.

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models.standard import StandardTransformer
    >>> model = StandardTransformer(3, 4, d_model=2, n_layers=2, n_heads=1, d_head=2)
    >>> tokens, skips = torch.tensor([[0, 1, 2]]), Skips(model)
    >>> with skips.learning():
    ...     logits = model(tokens)
    >>> with skips.before(1):  # layer 0 is passed over
    ...     logits = model(tokens)
    """

    def __init__(self, model: Any) -> None:
        self._blocks = list(model.blocks)
        self._forms: list[Any] = [None] * len(self._blocks)

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """A forward pass inside shows what the layers return."""

        def note(layer: int) -> Callable[..., None]:
            return lambda _, __, out: self._forms.__setitem__(layer, out)

        handles = [block.register_forward_hook(note(layer)) for layer, block in enumerate(self._blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def before(self, layer: int) -> Iterator[None]:
        """Inside, layers before this one pass on what they get, those that have been seen in :meth:`learning`."""
        blocks = self._blocks[:layer]
        passed = [(block, form) for block, form in zip(blocks, self._forms, strict=False) if form is not None]
        for block, form in passed:
            object.__setattr__(block, "forward", _passing(form))
        try:
            yield
        finally:
            for block, _ in passed:
                object.__delattr__(block, "forward")


def _passing(form: Any) -> Callable[..., Any]:
    more = form[1:] if isinstance(form, tuple) else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = (value for value in kwargs.values() if isinstance(value, Tensor) and value.ndim == 3)
        stream = args[0] if args else next(named)
        return stream if more is None else (stream, *more)

    return forward
