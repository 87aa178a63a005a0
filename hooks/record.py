"""Run a model over batches of tokens, and reduce what passes its attention hook points there.

Nothing of the size of a batch outlives its layer: a :class:`Reduction` makes something small of the values of one layer while they pass,
and adds it up once the whole micro-batch has passed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel, attention_hooks, describe, require_hooks, undisturbed
from causal_probe.hooks.visible import has_sinks

__all__ = [
    "Beside",
    "Reduction",
    "Rows",
    "check_pattern",
    "each_batch",
    "layer_batches",
    "micro_batch_size",
    "micro_batches",
    "record",
    "row_slack",
    "run_layers",
    "stop_at_layer",
    "token_batches",
]

#: Without a batch size, what a micro-batch's patterns of all layers, or its logits, take up at most, in bytes: some models keep
#: all patterns for the length of a forward.
MICRO_BATCH = 2**28


@runtime_checkable
class Reduction(Protocol):
    """A probe's reduction of the values at the hook points of each layer."""

    def start(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """A micro-batch is about to run; its tokens are on the model's device. It may fail, and start again in parts."""

    def reduce(self, layer: int, *values: Tensor) -> Any:
        """What to keep of the values at one layer's points. They belong to the model: they are not written to, and not kept."""

    def add(self, reduced: Mapping[int, Any]) -> None:
        """The micro-batch has passed: by layer, what :meth:`reduce` made of it. It raises before anything is added, or not at all."""


R = TypeVar("R", bound=Reduction)


def record(
    model: HookedModel,
    tokens: Any,
    reduction: R,
    *,
    points: Sequence[str] = ("pattern",),
    layers: Iterable[int] | None = None,
    batch_size: int | None = None,
) -> R:
    """Show every layer's values at some attention hook points, together, to a reduction, micro-batch by micro-batch.

    A hook may fire twice in one forward (a bridge calls it once for each of a point's names): the last values count. A micro-batch for
    which the memory of a device does not suffice is run again in halves, as is then everything after it; once.

    Parameters
    ----------
    model
        Any model with TransformerLens' hook points. It is run in evaluation mode without gradients, with the caller's own hooks, no further
        than the last of ``layers`` where it can be stopped, and is left as it was.
    tokens
        Tokens [batch, pos], or an iterable of such tensors (or of anything with ``.tokens``), all of one length; on any device.
    reduction
        The reduction of the values; it is returned.
    points
        The hook points, such as ``("pattern", "z")``: ``blocks.{layer}.attn.hook_pattern`` and ``hook_z``.
    layers
        Which layers; all by default.
    batch_size
        Sequences in a forward pass; by default :func:`micro_batch_size`.

    Raises
    ------
    CausalProbeError
        If a hook point is missing or never fires, there are no sequences, their lengths differ, or a pattern is not made of
        probabilities (NaN, or rows that don't sum to one: padding, or a hook that carries something else).
    """
    names = attention_hooks(model, points, layers)
    require_hooks(model, names.values())
    device = describe(model)["device"] or "cpu"
    n_layers = 1 + max(layer for layer, _ in names)
    held: dict[str, Tensor] = {}  # of the layer that is being run
    reduced: dict[int, Any] = {}
    now: tuple[int, int] = (0, 0)  # that layer, and the number of sequences

    def at_hook(layer: int, point: str, name: str) -> Callable[..., None]:
        nothing = has_sinks(model, layer)

        def look(value: Tensor, hook: Any) -> None:
            nonlocal now
            if point == "pattern":
                check_pattern(name, value, nothing=nothing)
            elif point != "attn_scores":  # which are minus infinity where a key is hidden; who reads them sees to it
                _check_heads(name, value)
            if len(value) != now[1]:
                return  # it is reported as silent below
            if layer != now[0]:
                held.clear()
                now = layer, now[1]
            held[point] = value.detach()
            if len(held) == len(points):
                reduced[layer] = reduction.reduce(layer, *(held[each] for each in points))
                held.clear()

        return look

    def run(piece: Tensor) -> None:
        nonlocal now
        now = -1, len(piece)
        reduced.clear()
        piece = piece.to(device)
        reduction.start(piece)
        run_layers(model, piece, n_layers)
        held.clear()
        if silent := [name for (layer, _), name in names.items() if layer not in reduced]:
            raise CausalProbeError(
                f"{', '.join(silent)} did not fire for every sequence. A Hugging Face model must be loaded with "
                'attn_implementation="eager".'
            )
        reduction.add(reduced)

    any_batch = False
    limit: int | None = None
    hooks = [(name, at_hook(layer, point, name)) for (layer, point), name in names.items()]
    with undisturbed(model), model.hooks(fwd_hooks=hooks):
        for batch in layer_batches(model, tokens, batch_size):
            any_batch = True
            pieces = list(torch.split(batch, limit or len(batch)))
            while pieces:
                piece = pieces.pop(0)
                try:
                    run(piece)
                    continue
                except torch.OutOfMemoryError as error:
                    if limit is not None or len(piece) == 1:
                        raise CausalProbeError(
                            f"The memory of {device} does not suffice for {len(piece)} sequences of {piece.shape[1]} tokens. Give a "
                            "smaller batch_size, shorter sequences, or a model of a smaller dtype."
                        ) from error
                # Outside of the handler, whose traceback would keep what the forward has allocated.
                held.clear()
                reduced.clear()
                limit = (len(piece) + 1) // 2
                torch.cuda.empty_cache()
                pieces = list(torch.split(piece, limit))
    if not any_batch:
        raise CausalProbeError("There are no sequences to run. Give tokens [batch, pos], or batches of them.")
    return reduction


class Beside:
    """Two reductions in one pass: one of all sequences, and one of the first ``n``.

    Parameters
    ----------
    whole, first
        The reductions; they are fed as :func:`record` would feed each.
    n
        How many sequences the second one sees.
    """

    def __init__(self, whole: Reduction, first: Reduction, n: int) -> None:
        self.whole, self.first = whole, first
        self._left = n
        self._its = 0  # of the micro-batch that is running

    def start(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Start both."""
        self._its = min(self._left, len(tokens))
        self.whole.start(tokens)
        if self._its:
            self.first.start(tokens[: self._its])

    def reduce(self, layer: int, *values: Tensor) -> tuple[Any, Any]:
        """What either makes of the values."""
        return self.whole.reduce(layer, *values), (
            self.first.reduce(layer, *(each[: self._its] for each in values)) if self._its else None
        )

    def add(self, reduced: Mapping[int, tuple[Any, Any]]) -> None:
        """Add to both."""
        self.whole.add({layer: its for layer, (its, _) in reduced.items()})
        if self._its:
            self.first.add({layer: its for layer, (_, its) in reduced.items()})
            self._left -= self._its


class Rows:
    """The base of reductions that keep some numbers of every sequence, in arrays that grow in few large steps.

    :meth:`start` puts what depends on the tokens alone into ``of_batch``, by name, [sequence, ...]; :meth:`reduce` gives the same of a layer.

    A list of the batches' small arrays would do, if each did not stay where it was put, among the forward's large temporary
    ones: the heap can't close up behind it, and grows with every batch.

    Examples
    --------
    >>> import numpy as np
    >>> rows = Rows()
    >>> for length in (2, 3):
    ...     rows.of_batch = {"length": np.full(length, length)}
    ...     rows.add({0: {"score": np.zeros((length, 1))}})
    >>> rows.arrays()["length"], rows.arrays()["score", 0].shape
    (array([2, 2, 3, 3, 3]), (5, 1))
    """

    def __init__(self) -> None:
        self.of_batch: Mapping[str, NDArray[Any]] = {}
        self._held: dict[Hashable, NDArray[Any]] = {}
        self._n = 0

    def start(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Nothing depends on the tokens."""

    def reduce(self, layer: int, *values: Tensor) -> Mapping[str, NDArray[Any]]:
        """By name, numbers of each sequence."""
        raise NotImplementedError

    def add(self, reduced: Mapping[int, Mapping[str, NDArray[Any]]]) -> None:
        """Write the micro-batch below those before."""
        named = {(name, layer): its for layer, of_layer in reduced.items() for name, its in of_layer.items()}
        written: dict[Any, NDArray[Any]] = {**self.of_batch, **named}
        end = self._n + len(next(iter(written.values())))
        for name, its in written.items():
            held = self._held.get(name)
            if held is None or end > len(held):
                larger = np.empty((max(end, 2 * self._n), *its.shape[1:]), its.dtype)
                if held is not None:
                    larger[: self._n] = held[: self._n]
                self._held[name] = held = larger
            held[self._n : end] = its
        self._n = end

    def arrays(self) -> dict[Any, NDArray[Any]]:
        """The written values: by name, and by (name, layer), [sequence, ...]."""
        return {name: held[: self._n].copy() for name, held in self._held.items()}


def run_layers(model: HookedModel, tokens: Tensor, n_layers: int, **options: Any) -> None:
    """Run this many layers, from 0 on, and, where the model can be stopped, no more: the unembedding can cost more than several layers.

    TransformerLens' bridges stop when they enter the next block, and so never after the last one. What they raise there to stop
    is raised here once the last block's output has passed; they catch it and tidy up. ``options`` are the model's own.
    """
    if not _can_stop(model):
        model(tokens, **options)
        return

    halted = stop_at_layer()

    def stop(stream: Tensor, hook: Any) -> None:
        raise halted(stream)

    name = _last_point(model, n_layers)
    last = [] if name is None else [(name, stop)]
    with contextlib.suppress(halted), model.hooks(fwd_hooks=last):
        model(tokens, stop_at_layer=n_layers, **options)


def _can_stop(model: HookedModel) -> bool:
    return "stop_at_layer" in inspect.signature(getattr(model, "forward", model)).parameters


def _last_point(model: HookedModel, n_layers: int) -> str | None:
    """Where a forward of so many layers ends; None where it can't be stopped there."""
    name = f"blocks.{n_layers - 1}.hook_resid_post"
    return name if _can_stop(model) and name in model.hook_dict else None


def stop_at_layer() -> type[Exception]:
    """The exception by which a bridge's forward pass ends early. Its module brings the whole bridge, three seconds, so it is imported where a model is run."""
    from transformer_lens.model_bridge.exceptions import StopAtLayerException

    found: type[Exception] = StopAtLayerException
    return found


# ----------------------------------------------------------------------------------------------------------------- batches


def each_batch(batches: Any) -> Iterator[Any]:
    """The batches of an iterable. A tensor of tokens, or anything with ``.tokens``, is one batch by itself.

    Examples
    --------
    >>> import torch
    >>> [list(batch.shape) for batch in each_batch(torch.zeros(2, 5, dtype=torch.long))]
    [[2, 5]]
    """
    return iter([batches] if isinstance(batches, Tensor) or hasattr(batches, "tokens") else batches)


def token_batches(
    batches: Any, batch_size: int | Callable[[int], int] | None = None
) -> Iterator[Int[Tensor, "batch pos"]]:
    """The tokens of each batch, in pieces of ``batch_size``, which may depend on their length; whole by default.

    Raises
    ------
    CausalProbeError
        If a batch is no tensor of tokens, lengths differ, or the size is not positive.
    """
    if isinstance(batch_size, int) and batch_size < 1:
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
                f"Sequences must be of one length to be averaged over; there are lengths {length} and {tokens.shape[1]}."
            )
        length = tokens.shape[1]
        if len(tokens):
            size = batch_size(length) if callable(batch_size) else batch_size
            yield from torch.split(tokens, size or len(tokens))


def micro_batches(
    model: HookedModel, batches: Any, batch_size: int | None = None
) -> Iterator[Int[Tensor, "batch pos"]]:
    """The tokens of each batch, in pieces of ``batch_size``, by default of :func:`micro_batch_size`. Errors: :func:`token_batches`."""
    return token_batches(batches, partial(micro_batch_size, model) if batch_size is None else batch_size)


def layer_batches(
    model: HookedModel, batches: Any, batch_size: int | None = None
) -> Iterator[Int[Tensor, "batch pos"]]:
    """:func:`micro_batches` for :func:`run_layers`: where it stops before the unembedding, logits take no room."""
    size = partial(micro_batch_size, model, logits=_last_point(model, int(model.cfg.n_layers)) is None)
    return token_batches(batches, size if batch_size is None else batch_size)


def micro_batch_size(model: HookedModel, pos: int, *, logits: bool = True) -> int:
    """How many sequences of ``pos`` tokens a probe runs at once by default, at least 1.

    The rule: float32 patterns of all layers, and ``logits`` where there are any, fit into 256 MiB on a CPU, where more is no faster (and results are the same
    on every machine), and into a quarter of the free memory of a GPU (what torch holds and doesn't use counts as free), the rest
    being for the forward pass itself.
    """
    cfg = model.cfg
    per_layer = int(getattr(cfg, "n_heads", 1)) * pos * pos
    numbers = max(int(cfg.n_layers) * per_layer, pos * int(getattr(cfg, "d_vocab", 1)) * logits)
    device = torch.device(describe(model)["device"] or "cpu")
    room = MICRO_BATCH
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = (torch.cuda.mem_get_info(device)[0] + unused) // 4
    return max(1, room // (4 * numbers))


# ------------------------------------------------------------------------------------------------------------------ checks


def row_slack(dtype: torch.dtype) -> float:
    """By how much a row of attention may miss its sum, by rounding alone."""
    return max(1e-4, 4 * torch.finfo(dtype).eps)


def check_pattern(name: str, pattern: Tensor, *, nothing: bool = False) -> None:
    """Raise unless a value is attention probabilities [batch, head, query, key].

    Rows sum to one, or, where heads can attend to nothing (:func:`~causal_probe.hooks.visible.has_sinks`), to one or less.
    """
    if pattern.ndim != 4 or pattern.shape[2] != pattern.shape[3]:
        raise CausalProbeError(
            f"{name} was expected to carry [batch, head, query, key] and carries {list(pattern.shape)}."
        )
    totals = pattern.sum(-1, dtype=torch.promote_types(pattern.dtype, torch.float32))
    right = (totals - 1).abs() <= row_slack(pattern.dtype)  # False for NaN
    if nothing:
        right |= (totals > 0) & (totals < 1)
    if not right.all():
        batch, head, query = (int(i) for i in (~right).nonzero()[0])
        raise CausalProbeError(
            f"{name} does not carry attention probabilities: a row must sum to one, and that of sequence {batch}, head {head}, "
            f"query {query} sums to {float(totals[batch, head, query]):.4g}. Give sequences without padding, and check the "
            "model's weights for NaN."
        )


def _check_heads(name: str, value: Tensor) -> None:
    """Raise unless a value is finite numbers [batch, pos, head, d_head]."""
    if value.ndim != 4:
        raise CausalProbeError(
            f"{name} was expected to carry [batch, pos, head, d_head] and carries {list(value.shape)}."
        )
    if not value.isfinite().all():
        raise CausalProbeError(f"{name} carries values that are not finite. Check the model's weights for NaN.")
