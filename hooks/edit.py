"""Edits at hook points: replace a row of a pattern, ablate a head.

Each builder returns one ``(name, function)`` pair for ``fwd_hooks=`` of TransformerLens' ``run_with_hooks`` and ``hooks``; or give
them to :func:`edited`. An edit clones what it changes: the model's own tensors are never written to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import Position, checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel, attention_hook, require_hooks
from causal_probe.hooks.heads import parse_head

__all__ = [
    "Edit",
    "edited",
    "mean_ablate",
    "one_hot_row",
    "replace_row",
    "resample_ablate",
    "uniform_row",
    "zero_ablate",
]

#: The name of a hook point and what is done there: ``(value, hook) -> value``.
Edit: TypeAlias = tuple[str, Callable[..., Tensor]]
#: The attribute of a hook point that says how many of the hooks on it are edits that never write to what they are given. Where all are, a model can
#: give one tensor, expanded, for all sequences: :meth:`causal_probe.models.DisentangledTransformer.predict` does.
KEEPING = "edits_that_keep_their_input"


@checked
def uniform_row(query: Position) -> Float[Tensor, " key"]:
    """Attention spread evenly over a query's past, itself included: 1 / (query + 1) on keys 0..query, [query + 1]; it sums to one.

    >>> uniform_row(1)
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    return torch.full((query + 1,), 1 / (query + 1), dtype=torch.float64)


@checked
def one_hot_row(key: Position) -> Float[Tensor, " key"]:
    """All attention on one key, [key + 1]: 1 there, 0 before it.

    >>> one_hot_row(2)
    tensor([0., 0., 1.], dtype=torch.float64)
    """
    return torch.eye(key + 1, dtype=torch.float64)[key]


@checked
def replace_row(layer: Any, head: Any = None, *, query: Position, row: Float[Tensor, " key"]) -> Edit:
    """Replace one head's attention at one query, in every sequence.

    Parameters
    ----------
    layer, head
        A layer and a head, counted from 0; or the head alone, as ``"L18H6"`` or ``(18, 6)``.
    query
        At which position, counted from 0.
    row
        The new attention on keys 0, 1, ...: not negative, sums to one. Later keys get none.

    Raises
    ------
    CausalProbeError
        If the row is no distribution; or, when the model runs, if there is no such head, query or key.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import hooks, models
    >>> model, tokens = models.DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]])
    >>> with hooks.edited(model, replace_row("L0H0", query=3, row=torch.tensor([1.0, 0.0, 0.0, 0.0]))):
    ...     logits = model(tokens)
    >>> logits.shape
    torch.Size([1, 4, 3])
    """
    if (row < 0).any() or not torch.isclose(row.sum().double(), torch.ones((), dtype=torch.float64), atol=1e-5):
        raise CausalProbeError(
            f"A pattern row must be a distribution over keys: its entries are {row.tolist()}, their sum {float(row.sum()):.4g}."
        )
    layer, head = parse_head(layer, head)
    name = attention_hook(layer, "pattern")

    def edit(pattern: Float[Tensor, "batch head query key"], hook: Any) -> Float[Tensor, "batch head query key"]:
        _check_index(name, "head", head, pattern.shape[1])
        _check_index(name, "query", query, pattern.shape[2])
        _check_index(name, "key", len(row) - 1, pattern.shape[3])
        # What all sequences share is edited once, and is shared again.
        one_for_all = len(pattern) > 1 and pattern.stride(0) == 0
        changed = (pattern[:1] if one_for_all else pattern).clone()
        changed[:, head, query, : len(row)] = row.to(pattern)
        changed[:, head, query, len(row) :] = 0
        return changed.expand_as(pattern) if one_for_all else changed

    edit.keeps_its_input = True  # type: ignore[attr-defined]
    return name, edit


@checked
def zero_ablate(layer: Any, head: Any = None) -> Edit:
    """Replace what a head reads out of the stream (its ``hook_z``) by zero, at every position.

    The head is named as in :func:`replace_row`; whether there is one is seen when the model runs, and else a CausalProbeError.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import hooks, models
    >>> model, tokens = models.DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]])
    >>> with hooks.edited(model, zero_ablate(0, 0)):
    ...     _, cache = model.run_with_cache(tokens)
    """
    return _replace_head(layer, head, torch.zeros(1))


@checked
def mean_ablate(
    layer: Any, head: Any = None, *, reference: Float[Tensor, "pos d_head"] | Float[Tensor, " d_head"]
) -> Edit:
    """Replace what a head reads out of the stream (its ``hook_z``) by a mean, the same for every sequence.

    A mean at each position takes away what depends on the sequence, and leaves what depends on the position alone: on repeated
    tokens also what a head writes in the second copy whatever the tokens are. One mean for all positions takes that away too, and
    so has a larger effect.

    Parameters
    ----------
    layer, head
        As in :func:`replace_row`.
    reference
        The mean, one for each position or one for all: ``mean_heads(model, tokens, layer="L18H6").mean`` is the one over ``tokens``.

    Raises
    ------
    CausalProbeError
        When the model runs, if there is no such head, or the reference is too short or of another width.

    Examples
    --------
    >>> import torch
    >>> mean_ablate("L0H1", reference=torch.zeros(8))[0]
    'blocks.0.attn.hook_z'
    """
    return _replace_head(layer, head, reference)


@checked
def resample_ablate(layer: Any, head: Any = None, *, donors: Float[Tensor, "batch pos d_head"]) -> Edit:
    """Replace what a head reads out of the stream (its ``hook_z``) by what it reads out of other sequences.

    Parameters
    ----------
    layer, head
        As in :func:`replace_row`.
    donors
        What the head read out of the sequence that replaces each, such as ``z.roll(1, 0)[:, :, head]`` of the same
        batch.

    Raises
    ------
    CausalProbeError
        When the model runs, if there is no such head, or the donors have another shape.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import hooks, models
    >>> model, tokens = models.DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]])
    >>> donors = torch.zeros(1, 4, 7)  # another input's outputs of that head
    >>> with hooks.edited(model, resample_ablate("L0H0", donors=donors)):
    ...     logits = model(tokens)
    >>> logits.shape
    torch.Size([1, 4, 3])
    """
    return _replace_head(layer, head, donors)


@contextmanager
def edited(model: HookedModel, *edits: Edit) -> Iterator[None]:
    """Run the model with edits for the length of a ``with`` block.

    Raises
    ------
    CausalProbeError
        If the model lacks one of the hook points.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import hooks
    >>> from causal_probe.models import DisentangledTransformer
    >>> model, tokens = DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]])
    >>> with hooks.edited(model, hooks.zero_ablate(1, 0)):
    ...     logits = model(tokens)
    >>> logits.shape
    torch.Size([1, 4, 3])
    """
    require_hooks(model, [name for name, _ in edits])
    if not edits:
        yield
        return
    kept = Counter(name for name, edit in edits if getattr(edit, "keeps_its_input", False))
    with model.hooks(fwd_hooks=list(edits)), ExitStack() as stack:
        for name, count in kept.items():
            point = model.hook_dict[name]
            before = getattr(point, KEEPING, 0)
            setattr(point, KEEPING, before + count)
            stack.callback(setattr, point, KEEPING, before)
        yield


def _replace_head(layer: Any, head: Any, reference: Tensor) -> Edit:
    layer, head = parse_head(layer, head)
    name = attention_hook(layer, "z")
    if not reference.isfinite().all():
        raise CausalProbeError(
            "What replaces a head's output holds NaN or infinities. Take it from a model that computes numbers."
        )

    def edit(z: Float[Tensor, "batch pos head d_head"], hook: Any) -> Float[Tensor, "batch pos head d_head"]:
        if z.ndim != 4:
            raise CausalProbeError(
                f"{name} was expected to carry [batch, pos, head, d_head] and carries {list(z.shape)}: its heads can't be told "
                "apart."
            )
        _check_index(name, "head", head, z.shape[2])
        n_positions, d_head = z.shape[1], z.shape[3]
        if (
            reference.shape[-1] not in (1, d_head)
            or (reference.ndim == 2 and len(reference) < n_positions)
            or (reference.ndim == 3 and reference.shape[:2] != z.shape[:2])
        ):
            raise CausalProbeError(
                f"A reference of the shape {list(reference.shape)} can't replace the head at {name}, whose shape is "
                f"[{n_positions}, {d_head}]{f', in {len(z)} sequences' if reference.ndim == 3 else ''}."
            )
        z = z.clone()
        z[:, :, head] = reference[..., :n_positions, :].to(z) if reference.ndim == 2 else reference.to(z)
        return z

    return name, edit


def _check_index(name: str, axis: str, index: int, size: int) -> None:
    if not 0 <= index < size:
        raise CausalProbeError(f"{axis} {index} was asked for at {name}, where the {axis} runs from 0 to {size - 1}.")
