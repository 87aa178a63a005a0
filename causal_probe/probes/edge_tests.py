"""From measured effects of edges to the edges that are confirmed: two tests over all tested pairs, at one family-wise level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.moments import Moments
from causal_probe.probes.p_values import holm, t_p_value
from causal_probe.results import BINARY, Result, Table, merge_provenance

__all__ = ["EdgeEffects"]

#: What is told of every tested pair.
COLUMNS = (
    "gain", "stderr", "p_value", "margin", "margin_stderr", "margin_p_value", "adjusted_p_value", "confirmed", "cut", "cut_stderr",
)  # fmt: skip
#: Of these, what is shown.
SHOWN = ("gain", "stderr", "margin", "adjusted_p_value", "confirmed", "cut")


@dataclass(frozen=True, eq=False, repr=False)
class EdgeEffects(Result):
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
        The raw evidence, :class:`~causal_probe.hooks.moments.Moments` over sequences. Gains and cuts [edge] are paired differences of
        losses, on the same sequence; losses [] are those of the model as it is.
    margins
        By edge, the moments of its gain minus the gain with the child redrawn as a root. Only edges whose gain is positive at
        ``level`` were redrawn, for no other can be confirmed. None if nothing was redrawn.
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
    margins: Mapping[tuple[int, int], Moments] | None = field(metadata=BINARY)
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
        """What rounding alone can make of a gain, in nats: the machine epsilon of the loss times its mean size."""
        return self.epsilon * abs(self.loss)

    @property
    def correction(self) -> str:
        """How p-values are corrected for the number of pairs."""
        return "holm" if self.margins is None else "holm (gain), bonferroni (margin)"

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
        return np.asarray(stats.t.sf(t, df=self.n_sequences - 1), dtype=np.float64)

    @property
    def margin(self) -> tuple[float | None, ...]:
        """``gain`` minus the mean gain on the same sequences with the child redrawn as a root, in nats.

        Chance is exactly 0: for a root both are equal in law. None where the child was not redrawn.
        """
        return self._of_margins(lambda moments: float(moments.mean))

    @property
    def margin_stderr(self) -> tuple[float | None, ...]:
        """Standard error of ``margin`` over sequences, paired."""
        return self._of_margins(lambda moments: None if moments.stderr is None else float(moments.stderr))

    @property
    def margin_p_value(self) -> tuple[float | None, ...]:
        """One-sided p-value of margin > ``resolution``, as ``p_value``."""
        return self._of_margins(self.p_value_of)

    def p_value_of(self, margin: Moments) -> float | None:
        """The p-value of one margin."""
        if margin.stderr is None:
            return None
        return t_p_value(float(margin.mean) - self.resolution, float(margin.stderr), margin.count)

    @property
    def adjusted_p_value(self) -> Float[np.ndarray, " edge"] | None:
        """The smallest family-wise level at which the edge is confirmed, over all tested pairs. None for one sequence.

        ``p_value`` after Holm's correction; where children were redrawn, the larger of that and of ``margin_p_value`` after
        Bonferroni's (they are decided one after the other). Neither assumes anything on how the pairs depend.
        """
        if self.p_value is None:
            return None
        adjusted = holm(self.p_value)
        if self.margins is not None:
            # An edge that was not redrawn has failed the first test, and keeps the p-value that it failed with.
            second = [0 if p is None else min(1, len(self.edges) * p) for p in self.margin_p_value]
            adjusted = np.maximum(adjusted, second)
        return adjusted

    @property
    def confirmed(self) -> Bool[np.ndarray, " edge"]:
        """Which edges gain, and by more than a root would where that was measured, at the family-wise ``level``.

        One sequence confirms none.
        """
        adjusted = self.adjusted_p_value
        return np.zeros(len(self.edges), dtype=bool) if adjusted is None else np.asarray(adjusted <= self.level)

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
        if self.margins is None or len(self.margins) < len(self.edges):
            reason = "the child was not redrawn as a root: " + (
                "no way to redraw was given" if self.margins is None else "the gain is not positive at the level"
            )
            reasons |= dict.fromkeys(("margin", "margin_stderr", "margin_p_value"), reason)
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

        It is the smaller of the t statistics of gain and margin (of the gain alone where the child was not redrawn), and 0, its
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
        margin, error = (
            np.array([np.nan if value is None else value for value in column], dtype=np.float64)
            for column in (self.margin, self.margin_stderr)
        )
        decisive = np.where(np.isnan(margin), t, np.minimum(t, _t(margin - self.resolution, error)))
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
        same = ("edges", "layer", "head", "level", "epsilon")
        if differing := [name for name in same if getattr(self, name) != getattr(other, name)]:
            raise CausalProbeError(f"Edge effects that differ in {', '.join(differing)} can't be merged.")
        mine, theirs = self.margins, other.margins
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
            margins=mine and theirs and {edge: moments.merge(theirs[edge]) for edge, moments in mine.items()},
            provenance=merge_provenance(self.provenance, other.provenance),
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per tested pair; what is undefined is missing, as pandas has it (NaN)."""
        return pd.DataFrame(list(self.each))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        exceeded = (
            ", and exceeded what it was with the child redrawn as a root and its descendants redrawn along the confirmed edges "
            "(Bonferroni-corrected)"
        )
        return (
            f"An edge parent -> child of head L{self.layer}H{self.head} of {self.provenance['model']} was confirmed if its "
            "gain, the loss with the child's attention spread evenly over its past minus the loss with that attention wholly "
            f"on the parent, was positive in the mean over {self.n_sequences} sequences (paired one-sided t-test, "
            f"Holm-corrected over {len(self.edges)} tested pairs){'' if self.margins is None else exceeded}, at the "
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
        )

    def _of_margins(self, number: Callable[[Moments], float | None]) -> tuple[float | None, ...]:
        measured = self.margins or {}
        return tuple(number(measured[edge]) if edge in measured else None for edge in self.edges)

    def _check_nodes(self, nodes: int) -> None:
        if (last := max(child for _, child in self.edges)) >= nodes:
            raise CausalProbeError(f"Edges into node {last} were tested; a graph over {nodes} nodes can't hold them.")


def _t(mean: Float[np.ndarray, " test"], stderr: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Means over their standard errors; without any spread infinite, and positive only if the mean is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(stderr > 0, mean / stderr, np.where(mean > 0, np.inf, -np.inf))


def _numpy(values: Tensor) -> Float[np.ndarray, " edge"]:
    return np.asarray(values.cpu().numpy(), dtype=np.float64)
