"""Streaming recorders: what passes a hook point is reduced there, and nothing of the size of a batch outlives its hook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel, attention_hook
from causal_probe.hooks.moments import Moments
from causal_probe.hooks.stream import Visit, check_heads, check_pattern, visit_values

__all__ = ["PatternMeans", "mean_heads", "mean_patterns"]


@dataclass(frozen=True, eq=False)
class PatternMeans:
    """Attention patterns averaged over sequences.

    Attributes
    ----------
    moments
        Per layer, the :class:`~causal_probe.hooks.Moments` of its patterns, shape [head, query, key]. Layers may differ in
        their number of heads.
    """

    moments: Mapping[int, Moments]

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return next(iter(self.moments.values())).count

    @property
    def mean(self) -> dict[int, Float[Tensor, "_head query key"]]:
        """Per layer, the mean attention of each head from query to key, in [0, 1]; rows sum to one."""
        return {layer: moments.mean for layer, moments in self.moments.items()}

    @property
    def stderr(self) -> dict[int, Float[Tensor, "_head query key"]] | None:
        """Per layer, the standard error of :attr:`mean` over sequences. None for one sequence."""
        errors = {layer: moments.stderr for layer, moments in self.moments.items()}
        return {layer: error for layer, error in errors.items() if error is not None} or None

    def merge(self, other: PatternMeans) -> PatternMeans:
        """The same over the sequences of both: sums are added, so it equals one run over all of them.

        Raises
        ------
        CausalProbeError
            If the layers, heads or lengths differ.
        """
        if self.moments.keys() != other.moments.keys():
            raise CausalProbeError(
                f"Patterns of the layers {sorted(self.moments)} and {sorted(other.moments)} can't be merged."
            )
        return PatternMeans({layer: moments.merge(other.moments[layer]) for layer, moments in self.moments.items()})


def mean_patterns(
    model: HookedModel, batches: Any, *, layers: Iterable[int] | None = None, batch_size: int | None = None
) -> PatternMeans:
    """Average every head's attention pattern over sequences, in one pass.

    Parameters
    ----------
    model
        Any model with TransformerLens' hook points ``blocks.{layer}.attn.hook_pattern``.
    batches
        Tokens [batch, pos], or an iterable of such tensors; a batch may also be anything with ``.tokens``. All sequences
        must be of one length.
    layers
        Which layers; all by default. The model is run no further than the last of them, where it can be stopped.
    batch_size
        Run larger batches in pieces of this size.

    Raises
    ------
    CausalProbeError
        If a hook point is missing or never fires, there are no sequences, their lengths differ, or a pattern is not made of
        probabilities (NaN, or rows that don't sum to one: padding, or a hook that carries something else).

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> found = mean_patterns(DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]] * 2))
    >>> found.moments[0].mean[0, 3]  # untrained: it attends evenly
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    layers = tuple(range(model.cfg.n_layers) if layers is None else layers)
    names = {layer: attention_hook(layer, "pattern") for layer in layers}
    return PatternMeans(_record(model, batches, names, check=check_pattern, batch_size=batch_size))


def mean_heads(model: HookedModel, batches: Any, *, layer: int, batch_size: int | None = None) -> Moments:
    """Average what each head of a layer reads out of the stream (``hook_z``), shape [pos, head, d_head], over sequences.

    Arguments and errors are those of :func:`mean_patterns`. The mean is a reference for
    :func:`~causal_probe.hooks.mean_ablate`.

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> found = mean_heads(DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]] * 2), layer=0)
    >>> list(found.mean.shape)  # [pos, head, d_head]
    [4, 1, 7]
    """
    names = {layer: attention_hook(layer, "z")}
    return _record(model, batches, names, check=check_heads, batch_size=batch_size)[layer]


# --------------------------------------------------------------------------------------------------------------- recording


def _record(
    model: HookedModel,
    batches: Any,
    names: Mapping[int, str],
    *,
    check: Callable[[str, Tensor], None],
    batch_size: int | None,
) -> dict[int, Moments]:
    """The moments over sequences of what passes the hook point of each layer."""
    total: dict[int, Moments] = {}
    before: dict[int, Moments] = {}

    def visitor(tokens: Tensor) -> Visit:
        nonlocal before
        before = dict(total)

        def add(layer: int, value: Tensor) -> None:
            new = Moments.of(value)
            # To what was there before this batch: a hook may fire twice in one forward, and the last value counts.
            total[layer] = before[layer].merge(new) if layer in before else new

        return add

    def undo() -> None:
        total.clear()
        total.update(before)

    visit_values(model, batches, visitor, names, check=check, batch_size=batch_size, undo=undo)
    return total
