"""Which edges a head needs: the loss when a child's attention is spread evenly, against all of it on one parent.

A trained root may attend to anything: its row has hardly any bearing on the loss, and may saturate on some node. So neither
attention nor cutting the row tells a root from a child. (Cutting a saturated root row can cost as much as cutting the weakest
true edge.) Two questions do, and an edge is confirmed where both are answered yes:

1. *Does it help to put the whole row on this one parent, rather than evenly on the past?* (the **gain**) For an edge it does,
   because a later layer reads the parent's token at the child. For a root it hardly ever does, whichever node is tried: none is
   its parent, and the later layer is made to count a pair that the data never drew.
2. *Does it help more than it would if the child were a root?* (the **excess**) Zero is not exactly what a root gains. The even
   row holds the child itself, which may harm; training has put the row where it harmed least; a model may be too sure of
   itself. So the same gain is measured again on the same sequences with the child redrawn as a root, and all that descends
   from it redrawn accordingly. If the child *is* a root, both are equal in law, for any model whatever, and their mean
   difference is zero. It needs data that can be redrawn, as of a known task; without it the first question is asked alone.

The children are redrawn from the last to the first, so that what descends from a child is known when its turn comes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

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
from causal_probe.probes.p_values import holm
from causal_probe.results import Citation, cite, escape, to_jsonable, versions

__all__ = ["EdgeEffects", "Redraw", "edge_effects"]

#: Draws a child as a root: ``redraw(batch, child, edges)`` is the batch of the same sequences in which the child's token is
#: drawn from what a root's would be, independently of all earlier ones, and every descendant of the child along ``edges`` (a graph
#: of the edges found so far, which holds those into later children) is drawn anew, parents before children.
Redraw: TypeAlias = Callable[[Any, int, nx.DiGraph], Any]

#: What is told of every tested pair.
COLUMNS = (
    "gain",
    "stderr",
    "p_value",
    "excess",
    "excess_stderr",
    "excess_p_value",
    "adjusted_p_value",
    "confirmed",
    "cut",
    "cut_stderr",
)


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
    excesses
        By edge, the moments of its gain minus the gain with the child redrawn as a root. Only edges whose gain is positive at
        ``level`` were redrawn, for no other can be confirmed. None if nothing was redrawn.
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
    excesses: Mapping[tuple[int, int], Moments] | None
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

        Positive for an edge that the model needs. Chance is close to 0, and is what ``excess`` takes off.
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
        t = _t(self.gain - self.resolution, self.stderr)
        return np.asarray(stats.t.sf(t, df=self.sequences - 1), dtype=np.float64)

    @property
    def excess(self) -> tuple[float | None, ...]:
        """``gain`` minus the mean gain on the same sequences with the child redrawn as a root, in nats.

        Chance is exactly 0: for a root both are equal in law. None where the child was not redrawn.
        """
        return self._of_excesses(lambda moments: float(moments.mean))

    @property
    def excess_stderr(self) -> tuple[float | None, ...]:
        """Standard error of ``excess`` over sequences, paired."""
        return self._of_excesses(lambda moments: None if moments.stderr is None else float(moments.stderr))

    @property
    def excess_p_value(self) -> tuple[float | None, ...]:
        """One-sided p-value of excess > ``resolution``, as ``p_value``."""
        return self._of_excesses(lambda moments: _p_value(moments, self.resolution))

    @property
    def adjusted_p_value(self) -> Float[np.ndarray, " edge"] | None:
        """The smallest family-wise level at which the edge is confirmed, over all tested pairs. None for one sequence.

        ``p_value`` after Holm's correction; where children were redrawn, the larger of that and of ``excess_p_value`` after
        Bonferroni's (they are decided one after the other). Neither assumes anything on how the pairs depend.
        """
        if self.p_value is None:
            return None
        adjusted = holm(self.p_value)
        if self.excesses is not None:
            # An edge that was not redrawn has failed the first test, and keeps the p-value that it failed with.
            second = [0 if p is None else min(1, len(self.edges) * p) for p in self.excess_p_value]
            adjusted = np.maximum(adjusted, second)
        return adjusted

    @property
    def confirmed(self) -> Bool[np.ndarray, " edge"]:
        """Which edges gain, and exceed what a root would gain where that was measured, at the family-wise ``level``.

        One sequence confirms none.
        """
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
            Edges parent -> child with the evidence as attributes: the numbers of :meth:`to_pandas`, None where undefined.

        Raises
        ------
        CausalProbeError
            If a tested pair is not among the nodes.
        """
        self._check_nodes(nodes)
        graph = nx.DiGraph()
        graph.add_nodes_from(range(nodes))
        taken: Counter[int] = Counter()
        for row in sorted(self._records(), key=lambda row: -row["gain"]):
            parent, child = row.pop("parent"), row.pop("child")
            if row.pop("confirmed") and (max_parents is None or taken[child] < max_parents):
                graph.add_edge(parent, child, **row)
                taken[child] += 1
        return graph

    def weights(self, nodes: int) -> Float[np.ndarray, "child parent"]:
        """The evidence that decides, as an array [child, parent] for AUROC and average precision.

        It is the smaller of the t statistics of gain and excess (of the gain alone where the child was not redrawn), and 0, its
        chance level, where nothing was tested.

        Raises
        ------
        CausalProbeError
            If a tested pair is not among the nodes, or one sequence leaves the statistics undefined.
        """
        self._check_nodes(nodes)
        if self.stderr is None:
            raise CausalProbeError("Evidence from one sequence has no standard error; measure on two or more.")
        t = _t(self.gain - self.resolution, self.stderr)
        measured = self.excesses or {}
        t_excess = [_t_of(measured[edge], self.resolution) if edge in measured else np.inf for edge in self.edges]
        weights = np.zeros((nodes, nodes))
        parents, children = np.array(self.edges).T
        # Without any spread t is infinite: the largest float, or, where there is no gain, chance.
        weights[children, parents] = np.nan_to_num(np.minimum(t, t_excess), neginf=0)
        return weights

    def merge(self, other: EdgeEffects) -> EdgeEffects:
        """The same over the sequences of both: sums are added, so it equals one run over all of them.

        Raises
        ------
        CausalProbeError
            If the two tested other edges, another head, or at another level, or redrew other children.
        """
        if differing := [
            name
            for name in ("edges", "layer", "head", "level", "epsilon")
            if getattr(self, name) != getattr(other, name)
        ]:
            raise CausalProbeError(f"Edge effects that differ in {', '.join(differing)} can't be merged.")
        mine, theirs = self.excesses, other.excesses
        if (mine is None) != (theirs is None) or (mine and theirs and mine.keys() != theirs.keys()):
            raise CausalProbeError(
                "Edge effects can't be merged if other children were redrawn in one than in the other: measure over all batches "
                "at once, or merge effects without redrawing."
            )
        return replace(
            self,
            gains=self.gains.merge(other.gains),
            cuts=self.cuts.merge(other.cuts),
            losses=self.losses.merge(other.losses),
            excesses=mine and theirs and {edge: moments.merge(theirs[edge]) for edge, moments in mine.items()},
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per tested pair; what is undefined is missing, as pandas has it (NaN)."""
        return pd.DataFrame(self._records())

    def to_dict(self) -> dict[str, Any]:
        """Settings, and the evidence on every edge, in plain JSON types."""
        undefined: dict[str, str] = {}
        if self.stderr is None:
            reason = "a standard error needs two sequences or more"
            undefined |= dict.fromkeys(("stderr", "p_value", "adjusted_p_value", "cut_stderr"), reason)
        if self.excesses is None or len(self.excesses) < len(self.edges):
            reason = "the child was not redrawn as a root: " + (
                "no way to redraw was given" if self.excesses is None else "the gain is not positive at the level"
            )
            undefined |= dict.fromkeys(("excess", "excess_stderr", "excess_p_value"), reason)
        edges = [{"edge": [row.pop("parent"), row.pop("child")], **row} for row in self._records()]
        return dict(
            to_jsonable(
                {
                    "layer": self.layer,
                    "head": self.head,
                    "level": self.level,
                    "correction": "holm" if self.excesses is None else "holm (gain), bonferroni (excess)",
                    "sequences": self.sequences,
                    "loss": self.loss,
                    "resolution": self.resolution,
                    "edges": edges,
                    "undefined": undefined,
                    "provenance": self.provenance,
                }
            )
        )

    def cite(self) -> Citation:
        """The paper whose mechanism the test rests on, and one sentence for a methods section."""
        number_of = self.provenance["versions"]
        exceeded = (
            ", and exceeded what it was with the child redrawn as a root and its descendants redrawn along the confirmed edges "
            "(Bonferroni-corrected)"
        )
        return cite(
            "nichani2024",
            methods=(
                f"An edge parent -> child of head L{self.layer}H{self.head} of {self.provenance['model']} was confirmed if its "
                "gain, the loss with the child's attention spread evenly over its past minus the loss with that attention wholly "
                f"on the parent, was positive in the mean over {self.sequences} sequences (paired one-sided t-test, "
                f"Holm-corrected over {len(self.edges)} tested pairs){'' if self.excesses is None else exceeded}, at the "
                f"family-wise level {self.level:g} (causal-probe {number_of.get('causal-probe', 'from source')}, "
                f"TransformerLens {number_of['transformer-lens']}, {self.provenance['dtype']} on {self.provenance['device']})."
            ),
        )

    def __repr__(self) -> str:
        table = self.to_pandas()[
            ["parent", "child", "gain", "stderr", "excess", "adjusted_p_value", "confirmed", "cut"]
        ]
        return (
            f"EdgeEffects of {self._title()}\n{table.to_string(index=False, float_format='{:.3g}'.format, max_rows=40)}"
        )

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(index=False, float_format="{:.3g}".format, max_rows=40, border=0)
        return f"<p>Edge effects of {escape(self._title())}</p>{table}"

    def _title(self) -> str:
        return (
            f"L{self.layer}H{self.head} of {self.provenance['model']}: {int(self.confirmed.sum())} of {len(self.edges)} tested "
            f"edges confirmed at the family-wise level {self.level:g}, on {self.sequences:,} sequences"
        )

    def _records(self) -> list[dict[str, Any]]:
        columns = {name: getattr(self, name) for name in COLUMNS}
        rows = []
        for index, (parent, child) in enumerate(self.edges):
            values = {name: None if column is None else column[index] for name, column in columns.items()}
            plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
            rows.append({"parent": parent, "child": child, **plain})
        return rows

    def _of_excesses(self, number: Callable[[Moments], float | None]) -> tuple[float | None, ...]:
        measured = self.excesses or {}
        return tuple(number(measured[edge]) if edge in measured else None for edge in self.edges)

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
    redraw: Redraw | None = None,
) -> EdgeEffects:
    """Test which edges parent -> child a head needs, and so tell children from roots.

    Definition. For a candidate edge, on one sequence, in nats::

        gain   = loss(the child's pattern row spread evenly over keys 0..child) - loss(the row wholly on the parent)
        excess = gain - gain on the same sequence with the child redrawn as a root
        cut    = loss(the child's pattern row spread evenly over keys 0..child) - loss(the model as it is)

    An edge is confirmed when the mean gain over sequences is positive and, if ``redraw`` is given, the mean excess as well: by
    paired one-sided tests over all tested pairs at the family-wise ``level``. Chance is close to 0 for the gain, and exactly 0
    for the excess if the child is a root. Why attention and the cut don't tell a root from a child, and these two do, is said at
    the head of this module. Row 0 can't be tested: with one key there is nothing to spread.

    All candidates are measured in one pass, in which a batch costs one run of the model as it is, one for each child and one for
    each candidate. With ``redraw`` it costs one more for each child with a positive gain, and one for each such candidate; the
    gains of all sequences are then kept, [sequence, edge].

    Parameters
    ----------
    model
        A TransformerLens model, or any HookedRootModule with hook points ``blocks.{layer}.attn.hook_pattern``. It is run in
        evaluation mode without gradients, with the caller's own hooks, and is left as it was.
    batches
        Anything that ``loss`` understands. (A tensor, or one object with ``.tokens``, is one batch.) With ``redraw`` they are gone
        through several times: give a list, or anything that can be iterated over again.
    loss
        ``loss(model, batch)`` runs the model and returns one loss per sequence, [batch], in nats.
    layer, head
        Whose pattern is edited, counted from 0.
    candidates
        Pairs (parent, child) or a graph, such as ``head_graphs(...).graph(layer, head, claim=0)``. They should be chosen
        without looking at these gains.
    level
        Family-wise level in (0, 1), one-sided.
    redraw
        ``redraw(batch, child, edges)`` is the batch with the child redrawn as a root, see :data:`Redraw`. Use it where the data
        come from a known process: without it a root whose row harms least on its candidate may be confirmed.

    Raises
    ------
    CausalProbeError
        If a candidate can't be tested (row 0, a parent that does not come before its child, a pair given twice), the head or a
        row does not exist, the loss does not depend on the head's pattern (a dead hook), a loss is not one finite number per
        sequence, there are no batches, or ``redraw`` is given with batches that can be gone through only once.

    References
    ----------
    The mechanism that it tests, a first layer that copies the parent's token to the child for the second layer to match, is that of
    Nichani, Damian & Lee, "How Transformers Learn Causal Structure with Gradient Descent", ICML 2024 (arXiv 2402.14735). The
    correction: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.

    Examples
    --------
    >>> from causal_probe import graphs, models, tasks, training
    >>> task = tasks.InContextMarkov(graphs.chain(7), d_vocab=3, concentration=0.1)
    >>> model = models.hand_set(graphs.chain(7), 3, match_scale=8.0, output_scale=4.0)
    >>> batches = [task.sample(4096, tasks.generator(0, "probe"))]
    >>> def loss(model, batch):
    ...     return training.task_loss(model.predict(batch.tokens), batch.target)
    >>> found = edge_effects(model, batches, loss, layer=0, head=0, candidates=[(2, 3), (0, 3)])
    >>> [(parent, child) for parent, child in found.graph(nodes=7).edges]
    [(2, 3)]
    """
    parents = _check_candidates(candidates)
    if not 0 < level < 1:
        raise CausalProbeError(f"The family-wise level lies between 0 and 1, such as 1e-3; it is {level!r}.")
    if redraw is not None and isinstance(batches, Iterator):
        raise CausalProbeError(
            "Redrawing goes through the batches several times, and these can be read once. Give a list."
        )
    name = attention_hook(layer, "pattern")
    require_hooks(model, [name])
    editing = _Editing(model, loss, layer, head)

    epsilon = max((torch.finfo(p.dtype).eps for p in _parameters(model) if p.is_floating_point()), default=0.0)
    totals: tuple[Moments, Moments, Moments] | None = None
    measured: list[Tensor] = []  # [sequence, edge] by batch: what the gains of redrawn batches are paired with
    with undisturbed(model):
        for batch in each_batch(batches):
            if totals is None and not is_live(model, name, partial(loss, model, batch)):
                raise CausalProbeError(
                    f"The loss does not depend on the pattern at {name}: nothing reads that hook's value, or the loss does not run "
                    "this model. An edit there would change nothing. Load a Hugging Face model with eager attention; the "
                    "patterns of encoder bridges (BERT) can't be edited."
                )
            clean = editing.losses(batch)
            epsilon = max(epsilon, torch.finfo(clean.dtype).eps)
            gains, cuts = [], []
            for child, its in parents.items():
                even, gain = editing.even_and_gain(batch, child, its)
                gains.append(gain)
                cuts.append((even - clean)[:, None].expand_as(gain))
            if redraw is not None:
                measured.append(torch.cat(gains, 1))
            new = (Moments.of(torch.cat(gains, 1)), Moments.of(torch.cat(cuts, 1)), Moments.of(clean))
            totals = (
                new if totals is None else (totals[0].merge(new[0]), totals[1].merge(new[1]), totals[2].merge(new[2]))
            )
        if totals is None:
            raise CausalProbeError("There are no batches to measure the loss on.")
        effects = EdgeEffects(
            edges=tuple((parent, child) for child, its in parents.items() for parent in its),
            layer=layer,
            head=head,
            level=level,
            gains=totals[0],
            cuts=totals[1],
            losses=totals[2],
            excesses=None,
            epsilon=epsilon,
            provenance={**describe(model), "versions": versions()},
        )
        if redraw is None:
            return effects
        return replace(effects, excesses=_excesses(editing, batches, measured, effects, redraw))


@dataclass(frozen=True)
class _Editing:
    """Losses per sequence under edits of one head's pattern."""

    model: HookedModel
    loss: Callable[[Any, Any], Tensor]
    layer: int
    head: int

    def even_and_gain(
        self, batch: Any, child: int, parents: list[int]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch parent"]]:
        """The loss with the child's row spread evenly, and what each parent gains over it."""
        even = self.losses(batch, replace_row(self.layer, self.head, child, uniform_row(child)))
        routed = [
            self.losses(batch, replace_row(self.layer, self.head, child, one_hot_row(parent))) for parent in parents
        ]
        return even, torch.stack([even - loss for loss in routed], dim=1)

    def losses(self, batch: Any, *edits: Edit) -> Float[Tensor, " batch"]:
        with edited(self.model, *edits):
            values = self.loss(self.model, batch)
        if not isinstance(values, Tensor) or values.ndim != 1 or not values.is_floating_point():
            found = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise CausalProbeError(
                f"loss(model, batch) must return one loss per sequence, a tensor [batch]; it returned {found}."
            )
        if not values.isfinite().all():
            raise CausalProbeError(
                f"The loss is not finite for {int((~values.isfinite()).sum())} of {len(values)} sequences: no effect can be "
                "measured."
            )
        return values.detach()


def _excesses(
    editing: _Editing, batches: Iterable[Any], gains: list[Tensor], effects: EdgeEffects, redraw: Redraw
) -> dict[tuple[int, int], Moments]:
    """The second question, for the edges that have passed the first; children are decided from the last to the first."""
    gaining = effects.graph(1 + max(child for _, child in effects.edges), max_parents=None)
    found = nx.empty_graph(gaining, create_using=nx.DiGraph)
    excesses: dict[tuple[int, int], Moments] = {}
    for child in sorted(gaining, reverse=True):
        parents = sorted(gaining.predecessors(child), key=lambda parent: -gaining.edges[parent, child]["gain"])
        if not parents:
            continue
        columns = [effects.edges.index((parent, child)) for parent in parents]
        total: Moments | None = None
        for batch, measured in zip(each_batch(batches), gains, strict=False):
            gain = measured[:, columns]
            _, as_root = editing.even_and_gain(redraw(batch, child, nx.freeze(found.copy())), child, parents)
            if gain.shape != as_root.shape:
                raise CausalProbeError(
                    f"redraw must return a batch of the same sequences; of {len(gain)} it made {len(as_root)}."
                )
            new = Moments.of(gain - as_root)
            total = new if total is None else total.merge(new)
        if total is None:
            raise CausalProbeError(
                "Redrawing goes through the batches several times, and these were gone after the first."
            )
        for index, parent in enumerate(parents):
            moments = Moments(total.count, total.sums[index], total.squares[index])
            excesses[parent, child] = moments
            p = _p_value(moments, effects.resolution)
            # One head copies one parent: of several, the child is redrawn along the one that gains most.
            if p is not None and p * len(effects.edges) <= effects.level and not any(found.predecessors(child)):
                found.add_edge(parent, child)
    return excesses


def _check_candidates(candidates: nx.DiGraph | Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """The candidate parents of each child, ascending; all that is wrong with them is said at once."""
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
    children = sorted({int(child) for _, child in pairs})
    return {child: sorted(int(parent) for parent, its in pairs if its == child) for child in children}


def _listing(edges: list[tuple[int, int]]) -> str:
    return ", ".join(f"{parent} -> {child}" for parent, child in edges)


def _t(mean: Float[np.ndarray, " test"], stderr: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Means over their standard errors; without any spread infinite, and positive only if the mean is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(stderr > 0, mean / stderr, np.where(mean > 0, np.inf, -np.inf))


def _t_of(moments: Moments, resolution: float) -> float:
    stderr = np.inf if moments.stderr is None else float(moments.stderr)
    return float(_t(np.array([float(moments.mean) - resolution]), np.array([stderr]))[0])


def _p_value(moments: Moments, resolution: float) -> float | None:
    if moments.stderr is None:
        return None
    return float(stats.t.sf(_t_of(moments, resolution), df=moments.count - 1))


def _parameters(model: HookedModel) -> Iterable[torch.nn.Parameter]:
    return getattr(model, "parameters", tuple)()


def _numpy(values: Tensor) -> Float[np.ndarray, " edge"]:
    return np.asarray(values.cpu().numpy(), dtype=np.float64)
