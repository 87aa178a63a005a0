"""Does a head follow the graph of the sequence that it reads, where every sequence may have another?

Averaged over sequences, the attention of a head that follows each sequence's own graph is a mixture of all of them. Here the graphs are held
apart: a head that follows them attends to parents that only graph g has in sequences of g, and not in sequences of another graph.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import BatchSize, Help, Position, Seed
from causal_probe.errors import CausalProbeError
from causal_probe.graphs import check_graph
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.heads import find_head
from causal_probe.hooks.record import Rows, record
from causal_probe.results import BINARY, Result, Table

__all__ = ["GraphSelectivity", "graph_selectivity"]

Permutations: TypeAlias = Annotated[int, Help("Of the labels.", least=19, most=10**6)]
#: A head's number by layer.
ByHead = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, eq=False, repr=False)
class GraphSelectivity(Result):
    """The result of :func:`graph_selectivity`; numbers run over [layer][head].

    Attributes
    ----------
    selectivity
        In [-1, 1]: 1 for a head that attends to the parents of each sequence's own graph alone; 0 for one that attends alike whatever the graph.
    stderr
        Standard error over sequences.
    p_value
        One-sided, by permuting labels; family-wise over all heads (the largest selectivity of each permutation is the reference).
    own
        Mean attention on the parents that only the sequence's own graph has.
    layers
        The layers' numbers.
    names, counts
        The graphs' names, and how many sequences each has.
    rows
        The rows, of all, in which every graph gives the node one parent that the row can see.
    followed
        [head, graph, other graph, row], heads of all layers in a row: at these rows the mean attention, in sequences of the first graph, on the parent that
        the other gives; in [0, 1]. A head that switches has its mass where the two are the same.
    """

    KIND = "graph selectivity"
    FORMAT = 2
    WORKS = ("dangelo2025", "westfall1993")

    layers: tuple[int, ...]
    selectivity: ByHead
    stderr: ByHead
    p_value: ByHead
    own: ByHead
    names: tuple[str, ...]
    counts: tuple[int, ...]
    rows: tuple[int, ...]
    followed: Float[np.ndarray, "head graph graph row"] = field(metadata=BINARY)

    def of(self, layer: Any = None, head: Any = None) -> Float[np.ndarray, "graph graph row"]:
        """One head's part of :attr:`followed`; by default that of :attr:`best`.

        Raises
        ------
        CausalProbeError
            If there is no such head, or no row in which every graph gives one parent.
        """
        if not self.rows:
            raise CausalProbeError(
                "In no row does every graph give the node one parent: the graphs can't be laid side by side."
            )
        sizes = {at: len(its) for at, its in zip(self.layers, self.selectivity, strict=True)}
        at, number = find_head(sizes, self.best if layer is None else layer, head)
        found: Float[np.ndarray, "graph graph row"] = self.followed[
            sum(size for each, size in sizes.items() if each < at) + number
        ]
        return found

    @property
    def best(self) -> str:
        """The most selective head, such as ``"L2H0"``."""
        return str(self.table().rows[0][0])

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The graph selectivity of a head of {self.provenance['model']} is its attention on parents that only one of {len(self.names)} graphs "
            f"has, in that graph's sequences less in another's, averaged over ordered pairs of graphs ({sum(self.counts)} sequences, rows from "
            f"{self.settings['burn_in']} on, row i read for node i + {self.settings['shift']}); p-values by {self.settings['permutations']} permutations "
            f"of the labels, family-wise over heads ({self.measured_with})."
        )

    def table(self) -> Table:
        """One row per head, the most selective first."""
        rows: list[tuple[Any, ...]] = [
            (f"L{layer}H{head}", *numbers)
            for layer, *of_layer in zip(self.layers, self.selectivity, self.stderr, self.p_value, self.own, strict=True)
            for head, numbers in enumerate(zip(*of_layer, strict=True))
        ]
        counted = ", ".join(f"{name}: {count}" for name, count in zip(self.names, self.counts, strict=True))
        return Table(
            f"GraphSelectivity of {self.provenance['model']}: {len(self.names)} graphs ({counted} sequences)",
            ("head", "selectivity", "stderr", "p_value", "own"),
            sorted(rows, key=operator.itemgetter(1), reverse=True),
            (f"row i is read for node i + {self.settings['shift']}",),
        )


@probe
def graph_selectivity(
    model: HookedModel,
    tokens: Any,
    labels: Any,
    graphs: Sequence[nx.DiGraph] | Mapping[str, nx.DiGraph],
    *,
    shift: Position = 0,
    burn_in: Position = 0,
    permutations: Permutations = 999,
    seed: Seed = 0,
    batch_size: BatchSize = None,
) -> GraphSelectivity:
    """How much each head's attention changes with the graph of the sequence.

    Let a(g, g'; n) be a head's mean attention, in sequence n, on the parents that graph g has and graph g' has not. The selectivity is the mean
    over ordered pairs g != g' of a(g, g'; .) over sequences of g, less over sequences of g'. Pairs count alike, whatever their numbers of sequences
    and edges. H0: attention on these parents doesn't depend on the sequence's graph; the unit is the sequence.

    A small p-value is not yet selection: what stands at a parent depends on the graph, and so does, by a hundredth or so, the attention of a random head that looks
    at tokens. Selection is a large value, one that follows the prefix of spliced sequences (:meth:`causal_probe.tasks.graph_mixture.LabelledBatch.splice`).

    Parameters
    ----------
    model
        Any model with TransformerLens' hook points.
    tokens
        [sequence, pos].
    labels
        For each sequence the number of its graph, from 0: a tensor, an array or a list.
    graphs
        The graphs by number, or by name in that order; edges parent -> child over positions.
    shift
        Row i is read for node i + ``shift``: 0 where a position looks up its own parent, 1 in a next-token model that looks up the parent of the token
        that it predicts.
    burn_in
        The first row that counts: a model must have seen some tokens to know the graph.
    permutations, seed
        Of the labels, for the p-values: the smallest is 1 / (``permutations`` + 1).
    batch_size
        Sequences in a forward pass.

    Raises
    ------
    CausalProbeError
        If labels and tokens don't fit together, a graph has fewer than two sequences, no two graphs differ in a row that counts, or an argument
        is out of range.

    References
    ----------
    D'Angelo, Croce & Flammarion, "Selective induction heads: how transformers select causal structures in context", ICLR 2025.
    Westfall & Young, *Resampling-Based Multiple Testing*, 1993 (the family-wise p-values).

    Examples
    --------
    >>> from causal_probe import models, tasks
    >>> task = tasks.GraphMixture.of_lags((1, 2), n_positions=12, d_vocab=3)
    >>> batch = task.sample(64, tasks.generator(0, "selectivity"))
    >>> model = models.DisentangledTransformer(d_vocab=3, n_positions=12)
    >>> found = graph_selectivity(model, batch.tokens, batch.labels, task.graphs)
    >>> round(abs(found.selectivity[0][0]), 6), found.p_value[0][0]  # untrained: it attends alike, whatever the graph
    (0.0, 1.0)
    """
    names = tuple(graphs) if isinstance(graphs, Mapping) else tuple(f"graph {i}" for i in range(len(graphs)))
    its = list(graphs.values()) if isinstance(graphs, Mapping) else list(graphs)
    tokens = torch.cat([getattr(batch, "tokens", batch) for batch in tokens])
    where, counts = _labelled(labels, len(tokens), names)
    only = torch.from_numpy(_only_in(its, tokens.shape[1], shift=shift, burn_in=burn_in, names=names))
    rows, parents = _side_by_side(its, tokens.shape[1], shift)
    found = record(model, tokens, _OnParents(only, where, rows, parents), batch_size=batch_size)
    arrays = found.arrays()
    layers = tuple(sorted(layer for _, layer in arrays))
    # [sequence, head, graph, other graph], all layers side by side
    attention = np.concatenate([arrays["attention", layer] for layer in layers], axis=1)
    n_graphs, n = len(its), len(where)
    # What a sequence says if it is one of graph g: for g its own parents, against g those that other graphs alone have.
    says = (attention.sum(3) - attention.sum(2)) / (n_graphs * (n_graphs - 1))
    member = np.eye(n_graphs)[where] / counts  # [sequence, graph]: a mean over each graph's sequences
    observed = np.einsum("n h g, n g -> h", says, member)
    variance = sum(says[where == g][:, :, g].var(0, ddof=1) / counts[g] for g in range(n_graphs))
    rng = np.random.default_rng(seed)
    largest = np.array(
        [np.einsum("n h g, n g -> h", says, member[rng.permutation(n)]).max() for _ in range(permutations)]
    )
    slack = 1e-12  # what rounding makes of sums in another order is no difference
    p = (1 + (largest[:, None] >= observed - slack).sum(0)) / (permutations + 1)
    own = np.einsum("n h g, n g -> h", attention.sum(3) / (n_graphs - 1), member) / n_graphs
    sizes = np.cumsum([arrays["attention", layer].shape[1] for layer in layers])[:-1]

    def by_layer(values: Float[np.ndarray, " head"]) -> ByHead:
        return tuple(tuple(part.tolist()) for part in np.split(values, sizes))

    return GraphSelectivity(
        layers=layers,
        selectivity=by_layer(observed),
        stderr=by_layer(np.sqrt(variance)),
        p_value=by_layer(p),
        own=by_layer(own),
        names=names,
        counts=tuple(int(count) for count in counts),
        rows=tuple(rows),
        followed=np.concatenate([found.sums[layer] for layer in layers], 1).swapaxes(0, 1) / counts[:, None, None],
        settings={"shift": shift, "burn_in": burn_in, "permutations": permutations, "seed": seed},
        provenance=describe(model),
    )


class _OnParents(Rows):
    """Of each sequence the attention on the parents that one graph has and another has not; by layer, sums over each graph's sequences of the rows."""

    def __init__(
        self,
        only: Float[Tensor, "graph other query key"],
        where: Int[np.ndarray, " sequence"],
        rows: Sequence[int],
        parents: Int[np.ndarray, "graph row"],
    ) -> None:
        super().__init__()
        self.only, self.where, self.rows, self.parents = only, where, rows, torch.from_numpy(parents)
        #: By layer, [graph, head, other graph, row].
        self.sums: dict[int, Float[np.ndarray, "graph head other row"]] = {}

    def reduce(self, layer: int, *values: Tensor) -> Mapping[str, Any]:
        """[sequence, head, graph, other], and the sums."""
        (pattern,) = values
        only = self.only.to(pattern.device, torch.promote_types(pattern.dtype, torch.float32))
        member = torch.from_numpy(np.eye(len(only))[self.where[self._n : self._n + len(pattern)]]).to(only)
        at = pattern[
            :, :, torch.tensor(self.rows, dtype=torch.long, device=only.device), self.parents.to(only.device)
        ].to(only)
        attention = torch.einsum("b h q k, g o q k -> b h g o", pattern.to(only), only)
        sums = torch.einsum("b l, b h g r -> l h g r", member, at)
        return {"attention": attention.double().cpu().numpy(), "sums": sums.double().cpu().numpy()}

    def add(self, reduced: Mapping[int, Mapping[str, Any]]) -> None:
        """The sums are added up; the rest is written below what is there."""
        super().add({layer: {"attention": its["attention"]} for layer, its in reduced.items()})
        for layer, its in reduced.items():
            self.sums[layer] = self.sums.get(layer, 0) + its["sums"]


def _side_by_side(
    graphs: Sequence[nx.DiGraph], n_positions: int, shift: int
) -> tuple[list[int], Int[np.ndarray, "graph row"]]:
    """The rows in which every graph gives the node one parent that the row can see, and these parents."""
    found = {}
    for row in range(n_positions):
        its = [[*graph.pred[row + shift]] if row + shift in graph else [] for graph in graphs]
        if all(len(each) == 1 and each[0] <= row for each in its):
            found[row] = [each[0] for each in its]
    return [*found], np.array([*found.values()], dtype=int).reshape(-1, len(graphs)).T


def _labelled(
    labels: Any, n: int, names: Sequence[str]
) -> tuple[Int[np.ndarray, " sequence"], Int[np.ndarray, " graph"]]:
    """The labels, and how many sequences each graph has."""
    where = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if where.shape != (n,) or where.dtype.kind not in "iu":
        raise CausalProbeError(
            f"Labels are whole numbers, one for each of {n} sequences; found {where.dtype} of shape {list(where.shape)}."
        )
    if len(names) < 2 or where.min(initial=0) < 0 or where.max(initial=0) >= len(names):
        raise CausalProbeError(
            f"Labels number two graphs or more from 0; there are {len(names)} graphs, and labels from {where.min()} to {where.max()}."
        )
    counts = np.bincount(where, minlength=len(names))
    if few := [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < 2]:
        raise CausalProbeError(f"Each graph needs two sequences or more; these have fewer: {', '.join(few)}.")
    return where, counts


def _only_in(
    graphs: Sequence[nx.DiGraph], n_positions: int, *, shift: int, burn_in: int, names: Sequence[str]
) -> Float[np.ndarray, "graph other query key"]:
    """For each ordered pair of graphs, equal weights, of sum 1, on the (row, parent) that only the first has."""
    edges = []
    for graph in graphs:
        check_graph(graph)
        rows = {(child - shift, parent) for parent, child in graph.edges}
        edges.append({(row, key) for row, key in rows if burn_in <= row < n_positions and key <= row})
    only = np.zeros((len(graphs), len(graphs), n_positions, n_positions))
    for g, own in enumerate(edges):
        for o, other in enumerate(edges):
            if g == o:
                continue
            if not (alone := own - other):
                raise CausalProbeError(
                    f"In the rows from {burn_in} to {n_positions - 1} {names[g]} has no parent that {names[o]} lacks: nothing tells them apart there."
                )
            where = np.array(sorted(alone)).T
            only[g, o, where[0], where[1]] = 1 / len(alone)
    return only
