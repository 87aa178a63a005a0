"""From measured effects of edges to the edges that are confirmed: tests of every pair against rivals, at one family-wise level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import scipy
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.moments import Moments
from causal_probe.probes.p_values import holm, t_p_value
from causal_probe.results import BINARY, Result, Table, merge_provenance
from causal_probe.results.lazy import pandas as pd

__all__ = ["EdgeEffects"]

#: The fields recorded for every tested pair.
COLUMNS = (
    "gain", "stderr", "p_value", "margin", "margin_stderr", "margin_p_value", "rival", "adjusted_p_value", "confirmed", "redundant",
    "cut", "cut_stderr",
)  # fmt: skip
#: Of these, what is shown.
SHOWN = ("gain", "stderr", "margin", "rival", "adjusted_p_value", "confirmed", "redundant", "cut")


class Again(NamedTuple):
    """An edge tested again, with the rows of the other candidate children of its parent spread evenly.

    Attributes
    ----------
    gain, margins
        As the edge's own.
    """

    gain: Moments
    margins: Moments


@dataclass(frozen=True, eq=False, repr=False)
class EdgeEffects(Result):
    """The result of :func:`edge_effects`. Arrays run over the tested pairs, in the order of ``edges``; losses are in nats.

    Attributes
    ----------
    edges
        The tested pairs (parent, child), by child, then parent.
    layer, head
        Whose pattern was edited.
    level
        Family-wise level of ``confirmed``: the probability, at most, of confirming any edge into a root or from another node than the parent,
        where sequences were redrawn; else, that of confirming any edge for which the model's loss is no lower in the mean.
    gains, cuts, losses
        The raw evidence, :class:`~causal_probe.hooks.moments.Moments` over sequences. Gains and cuts [edge] are paired differences of
        losses, on the same sequence; losses [] are those of the model as it is.
    margins
        By edge whose gain is positive at ``level`` (no other can be confirmed alone), the moments of its margin over each rival [rival],
        in the order of :meth:`rivals`. An edge into node 1 has none where nothing was redrawn.
    redrawn
        Whether sequences were redrawn.
    again
        The same with the rows of the other nodes spread evenly of which the parent is a candidate too, by edge that was not confirmed, and whose
        gain is positive then at ``level`` (no other can be confirmed so).
    epsilon
        Machine epsilon of the coarser of the model's and the loss's dtype.
    """

    KIND = "edge effects"
    WORKS = ("nichani2024",)
    DERIVED = ("n_sequences", "loss", "resolution", "correction", "each")

    edges: tuple[tuple[int, int], ...]
    layer: int
    head: int
    level: float
    gains: Moments = field(metadata=BINARY)
    cuts: Moments = field(metadata=BINARY)
    losses: Moments = field(metadata=BINARY)
    margins: Mapping[tuple[int, int], Moments] = field(metadata=BINARY)
    redrawn: bool
    again: Mapping[tuple[int, int], Again] = field(metadata=BINARY)
    epsilon: float

    # ------------------------------------------------------------------------------------------------------------ evidence

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return self.gains.count

    @property
    def loss(self) -> float:
        """Mean loss of the model as it is."""
        return float(self.losses.mean)

    @property
    def resolution(self) -> float:
        """The gain that rounding alone can make, in nats: the machine epsilon of the loss times its mean size."""
        return self.epsilon * abs(self.loss)

    @property
    def correction(self) -> str:
        """How p-values are corrected for the number of pairs."""
        return "holm (gain), bonferroni (margin)"

    def rivals(self, edge: tuple[int, int]) -> tuple[int | None, ...]:
        """What an edge's margins are over: None, which is no parent, where sequences were redrawn, and all other earlier nodes."""
        parent, child = edge
        return (*([None] * self.redrawn), *(node for node in range(child) if node != parent))

    def siblings(self, edge: tuple[int, int]) -> tuple[int, ...]:
        """The other nodes of which the parent is a candidate too."""
        return tuple(child for parent, child in self.edges if parent == edge[0] and child != edge[1])

    @property
    def gaining(self) -> tuple[tuple[int, int], ...]:
        """The edges whose gain is positive at the level."""
        if self.p_value is None:
            return ()
        return tuple(edge for edge, p in zip(self.edges, holm(self.p_value), strict=True) if p <= self.level)

    @property
    def gain(self) -> Float[np.ndarray, " edge"]:
        """Mean loss with the child's row spread evenly over keys 0..child, minus that with the row wholly on the parent.

        Positive for an edge that the model needs. Chance is close to 0, and is what ``margin`` takes off.
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
        """One-sided p-value of gain > ``resolution``: Student's t with n_sequences - 1 degrees of freedom, paired.

        (It is the normal law for the hundreds of sequences that are needed anyway.) Without any spread it is 0 or 1. None for
        one sequence.
        """
        if self.stderr is None:
            return None
        t = _t(self.gain - self.resolution, self.stderr)
        return np.asarray(scipy.stats.t.sf(t, df=self.n_sequences - 1), dtype=np.float64)

    @property
    def margin(self) -> tuple[float | None, ...]:
        """By edge, the margin over the rival that is told from the parent least surely, in nats.

        Its chance level is exactly 0 if that rival is the parent and sequences were redrawn. None where no margin was measured.
        """
        return self._of_margins(lambda moments, worst: float(moments.mean[worst]))

    @property
    def margin_stderr(self) -> tuple[float | None, ...]:
        """Standard error of ``margin`` over sequences, paired."""
        return self._of_margins(lambda moments, worst: None if moments.stderr is None else float(moments.stderr[worst]))

    @property
    def margin_p_value(self) -> tuple[float | None, ...]:
        """One-sided p-value of margin > ``resolution`` for that rival, as ``p_value``: the largest over all rivals."""
        return self._of_margins(lambda moments, worst: self.rival_p_values(moments)[worst])

    @property
    def rival(self) -> tuple[int | str | None, ...]:
        """That rival: a node, or ``"none"``, which is no parent."""
        found = (
            None if edge not in self.margins else self.rivals(edge)[self._worst(self.margins[edge])]
            for edge in self.edges
        )
        return tuple(
            "none" if its is None and edge in self.margins else its for its, edge in zip(found, self.edges, strict=True)
        )

    def rival_p_values(self, margins: Moments) -> list[float]:
        """The p-values of one edge's margins, 1 for one sequence."""
        if margins.stderr is None:
            return [1.0] * len(margins.sums)
        pairs = zip(margins.mean.tolist(), margins.stderr.tolist(), strict=True)
        return [t_p_value(mean, stderr, margins.count, above=self.resolution) for mean, stderr in pairs]

    @property
    def adjusted_p_value(self) -> Float[np.ndarray, " edge"] | None:
        """The smallest family-wise level at which the edge is confirmed, over all tested pairs. None for one sequence.

        The larger of ``p_value`` after Holm's correction and of ``margin_p_value`` after Bonferroni's, which is twice as large where there
        are siblings, with which the edge may be tested again: then the smaller of both tests. Nothing is assumed on how the pairs depend.
        """
        return None if self.p_value is None else np.minimum(self._alone, self._again)

    @property
    def confirmed(self) -> Bool[np.ndarray, " edge"]:
        """Which edges gain, and tell their parent from every rival, at the family-wise ``level``; ``redundant`` ones included.

        One sequence confirms none.
        """
        adjusted = self.adjusted_p_value
        return np.zeros(len(self.edges), dtype=bool) if adjusted is None else np.asarray(adjusted <= self.level)

    @property
    def redundant(self) -> Bool[np.ndarray, " edge"]:
        """Which of these are confirmed only with the rows of their siblings spread evenly."""
        return self.confirmed & (self._alone > self.level) if self.p_value is not None else self.confirmed

    @property
    def _alone(self) -> Float[np.ndarray, " edge"]:
        gain = holm(np.ones(len(self.edges)) if self.p_value is None else self.p_value)
        for index, edge in enumerate(self.edges):
            if edge in self.margins:
                gain[index] = max(gain[index], self._corrected(edge, max(self.rival_p_values(self.margins[edge]))))
            elif gain[index] <= self.level and self.rivals(edge):
                gain[index] = 1.0  # merged results: what did not gain in the parts was not tested against rivals
        return gain

    @property
    def _again(self) -> Float[np.ndarray, " edge"]:
        found = np.ones(len(self.edges))
        for index, edge in enumerate(self.edges):
            if edge in self.again:
                gain, margins = self.again[edge]
                p_values = [self._gain_p_value(gain), *self.rival_p_values(margins)]
                found[index] = self._corrected(edge, max(p_values))
        return found

    def gains_again(self, edge: tuple[int, int], gain: Moments) -> bool:
        """Whether an edge's gain with its siblings' rows spread evenly is positive at the level."""
        return self._corrected(edge, self._gain_p_value(gain)) <= self.level

    def _gain_p_value(self, gain: Moments) -> float:
        if gain.stderr is None:
            return 1.0
        return t_p_value(float(gain.mean) - self.resolution, float(gain.stderr), gain.count)

    def _corrected(self, edge: tuple[int, int], p_value: float) -> float:
        return min(1.0, len(self.edges) * (2 if self.siblings(edge) else 1) * p_value)

    def _worst(self, margins: Moments) -> int:
        """The rival with the largest p-value; of equals that with the smallest margin over its error."""
        error = torch.ones_like(margins.sums) if margins.stderr is None else margins.stderr
        return int((margins.mean / error.clamp(min=torch.finfo(error.dtype).tiny)).argmin())

    @property
    def each(self) -> tuple[dict[str, Any], ...]:
        """By edge, its ``parent``, its ``child``, and every number above."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        rows = []
        for index, (parent, child) in enumerate(self.edges):
            values = {name: None if column is None else column[index] for name, column in columns.items()}
            plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
            rows.append({"parent": parent, "child": child, **plain})
        return tuple(rows)

    @property
    def undefined(self) -> dict[str, str]:
        """Why a number is None."""
        reasons: dict[str, str] = {}
        if self.stderr is None:
            reason = "a standard error needs two sequences or more"
            reasons |= dict.fromkeys(("stderr", "p_value", "adjusted_p_value", "cut_stderr"), reason)
        if len(self.margins) < len(self.edges):
            reason = "the gain is not positive at the level, or there is no rival"
            reasons |= dict.fromkeys(("margin", "margin_stderr", "margin_p_value", "rival"), reason)
        return reasons

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
        for row in sorted(self.each, key=lambda row: -row["gain"]):
            parent, child = row.pop("parent"), row.pop("child")
            if row.pop("confirmed") and (max_parents is None or taken[child] < max_parents):
                graph.add_edge(parent, child, **row)
                taken[child] += 1
        return graph

    def weights(self, nodes: int) -> Float[np.ndarray, "child parent"]:
        """The evidence that decides, as an array [child, parent] for AUROC and average precision.

        It is the smaller of the t statistics of the gain and of the margin over the nearest rival (of the gain alone where no margin was
        measured; where the edge was tested again, the larger of both tests'), and 0, its chance level, where nothing was tested.

        Raises
        ------
        CausalProbeError
            If a tested pair is not among the nodes, or one sequence leaves the statistics undefined.
        """
        self._check_nodes(nodes)
        if self.stderr is None:
            raise CausalProbeError("Evidence from one sequence has no standard error; measure on two or more.")
        t = _t(self.gain - self.resolution, self.stderr)
        margin, error = (
            np.array([np.nan if value is None else value for value in column], dtype=np.float64)
            for column in (self.margin, self.margin_stderr)
        )
        decisive = np.where(np.isnan(margin), t, np.minimum(t, _t(margin - self.resolution, error)))
        for index, edge in enumerate(self.edges):
            if edge in self.again:
                gain, margins = self.again[edge]
                both = _numpy(torch.cat([gain.mean[None], margins.mean]) - self.resolution)
                errors = _numpy(torch.cat([gain.stderr[None], margins.stderr]))  # type: ignore[index, list-item]  # two sequences or more: checked above
                decisive[index] = max(decisive[index], _t(both, errors).min())
        weights = np.zeros((nodes, nodes))
        parents, children = np.array(self.edges).T
        # Without any spread t is infinite: the largest float, or, where there is no gain, chance.
        weights[children, parents] = np.nan_to_num(decisive, neginf=0)
        return weights

    def merge(self, other: EdgeEffects) -> EdgeEffects:
        """The same over the sequences of both: sums are added, so it equals one run over all of them.

        Raises
        ------
        CausalProbeError
            If the two tested other edges, another head, or at another level, or redrew other children.
        """
        same = ("edges", "layer", "head", "level", "epsilon", "redrawn")
        if differing := [name for name in same if getattr(self, name) != getattr(other, name)]:
            raise CausalProbeError(f"Edge effects that differ in {', '.join(differing)} can't be merged.")
        if self.margins.keys() != other.margins.keys() or self.again.keys() != other.again.keys():
            raise CausalProbeError(
                "Edge effects can't be merged if other edges were tested against rivals in one than in the other: measure over all "
                "batches at once."
            )
        return replace(
            self,
            gains=self.gains.merge(other.gains),
            cuts=self.cuts.merge(other.cuts),
            losses=self.losses.merge(other.losses),
            margins={edge: moments.merge(other.margins[edge]) for edge, moments in self.margins.items()},
            again={
                edge: Again(gain.merge(other.again[edge].gain), margins.merge(other.again[edge].margins))
                for edge, (gain, margins) in self.again.items()
            },
            provenance=merge_provenance(self.provenance, other.provenance),
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per tested pair; what is undefined is missing, as pandas has it (NaN)."""
        return pd.DataFrame(list(self.each))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        rivals = (
            "the loss with the attention on the parent was lower than its mean over the tokens that the child would have as a root or as a child "
            "of any other earlier node, all later nodes being redrawn, on sequences whose query is the parent's token and not that node's"
            if self.redrawn
            else "the loss with the attention wholly on any other earlier node was higher"
        )
        return (
            f"An edge parent -> child of head L{self.layer}H{self.head} of {self.provenance['model']} was confirmed if its "
            "gain, the loss with the child's attention spread evenly over its past minus the loss with that attention wholly "
            f"on the parent, was positive in the mean over {self.n_sequences} sequences (paired one-sided t-test, "
            f"Holm-corrected over {len(self.edges)} tested pairs), and {rivals} (each rival tested, Bonferroni-corrected over the pairs; where "
            "several candidates share a parent, also with the others' attention spread evenly), at the "
            f"family-wise level {self.level:g} ({self.measured_with})."
        )

    def table(self) -> Table:
        """By edge: its gain, its margin, and whether it is confirmed."""
        columns = ("parent", "child", *SHOWN)
        return Table(
            f"EdgeEffects of L{self.layer}H{self.head} of {self.provenance['model']}: {int(self.confirmed.sum())} of "
            f"{len(self.edges)} tested edges confirmed at the family-wise level {self.level:g}, on {self.n_sequences:,} sequences",
            columns,
            [[row[name] for name in columns] for row in self.each],
            ["margin: over the nearest rival; an edge that is not confirmed is not shown to be none"],
        )

    def _of_margins(self, number: Callable[[Moments, int], float | None]) -> tuple[float | None, ...]:
        found = (self.margins.get(edge) for edge in self.edges)
        return tuple(None if its is None else number(its, self._worst(its)) for its in found)

    def _check_nodes(self, nodes: int) -> None:
        if (last := max(child for _, child in self.edges)) >= nodes:
            raise CausalProbeError(f"Edges into node {last} were tested; a graph over {nodes} nodes can't hold them.")


def _t(mean: Float[np.ndarray, " test"], stderr: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Means over their standard errors; without any spread infinite, and positive only if the mean is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(stderr > 0, mean / stderr, np.where(mean > 0, np.inf, -np.inf))


def _numpy(values: Tensor) -> Float[np.ndarray, " edge"]:
    return np.asarray(values.cpu().numpy(), dtype=np.float64)
