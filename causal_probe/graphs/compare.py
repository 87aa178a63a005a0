"""How far a found graph is from the true one."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.graphs.check import is_integer, listing, show_edge, show_node
from causal_probe.graphs.mixed import arrowheads, is_mixed
from causal_probe.results import Result, Table

__all__ = ["GraphComparison", "compare"]

Edge: TypeAlias = tuple[Any, Any]


@dataclass(frozen=True, repr=False)  # of plain values: two are compared by these
class GraphComparison(Result):
    """The result of :func:`compare`. Edges are ``(parent, child)``; an undefined metric is None, with its reason in ``undefined``.

    Attributes
    ----------
    children
        The nodes whose incoming edges were compared.
    true_positives
        Number of found edges that are true, direction included.
    precision
        ``true_positives`` over the number of found edges, in [0, 1]. Undefined if none was found.
    recall
        ``true_positives`` over the number of true edges, in [0, 1]. Undefined if there is none.
    f1
        ``2 true_positives`` over the number of found plus the number of true edges, in [0, 1]: the harmonic mean of
        precision and recall where both are defined. Undefined if neither graph has an edge.
    shd
        Structural Hamming distance: the number of missing, plus the number of extra, plus ``reversal_cost`` times the
        number of reversed edges. 0 says that the graphs are equal.
    missing
        The true edges that were not found in either direction.
    extra
        The found edges that are not true in either direction.
    reversed
        The true edges that were found in the wrong direction only, as they are in the truth.
    reversal_cost
        The amount that a reversed edge adds to ``shd``: 1 as one wrong edge, 2 as one missing and one extra.
    parent_accuracy
        Share of the compared nodes with true parents whose set of found parents equals that of the true ones, in [0, 1].
        Undefined if no compared node has a true parent.
    root_accuracy
        Share of the compared nodes without a true parent (node 0 is one) for which no parent was found, in [0, 1].
        Undefined if every compared node has a true parent.
    wrong_nodes
        The compared nodes whose set of found parents is not the true one.
    auroc
        Area under the ROC curve of the weights as a classifier of the pairs parent < child into edges and others, in
        [0, 1]: the probability that an edge outweighs another pair, ties counted half. Chance is 1/2. Undefined without
        weights, or if all pairs are of one kind.
    average_precision
        Average precision of the same weights, in [0, 1]. Chance is ``average_precision_chance``. Undefined without
        weights or without a true edge.
    average_precision_chance
        Share of true edges among the pairs. Undefined without weights or without a pair.
    undefined
        For each of these numbers that is None, why.
    shift
        Where a head's graph was compared: the edges into node i were read in row i - shift. None for other graphs.
    otherwise
        There, SHD, precision and recall by the other reading, for information: the default reading follows from the model's task.
    """

    KIND = "graph comparison"
    WORKS = ("tsamardinos2006",)

    children: tuple[Any, ...]
    true_positives: int
    precision: float | None
    recall: float | None
    f1: float | None
    shd: int
    missing: tuple[Edge, ...]
    extra: tuple[Edge, ...]
    reversed: tuple[Edge, ...]
    reversal_cost: int
    parent_accuracy: float | None
    root_accuracy: float | None
    wrong_nodes: tuple[Any, ...]
    auroc: float | None
    average_precision: float | None
    average_precision_chance: float | None
    undefined: Mapping[str, str]
    shift: int | None = None
    otherwise: Mapping[str, Any] | None = None

    @property
    def exact(self) -> bool:
        """Whether every compared edge and every compared root is right."""
        return self.shd == 0

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        weighed = ", and AUROC and average precision (scikit-learn) over all pairs of a node and an earlier one"
        number_of = self.provenance["versions"]
        return (
            f"The found graph was compared with the true one over the incoming edges of {len(self.children)} nodes, by the "
            "precision, recall and F1 of directed edges, the structural Hamming distance (missing + extra + "
            f"{self.reversal_cost} x reversed edges; after Tsamardinos et al., 2006, here on directed graphs), the share of "
            "non-root nodes whose set of parents is exact, and the share of roots left without a parent"
            f"{'' if self.shift is None else f'; the edges into node i were read in row i - {self.shift}'}"
            f"{weighed if self.auroc is not None or self.average_precision is not None else ''} "
            f"({self.measured_with}, networkx {number_of['networkx']}, scikit-learn {number_of['scikit-learn']})."
        )

    def table(self) -> Table:
        """The metrics, and the wrong edges."""
        found = self.true_positives + len(self.extra) + len(self.reversed)
        true = self.true_positives + len(self.missing) + len(self.reversed)
        notes = {
            "precision": f"{self.true_positives} of {found} found edges are true",
            "recall": f"{self.true_positives} of {true} true edges are found",
            "f1": "",
            "parent_accuracy": "non-root nodes with exactly their parents",
            "root_accuracy": "roots without a parent",
            "auroc": "chance 0.5",
            "average_precision": f"chance {self.average_precision_chance or 0:.4g}",
        }
        rows: list[tuple[str, float | None, str]] = [
            (name.replace("_", " "), getattr(self, name), self.undefined.get(name, note))
            for name, note in notes.items()
        ]
        rows += [
            (name, len(edges := getattr(self, name)), listing(edges, show_edge))
            for name in ("missing", "extra", "reversed")
        ]
        return Table(
            f"GraphComparison over {len(self.children)} nodes: SHD {self.shd}",
            ("metric", "value", "note"),
            rows,
            [] if self.shift is None else [told_shift(self.shift, self.otherwise)],
        )


def told_shift(shift: int, otherwise: Mapping[str, Any] | None) -> str:
    """In which row the edges into a node were read, and what the other reading says.

    >>> told_shift(1, {"shift": 0, "shd": 10, "precision": None, "recall": 0.25})
    'shift 1: the edges into node i are read in row i - 1, which predicts it; with shift 0: shd 10, precision undefined, recall 0.25'
    """
    row = "row i - 1, which predicts it" if shift else "row i, its own"
    numbers = ", ".join(
        f"{name} {'undefined' if value is None else f'{value:.3g}'}"
        for name, value in (otherwise or {}).items()
        if name != "shift"
    )
    told = f"; with shift {otherwise['shift']}: {numbers}" if otherwise else ""
    return f"shift {shift}: the edges into node i are read in {row}{told}"


@checked
def compare(
    predicted: nx.DiGraph,
    truth: nx.DiGraph,
    *,
    weights: Any = None,
    children: Iterable[Hashable] | None = None,
    reversal_cost: int = 1,
    mode: str = "directed",
) -> GraphComparison:
    """Compare a found graph with the true one, edge by edge.

    Nodes are aligned by their names over the union of both graphs: a node that one graph lacks has no edges there. The
    order in which nodes or edges were added plays no part.

    Parameters
    ----------
    predicted, truth
        Directed graphs, edges parent -> child, without self loops or parallel edges. Their nodes need not be positions,
        but must be comparable with each other, and an edge may run either way, so that a reversed one can be told.
    weights
        The evidence behind ``predicted``, larger for an edge: a square array ``[child, parent]`` indexed by the nodes, or a
        DiGraph whose edges carry ``weight`` (a pair without an edge weighs 0, as in :func:`networkx.to_numpy_array`). Only
        AUROC and average precision use it. They run over all pairs parent < child of the compared children and all nodes.
        What an array holds elsewhere is looked at only where these are all the same, to recognise ``[parent, child]``.
    children
        Compare only the edges into these nodes. All nodes by default.
    reversal_cost
        The amount that a reversed edge adds to the structural Hamming distance, 1 or 2.
    mode
        The edges to compare. ``"directed"``: edges from parent to child. ``"skeleton"``: which nodes are joined, whatever the
        direction and the marks; an edge is written (smaller, larger) and belongs to the larger node. ``"arrowheads"``: the
        arcs (u, v) with an arrow at v, "v is no cause of u"; for graphs with marks (:mod:`causal_probe.graphs.mixed`), and for
        others the same as ``"directed"``. A bidirected edge is two arrowheads. In the last two, parents and roots are undefined.

    Returns
    -------
    GraphComparison
        Counts, metrics and the wrong edges; every number is defined there.

    Raises
    ------
    CausalProbeError
        If a graph is undirected, a multigraph or has a self loop; if the names of the nodes are of several kinds, or
        ``children`` is not among them; if ``reversal_cost`` is neither 1 nor 2; or if ``weights`` are given and do not fit:
        nodes that are not non-negative integers, a true edge whose parent comes after its child, an array of another shape,
        an edge without a weight, a compared pair whose weight is not finite, weights the other way round, ``[parent, child]``.

    References
    ----------
    .. [1] I. Tsamardinos, L. E. Brown, C. F. Aliferis. The max-min hill-climbing Bayesian network structure learning
       algorithm. Machine Learning 65, 31-78, 2006. (Structural Hamming distance, a reversed edge counted once; there on
       equivalence classes of graphs, here on the directed graphs themselves.)

    Examples
    --------
    >>> from causal_probe.graphs import compare, from_parents
    >>> compare(from_parents([None, 0, 0, None]), from_parents([None, 0, 1, 2]))
    GraphComparison over 4 nodes: SHD 3
      metric              value  note
      precision             0.5  1 of 2 found edges are true
      recall             0.3333  1 of 3 true edges are found
      f1                    0.4
      parent accuracy    0.3333  non-root nodes with exactly their parents
      root accuracy           1  roots without a parent
      auroc                      no weights were given
      average precision          no weights were given
      missing                 2  1 -> 2, 2 -> 3
      extra                   1  0 -> 2
      reversed                0
    """
    if reversal_cost not in (1, 2) or not is_integer(reversal_cost):
        raise CausalProbeError(
            f"reversal_cost is {reversal_cost!r}. It must be 1 (one wrong edge) or 2 (missing and extra)."
        )
    for role, graph in (("predicted", predicted), ("truth", truth)):
        _check_comparable(role, graph)
    predicted, truth = (_as_compared(graph, mode) for graph in (predicted, truth))
    nodes = _union(predicted, truth)
    rows = _rows_of(children, nodes)
    found, true = _edges_into(rows, predicted), _edges_into(rows, truth)

    unfound, untrue = true - found, found - true
    turned = {(parent, child) for parent, child in unfound if (child, parent) in untrue}
    missing = unfound - turned
    extra = untrue - {(child, parent) for parent, child in turned}

    true_parents, found_parents = _parent_sets(rows, true), _parent_sets(rows, found)
    right = {child: true_parents[child] == found_parents[child] for child in rows}
    right_children = [right[child] for child in rows if true_parents[child]]
    right_roots = [right[child] for child in rows if not true_parents[child]]

    undefined: dict[str, str] = {}

    def share(name: str, part: float, whole: int, reason: str) -> float | None:
        if whole == 0:
            undefined[name] = reason
            return None
        return part / whole

    hits = len(found & true)
    precision = share("precision", hits, len(found), "no edge was found")
    recall = share("recall", hits, len(true), "there is no true edge")
    f1 = share("f1", 2 * hits, len(found) + len(true), "neither graph has an edge")
    parent_accuracy = share(
        "parent_accuracy", sum(right_children), len(right_children), "no compared node has a true parent"
    )
    root_accuracy = share("root_accuracy", sum(right_roots), len(right_roots), "every compared node has a true parent")
    if mode != "directed":
        parent_accuracy = root_accuracy = None
        undefined |= dict.fromkeys(("parent_accuracy", "root_accuracy"), f"{mode} have no parents")
    auroc, average_precision, chance = _rank(weights, rows, nodes, true, undefined)

    return GraphComparison(
        children=rows,
        true_positives=hits,
        precision=precision,
        recall=recall,
        f1=f1,
        shd=len(missing) + len(extra) + reversal_cost * len(turned),
        missing=_sorted(missing),
        extra=_sorted(extra),
        reversed=_sorted(turned),
        reversal_cost=int(reversal_cost),
        parent_accuracy=parent_accuracy,
        root_accuracy=root_accuracy,
        wrong_nodes=tuple(child for child in rows if not right[child]),
        auroc=auroc,
        average_precision=average_precision,
        average_precision_chance=chance,
        undefined=undefined,
    )


# --------------------------------------------------------------------------------------------------------- nodes and edges


def _check_comparable(role: str, graph: Any) -> None:
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        kind = type(graph).__name__
        raise CausalProbeError(
            f"{role} is a {kind}. It must be a networkx.DiGraph, with its edges from parent to child."
        )
    if loops := [node for node, _ in nx.selfloop_edges(graph)]:
        raise CausalProbeError(
            f"{role} has self loops at {listing(loops, show_node)}. No node is its own parent: remove them."
        )


def _as_compared(graph: nx.DiGraph, mode: str) -> nx.DiGraph:
    """The graph whose arcs are compared."""
    if mode == "directed":
        if is_mixed(graph):
            raise CausalProbeError(
                "A graph with marks at its edges has no parents and children alone. Compare with mode='skeleton' or 'arrowheads'."
            )
        return graph
    compared = nx.DiGraph()
    compared.add_nodes_from(graph)
    if mode == "skeleton":
        try:
            compared.add_edges_from((min(edge), max(edge)) for edge in graph.edges)
        except TypeError as error:
            raise CausalProbeError(
                f"The nodes of a skeleton are compared with each other, and these can't be: {error}"
            ) from error
    elif mode == "arrowheads":
        compared.add_edges_from(arrowheads(graph))
    else:
        raise CausalProbeError(f"The mode {mode!r} was asked for; there are directed, skeleton and arrowheads.")
    return compared


def _union(predicted: nx.DiGraph, truth: nx.DiGraph) -> tuple[Any, ...]:
    """All nodes, ascending, NumPy's integers as Python's."""
    try:
        return tuple(sorted({_plain(node) for graph in (predicted, truth) for node in graph}))
    except TypeError as error:
        examples = (listing(sorted({type(node).__name__ for node in graph})) for graph in (predicted, truth))
        raise CausalProbeError(
            "The nodes of the two graphs can't be aligned by name: predicted has nodes of the types {}, truth of the types {}. "
            "Name the nodes of both alike, such as the integers 0..n-1.".format(*examples)
        ) from error


def _rows_of(children: Any, nodes: tuple[Any, ...]) -> tuple[Any, ...]:
    if children is None:
        return nodes
    if isinstance(children, str) or not isinstance(children, Iterable):
        raise CausalProbeError(f"children is {show_node(children)}. It must be a collection of nodes.")
    asked = {_plain(child) for child in children}
    if unknown := [child for child in asked if child not in set(nodes)]:
        raise CausalProbeError(f"children has {listing(sorted(map(show_node, unknown)))}, which neither graph has.")
    return tuple(node for node in nodes if node in asked)


def _edges_into(children: tuple[Any, ...], graph: nx.DiGraph) -> set[Edge]:
    rows = set(children)
    return {(_plain(parent), _plain(child)) for parent, child in graph.edges if child in rows}


def _parent_sets(children: tuple[Any, ...], edges: set[Edge]) -> dict[Any, set[Any]]:
    parents: dict[Any, set[Any]] = {child: set() for child in children}
    for parent, child in edges:
        parents[child].add(parent)
    return parents


def _sorted(edges: set[Edge]) -> tuple[Edge, ...]:
    """By child, then parent: the order of the rows."""
    return tuple(sorted(edges, key=lambda edge: (edge[1], edge[0])))


def _plain(node: Any) -> Any:
    return int(node) if is_integer(node) else node


# ------------------------------------------------------------------------------------------------------------------ ranking


def _rank(
    weights: Any, children: tuple[Any, ...], nodes: tuple[Any, ...], true: set[Edge], undefined: dict[str, str]
) -> tuple[float | None, float | None, float | None]:
    """AUROC, average precision and the latter's chance level; ``undefined`` gets the reasons for those that are undefined."""
    names = ("auroc", "average_precision", "average_precision_chance")
    if weights is None:
        undefined.update(dict.fromkeys(names, "no weights were given"))
        return None, None, None
    _check_ordered(nodes, true)
    compared = [(parent, child) for child in children for parent in nodes if parent < child]
    if not compared:
        undefined.update(dict.fromkeys(names, "no compared node has a node before it"))
        return None, None, None
    values = _weights_of(compared, weights)
    if len(np.unique(values)) == 1 < len(values):
        behind = _weights_of(compared, weights, turned=True)
        if len(np.unique(behind[np.isfinite(behind)])) > 1:
            raise CausalProbeError(
                "The weights are the same for every pair that is compared, and differ for the pairs the other way round: they stand as "
                "[parent, child], as networkx.to_numpy_array gives them. Give [child, parent], their transpose."
            )
    if not np.isfinite(values).all():
        wrong = [pair for pair, value in zip(compared, values, strict=True) if not np.isfinite(value)]
        raise CausalProbeError(
            f"The weights of {listing(wrong, show_edge)} are not finite. Every compared pair needs one."
        )
    from sklearn.metrics import average_precision_score, roc_auc_score  # half a second, for two functions

    is_edge = np.array([pair in true for pair in compared])
    auroc = average_precision = None
    if not is_edge.any():
        undefined.update(dict.fromkeys(names[:2], "no compared pair is a true edge"))
    else:
        average_precision = float(average_precision_score(is_edge, values))
        if is_edge.all():
            undefined["auroc"] = "every compared pair is a true edge"
        else:
            auroc = float(roc_auc_score(is_edge, values))
    return auroc, average_precision, float(is_edge.mean())


def _check_ordered(nodes: tuple[Any, ...], true: set[Edge]) -> None:
    if strangers := [node for node in nodes if not is_integer(node) or node < 0]:
        raise CausalProbeError(
            f"Weights rank the pairs parent < child of positions, and {listing(strangers, show_node)} are not positions. "
            "Name the nodes 0..n-1, or compare without weights."
        )
    if backward := [edge for edge in _sorted(true) if edge[0] > edge[1]]:
        raise CausalProbeError(
            f"Weights rank the pairs parent < child, and the truth has {listing(backward, show_edge)}. "
            "Number the nodes so that every true parent comes before its child, or compare without weights."
        )


def _weights_of(compared: list[Edge], weights: Any, *, turned: bool = False) -> NDArray[np.float64]:
    """The weight of each pair (parent, child), as float64; ``turned``: as if it were (child, parent)."""
    if isinstance(weights, nx.Graph):
        _check_comparable("weights", weights)
        if bare := [edge for edge in weights.edges if "weight" not in weights.edges[edge]]:
            raise CausalProbeError(f"The edges {listing(bare, show_edge)} of weights carry no 'weight'.")
        pairs = [pair[::-1] for pair in compared] if turned else compared
        values = [weights.edges[pair]["weight"] if pair in weights.edges else 0.0 for pair in pairs]
        return _as_floats(values)
    array = _as_floats(weights)
    size = max(child for _, child in compared) + 1
    if array.ndim != 2 or array.shape[0] != array.shape[1] or len(array) < size:
        raise CausalProbeError(
            f"weights has the shape {array.shape}. It must be a square array [child, parent] over at least {size} nodes."
        )
    parents, children = np.array(compared).T
    values_of_pairs: NDArray[np.float64] = (array.T if turned else array)[children, parents]
    return values_of_pairs


def _as_floats(values: Any) -> NDArray[np.float64]:
    try:
        found = np.asarray(values)
        if np.iscomplexobj(found):
            raise CausalProbeError(
                "weights are complex numbers, which have no order. Give real ones, such as their sizes."
            )
        return found.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor that requires grad
        raise CausalProbeError(f"weights can't be read as an array of numbers: {error}") from error
