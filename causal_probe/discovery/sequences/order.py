"""Whether the columns stand in causal order: do graphs that break it fit better?

Three kinds of such graphs are tried: a later column as one child's parent; another root of one component; and the best graph of a search that
knows no order. The last sees what the first two can't: under a wrong order the search may have settled on a graph that agrees with it, and that no single change improves.

**The search without order** begins with trees without direction, of the pairs of columns whose tokens agree most with other pairs (:mod:`.agreement`, all other
columns as candidates), and with the graph in order. It then turns one component after another to the root under which the score is largest, and gives one child after
another the best parent among the columns that don't descend from it, until neither helps. The score is the same in whatever order edges are added, so a
parent need not stand first. It searches one half of the sequences, and its graph is compared with the graph in order on the other.

Two symbols tell no root: every matrix of two is reversible, so a tree's law is the same whatever its root. They may still tell that no root agrees with the
order, where a column has two neighbours before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import networkx as nx
import numpy as np
import scipy
from numpy.typing import NDArray

from causal_probe.discovery.sequences.agreement import agreement, one_hot
from causal_probe.discovery.sequences.codes import Codes
from causal_probe.discovery.sequences.counts import CONCENTRATIONS, ROOT, Counts, Parents, polya
from causal_probe.discovery.sequences.search import LEAST, SMOOTH, SWEEPS, Found
from causal_probe.discovery.sequences.verdicts import ASSUMPTION_LEVEL, Assumption, z_of, z_of_sums

__all__ = ["IN_ORDER", "best_without_order", "causal_order"]

#: The assumption by which the first column is a root.
IN_ORDER = "columns are in causal order"
#: Another root must raise the score by this share to speak against the order: a root is scored by frequencies, a child by counts, so that re-rooting
#: changes the score a little where it changes no law.
LEAST_TURN = 0.05
#: Sequences that are searched without an order.
SEARCHED = 1000
#: A pair of columns begins without an edge if it agrees less than this share of the most.
SHARES = (0.0, 0.05, 0.15, 0.4)
#: Up to this many columns all forests are scored.
ENUMERATED = 4
#: Kinds of agreement that it begins with.
AGREEMENTS: tuple[dict[str, bool], ...] = ({}, {"standardise": True}, {"centre": False})


def causal_order(codes: Codes, first: Codes, second: Codes, best: Found) -> Assumption:
    """Whether the data reject the order, at :data:`.ASSUMPTION_LEVEL`.

    H0: the graph in order predicts at least as well as every graph that breaks the order. Estimand: the mean difference of scores, in nats a sequence;
    paired z-tests over sequences. Family: half of the level for all later parents and other roots (Bonferroni), half for the graph without order.
    """
    single: list[tuple[float, str]] = []
    if best.concentration is not None:
        single += _later_parents(codes, best.parents, best.concentration)
        single += _other_roots(codes, best.parents, best.concentration)
    parts = [
        (2 * len(part) * float(scipy.stats.norm.sf(z)), found)
        for part in (single, _without_order(first, second, best))
        for z, found in part
    ]
    p, found = min(parts, default=(1.0, ""))
    return Assumption(IN_ORDER, p > ASSUMPTION_LEVEL, min(1.0, p), found if p <= ASSUMPTION_LEVEL else "")


def best_without_order(codes: Codes, also: Sequence[int]) -> tuple[Parents, float | None]:
    """The graph of the largest score that any of the starting points leads to, columns in any order, and its concentration; ``also``: one more starting point."""
    codes = codes.take(slice(SEARCHED))
    counts = Counts(codes)
    if counts.n_columns <= ENUMERATED:
        return _best_of_all(counts)
    tokens = one_hot(codes.local)
    tables = [agreement(tokens, ordered=False, **its) for its in AGREEMENTS]
    begin = dict.fromkeys(tuple(tree) for table in tables for tree in _trees(table + table.T))
    best: tuple[float, Parents, float | None] = (0.0, [ROOT] * counts.n_columns, None)
    for graph in [*begin, tuple(also)]:
        for smooth in SMOOTH:
            parents, _ = _climb(counts, graph, smooth, fit=False)
            parents, concentration = _climb(counts, parents, smooth)
            score = 0.0 if concentration is None else counts.score(parents, concentration)
            if score > best[0] + LEAST:
                best = score, parents, concentration
    return best[1], best[2]


def _later_parents(codes: Codes, parents: Sequence[int], concentration: float) -> Iterator[tuple[float, str]]:
    """Every later column that doesn't descend from a child, as its parent: z over the parent in order, and words."""
    counts = Counts(codes, parents)
    for child, parent in enumerate(parents):
        below = _descendants(parents, child)
        later = [column for column in range(child + 1, len(parents)) if column not in below]
        if not later:
            continue
        sums, squares = np.zeros(len(later)), np.zeros(len(later))
        for gains in counts.gains(child, later if parent == ROOT else [*later, parent], concentration):
            own = np.float32(0) if parent == ROOT else gains[[-1]]
            difference = (gains[: len(later)] - own).astype(np.float64)
            sums += difference.sum(1)
            squares += (difference**2).sum(1)
        for column, z in zip(later, z_of_sums(sums, squares, counts.n_sequences), strict=True):
            yield float(z), f"column {column} predicts column {child} better than any column before it"


def _other_roots(codes: Codes, parents: Sequence[int], concentration: float) -> Iterator[tuple[float, str]]:
    """Every other root of a component of three columns and more: z over the root in order, and words."""
    if int(codes.local.max()) < 2:
        return
    best = polya(codes, parents, concentration)
    for component in _components(parents):
        for root in component[1:] if len(component) > 2 else []:
            difference = polya(codes, _turned(parents, root), concentration) - best
            enough = difference.mean() > LEAST_TURN * best.mean()
            yield (
                z_of(difference) if enough else 0.0,
                f"the component of column {component[0]} fits better with column {root} as its root",
            )


def _without_order(first: Codes, second: Codes, best: Found) -> list[tuple[float, str]]:
    """The best graph that knows no order: z over the graph in order, and words; nothing where the order allows it, too."""
    parents, concentration = best_without_order(first, best.parents)
    if concentration is None:
        return []
    broken = [(parent, child) for child, parent in enumerate(parents) if parent > child]
    if int(first.local.max()) < 2 and not _two_before(parents):
        broken = []
    if not broken:
        return []
    in_order = 0.0 if best.concentration is None else polya(second, best.parents, best.concentration)
    difference = polya(second, parents, concentration) - in_order
    enough = difference.mean() > LEAST_TURN * np.mean(in_order)
    edges = ", ".join(f"{parent} > {child}" for parent, child in broken)
    return [(z_of(difference) if enough else 0.0, f"a graph with the edges {edges} fits better than any in this order")]


def _climb(
    counts: Counts, parents: Sequence[int], concentration: float, *, fit: bool = True
) -> tuple[Parents, float | None]:
    """Turn components and change parents for the better until nothing changes; the graph and its concentration, None if no edge is left."""
    graph = list(parents)
    for _ in range(SWEEPS):
        before, fitted = list(graph), concentration
        graph = _best_roots(counts, graph, concentration)
        counts.set(graph)
        for child in range(counts.n_columns):
            below = _descendants(counts.parents, child)
            candidates = [column for column in range(counts.n_columns) if column not in below]
            if not candidates:
                continue
            gains = counts.mean_gains(child, candidates, concentration)
            leading = int(gains.argmax())
            counts.move(child, candidates[leading] if gains[leading] > 0 else ROOT)
        graph = list(counts.parents)
        if fit:
            found = counts.fit()
            if found is None:
                return graph, None
            fitted = found
        if graph == before and fitted == concentration:
            break
        concentration = fitted
    return graph, concentration


def _best_roots(counts: Counts, parents: Parents, concentration: float) -> Parents:
    """The same edges, each component from the root with the largest score, one component after another."""
    best, score = parents, counts.score(parents, concentration)
    for component in _components(parents):
        for root in component if len(component) > 1 else []:
            turned = _turned(best, root)
            its = counts.score(turned, concentration)
            if its > score + LEAST:
                best, score = turned, its
    return best


def _best_of_all(counts: Counts) -> tuple[Parents, float | None]:
    """Every forest at every concentration: (n + 1)^(n - 1) of n columns."""
    best: tuple[float, Parents, float | None] = (0.0, [ROOT] * counts.n_columns, None)
    for graph in itertools.product(range(ROOT, counts.n_columns), repeat=counts.n_columns):
        if max(graph) == ROOT or any(graph[column] in _descendants(graph, column) for column in range(len(graph))):
            continue
        for concentration in CONCENTRATIONS:
            score = counts.score(graph, concentration)
            if score > best[0] + LEAST:
                best = score, list(graph), float(concentration)
    return best[1], best[2]


def _trees(agree: NDArray[np.float64]) -> Iterator[Parents]:
    """Maximum spanning forests of the pairs that agree most, each component from its first column."""
    columns = len(agree)
    for share in SHARES:
        some = np.where(agree > share * agree.max(), agree, 0)
        forest = nx.maximum_spanning_tree(nx.from_numpy_array(some))
        parents = [ROOT] * columns
        for component in nx.connected_components(forest):
            for parent, child in nx.bfs_edges(forest, min(component)):
                parents[child] = parent
        yield parents


def _two_before(parents: Sequence[int]) -> bool:
    """Whether some column has two neighbours before it, so that no root of its component agrees with the order."""
    edges = [(parent, child) for child, parent in enumerate(parents) if parent != ROOT]
    before = [max(edge) for edge in edges]
    return len(set(before)) < len(before)


def _components(parents: Sequence[int]) -> list[list[int]]:
    graph = nx.Graph()
    graph.add_nodes_from(range(len(parents)))
    graph.add_edges_from((parent, child) for child, parent in enumerate(parents) if parent != ROOT)
    return [sorted(component) for component in nx.connected_components(graph)]


def _turned(parents: Sequence[int], root: int) -> Parents:
    """The same edges from another root of its component: those on the way from the root run the other way."""
    turned, behind, column = list(parents), ROOT, root
    while column != ROOT:
        turned[column], behind, column = behind, column, parents[column]
    return turned


def _descendants(parents: Sequence[int], column: int) -> set[int]:
    """The column and all that come from it."""
    found, last = {column}, {column}
    while last:
        last = {child for child, parent in enumerate(parents) if parent in last} - found
        found |= last
    return found
