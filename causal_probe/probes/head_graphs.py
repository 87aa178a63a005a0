"""A graph for every attention head: who attends to whom, averaged over sequences."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from causal_probe.arguments import BatchSize
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.corpus import Corpus, CorpusPass
from causal_probe.hooks.means import mean_patterns
from causal_probe.hooks.record import record
from causal_probe.probes.evidence import ATTENTION, Evidence
from causal_probe.probes.sequence_graphs import LargestParents, SequenceGraphs

__all__ = ["head_graphs"]


@overload
def head_graphs(
    model: HookedModel,
    tokens: Any,
    *,
    per: Literal["mean"] = ...,
    by: Any = ...,
    sink: Literal["exclude", "root", "keep"] | None = ...,
    batch_size: int | None = ...,
) -> Evidence: ...


@overload
def head_graphs(
    model: HookedModel,
    tokens: Any,
    *,
    per: Literal["sequence"],
    sink: Literal["exclude", "root", "keep"] | None = ...,
    batch_size: int | None = ...,
) -> SequenceGraphs: ...


@probe
def head_graphs(
    model: HookedModel,
    tokens: Any,
    *,
    per: Literal["mean", "sequence"] = "mean",
    by: Any = None,
    sink: Literal["exclude", "root", "keep"] | None = None,
    batch_size: BatchSize = None,
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
    tokens
        Tokens [batch, pos], or an iterable of such tensors (or of anything with ``.tokens``), all of one length. Text, as a
        :func:`~causal_probe.hooks.corpus`: what was read of it is in ``provenance["corpus"]``.
    per
        ``"mean"`` for one graph for each head, from the mean over sequences; ``"sequence"`` for one on each sequence.
    by
        Labels [sequence] of the sequences, in their order, words or whole numbers: each group is averaged by itself
        (:attr:`Evidence.labels`; ``found.at("2")`` is one group's evidence). Averages over sequences whose graphs differ show none of them.
    sink
        What attention on position 0 says: ``"root"``, that there is no parent; ``"exclude"``, nothing; ``"keep"``, that it is the
        parent. By default ``"keep"`` for the mean and ``"root"`` for each sequence. The rules: :attr:`Evidence.settings`
        and :class:`~causal_probe.probes.sequence_graphs.SequenceGraphs`.
    batch_size
        Sequences in a forward pass; by default as many as :func:`~causal_probe.probes.scan` takes.

    Returns
    -------
    Evidence or SequenceGraphs
        For ``per="mean"`` and ``per="sequence"``: shares of a row's attention, in [0, 1]. Chance is 1 / (child + 1), even attention.

    Raises
    ------
    CausalProbeError
        If a hook point is missing or never fires, there are no sequences, their lengths differ, or a pattern is not made of
        probabilities.

    References
    ----------
    Nichani, Damian & Lee, "How Transformers Learn Causal Structure with Gradient Descent", ICML 2024 (arXiv 2402.14735).

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
    if sink is None:
        sink = "keep" if per == "mean" else "root"
    if by is not None:
        return _by_group(model, tokens, by, per=per, sink=sink, batch_size=batch_size)
    provenance: dict[str, Any] = {**describe(model)}
    reading = CorpusPass(tokens) if isinstance(tokens, Corpus) else None
    batches = tokens if reading is None else reading
    if per == "sequence":
        found = record(model, batches, LargestParents(), batch_size=batch_size)
    else:
        moments = mean_patterns(model, batches, batch_size=batch_size)
    if reading is not None:
        provenance["corpus"] = reading.reading
    if per == "mean":
        return Evidence.of_moments(moments, ATTENTION, {"sink": sink}, provenance)
    return found.graphs(sink, provenance)


def _by_group(model: HookedModel, tokens: Any, by: Any, *, per: str, **options: Any) -> Evidence:
    """The evidence of each group of sequences, side by side."""
    if per != "mean" or isinstance(tokens, Corpus):
        raise CausalProbeError(
            f"by groups sequences of tokens, for per='mean'; found per={per!r} and a {type(tokens).__name__}."
        )
    tokens = torch.cat([getattr(batch, "tokens", batch) for batch in tokens])
    labels = np.asarray(by.cpu() if isinstance(by, Tensor) else by)
    if labels.shape != (len(tokens),) or labels.dtype.kind not in "iuU":
        raise CausalProbeError(
            f"by is one label for each of {len(tokens)} sequences, a word or a whole number; found {labels.dtype} of shape {list(labels.shape)}."
        )
    groups = {str(label): tokens[torch.from_numpy(labels == label)] for label in np.unique(labels)}
    return Evidence.stack({label: head_graphs(model, its, **options) for label, its in groups.items()})
