"""The values at some hook points in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from causal_probe.hooks.check import HookedModel, keep, undisturbed
from causal_probe.hooks.record import run_layers

__all__ = ["read_values"]


def read_values(
    model: HookedModel,
    tokens: Tensor,
    names: Iterable[str],
    *,
    n_layers: int,
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """The values at hook points, of one batch.

    Parameters
    ----------
    tokens
        Tokens [batch, pos].
    names
        Hook points; those that the model lacks, or that do not fire, are missing from the answer.
    n_layers
        The number of layers to run.
    edits
        By hook point, what its value is replaced by.

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=4)
    >>> found = read_values(model, torch.tensor([[0, 2]]), ["hook_embed", "blocks.0.hook_no_such"], n_layers=1)
    >>> found["hook_embed"].tolist()
    [[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]
    """
    found: dict[str, Tensor] = {}

    def change(edit: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda value, hook: edit(value)

    hooks: list[tuple[str, Callable[..., Any]]] = [(name, change(edit)) for name, edit in (edits or {}).items()]
    there = model.hook_dict  # a bridge makes it anew each time
    hooks += [(name, keep(found, name)) for name in names if name in there]
    with undisturbed(model), model.hooks(fwd_hooks=hooks):
        run_layers(model, tokens, n_layers)
    return {name: value.detach() for name, value in found.items()}
