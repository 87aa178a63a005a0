"""Which head copies which parent, where nodes have several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np
import scipy
from jaxtyping import Float

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.graphs.compare import told_shift
from causal_probe.hooks.heads import find_layer
from causal_probe.probes.evidence import Evidence
from causal_probe.probes.reading import check_shift, compared_children, seen
from causal_probe.results import Result, Table

__all__ = ["HeadMatch", "match_heads"]


@dataclass(frozen=True, eq=False, repr=False)
class HeadMatch(Result):
    """The result of :func:`match_heads`. Slot k is a node's k-th smallest parent, counted from 0.

    Attributes
    ----------
    layer
        Whose heads were matched.
    scores
        [head, slot]: mean attention from child to its parent in the slot, over the children that have one, in [0, 1].
    heads
        By slot: the head that was assigned to it; None where there are fewer heads than slots.
    unmatched_heads
        The heads without a slot.
    attention
        By slot: the matched head's entry of ``scores``; None without a head.
    swapped
        By slot: the children at which its head attends more to the parent of another slot than to that of its own. Empty
        without a head.
    mean_parent_attention
        Attention on the true parent: mean, over all edges whose slot has a head, of the mean attention from child to parent
        in that head, in [0, 1]. Edges of a slot without a head are left out.
    shift
        The edges into node i were read in row i - shift.
    otherwise
        ``mean_parent_attention`` by the other reading, of the heads that it would match, for information; None if it has nothing to match.
    """

    KIND = "head match"
    WORKS = ("nichani2024",)

    layer: int
    scores: Float[np.ndarray, "head slot"]
    heads: tuple[int | None, ...]
    unmatched_heads: tuple[int, ...]
    attention: tuple[float | None, ...]
    swapped: tuple[tuple[int, ...], ...]
    mean_parent_attention: float
    shift: int = 0
    otherwise: float | None = None

    @property
    def unmatched_slots(self) -> tuple[int, ...]:
        """The slots without a head."""
        return tuple(slot for slot, head in enumerate(self.heads) if head is None)

    @property
    def swaps(self) -> int:
        """Number of swapped children, over all slots."""
        return sum(map(len, self.swapped))

    @property
    def undefined(self) -> dict[str, str]:
        """Why a slot has no attention."""
        return {f"attention.{slot}": "there are fewer heads than parent slots" for slot in self.unmatched_slots}

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The heads of layer {self.layer} were assigned to parent slots (a node's k-th smallest parent) one to one, so that the "
            f"summed mean attention on the true parents is largest, that of node i in row i - {self.shift} (the Hungarian method, scipy "
            f"{self.provenance['versions']['scipy']}; {self.measured_with})."
        )

    def table(self) -> Table:
        """One row for each slot."""
        names = [None if head is None else f"L{self.layer}H{head}" for head in self.heads]
        rows = zip(range(len(names)), names, self.attention, map(len, self.swapped), strict=True)
        spare = ", ".join(f"L{self.layer}H{head}" for head in self.unmatched_heads)
        return Table(
            f"HeadMatch of layer {self.layer}: mean attention on the true parent {self.mean_parent_attention:.3f}",
            ("slot", "head", "attention", "swapped children"),
            list(rows),
            [f"slot {slot}: no head is left for it" for slot in self.unmatched_slots]
            + [f"heads without a slot: {spare}"] * bool(spare)
            + [told_shift(self.shift, {"shift": 1 - self.shift, "attention on the true parent": self.otherwise})],
        )


@checked
def match_heads(
    evidence: Evidence,
    truth: nx.DiGraph,
    *,
    layer: int = 0,
    children: Iterable[int] | None = None,
    shift: int | None = None,
) -> HeadMatch:
    """Assign the heads of a layer to parent slots so that the summed mean attention on the true parents is largest.

    Heads that learn several parents share them out in an order of their own. The assignment is one to one, over the whole
    graph (scipy's ``linear_sum_assignment``: the Hungarian problem); at single children the heads may still have swapped
    roles, which is counted. Of equally good assignments the one with the smaller heads in the smaller slots need not be taken.

    Parameters
    ----------
    evidence
        The result of :func:`~causal_probe.probes.head_graphs`.
    truth
        Edges parent -> child over nodes that are positions.
    layer
        Whose heads, counted from 0.
    children
        Only these children; by default those of :meth:`Evidence.compare <causal_probe.probes.Evidence.compare>`.
    shift
        In which row the edges into node i are read, i - shift; the default follows from the model's task, as there.

    Raises
    ------
    CausalProbeError
        If there is no such layer, a child has no row, or no child has a parent.

    References
    ----------
    H. W. Kuhn, "The Hungarian method for the assignment problem", Naval Research Logistics Quarterly 2, 1955. Several parents shared out
    over heads: Nichani, Damian & Lee, ICML 2024 (arXiv 2402.14735).

    Examples
    --------
    >>> import numpy as np
    >>> from causal_probe.graphs import two_parent_tree
    >>> from causal_probe.probes import match_heads
    >>> from causal_probe.probes.evidence import Evidence
    >>> weights = np.zeros((2, 4, 4))
    >>> weights[0, [2, 3], [1, 2]] = 0.9    # head 0 attends to the later parent, head 1 to the earlier one
    >>> weights[1, [2, 3], [0, 1]] = 0.8
    >>> match_heads(Evidence.from_arrays([weights]), two_parent_tree(4))
    HeadMatch of layer 0: mean attention on the true parent 0.850
      slot  head  attention  swapped children
         0  L0H1        0.8                 0
         1  L0H0        0.9                 0
      shift 0: the edges into node i are read in row i, its own; with shift 1: attention on the true parent 0.225
    """
    layer = find_layer(1 + max(evidence.values), layer)
    if layer not in evidence.values:
        raise CausalProbeError(
            f"There is no evidence of layer {layer}; there is of {', '.join(map(str, evidence.values))}."
        )
    shift = check_shift(evidence.shift if shift is None else shift)
    its = list(compared_children(truth, evidence.n_positions, children))
    found, other = (
        _matched(evidence.shifted(way), truth, layer, its if children else seen(its, way)) for way in (shift, 1 - shift)
    )
    if found is None:
        raise CausalProbeError("No head can be matched: none of the compared nodes has a parent in the truth.")
    return replace(found, shift=shift, otherwise=None if other is None else other.mean_parent_attention)


def _matched(evidence: Evidence, truth: nx.DiGraph, layer: int, rows: list[int]) -> HeadMatch | None:
    """The match in the rows that bear the nodes' names; None if no node has a parent."""
    weights = evidence.values[layer]
    parents = {child: sorted(truth.predecessors(child)) for child in rows}
    n_slots = max(map(len, parents.values()), default=0)
    if n_slots == 0:
        return None

    scores = np.zeros((len(weights), n_slots))
    for slot in range(n_slots):
        edges = [(child, its[slot]) for child, its in parents.items() if len(its) > slot]
        scores[:, slot] = np.mean([weights[:, child, parent] for child, parent in edges], axis=0)
    slot_to_head = {
        int(slot): int(head)
        for head, slot in zip(*scipy.optimize.linear_sum_assignment(scores, maximize=True), strict=True)
    }
    heads = tuple(slot_to_head.get(slot) for slot in range(n_slots))

    on_parent: list[float] = []
    swapped: list[tuple[int, ...]] = []
    for slot, head in enumerate(heads):
        away = []
        for child, its in parents.items():
            if head is not None and len(its) > slot:
                attention = weights[head, child, its]
                on_parent.append(float(attention[slot]))
                if attention.max() > attention[slot]:
                    away.append(child)
        swapped.append(tuple(away))
    return HeadMatch(
        layer=layer,
        scores=scores,
        heads=heads,
        unmatched_heads=tuple(head for head in range(len(weights)) if head not in heads),
        attention=tuple(None if head is None else float(scores[head, slot]) for slot, head in enumerate(heads)),
        swapped=tuple(swapped),
        mean_parent_attention=float(np.mean(on_parent)),
        provenance=evidence.provenance,
    )
