"""Which edges a head needs: the loss when a child's attention is spread evenly, against all of it on one parent.

A trained root may attend to anything: its row has no bearing on the loss, or hardly any, and may saturate on some node. So
neither attention nor cutting the row tells a root from a child. (Cutting a saturated root row can cost as much as cutting the
weakest true edge: the even row is not neutral for the layers that read it.) The question that does is asked the other way
round: *does it help to put the whole row on this one parent, rather than evenly on the past?* For an edge it does, because
a later layer reads the parent's token at the child. For a root it does not, whichever node is tried: none is its parent, so the
later layer is made to count a pair that the data never drew.
"""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import (
    Edit,
    HookedModel,
    Moments,
    attention_hook,
    describe,
    each_batch,
    edited,
    is_live,
    one_hot_row,
    replace_row,
    require_hooks,
    undisturbed,
    uniform_row,
)
from causal_probe.results import Citation, cite, to_jsonable, versions

__all__ = ["EdgeEffects", "edge_effects"]


@dataclass(frozen=True, eq=False, repr=False)
class EdgeEffects:
    """What :func:`edge_effects` measured. Arrays run over the tested pairs, in the order of ``edges``; losses are in nats.

    Attributes
    ----------
    edges
        The tested pairs (parent, child), by child, then parent.
    layer, head
        Whose pattern was edited.
    level
        Family-wise level of ``confirmed``: the probability, at most, of confirming any edge into a root.
    gains, cuts, losses
        The raw evidence, :class:`~causal_probe.hooks.Moments` over sequences. Gains and cuts [edge] are paired differences of
        losses, on the same sequence; losses [] are those of the model as it is.
    epsilon
        Machine epsilon of the coarser of the model's and the loss's dtype.
    provenance
        The model's name, dtype and device, and the versions of the packages.
    """

    edges: tuple[tuple[int, int], ...]
    layer: int
    head: int
    level: float
    gains: Moments
    cuts: Moments
    losses: Moments
    epsilon: float
    provenance: Mapping[str, Any]

    # ------------------------------------------------------------------------------------------------------------ evidence

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.gains.count

    @property
    def loss(self) -> float:
        """Mean loss of the model as it is."""
        return float(self.losses.mean)

    @property
    def resolution(self) -> float:
        """What rounding alone can make of a gain, in nats: the machine epsilon of the loss times its mean size."""
        return self.epsilon * abs(self.loss)

    @property
    def gain(self) -> Float[np.ndarray, " edge"]:
        """Mean loss with the child's row spread evenly over keys 0..child, minus that with the row wholly on the parent.

        Positive for an edge that the model needs. Chance is 0: for a root no parent gains, whichever is tried.
        """
        return _numpy(self.gains.mean)

    @property
    def stderr(self) -> Float[np.ndarray, " edge"] | None:
        """Standard error of ``gain`` over sequences, paired. None for one sequence."""
        return None if self.gains.stderr is None else _numpy(self.gains.stderr)

    @property
    def cut(self) -> Float[np.ndarray, " edge"]:
        """Mean loss with the child's row spread evenly over its past, minus that of the model as it is.

        What cutting the row costs, and no more than that: it belongs to the child, not to one candidate; it is near zero where
        later layers or other heads make up for it, and above zero for some roots. It decides nothing here.
        """
        return _numpy(self.cuts.mean)

    @property
    def cut_stderr(self) -> Float[np.ndarray, " edge"] | None:
        """Standard error of ``cut`` over sequences, paired. None for one sequence."""
        return None if self.cuts.stderr is None else _numpy(self.cuts.stderr)

    @property
    def p_value(self) -> Float[np.ndarray, " edge"] | None:
        """One-sided p-value of gain > ``resolution``: Student's t with sequences - 1 degrees of freedom, paired.

        (It is the normal law for the hundreds of sequences that are needed anyway.) Without any spread it is 0 or 1. None for
        one sequence.
        """
        if self.stderr is None:
            return None
        excess = self.gain - self.resolution
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(self.stderr > 0, excess / self.stderr, np.where(excess > 0, np.inf, -np.inf))
        return np.asarray(stats.t.sf(t, df=self.sequences - 1), dtype=np.float64)

    @property
    def adjusted_p_value(self) -> Float[np.ndarray, " edge"] | None:
        """``p_value`` after Holm's correction over all tested pairs, which needs no assumption on how they depend.

        The smallest family-wise level at which the edge is confirmed. None for one sequence.
        """
        return None if self.p_value is None else _holm(self.p_value)

    @property
    def confirmed(self) -> Bool[np.ndarray, " edge"]:
        """Which edges gain at the family-wise ``level``. None is confirmed by one sequence."""
        if self.adjusted_p_value is None:
            return np.zeros(len(self.edges), dtype=bool)
        return np.asarray(self.adjusted_p_value <= self.level)

    # ------------------------------------------------------------------------------------------------------------- results

    def graph(self, nodes: int, *, max_parents: int | None = 1) -> nx.DiGraph:
        """The confirmed edges.

        Parameters
        ----------
        nodes
            The graph has nodes 0..nodes-1.
        max_parents
            Of a child's confirmed candidates keep those that gain most. The default is one, for one head copies one parent: where
            several candidates of a child were tested, its grandparent can gain as well, only less. None keeps them all.

        Returns
        -------
        networkx.DiGraph
            Edges parent -> child with the evidence as attributes: ``gain``, ``stderr``, ``p_value``, ``adjusted_p_value``,
            ``cut``, ``cut_stderr``.

        Raises
        ------
        CausalProbeError
            If a tested pair is not among the nodes.
        """
        self._check_nodes(nodes)
        graph = nx.DiGraph()
        graph.add_nodes_from(range(nodes))
        table = self.to_pandas()
        table = table[table["confirmed"]].drop(columns="confirmed").sort_values("gain", ascending=False, kind="stable")
        if max_parents is not None:
            table = table.groupby("child").head(max_parents)
        for row in table.sort_values(["child", "parent"]).to_dict("records"):
            graph.add_edge(row.pop("parent"), row.pop("child"), **row)
        return graph

    def weights(self, nodes: int) -> Float[np.ndarray, "child parent"]:
        """``gain`` as an array [child, parent], for AUROC and average precision; 0, which is chance, where nothing was tested.

        Raises
        ------
        CausalProbeError
            If a tested pair is not among the nodes.
        """
        self._check_nodes(nodes)
        weights = np.zeros((nodes, nodes))
        parents, children = np.array(self.edges).T
        weights[children, parents] = self.gain
        return weights

    def merge(self, other: EdgeEffects) -> EdgeEffects:
        """The same over the sequences of both: sums are added, so it equals one run over all of them.

        Raises
        ------
        CausalProbeError
            If the two tested other edges, another head, or at another level.
        """
        if differing := [
            name
            for name in ("edges", "layer", "head", "level", "epsilon")
            if getattr(self, name) != getattr(other, name)
        ]:
            raise CausalProbeError(f"Edge effects that differ in {', '.join(differing)} can't be merged.")
        return replace(
            self,
            gains=self.gains.merge(other.gains),
            cuts=self.cuts.merge(other.cuts),
            losses=self.losses.merge(other.losses),
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per tested pair; what is undefined is None."""
        nothing = [None] * len(self.edges)
        columns = ("gain", "stderr", "p_value", "adjusted_p_value", "confirmed", "cut", "cut_stderr")
        values = {name: getattr(self, name) for name in columns}
        return pd.DataFrame(
            {
                "parent": [parent for parent, _ in self.edges],
                "child": [child for _, child in self.edges],
                **{name: nothing if value is None else value for name, value in values.items()},
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Settings, and the evidence on every edge, in plain JSON types."""
        reason = "a standard error needs two sequences or more"
        undefined = dict.fromkeys(("stderr", "p_value", "adjusted_p_value", "cut_stderr"), reason)
        edges = [{"edge": [row.pop("parent"), row.pop("child")], **row} for row in self.to_pandas().to_dict("records")]
        return dict(
            to_jsonable(
                {
                    "layer": self.layer,
                    "head": self.head,
                    "level": self.level,
                    "correction": "holm",
                    "sequences": self.sequences,
                    "loss": self.loss,
                    "resolution": self.resolution,
                    "edges": edges,
                    "undefined": undefined if self.stderr is None else {},
                    "provenance": self.provenance,
                }
            )
        )

    def cite(self) -> Citation:
        """The paper whose mechanism the test rests on, and one sentence for a methods section."""
        number_of = self.provenance["versions"]
        return cite(
            "nichani2024",
            methods=(
                f"An edge parent -> child of head L{self.layer}H{self.head} of {self.provenance['model']} was confirmed if the "
                "mean loss with the child's attention spread evenly over its past exceeded the mean loss with that attention "
                f"wholly on the parent, on the same {self.sequences} sequences (paired one-sided t-test, Holm-corrected over "
                f"{len(self.edges)} tested pairs, family-wise level {self.level:g}; causal-probe "
                f"{number_of.get('causal-probe', 'from source')}, TransformerLens {number_of['transformer-lens']}, "
                f"{self.provenance['dtype']} on {self.provenance['device']})."
            ),
        )

    def __repr__(self) -> str:
        table = self.to_pandas()[["parent", "child", "gain", "stderr", "adjusted_p_value", "confirmed", "cut"]]
        return (
            f"EdgeEffects of {self._title()}\n{table.to_string(index=False, float_format='{:.3g}'.format, max_rows=40)}"
        )

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(index=False, float_format="{:.3g}".format, max_rows=40, border=0)
        return f"<p>Edge effects of {html.escape(self._title())}</p>{table}"

    def _title(self) -> str:
        return (
            f"L{self.layer}H{self.head} of {self.provenance['model']}: {int(self.confirmed.sum())} of {len(self.edges)} tested "
            f"edges confirmed at the family-wise level {self.level:g}, on {self.sequences:,} sequences"
        )

    def _check_nodes(self, nodes: int) -> None:
        if (last := max(child for _, child in self.edges)) >= nodes:
            raise CausalProbeError(f"Edges into node {last} were tested; a graph over {nodes} nodes can't hold them.")


def edge_effects(
    model: HookedModel,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    layer: int,
    head: int,
    candidates: nx.DiGraph | Iterable[tuple[int, int]],
    level: float = 1e-3,
) -> EdgeEffects:
    """Test which edges parent -> child a head needs, and so tell children from roots.

    Definition. For a candidate edge, on one sequence, in nats::

        gain = loss(the child's pattern row spread evenly over keys 0..child) - loss(the row wholly on the parent)
        cut  = loss(the child's pattern row spread evenly over keys 0..child) - loss(the model as it is)

    An edge is confirmed when its mean gain over sequences is positive by a paired one-sided test, Holm-corrected over all
    tested pairs, at the family-wise ``level``. Chance is 0: for a root no parent gains, as its token does not depend on any
    earlier one. Why attention, or the cut alone, does not tell a root from a child is said at the head of this module. Row 0
    can't be tested: with one key there is nothing to spread.

    All candidates are measured in one pass. A batch costs one run of the model as it is, one for each child and one for each
    candidate.

    Parameters
    ----------
    model
        A TransformerLens model, or any HookedRootModule with hook points ``blocks.{layer}.attn.hook_pattern``. It is run in
        evaluation mode without gradients, with the caller's own hooks, and is left as it was.
    batches
        Anything that ``loss`` understands, gone through once. (A tensor, or one object with ``.tokens``, is one batch.)
    loss
        ``loss(model, batch)`` runs the model and returns one loss per sequence, [batch], in nats.
    layer, head
        Whose pattern is edited, counted from 0.
    candidates
        Pairs (parent, child) or a graph, such as ``head_graphs(...).graph(layer, head, threshold=0)``. They should be chosen
        without looking at these gains.
    level
        Family-wise level in (0, 1), one-sided.

    Raises
    ------
    CausalProbeError
        If a candidate can't be tested (row 0, a parent that does not come before its child, a pair given twice), the head or a
        row does not exist, the loss does not depend on the head's pattern (a dead hook), a loss is not one finite number per
        sequence, or there are no batches.

    References
    ----------
    The mechanism that it tests, a first layer that copies the parent's token to the child for the second layer to match, is that of
    Nichani, Damian & Lee, "How Transformers Learn Causal Structure with Gradient Descent", ICML 2024 (arXiv 2402.14735). The
    correction: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    edges = _check_candidates(candidates)
    if not 0 < level < 1:
        raise CausalProbeError(f"The family-wise level lies between 0 and 1, such as 1e-3; it is {level!r}.")
    name = attention_hook(layer, "pattern")
    require_hooks(model, [name])
    parents: dict[int, list[int]] = defaultdict(list)
    for parent, child in edges:
        parents[child].append(parent)

    epsilon = max(
        (torch.finfo(p.dtype).eps for p in getattr(model, "parameters", tuple)() if p.is_floating_point()), default=0
    )
    totals: tuple[Moments, Moments, Moments] | None = None
    with undisturbed(model):
        for batch in each_batch(batches):
            if totals is None and not is_live(model, name, partial(loss, model, batch)):
                raise CausalProbeError(
                    f"The loss does not depend on the pattern at {name}: nothing reads that hook's value, or the loss does not run "
                    "this model. An edit there would change nothing. Load a Hugging Face model with eager attention; the "
                    "patterns of encoder bridges (BERT) can't be edited."
                )
            clean = _losses(loss, model, batch)
            epsilon = max(epsilon, torch.finfo(clean.dtype).eps)
            gains, cuts = [], []
            for child, its in parents.items():
                even = _losses(loss, model, batch, replace_row(layer, head, child, uniform_row(child)))
                for parent in its:
                    routed = _losses(loss, model, batch, replace_row(layer, head, child, one_hot_row(parent)))
                    gains.append(even - routed)
                    cuts.append(even - clean)
            new = (Moments.of(torch.stack(gains, 1)), Moments.of(torch.stack(cuts, 1)), Moments.of(clean))
            totals = (
                new if totals is None else (totals[0].merge(new[0]), totals[1].merge(new[1]), totals[2].merge(new[2]))
            )
    if totals is None:
        raise CausalProbeError("There are no batches to measure the loss on.")
    return EdgeEffects(
        edges=tuple((parent, child) for child, its in parents.items() for parent in its),
        layer=layer,
        head=head,
        level=level,
        gains=totals[0],
        cuts=totals[1],
        losses=totals[2],
        epsilon=epsilon,
        provenance={**describe(model), "versions": versions()},
    )


def _losses(
    loss: Callable[[Any, Any], Tensor], model: HookedModel, batch: Any, *edits: Edit
) -> Float[Tensor, " batch"]:
    """One finite loss per sequence, with edits."""
    with edited(model, *edits):
        values = loss(model, batch)
    if not isinstance(values, Tensor) or values.ndim != 1 or not values.is_floating_point():
        found = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise CausalProbeError(
            f"loss(model, batch) must return one loss per sequence, a tensor [batch]; it returned {found}."
        )
    if not values.isfinite().all():
        raise CausalProbeError(
            f"The loss is not finite for {int((~values.isfinite()).sum())} of {len(values)} sequences: no effect can be measured."
        )
    return values.detach()


def _check_candidates(candidates: nx.DiGraph | Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The candidates by child, then parent; all that is wrong with them is said at once."""
    pairs = list(candidates.edges if isinstance(candidates, nx.DiGraph) else candidates)
    problems = []
    if not pairs:
        problems.append("there are none")
    if into_root := [pair for pair in pairs if pair[1] == 0]:
        problems.append(f"row 0 has one key only and can't be tested: {_listing(into_root)}")
    if backward := [pair for pair in pairs if pair[1] != 0 and not 0 <= pair[0] < pair[1]]:
        problems.append(f"a parent must come before its child: {_listing(backward)}")
    if repeated := [pair for pair, times in Counter(pairs).items() if times > 1]:
        problems.append(f"given twice: {_listing(repeated)}")
    if problems:
        raise CausalProbeError(f"The candidate edges can't be tested: {'; '.join(problems)}.")
    return sorted(((int(parent), int(child)) for parent, child in pairs), key=lambda pair: (pair[1], pair[0]))


def _listing(edges: list[tuple[int, int]]) -> str:
    return ", ".join(f"{parent} -> {child}" for parent, child in edges)


def _holm(p_values: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Holm's adjusted p-values: the k-th smallest of m times m - k + 1, made monotone, at most 1."""
    order = p_values.argsort(kind="stable")
    scaled = p_values[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted


def _numpy(values: Tensor) -> Float[np.ndarray, " edge"]:
    return np.asarray(values.cpu().numpy(), dtype=np.float64)
