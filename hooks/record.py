"""Streaming recorders: what passes a hook point is reduced there, and nothing of the size of a batch outlives its hook."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel, attention_hook, require_hooks, undisturbed
from causal_probe.hooks.moments import Moments

__all__ = ["PatternMeans", "each_batch", "mean_heads", "mean_patterns"]


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
    """
    layers = tuple(range(model.cfg.n_layers) if layers is None else layers)
    names = {layer: attention_hook(layer, "pattern") for layer in layers}
    return PatternMeans(_record(model, batches, names, check=_check_pattern, batch_size=batch_size))


def mean_heads(model: HookedModel, batches: Any, *, layer: int, batch_size: int | None = None) -> Moments:
    """Average what each head of a layer reads out of the stream (``hook_z``), shape [pos, head, d_head], over sequences.

    Arguments and errors are those of :func:`mean_patterns`. The mean is a reference for
    :func:`~causal_probe.hooks.mean_ablate`.
    """
    names = {layer: attention_hook(layer, "z")}
    return _record(model, batches, names, check=_check_finite, batch_size=batch_size)[layer]


def each_batch(batches: Any) -> Iterator[Any]:
    """The batches of an iterable. A tensor of tokens, or anything with ``.tokens``, is one batch by itself."""
    return iter([batches] if isinstance(batches, Tensor) or hasattr(batches, "tokens") else batches)


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
    require_hooks(model, names.values())
    total: dict[int, Moments] = {}
    # A hook may fire twice in one forward (a bridge calls it once for each of a point's names), so the last value of a
    # forward counts, and only that.
    passed: dict[int, Moments] = {}

    def recorder(layer: int, name: str) -> Callable[..., None]:
        def record(value: Tensor, hook: Any) -> None:
            check(name, value)
            passed[layer] = Moments.of(value)

        return record

    fwd_hooks = [(name, recorder(layer, name)) for layer, name in names.items()]
    with undisturbed(model), model.hooks(fwd_hooks=fwd_hooks):
        for tokens in _token_batches(batches, batch_size):
            passed.clear()
            _run(model, tokens, stop_at_layer=max(names) + 1)
            if dead := [
                name for layer, name in names.items() if layer not in passed or passed[layer].count != len(tokens)
            ]:
                raise CausalProbeError(
                    f"{', '.join(dead)} did not fire for every sequence. A Hugging Face model must be loaded with "
                    'attn_implementation="eager".'
                )
            total = {layer: total[layer].merge(new) if layer in total else new for layer, new in passed.items()}
    if not total:
        raise CausalProbeError("There are no sequences to average over. Give tokens [batch, pos], or batches of them.")
    return {layer: total[layer] for layer in names}


def _run(model: HookedModel, tokens: Tensor, *, stop_at_layer: int) -> None:
    # Without the layers behind the last hook, and above all without the unembedding, which can cost more than all layers.
    can_stop = "stop_at_layer" in inspect.signature(getattr(model, "forward", model)).parameters
    model(tokens, **({"stop_at_layer": stop_at_layer} if can_stop else {}))


def _token_batches(batches: Any, batch_size: int | None) -> Iterator[Int[Tensor, "batch pos"]]:
    if batch_size is not None and batch_size < 1:
        raise CausalProbeError(f"batch_size must be at least 1; it is {batch_size}.")
    length = None
    for batch in each_batch(batches):
        tokens = getattr(batch, "tokens", batch)
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            found = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise CausalProbeError(
                f"A batch must be a tensor of tokens [batch, pos], of whole numbers; this one is {found}."
            )
        if length is not None and tokens.shape[1] != length:
            raise CausalProbeError(
                f"Patterns can be averaged over sequences of one length only; there are lengths {length} and {tokens.shape[1]}."
            )
        length = tokens.shape[1]
        if len(tokens):
            yield from torch.split(tokens, batch_size or len(tokens))


def _check_pattern(name: str, pattern: Tensor) -> None:
    if pattern.ndim != 4 or pattern.shape[2] != pattern.shape[3]:
        raise CausalProbeError(
            f"{name} was expected to carry [batch, head, query, key] and carries {list(pattern.shape)}."
        )
    totals = pattern.sum(-1, dtype=torch.promote_types(pattern.dtype, torch.float32))
    right = (totals - 1).abs() <= max(1e-4, 4 * torch.finfo(pattern.dtype).eps)  # False for NaN
    if not right.all():
        batch, head, query = (int(i) for i in (~right).nonzero()[0])
        raise CausalProbeError(
            f"{name} does not carry attention probabilities: a row must sum to one, and that of sequence {batch}, head {head}, "
            f"query {query} sums to {float(totals[batch, head, query]):.4g}. Give sequences without padding, and check the "
            "model's weights for NaN."
        )


def _check_finite(name: str, value: Tensor) -> None:
    if value.ndim != 4:
        raise CausalProbeError(
            f"{name} was expected to carry [batch, pos, head, d_head] and carries {list(value.shape)}."
        )
    if not value.isfinite().all():
        raise CausalProbeError(f"{name} carries values that are not finite. Check the model's weights for NaN.")
