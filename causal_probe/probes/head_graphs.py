"""A graph for every attention head: who attends to whom, averaged over sequences."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import GraphComparison, compare
from causal_probe.hooks import Corpus, CorpusPass, HookedModel, Moments, describe, mean_patterns, merge_readings
from causal_probe.hooks.stream import Rows, Visit, visit_patterns
from causal_probe.probes.scoring import micro_batches
from causal_probe.probes.sequence_graphs import REST, SINKS, SequenceGraphs, largest_parents
from causal_probe.results import Citation, cite, escape, read_arrays, to_jsonable, versions, write_arrays

__all__ = ["Candidate", "HeadGraphs", "compared_children", "head_graphs"]

#: What a file of :meth:`HeadGraphs.save` says that it is.
KIND, FORMAT = "head graphs", 1
#: A repr shows this many heads at most.
SHOWN = 24


class Candidate(NamedTuple):
    """The earlier node that a node attends to most.

    Attributes
    ----------
    child, parent
        The node and its candidate parent, the smallest of several with the same attention.
    weight
        The evidence for the edge, in [0, 1]: mean attention from child to parent (:attr:`HeadGraphs.evidence`).
    margin
        ``weight`` minus the largest evidence for any other earlier node, >= 0; None for a node that has no other.
    """

    child: int
    parent: int
    weight: float
    margin: float | None


@dataclass(frozen=True, eq=False, repr=False)
class HeadGraphs:
    """What :func:`head_graphs` found.

    Attributes
    ----------
    weights
        By layer: mean attention [head, query, key] = [head, child, parent], in [0, 1]; rows sum to one.
    stderr
        By layer: the standard error of ``weights`` over sequences, of the same shape. None for one sequence.
    sequences
        Number of sequences that were averaged over.
    provenance
        The model's name, dtype and device, and the versions of the packages.
    sink
        What the graphs make of the attention on position 0. ``"keep"``: position 0 is a key as any other. ``"root"``: it says
        "no parent", so a row is a root where it exceeds the attention on any other earlier position. ``"exclude"``: it
        says nothing; a row's other attention is scaled up to one, and a row that has less than 0.1 of it is a root.
    """

    weights: tuple[Float[np.ndarray, "_head query key"], ...]
    stderr: tuple[Float[np.ndarray, "_head query key"], ...] | None
    sequences: int
    provenance: Mapping[str, Any]
    sink: str = "keep"

    @property
    def positions(self) -> int:
        """Number of positions T of the sequences."""
        return int(self.weights[0].shape[1])

    def parents(self, layer: int, head: int, *, nodes: int | None = None) -> tuple[Candidate, ...]:
        """The candidate parent of every node but node 0: the earlier node that it attends to most.

        Where the sink is excluded or says "root", position 0 is no candidate, and node 1 has none.

        Parameters
        ----------
        layer, head
            Which head, counted from 0.
        nodes
            Only nodes 0..nodes-1; all positions by default.

        Raises
        ------
        CausalProbeError
            If there is no such head, or fewer positions than nodes.
        """
        evidence = self.evidence(layer, head)[: self._check_nodes(nodes)]
        first = 0 if self.sink == "keep" else 1
        found = []
        for child in range(first + 1, len(evidence)):
            earlier = evidence[child, first:child]
            best = int(earlier.argmax())  # the first of equals
            others = np.delete(earlier, best)
            margin = float(earlier[best] - others.max()) if len(others) else None
            found.append(Candidate(child, first + best, float(earlier[best]), margin))
        return tuple(found)

    def evidence(self, layer: int, head: int) -> Float[np.ndarray, "query key"]:
        """One head's mean attention after the rule of :attr:`sink`: what its graph is read from, in [0, 1].

        Raises
        ------
        CausalProbeError
            If there is no such head.
        """
        weights = self._of(layer, head)
        if self.sink == "keep":
            return weights
        at_sink = weights[:, :1]
        others = np.where(np.arange(len(weights)) == 0, 0.0, weights)
        if self.sink == "root":
            return np.where(others > at_sink, others, 0.0)
        return np.where(1 - at_sink >= REST, others / np.maximum(1 - at_sink, REST), 0.0)

    def by_offset(self, layer: int, head: int) -> Float[np.ndarray, " offset"]:
        """The evidence by relative offset: for k = 0 ... T - 1, its mean over the rows that have a key k positions back.

        Where the sink is excluded or says "root", over those for which that key is not position 0; 0 where there is none.
        """
        evidence = self.evidence(layer, head)
        first = 0 if self.sink == "keep" else 1
        return np.array(
            [
                np.diagonal(evidence, -k)[first:].mean() if k + first < len(evidence) else 0.0
                for k in range(len(evidence))
            ]
        )

    def offset_graph(self, layer: int, head: int, *, threshold: float = 0.5) -> nx.DiGraph:
        """One head's graph by relative offset: one offset for all positions, or no edges.

        The offset k >= 1 with the largest :meth:`by_offset` (of equals the smallest) gives each position i >= k the parent i - k,
        if it reaches ``threshold``. Edges carry that as ``weight``. Such a graph sees a head that looks a fixed distance back
        also where single rows are noisy; and it sees no other.

        Raises
        ------
        CausalProbeError
            If there is no such head, or the threshold is out of range.
        """
        self._check_threshold(threshold)
        graph = nx.empty_graph(self.positions, create_using=nx.DiGraph)
        weights = self.by_offset(layer, head)[1:]
        if len(weights) and weights.max() >= threshold:
            k = 1 + int(weights.argmax())
            first = 0 if self.sink == "keep" else 1
            graph.add_edges_from((i - k, i, {"weight": float(weights.max())}) for i in range(k + first, self.positions))
        return graph

    def graph(self, layer: int, head: int, *, threshold: float = 0.5, nodes: int | None = None) -> nx.DiGraph:
        """One head's graph: each node has one parent, or is a root.

        The rule: a node's candidate parent is the earlier node that it attends to most, on the mean over sequences (of equals
        the smallest). The node is a root unless the candidate gets at least ``threshold`` of the node's attention, itself
        included; node 0 is always a root. The default, one half, asks for more than all other keys together. What becomes of
        attention on position 0 is the rule of :attr:`sink`.

        The limits of the rule: attention alone does not tell a root from a child. What a root's row holds has no bearing on
        the loss, so it may saturate on any node; and a head that has not been trained to the end may spread a true child's row
        below the threshold. :func:`~causal_probe.probes.edge_effects` decides by effect; give it the candidates, which are
        ``graph(layer, head, threshold=0)``. Averaging over sequences keeps what depends on position alone: a head whose
        target depends on the tokens has a flat mean.

        Parameters
        ----------
        layer, head
            Which head, counted from 0.
        threshold
            In [0, 1]. 0 makes every candidate an edge.
        nodes
            The graph has nodes 0..nodes-1; by default one for each position. (In the in-context tree task the last position
            is a query and no node.)

        Returns
        -------
        networkx.DiGraph
            Edges parent -> child with ``weight`` and ``margin`` of the :class:`Candidate`, and ``stderr`` of the weight (None for
            one sequence, and where the sink is excluded).

        Raises
        ------
        CausalProbeError
            If there is no such head, fewer positions than nodes, or the threshold is out of range.
        """
        self._check_threshold(threshold)
        candidates = self.parents(layer, head, nodes=nodes)
        graph = nx.DiGraph()
        graph.add_nodes_from(range(self._check_nodes(nodes)))
        for child, parent, weight, margin in candidates:
            if weight >= threshold and (weight > 0 or self.sink == "keep"):
                # the standard error is that of the attention, and says nothing of a share of the rest
                known = self.stderr is not None and self.sink != "exclude"
                stderr = float(self.stderr[layer][head, child, parent]) if known and self.stderr else None
                graph.add_edge(parent, child, weight=weight, margin=margin, stderr=stderr)
        return graph

    def compare(
        self,
        truth: nx.DiGraph,
        layer: int,
        head: int,
        *,
        threshold: float = 0.5,
        children: Iterable[int] | None = None,
        reversal_cost: int = 1,
    ) -> GraphComparison:
        """Compare :meth:`graph` with the truth by :func:`causal_probe.graphs.compare`, the mean attention as weights.

        Parameters
        ----------
        truth
            Edges parent -> child over nodes that are positions.
        children
            Compare only the edges into these nodes. By default every node of ``truth`` that has a row of its own: all of
            them, or, where ``truth`` has nodes beyond the last position, those before the last position (whose row is the
            query for what comes next, not the row of its own node).

        Raises
        ------
        CausalProbeError
            If an argument does not fit, here or in :func:`~causal_probe.graphs.compare`.
        """
        rows = compared_children(truth, self.positions, children)
        nodes = min(len(truth), self.positions)
        found = self.graph(layer, head, threshold=threshold, nodes=nodes)
        weights = self.evidence(layer, head)[:nodes, :nodes]
        return compare(found, truth, weights=weights, children=rows, reversal_cost=reversal_cost)

    def merge(self, other: HeadGraphs) -> HeadGraphs:
        """The result of one run over the sequences of both: sums and sums of squares are added, so it is that to rounding.

        Raises
        ------
        CausalProbeError
            If the models, their heads, the lengths of the sequences or the rules of the sink differ, or shards of a corpus share documents.
        """
        shapes = [[list(layer.shape) for layer in one.weights] for one in (self, other)]
        for what, mine, theirs in (
            ("models", self.provenance["model"], other.provenance["model"]),
            ("patterns", *shapes),
            ("sinks", self.sink, other.sink),
            ("sequences (one is text)", "corpus" in self.provenance, "corpus" in other.provenance),
        ):
            if mine != theirs:
                raise CausalProbeError(f"Head graphs can't be merged: their {what} differ, {mine} and {theirs}.")
        provenance = dict(self.provenance)
        if "corpus" in provenance:
            provenance["corpus"] = merge_readings(provenance["corpus"], other.provenance["corpus"])
        merged = [
            one.merge(two) for one, two in zip(_moments(self), _moments(other), strict=True)
        ]  # two sequences or more: there is a standard error
        return replace(
            self,
            weights=tuple(moments.mean.numpy() for moments in merged),
            stderr=tuple(moments.stderr.numpy() for moments in merged if moments.stderr is not None),
            sequences=self.sequences + other.sequences,
            provenance=provenance,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything into one safetensors file, which :meth:`load` reads."""
        arrays = {f"weights.{layer}": values for layer, values in enumerate(self.weights)}
        arrays |= {f"stderr.{layer}": values for layer, values in enumerate(self.stderr or ())}
        about = {"sequences": self.sequences, "sink": self.sink, "provenance": self.provenance, "versions": versions()}
        write_arrays(path, arrays, about={"kind": KIND, "format": FORMAT, **about})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadGraphs:
        """What :meth:`save` has written.

        Raises
        ------
        CausalProbeError
            If the file is missing, damaged, something else, or of a newer format.
        """
        arrays, about = read_arrays(path, kind=KIND, newest=FORMAT)
        layers = range(sum(name.startswith("weights.") for name in arrays))
        stderr = tuple(arrays[f"stderr.{layer}"] for layer in layers) if "stderr.0" in arrays else None
        weights = tuple(arrays[f"weights.{layer}"] for layer in layers)
        return cls(weights, stderr, about["sequences"], about["provenance"], about["sink"])

    def cite(self) -> Citation:
        """The paper whose heads hold a causal graph, and one sentence for a methods section."""
        number_of = self.provenance["versions"]
        return cite(
            "nichani2024",
            methods=(
                f"The graph of an attention head of {self.provenance['model']} was read from its attention pattern averaged over "
                f"{self.sequences} sequences of {self.positions} tokens: a node's candidate parent is the earlier position with "
                "the largest mean attention, and the node is a root unless that attention reaches a threshold "
                f"(causal-probe {number_of.get('causal-probe', 'from source')}, TransformerLens {number_of['transformer-lens']}, "
                f"{self.provenance['dtype']} on {self.provenance['device']})."
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields in plain JSON types; arrays as nested lists [layer][head][child][parent]."""
        fields = {"weights": self.weights, "stderr": self.stderr, "sequences": self.sequences, "sink": self.sink}
        undefined = {} if self.stderr is not None else {"stderr": "a standard error needs two sequences or more"}
        return dict(to_jsonable({**fields, "undefined": undefined, "provenance": self.provenance}))

    def __repr__(self) -> str:
        lines = [f"HeadGraphs of {self._title()}"]
        lines += [f"  {name:<7} {edges:>3} edges   {attention:.3f}" for name, edges, attention in self._rows()]
        return "\n".join([*lines, f"  {self._legend()}"])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{name}</th><td>{edges}</td><td>{mean:.3f}</td></tr>" for name, edges, mean in self._rows()
        )
        return (
            f"<table><caption>Head graphs of {escape(self._title())}</caption>"
            "<thead><tr><th>head</th><th>edges</th><th>mean largest attention</th></tr></thead>"
            f"<tbody>{rows}</tbody></table><p>{self._legend()}</p>"
        )

    def _title(self) -> str:
        heads = ", ".join(str(len(layer)) for layer in self.weights)
        return (
            f"{self.provenance['model']}: {heads} heads by layer, {self.positions} positions, "
            f"mean over {self.sequences:,} sequences{'' if self.sink == 'keep' else f', sink={self.sink!r}'}"
        )

    def _legend(self) -> str:
        n_heads = sum(map(len, self.weights))
        rest = f"; and {n_heads - SHOWN} more heads" if n_heads > SHOWN else ""
        return f"edges: attention >= 0.5; number: mean over nodes of the largest attention on an earlier node{rest}"

    def _rows(self) -> Iterator[tuple[str, int, float]]:
        heads = ((layer, head) for layer, weights in enumerate(self.weights) for head in range(len(weights)))
        for layer, head in itertools.islice(heads, SHOWN):
            attention = [candidate.weight for candidate in self.parents(layer, head)]
            yield f"L{layer}H{head}", sum(weight >= 0.5 for weight in attention), float(np.mean(attention or [0.0]))

    def _of(self, layer: int, head: int) -> Float[np.ndarray, "query key"]:
        if not 0 <= layer < len(self.weights) or not 0 <= head < len(self.weights[layer]):
            heads = [len(weights) for weights in self.weights]
            raise CausalProbeError(f"There is no head L{layer}H{head}; the heads by layer are {heads}.")
        return np.asarray(self.weights[layer][head])

    @staticmethod
    def _check_threshold(threshold: float) -> None:
        if not 0 <= threshold <= 1:
            raise CausalProbeError(f"The threshold is a share of a row's attention, from 0 to 1; it is {threshold!r}.")

    def _check_nodes(self, nodes: int | None) -> int:
        if nodes is not None and not 1 <= nodes <= self.positions:
            raise CausalProbeError(
                f"A graph over {nodes} nodes was asked for; the sequences have {self.positions} positions, one node each."
            )
        return self.positions if nodes is None else nodes


@overload
def head_graphs(
    model: HookedModel,
    batches: Any,
    *,
    per: Literal["mean"] = ...,
    sink: Literal["exclude", "root", "keep"] | None = ...,
    batch_size: int | None = ...,
) -> HeadGraphs: ...


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
) -> HeadGraphs | SequenceGraphs:
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
        parent. By default ``"keep"`` for the mean and ``"root"`` for each sequence. The rules: :attr:`HeadGraphs.sink`
        and :class:`~causal_probe.probes.SequenceGraphs`.
    batch_size
        Sequences in a forward pass; by default as many as :func:`~causal_probe.probes.scan` takes.

    Returns
    -------
    HeadGraphs or SequenceGraphs
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
    HeadGraphs of disentangled-transformer: 1, 1 heads by layer, 4 positions, mean over 8 sequences
      L0H0      3 edges   1.000
      L1H0      1 edges   0.361
      edges: attention >= 0.5; number: mean over nodes of the largest attention on an earlier node
    """
    if per not in ("mean", "sequence"):
        raise CausalProbeError(f"per is 'mean' or 'sequence'; it is {per!r}.")
    if sink is None:
        sink = "keep" if per == "mean" else "root"
    if sink not in SINKS:
        raise CausalProbeError(f"sink is one of {', '.join(map(repr, SINKS))}; it is {sink!r}.")
    provenance = {**describe(model), "versions": versions()}
    reading = CorpusPass(batches) if isinstance(batches, Corpus) else None
    if reading is not None:
        batches = reading
    if batch_size is None:
        batches = micro_batches(model, batches)
    if per == "sequence":
        return _sequence_graphs(model, batches, sink, batch_size, provenance, reading)
    means = mean_patterns(model, batches, batch_size=batch_size)
    mean, stderr = means.mean, means.stderr
    if reading is not None:
        provenance["corpus"] = reading.reading
    return HeadGraphs(
        weights=tuple(mean[layer].cpu().numpy() for layer in sorted(mean)),
        stderr=None if stderr is None else tuple(stderr[layer].cpu().numpy() for layer in sorted(stderr)),
        sequences=means.sequences,
        provenance=provenance,
        sink=sink,
    )


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
    return SequenceGraphs(candidates, weights, sinks, seen.array, sink, provenance)


def compared_children(truth: nx.DiGraph, positions: int, children: Iterable[int] | None) -> list[int]:
    """The nodes whose pattern rows can be compared with their edges in ``truth``; see :meth:`HeadGraphs.compare`.

    Raises
    ------
    CausalProbeError
        If a child was asked for that is no position or no node.
    """
    if children is None:
        return list(range(len(truth) if len(truth) <= positions else positions - 1))
    rows = sorted(set(children))
    if strangers := [row for row in rows if not (row in truth and 0 <= row < positions)]:
        raise CausalProbeError(
            f"The children {strangers} have no row to compare: the sequences have {positions} positions, the truth "
            f"{len(truth)} nodes."
        )
    return rows


def _moments(graphs: HeadGraphs) -> list[Moments]:
    """By layer, the count, sum and sum of squares that the means and standard errors came from."""
    n = graphs.sequences
    found = []
    for layer, mean in enumerate(graphs.weights):
        exact = torch.as_tensor(mean, dtype=torch.float64)
        spread = 0.0 if graphs.stderr is None else torch.as_tensor(graphs.stderr[layer], dtype=torch.float64) ** 2
        found.append(Moments(n, n * exact, n * exact**2 + n * (n - 1) * spread))
    return found
