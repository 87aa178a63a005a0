"""Evidence: for every pair of positions (child, parent) of every head, the mean of one quantity over sequences.

What a head attends to, where a little more attention would lower a loss, what a block of the weights holds: all of it is a number
for each possible edge parent -> child, ``[layer][head, child, parent]``, with its standard error. A *claim* makes a graph of it: a
threshold, or a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
from jaxtyping import Bool, Float

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import GraphComparison, compare
from causal_probe.hooks.heads import find_head
from causal_probe.hooks.moments import Moments
from causal_probe.hooks.patterns import attention_on_nothing, given_patterns
from causal_probe.probes.averages import Averages, Quantity, as_arrays, shapes
from causal_probe.probes.claims import AboveZero
from causal_probe.probes.p_values import t_interval
from causal_probe.probes.reading import (
    Candidate,
    candidates,
    check_shift,
    check_sink,
    chosen_nodes,
    compared_children,
    mean_by_offset,
    seen,
    without_sink,
)
from causal_probe.results import Table
from causal_probe.results.lazy import pandas as pd

__all__ = ["ATTENTION", "AboveZero", "Claim", "Evidence", "Quantity"]


#: What makes a candidate an edge: its least value; or which pairs [child, parent] of a head, over these nodes, are edges.
Claim: TypeAlias = float | Callable[["Evidence", int, int, Sequence[int]], Bool[np.ndarray, "child parent"]]

ATTENTION = Quantity(
    name="attention",
    unit="share of a row's attention",
    chance="1 / (child + 1), even attention",
    works=("nichani2024",),
    sentence="the attention from child to parent",
    threshold=0.5,
    least=0.0,
    largest=1.0,
)


@dataclass(frozen=True, eq=False, repr=False)
class Evidence(Averages):
    """For every head, and every pair of a position (child) and an earlier one (parent), the mean of a quantity over sequences.

    Attributes
    ----------
    values
        By layer: the mean, [head, query, key] = [head, child, parent]. With :attr:`labels`, one array for each comes first.
    stderr
        Its standard error over sequences, in the same shape. None for one sequence.
    n_sequences
        Number of sequences that were averaged over.
    quantity
        What was measured.
    settings
        How: results of other settings can't be merged. ``settings["sink"]`` says what graphs make of the attention on position 0.
        ``"keep"``: position 0 is a key as any other. ``"root"``: it says "no parent", so a row is a root where it exceeds the
        attention on any other earlier position. ``"exclude"``: it says nothing; a row's other attention is scaled up to one, and
        a row that has less than 0.1 of it is a root.
    nothing
        By layer: the mean attention on nothing, [head, child], of models whose rows sum to less than one (a learnt sink, as in
        GPT-OSS). None where rows sum to one, or the quantity is no attention.
    labels, n_by_label
        Groups of sequences that were averaged by themselves, and their numbers of sequences; :meth:`at` is one of them.
    """

    values: Mapping[int, Float[np.ndarray, "*_label _head child parent"]]
    stderr: Mapping[int, Float[np.ndarray, "*_label _head child parent"]] | None
    nothing: Mapping[int, Float[np.ndarray, "*_label _head child"]] | None = None

    KIND = "evidence"
    ARRAYS = ("values", "stderr", "nothing")

    # -------------------------------------------------------------------------------------------------------------- making

    @classmethod
    def of_moments(
        cls,
        moments: Mapping[int, Moments],
        quantity: Quantity,
        settings: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> Evidence:
        """The evidence whose sums over sequences these are, by layer."""
        known = {layer: error.cpu().numpy() for layer, its in moments.items() if (error := its.stderr) is not None}
        means = {layer: its.mean for layer, its in moments.items()}
        # Rows of half precision are one to some thousandths, whatever their mean is kept in.
        rest = attention_on_nothing(means, slack=0.01) if quantity.name == ATTENTION.name else None
        return cls(
            values=as_arrays(means),
            stderr=known or None,
            n_sequences=next(iter(moments.values())).count,
            nothing=None if rest is None else as_arrays(rest),
            quantity=quantity,
            settings=settings,
            provenance=provenance,
        )

    @classmethod
    def from_arrays(
        cls,
        values: Any,
        stderr: Any = None,
        *,
        n_sequences: int | None = None,
        quantity: Quantity = ATTENTION,
        sink: str = "keep",
        model: str = "given arrays",
    ) -> Evidence:
        """Evidence that you have as arrays: means over sequences, or one array for each sequence, such as attention patterns.

        Parameters
        ----------
        values
            By layer, an array or tensor [head, child, parent] of means, or [batch, head, child, parent] of one for each sequence (then
            the numbers are those of :func:`~causal_probe.probes.head_graphs` on the same sequences): a list, one for each layer, as
            ``output_attentions`` gives it; a mapping from the layer; or a TransformerLens ``ActivationCache``, or any mapping with its
            names, ``blocks.{layer}.attn.hook_pattern``.
        stderr
            Of means: their standard errors, in the same form. None where they are not known.
        n_sequences
            Of means: the number of sequences. It is needed for standard errors, and to merge.
        quantity
            What the numbers are. Values must lie in its range, and rows of attention sum to one or less; the rest is
            attention on :attr:`nothing`.
        sink
            See :attr:`settings`.
        model
            The model's name, for provenance.

        Raises
        ------
        CausalProbeError
            If an array has another shape, differs in length from the others, is not finite or out of range, or an argument does
            not go with the others.

        Examples
        --------
        >>> import numpy as np
        >>> pattern = np.array([[[1, 0, 0], [0.9, 0.1, 0], [0.0, 0.7, 0.3]]])
        >>> found = Evidence.from_arrays([pattern])
        >>> list(found.graph("L0H0").edges)
        [(0, 1), (1, 2)]
        """
        check_sink(sink)
        given = given_patterns(values, low=quantity.least, high=quantity.largest)
        first = next(iter(given.values()))
        settings = {"sink": sink}
        provenance = {"model": model, "dtype": str(first.dtype).removeprefix("torch."), "device": str(first.device)}
        if first.ndim == 4:
            if stderr is not None or n_sequences is not None:
                raise CausalProbeError(
                    "Arrays [batch, head, child, parent] give their own number and standard errors: leave out the others."
                )
            moments = {layer: Moments.of(array) for layer, array in given.items()}
            found = cls.of_moments(moments, quantity, settings, provenance)
        else:
            errors = None if stderr is None else as_arrays(given_patterns(stderr, low=0))
            n = 1 if n_sequences is None else n_sequences
            if errors is not None and n < 2:
                raise CausalProbeError(f"A standard error needs two sequences or more; n_sequences is {n_sequences}.")
            means = as_arrays(given)
            if errors is not None and shapes(errors) != shapes(means):
                raise CausalProbeError("stderr must have the layers and the shapes of the values.")
            found = cls(means, errors, n, quantity, settings=settings, provenance=provenance)
        if quantity.name != ATTENTION.name:
            return found
        rest = attention_on_nothing(given)
        return found if rest is None else replace(found, nothing=as_arrays(rest))

    # ------------------------------------------------------------------------------------------------------------- reading

    @property
    def heads(self) -> dict[int, int]:
        """By layer, the number of its heads."""
        return {layer: array.shape[-3] for layer, array in self.values.items()}

    @property
    def n_positions(self) -> int:
        """Number of positions T of the sequences."""
        return int(next(iter(self.values.values())).shape[-1])

    @property
    def claim(self) -> Claim | None:
        """What makes a candidate an edge by default. None: a claim must be given (a test needs two sequences)."""
        if self.quantity.level is None:
            return self.quantity.threshold
        return None if self.stderr is None else AboveZero(self.quantity.level)

    @property
    def sink(self) -> str:
        """What graphs make of the attention on position 0: see :attr:`settings`."""
        return str(self.settings.get("sink", "keep"))

    def of(self, layer: Any, head: Any = None) -> Float[np.ndarray, "child parent"]:
        """The mean of one head, for every pair.

        Parameters
        ----------
        layer, head
            A layer and a head, counted from 0; or the head alone, as ``"L1H2"`` or ``(1, 2)``. So in all methods.

        Raises
        ------
        CausalProbeError
            If there is no such head, or groups of sequences must be told apart first (:meth:`at`).
        """
        layer, head = self._find(layer, head)
        return np.asarray(self.values[layer][head])

    def stderr_of(self, layer: Any, head: Any = None) -> Float[np.ndarray, "child parent"] | None:
        """The standard errors of one head; None for one sequence."""
        layer, head = self._find(layer, head)
        return None if self.stderr is None else np.asarray(self.stderr[layer][head])

    def z_values(self, layer: Any, head: Any = None) -> Float[np.ndarray, "child parent"] | None:
        """Means over their standard errors, 0 where both are 0. None for one sequence."""
        found, error = self.of(layer, head), self.stderr_of(layer, head)
        if error is None:
            return None
        return np.asarray(np.divide(found, error, out=np.zeros_like(found), where=error > 0))

    def decisive(self, layer: Any, head: Any = None) -> Float[np.ndarray, "child parent"]:
        """One head's evidence after the rule of :attr:`sink`: what its graph is read from."""
        return without_sink(self.of(layer, head), self.sink)

    def parents(
        self, layer: Any, head: Any = None, *, nodes: int | Iterable[int] | None = None
    ) -> tuple[Candidate, ...]:
        """The candidate parent of every node that has one: the earlier node with the most evidence.

        Node 0 has none. Where the sink is excluded or says "root", position 0 is no candidate.

        Parameters
        ----------
        nodes
            Only these positions, or 0..nodes-1; all by default.

        Raises
        ------
        CausalProbeError
            If there is no such head, or no such position.
        """
        its = chosen_nodes(nodes, self.n_positions)
        return candidates(self.decisive(layer, head), its, first=self._first)

    def graph(
        self, layer: Any, head: Any = None, *, claim: Claim | None = None, nodes: int | Iterable[int] | None = None
    ) -> nx.DiGraph:
        """One head's graph: each node has one parent, or is a root.

        The rule: a node's candidate parent is the earlier node with the most evidence, on the mean over sequences (of equals the
        smallest). The node is a root unless the claim holds for the candidate. For attention the default, a threshold of one
        half, asks for more than all other keys together. What becomes of attention on position 0 is the rule of :attr:`sink`.

        The limits of the rule: attention alone does not tell a root from a child. What a root's row holds has no bearing on
        the loss, so it may saturate on any node; and a head that has not been trained to the end may spread a true child's row
        below the threshold. :func:`~causal_probe.probes.edge_effects` decides by effect; give it the candidates, which are
        ``graph(layer, head, claim=0)``. Averaging over sequences keeps what depends on position alone: a head whose
        target depends on the tokens has a flat mean.

        Parameters
        ----------
        layer, head
            As in :meth:`of`.
        claim
            What makes a candidate an edge: its least value (for attention 0 makes every candidate an edge), or a test such as
            :class:`AboveZero`. By default that of the quantity.
        nodes
            Only these positions, or 0..nodes-1; by default all. (In the in-context tree task the last position is a query and no
            node.)

        Returns
        -------
        networkx.DiGraph
            Edges parent -> child with the value as ``weight``, the ``margin`` of the :class:`Candidate`, and ``stderr`` of the
            weight (None for one sequence, and where the sink is excluded).

        Raises
        ------
        CausalProbeError
            If there is no such head or position, the claim is out of range, or there is none.
        """
        layer, head = self._find(layer, head)
        its = chosen_nodes(nodes, self.n_positions)
        claimed = self._claimed(claim, layer, head, its)
        # The standard error is that of the attention, and says nothing of a share of the rest.
        errors = None if self.sink == "exclude" else self.stderr_of(layer, head)
        graph = nx.DiGraph()
        graph.add_nodes_from(its)
        for child, parent, value, margin in self.parents(layer, head, nodes=its):
            if claimed[child, parent]:
                stderr = None if errors is None else float(errors[child, parent])
                graph.add_edge(parent, child, weight=value, margin=margin, stderr=stderr)
        return graph

    def compare(
        self,
        truth: nx.DiGraph,
        layer: Any,
        head: Any = None,
        *,
        claim: Claim | None = None,
        children: Iterable[int] | None = None,
        reversal_cost: int = 1,
        shift: int | None = None,
    ) -> GraphComparison:
        """Compare :meth:`graph` with the truth by :func:`causal_probe.graphs.compare`, ranked by :meth:`decisive`.

        Nodes are positions: a truth over the nodes 8, 9, 10 is compared on these rows and columns, and others are nobody's parents.

        Parameters
        ----------
        truth
            Edges parent -> child over nodes that are positions; every parent comes before its child.
        children
            Compare only the edges into these nodes. By default every node of ``truth`` that has a row of its own: all of
            them, or, where ``truth`` has nodes beyond the last position, those before the last position (whose row is the
            query for what comes next, not the row of its own node). With a shift of 1 node 1 is left out: its row sees one key.
        shift
            In which row the edges into node i are read: i - shift. Row i of a language model is about to predict token i + 1. The default
            follows from the model's task, not from the result: :attr:`shift`. The result states it, and what the other reading says.

        Raises
        ------
        CausalProbeError
            If an argument does not fit, here or in :func:`~causal_probe.graphs.compare`.
        """
        layer, head = self._find(layer, head)
        shift = check_shift(self.shift if shift is None else shift)
        its = list(compared_children(truth, self.n_positions, children))
        found, other = (
            self.shifted(way)._compared(truth, layer, head, claim, its if children else seen(its, way), reversal_cost)
            for way in (shift, 1 - shift)
        )
        otherwise = {"shift": 1 - shift, "shd": other.shd, "precision": other.precision, "recall": other.recall}
        return replace(found, shift=shift, otherwise=otherwise)

    @property
    def shift(self) -> int:
        """Of which position row i speaks: i + shift. 1 for a model that predicts the next token; 0 for others, and given arrays."""
        return int(self.provenance.get("shift", 0))

    def shifted(self, shift: int) -> Evidence:
        """The same with row i - shift in the place of row i."""
        if not check_shift(shift):
            return self
        arrays = {
            what: its
            and {layer: np.concatenate([0 * array[..., :1, :], array[..., :-1, :]], -2) for layer, array in its.items()}
            for what, its in (("values", self.values), ("stderr", self.stderr))
        }
        return replace(self, **arrays, nothing=None)  # type: ignore[arg-type]  # arrays by field name

    def _compared(
        self, truth: nx.DiGraph, layer: int, head: int, claim: Claim | None, children: Sequence[int], reversal_cost: int
    ) -> GraphComparison:
        found = self.graph(layer, head, claim=claim, nodes=[node for node in truth if node < self.n_positions])
        return compare(found, truth, weights=self.decisive(layer, head), children=children, reversal_cost=reversal_cost)

    def by_offset(self, layer: Any, head: Any = None) -> Float[np.ndarray, " offset"]:
        """The evidence by relative offset: for k = 0 ... T - 1, its mean over the rows that have a key k positions back.

        Where the sink is excluded or says "root", over those for which that key is not position 0; 0 where there is none.
        """
        return mean_by_offset(self.decisive(layer, head), first=self._first)

    def offset_graph(self, layer: Any, head: Any = None, *, claim: float | None = None) -> nx.DiGraph:
        """One head's graph by relative offset: one offset for all positions, or no edges.

        The offset k >= 1 with the largest :meth:`by_offset` (of equals the smallest) gives each position i >= k the parent i - k,
        if it reaches the threshold ``claim``. Edges carry that as ``weight``. Such a graph sees a head that looks a fixed distance
        back also where single rows are noisy; and it sees no other.

        Raises
        ------
        CausalProbeError
            If there is no such head, or the claim is no value in range.
        """
        threshold = self._threshold(self.claim if claim is None else claim)
        graph = nx.empty_graph(self.n_positions, create_using=nx.DiGraph)
        values = self.by_offset(layer, head)[1:]
        if len(values) and values.max() >= threshold:
            k = 1 + int(values.argmax())
            weight = {"weight": float(values.max())}
            graph.add_edges_from((i - k, i, weight) for i in range(k + self._first, self.n_positions))
        return graph

    # ------------------------------------------------------------------------------------------------------------- showing

    def to_pandas(self, *, claim: Claim | None = None) -> pd.DataFrame:
        """One row for each head's node with its candidate parent: layer, head, child, parent, value, stderr, margin, whether it is claimed, and
        ``low`` and ``high``, the value's 95% confidence interval (Student's t over sequences).
        """
        rows, reach = [], None if self.n_sequences < 2 else t_interval(0.0, 1.0, self.n_sequences)[1]
        for layer, head in self._each_head():
            asked = self.claim if claim is None else claim
            claimed = None if asked is None else self._claimed(asked, layer, head, range(self.n_positions))
            errors = self.stderr_of(layer, head)
            for child, parent, value, margin in self.parents(layer, head):
                stderr = None if errors is None else float(errors[child, parent])
                told = None if claimed is None else bool(claimed[child, parent])
                # The standard error is that of the attention, and says nothing of a share of the rest.
                known = None if stderr is None or reach is None or self.sink == "exclude" else reach * stderr
                ends = (None, None) if known is None else (value - known, value + known)
                rows.append((layer, head, child, parent, value, stderr, margin, told, *ends))
        columns = ["layer", "head", "child", "parent", "value", "stderr", "margin", "claimed", "low", "high"]
        return pd.DataFrame(rows, columns=columns)

    def told(self) -> str:
        """The method, as a sentence without its end."""
        test = (
            "that reaches a threshold"
            if self.quantity.level is None
            else f"it is above zero by a one-sided z-test at the family-wise level {self.quantity.level:g} (Bonferroni)"
        )
        return (
            f"{super().told()} of {self.n_positions} tokens, for every attention head: a node's candidate parent is the earlier "
            f"position with the largest mean, and the node is a root unless {test}"
        )

    def table(self) -> Table:
        """By head: its edges by the default claim, and the mean over nodes of the largest value on an earlier node."""
        heads = ", ".join(str(n) for n in self.heads.values())
        groups = f" in {len(self.labels)} groups" if self.labels else ""
        name, claim = self.quantity.name, self.claim
        title = (
            f"Evidence of {self.provenance['model']} ({name}): {heads} heads by layer, {self.n_positions} positions, mean over "
            f"{self.n_sequences:,} sequences{groups}{'' if self.sink == 'keep' else f', sink={self.sink!r}'}"
        )
        if self.labels:
            return Table(title, (), (), [f"groups: {', '.join(self.labels)}; .at(label) is the evidence of one"])
        rows = []
        for layer, head in self._each_head():
            its = self.parents(layer, head)
            claimed = None if claim is None else self._claimed(claim, layer, head, range(self.n_positions))
            edges = None if claimed is None else sum(int(claimed[each.child, each.parent]) for each in its)
            rows.append((f"L{layer}H{head}", edges, float(np.mean([each.value for each in its] or [0.0]))))
        test = f"above zero at level {claim.level:g}" if isinstance(claim, AboveZero) else f"{name} >= {claim}"
        return Table(
            title,
            ("head", "edges", f"largest {name}"),
            rows,
            [f"{'' if claim is None else f'edges: {test}; '}largest {name}: on an earlier node, mean over nodes"],
        )

    # ------------------------------------------------------------------------------------------------------------- helpers

    @property
    def _first(self) -> int:
        """The first position that may be a parent."""
        return 0 if self.sink == "keep" else 1

    def _each_head(self) -> list[tuple[int, int]]:
        return [(layer, head) for layer, n in self.heads.items() for head in range(n)]

    def _find(self, layer: Any, head: Any) -> tuple[int, int]:
        if self.labels:
            raise CausalProbeError(
                f"There are several groups of sequences: take one by .at(label), {', '.join(self.labels)}."
            )
        return find_head(self.heads, layer, head)

    def _threshold(self, claim: Any) -> float:
        least, largest = self.quantity.least, self.quantity.largest
        low, high = -np.inf if least is None else least, np.inf if largest is None else largest
        if not isinstance(claim, (int, float)) or not low <= claim <= high:
            inside = "" if least is None or largest is None else f", from {least:g} to {largest:g}"
            raise CausalProbeError(
                f"A threshold is a value of the {self.quantity.name} ({self.quantity.unit}){inside}; it is {claim!r}."
            )
        return float(claim)

    def _claimed(
        self, claim: Claim | None, layer: int, head: int, nodes: Sequence[int]
    ) -> Bool[np.ndarray, "child parent"]:
        claim = self.claim if claim is None else claim
        if callable(claim):
            return np.asarray(claim(self, layer, head, nodes))
        values = self.decisive(layer, head)
        # Where the sink takes evidence away, what is left of it is 0, and no edge whatever the threshold.
        return np.asarray((values >= self._threshold(claim)) & ((values > 0) | (self.sink == "keep")))
