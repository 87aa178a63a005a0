"""A graph for every attention head: who attends to whom, averaged over sequences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, overload

from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import Corpus, CorpusPass, HookedModel, describe, mean_patterns
from causal_probe.hooks.stream import Rows, Visit, visit_patterns
from causal_probe.probes.evidence import ATTENTION, Evidence
from causal_probe.probes.reading import check_sink
from causal_probe.probes.scoring import micro_batches
from causal_probe.probes.sequence_graphs import SequenceGraphs, largest_parents

__all__ = ["head_graphs"]


@overload
def head_graphs(
    model: HookedModel,
    batches: Any,
    *,
    per: Literal["mean"] = ...,
    sink: Literal["exclude", "root", "keep"] | None = ...,
    batch_size: int | None = ...,
) -> Evidence: ...


@overload
def head_graphs(
    model: HookedModel,
    batches: Any,
    *,
    per: Literal["sequence"],
    sink: Literal["exclude", "root", "keep"] | None = ...,
    batch_size: int | None = ...,
) -> SequenceGraphs: ...


def head_graphs(
    model: HookedModel,
    batches: Any,
    *,
    per: Literal["mean", "sequence"] = "mean",
    sink: Literal["exclude", "root", "keep"] | None = None,
    batch_size: int | None = None,
) -> Evidence | SequenceGraphs:
    """Read a graph out of every attention head of any TransformerLens model.

    The evidence of an edge parent -> child is the head's attention from child to parent, averaged over sequences, or on each
    sequence. It is read in one pass that keeps nothing of the size of a batch.

    Averaging is right for heads that look by position, such as those of a known causal graph. On a language model ask for
    ``per="sequence"``: averaging erases the edges of heads that look by content, and most rows of most heads look at position 0,
    an attention sink, when they have nothing to say.

    Parameters
    ----------
    model
        A TransformerLens model, or any HookedRootModule with hook points ``blocks.{layer}.attn.hook_pattern``. It is run in
        evaluation mode without gradients, with the caller's own hooks, and is left as it was.
    batches
        Tokens [batch, pos], or an iterable of such tensors (or of anything with ``.tokens``), all of one length. Text, as a
        :func:`~causal_probe.hooks.corpus`: what was read of it is in ``provenance["corpus"]``.
    per
        ``"mean"`` for one graph for each head, from the mean over sequences; ``"sequence"`` for one on each sequence.
    sink
        What attention on position 0 says: ``"root"``, that there is no parent; ``"exclude"``, nothing; ``"keep"``, that it is the
        parent. By default ``"keep"`` for the mean and ``"root"`` for each sequence. The rules: :attr:`Evidence.settings`
        and :class:`~causal_probe.probes.SequenceGraphs`.
    batch_size
        Sequences in a forward pass; by default as many as :func:`~causal_probe.probes.scan` takes.

    Returns
    -------
    Evidence or SequenceGraphs
        For ``per="mean"`` and ``per="sequence"``.

    Raises
    ------
    CausalProbeError
        If a hook point is missing or never fires, there are no sequences, their lengths differ, or a pattern is not made of
        probabilities.

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=4)
    >>> for child, parent in [(1, 0), (2, 0), (3, 2)]:
    ...     model.block(0, 0, query="position", key="position")[child, parent] = 9.0
    >>> found = head_graphs(model, torch.randint(3, (8, 4), generator=torch.Generator().manual_seed(0)))
    >>> list(found.graph(0, 0).edges)
    [(0, 1), (0, 2), (2, 3)]
    >>> found
    Evidence of disentangled-transformer (attention): 1, 1 heads by layer, 4 positions, mean over 8 sequences
      head  edges  largest attention
      L0H0      3             0.9998
      L1H0      1             0.3611
      edges: attention >= 0.5; largest attention: on an earlier node, mean over nodes
    """
    if per not in ("mean", "sequence"):
        raise CausalProbeError(f"per is 'mean' or 'sequence'; it is {per!r}.")
    if sink is None:
        sink = "keep" if per == "mean" else "root"
    check_sink(sink)
    provenance: dict[str, Any] = {**describe(model)}
    reading = CorpusPass(batches) if isinstance(batches, Corpus) else None
    if reading is not None:
        batches = reading
    if batch_size is None:
        batches = micro_batches(model, batches)
    if per == "sequence":
        return _sequence_graphs(model, batches, sink, batch_size, provenance, reading)
    moments = mean_patterns(model, batches, batch_size=batch_size).moments
    if reading is not None:
        provenance["corpus"] = reading.reading
    return Evidence.of_moments(moments, ATTENTION, {"sink": sink}, provenance)


def _sequence_graphs(
    model: HookedModel,
    batches: Any,
    sink: str,
    batch_size: int | None,
    provenance: Mapping[str, Any],
    reading: CorpusPass | None,
) -> SequenceGraphs:
    seen = Rows()
    found: defaultdict[int, tuple[Rows, ...]] = defaultdict(lambda: (Rows(), Rows(), Rows()))
    start = 0

    def visitor(tokens: Tensor) -> Visit:
        nonlocal start
        first, start = start, start + len(tokens)
        seen.write(first, tokens.cpu().numpy())

        def visit(layer: int, pattern: Tensor) -> None:
            for rows, values in zip(found[layer], largest_parents(pattern), strict=True):
                rows.write(first, values.cpu().numpy())

        return visit

    visit_patterns(model, batches, visitor, batch_size=batch_size)
    if reading is not None:
        provenance = {**provenance, "corpus": reading.reading}
    candidates, weights, sinks = (tuple(found[layer][what].array for layer in sorted(found)) for what in range(3))
    return SequenceGraphs(candidates, weights, sinks, seen.array, sink, provenance=provenance)
