"""For each column: parent, root, undecided, or not identifiable; and whether what this assumes holds.

**Tests.** For column i and each rival of its parent in the best graph, the difference of the two gains (:mod:`.counts`) is one number a sequence, and sequences are independent: a
one-sided z-test on its mean. Under "the rival is the parent" the true parent predicts at least as well, so the mean is at most 0 (for the law
that the gain assumes; priors of other kinds are tried in the benchmark). All rivals must be rejected, each at level / (number of pairs of columns), and so must the
closest graphs in which several columns change parents at once. Whether a column has a parent at all is a test of another statistic: the parent's gain less its mean if
the token had been drawn from the rest of its sequence, which has mean 0 (or a little less) for a root, and twice the power of the gain alone. Root is claimed where
"root" beats every candidate, with a larger concentration, A (1 + A / 4), under which also a weak parent's gain has a mean above 0.

**Not identifiable.** Fixed beforehand: a claimed edge needs three different parents in the graph, or two of which one is the other's child. If
one column is the parent of all edges (a single edge, a star), all children are drawn from one row of the matrix, and nothing says which column's token
chose the row: any root would do as well. If two roots are the only parents, whether their tokens are equal says whether their children share a row, and that is the
same when they exchange their children; a root may then be a hub's child as well, so none is claimed.

**Assumptions.** The same tests against rivals that the assumptions exclude: a second parent beside the first or in its place, transitions that depend on
the parent's parent too, a common parent that is no column; columns without an edge that share a matrix among themselves; and columns whose tokens are
frequenter than elsewhere in the same sequences (columns then don't share one stationary law). That columns stand in causal order is tested in :mod:`.order`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from causal_probe.discovery.sequences.codes import Codes
from causal_probe.discovery.sequences.counts import ROOT, Counts, polya
from causal_probe.discovery.sequences.search import hub_moves, search
from causal_probe.discovery.sequences.swaps import swap_test

__all__ = [
    "ASSUMPTION_LEVEL",
    "Assumption",
    "HubRival",
    "Node",
    "check_assumptions",
    "hub_rivals",
    "identifiable",
    "judge",
    "one_matrix_for_all",
    "rejections",
    "z_of",
    "z_of_sums",
]

#: Columns that are tried in pairs as the parents of one that has none; entries of a table over pairs of edges.
LEADING = 4
HALF = float(np.log(2))
PAIR_ENTRIES = 2**23
#: Level of each test of an assumption: a rejection withholds all claims, so it is rarer than the study's own errors.
ASSUMPTION_LEVEL = 1e-3
#: Entries of the tables of transitions that hidden parents are asked about: with many tokens, fewer sequences.
SIBLING_ENTRIES = 2**19
#: Rival graphs that are scored on a few sequences, and how many of the closest are tested on all.
SCREENED = 600
SCREENED_ON = 500
TESTED = 30
#: Columns without an edge among which other transitions are looked for.
FEWEST_REST = 4
#: Sequences below which no z-test is trusted.
FEWEST = 100


@dataclass(frozen=True)
class Node:
    """The verdict on one column.

    Attributes
    ----------
    column
        The column.
    verdict
        ``"edge"``, ``"root"``, ``"undecided"`` or ``"not identifiable"``.
    candidate
        The parent in the best graph; None for a root there.
    p_value
        Largest p-value over the rivals (not corrected); None for column 0.
    closest_rival
        The rival with that p-value; -1 is "root".
    confidence_set
        What isn't rejected, at the study's level over all columns: parents, and -1 for "root".
    reason
        Why nothing is claimed; empty if something is.
    """

    column: int
    verdict: str
    candidate: int | None
    p_value: float | None
    closest_rival: int | None
    confidence_set: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Assumption:
    """One assumption, whether it is rejected, and by what."""

    name: str
    holds: bool
    p_value: float
    found: str


def root_concentration(concentration: float) -> float:
    """The concentration with which "root" is tested."""
    return concentration * (1 + concentration / 4)


def identifiable(parents: Sequence[int]) -> bool:
    """Whether the graph's edges can be told from those of other hubs: three different parents, or two of which one is the other's child."""
    hubs = {parent for parent in parents if parent != ROOT}
    return len(hubs) >= 3 or (len(hubs) == 2 and any(parents[hub] != ROOT for hub in hubs))


@dataclass(frozen=True)
class HubRival:
    """A graph in which several columns change parents at once: the columns and their parents there, and the p-value of "it is the graph"."""

    changed: tuple[tuple[int, int], ...]
    p_value: float


def hub_rivals(
    codes: Codes, parents: Sequence[int], concentration: float | None, other: Sequence[int]
) -> list[HubRival]:
    """The closest graphs in which two columns exchange their children, or one hands all of them to another; and ``other``, where it differs.

    Each column alone may be told from its rivals while all siblings together could have another parent.
    """
    if concentration is None:
        return []
    few = codes.take(slice(SCREENED_ON))
    moves = hub_moves(parents)
    if len(moves) > SCREENED:
        moves = [moves[i] for i in np.random.default_rng(0).choice(len(moves), SCREENED, replace=False)]
    scored = [float(polya(few, graph, concentration).mean()) for graph in moves]
    closest = sorted(zip(scored, moves, strict=True), key=lambda item: -item[0])[:TESTED]
    best = polya(codes, parents, concentration)
    found = []
    rivals = [graph for _, graph in closest] + ([list(other)] if list(other) != list(parents) else [])
    for graph in rivals:
        difference = best - polya(codes, graph, concentration)
        z = z_of_sums(difference.sum(keepdims=True), (difference**2).sum(keepdims=True), len(best))[0]
        changed = tuple((c, new) for c, (old, new) in enumerate(zip(parents, graph, strict=True)) if old != new)
        found.append(HubRival(changed, float(scipy.stats.norm.sf(z))))
    return found


def rejections(counts: Counts, concentration: float | None) -> list[dict[int, float]]:
    """For each column, the p-value of "this rival, not the parent in the graph, is the parent", by rival; -1 is "root". Empty without an edge."""
    if concentration is None:
        return [{} for _ in range(counts.n_columns)]
    return [{}] + [_rejections(counts, child, concentration) for child in range(1, counts.n_columns)]


def judge(
    parents: Sequence[int],
    p_values: Sequence[Mapping[int, float]],
    hubs: Sequence[HubRival] = (),
    *,
    n_sequences: int,
    level: float,
) -> list[Node]:
    """The verdict on every column, given the best graph and :func:`rejections`."""
    columns = len(parents)
    nodes = [Node(0, "root", None, None, None, (ROOT,), "")]
    hub_columns = {parent for parent in parents if parent != ROOT}
    single, swapped = len(hub_columns) == 1, len(hub_columns) == 2 and not identifiable(parents)
    limit = level / (columns * (columns - 1) / 2)
    for child in range(1, columns):
        parent, everything = parents[child], (ROOT, *range(child))
        candidate = None if parent == ROOT else parent
        rivals = {rival: p for rival, p in p_values[child].items() if rival != parent}
        if not rivals:
            nodes.append(Node(child, "undecided", candidate, None, None, everything, "no edge was found"))
            continue
        closest = max(rivals, key=lambda rival: rivals[rival])
        together = {new for hub in hubs if hub.p_value > limit for column, new in hub.changed if column == child}
        kept = tuple(sorted({parent, *together, *(rival for rival, p in rivals.items() if p > limit)}))
        verdict, reason = ("root" if parent == ROOT else "edge"), ""
        if single:
            kept, verdict = everything, "not identifiable"
            reason = "one column would be the parent of every edge, and any other root would do as well"
        elif swapped:  # a root, too, may be a hub's child in the other graph
            kept, verdict = tuple(sorted({hub for hub in hub_columns if hub < child} | set(kept))), "not identifiable"
            reason = "two roots are the only parents, and exchanging their children changes nothing in the data's law"
        elif n_sequences < FEWEST:
            kept, verdict, reason = everything, "undecided", f"fewer than {FEWEST} sequences"
        elif len(kept) > 1:
            verdict = "undecided"
            reason = f"not told from {', '.join('root' if r == ROOT else str(r) for r in kept if r != parent)}"
        nodes.append(Node(child, verdict, candidate, rivals[closest], closest, kept, reason))
    return nodes


def check_assumptions(codes: Codes, counts: Counts, concentration: float | None) -> tuple[Assumption, ...]:
    """Whether the data reject what the graph assumes, each at :data:`ASSUMPTION_LEVEL`."""
    found = [_one_law(codes)]
    if concentration is not None:
        few = Counts(codes.take(slice(max(1, SIBLING_ENTRIES // counts.distinct**2))), counts.parents)
        found += [
            _one_parent(codes, counts, concentration),
            _no_hidden_parent(few, concentration),
        ]
    return tuple(found)


def _rejections(counts: Counts, child: int, concentration: float) -> dict[int, float]:
    """p-value of "the rival, not the parent in the graph, is the child's parent", by rival."""
    parent = counts.parents[child]
    sums = np.zeros((2, child + 1))
    squares = np.zeros((2, child + 1))
    for which, A in enumerate((concentration, root_concentration(concentration))):
        for gains in counts.gains(child, None, A):
            with_root = np.concatenate([gains, np.zeros((1, gains.shape[1]), np.float32)]).astype(np.float64)
            difference = with_root[[parent]] - with_root  # index -1 is root
            sums[which] += difference.sum(1)
            squares[which] += (difference**2).sum(1)
    z = z_of_sums(sums, squares, counts.n_sequences)
    if parent == ROOT:
        chosen = z[1]  # root against every candidate
    else:
        chosen = z[0].copy()
        chosen[-1] = z_of(counts.over_root(child, concentration))
    p_values = scipy.stats.norm.sf(chosen)
    return {(rival if rival < child else ROOT): float(p_values[rival]) for rival in range(child + 1)}


def z_of_sums(sums: NDArray[np.float64], squares: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Means in standard errors, of sums over ``n`` sequences and sums of squares."""
    means = sums / n
    variance = np.maximum(squares / n - means**2, 0) / max(n - 1, 1)
    # A difference of exactly 0 everywhere says nothing.
    return np.where(variance > 0, means / np.sqrt(np.where(variance > 0, variance, 1)), 0.0)


def z_of(values: NDArray[np.float64]) -> float:
    """The mean in standard errors."""
    return float(z_of_sums(values.sum(keepdims=True), (values**2).sum(keepdims=True), len(values))[0])


def _one_law(codes: Codes) -> Assumption:
    """Whether some token is frequenter in some column than in the rest of the same sequences."""
    n, columns = codes.shared.shape
    name = "columns share each sequence's token frequencies"
    if codes.ranked:
        return Assumption(name, True, 1.0, "not tested: labels mean nothing across so many symbols")
    size = int(codes.shared.max()) + 1
    worst, where, tests = 0.0, (0, 0), 0
    for token in range(size):
        is_token = codes.shared == token
        deviation = is_token - is_token.mean(1, keepdims=True)
        if is_token.sum() < 50 * columns:
            continue
        tests += columns
        z = z_of_sums(deviation.sum(0), (deviation**2).sum(0), n)
        column = int(np.abs(z).argmax())
        if abs(z[column]) > worst:
            worst, where = float(abs(z[column])), (column, token)
    p = min(1.0, 2 * float(scipy.stats.norm.sf(worst)) * max(1, tests))
    found = (
        f"column {where[0]} has another share of token number {where[1]} than its sequences"
        if p <= ASSUMPTION_LEVEL
        else ""
    )
    return Assumption(name, p > ASSUMPTION_LEVEL, p, found)


def _one_parent(codes: Codes, counts: Counts, concentration: float) -> Assumption:
    """A mixture of two parents against one of them or none; and the parent with its own parent against the parent alone."""
    name = "at most one parent a column"
    columns, n = counts.n_columns, counts.n_sequences
    worst, found, tests = (
        z_of(_with_grandparents(codes, counts, concentration)),
        "transitions depend on the parent's parent too",
        1,
    )
    for child in range(2, columns):
        parent = counts.parents[child]
        # A column without a parent may have two of which neither is told alone: the leading few are tried with each other.
        leading = np.argsort(-counts.mean_gains(child, None, concentration))[:LEADING].tolist()
        pairs = [(a, b) for a, b in itertools.combinations(leading, 2)]
        if parent != ROOT:
            pairs = [(parent, other) for other in range(child) if other != parent]
        tests += len(pairs) if parent != ROOT else child * (child - 1) // 2
        sums, squares = np.zeros((3, len(pairs))), np.zeros((3, len(pairs)))
        for gains in counts.gains(child, None, concentration):
            one, two = (gains[[pair[k] for pair in pairs]].astype(np.float64) for k in (0, 1))
            # All that has one parent or none must be worse. What "root" adds instead of either is smoothing, not a parent.
            single = [one, np.logaddexp(one, 0) - HALF, one]
            if parent == ROOT:
                single = [np.zeros_like(one), np.logaddexp(one, 0) - HALF, np.logaddexp(two, 0) - HALF]
            difference = np.logaddexp(one, two) - HALF - np.stack(single)
            sums += difference.sum(2)
            squares += (difference**2).sum(2)
        z = z_of_sums(sums, squares, n).min(0)
        if z.max() > worst:
            worst = float(z.max())
            found = "column {2} is predicted by {0} and {1} together".format(*pairs[int(z.argmax())], child)
    p = min(1.0, float(scipy.stats.norm.sf(worst)) * max(1, tests))
    return Assumption(name, p > ASSUMPTION_LEVEL, p, found if p <= ASSUMPTION_LEVEL else "")


def _with_grandparents(codes: Codes, counts: Counts, concentration: float) -> NDArray[np.float64]:
    """Log-likelihood in each sequence of transitions from the parent's and its parent's tokens, over those from the parent's alone."""
    graph = counts.parents
    chosen = [child for child, parent in enumerate(graph) if parent != ROOT and graph[parent] != ROOT]
    if len(chosen) < 2:
        return np.zeros(counts.n_sequences)
    local = codes.local[: max(1, PAIR_ENTRIES // len(chosen) ** 2)]
    child = local[:, chosen]
    parent = local[:, [graph[c] for c in chosen]]
    grand = local[:, [graph[graph[c]] for c in chosen]]
    same = (parent[:, :, None] == parent[:, None, :]) & (grand[:, :, None] == grand[:, None, :])
    total = same.sum(2) - 1
    count = (same & (child[:, :, None] == child[:, None, :])).sum(2) - 1
    n = len(local)
    alone = np.stack(
        [np.concatenate([b[0] for b in counts.gains(c, [graph[c]], concentration)])[:n] for c in chosen], 1
    )
    q = np.exp(alone) * codes.base[:n, chosen]
    return np.asarray(np.log((count / q + concentration) / (total + concentration)).sum(1))


def _no_hidden_parent(counts: Counts, concentration: float) -> Assumption:
    """Two children of one hidden parent against the child's parent in the graph."""
    name = "no two columns have a hidden common parent"
    worst, found, tests = 0.0, "", 0
    for child in range(2, counts.n_columns):
        parent = counts.parents[child]
        gains = counts.sibling_gains(child, concentration)
        own = (
            np.concatenate([block[0] for block in counts.gains(child, [parent], concentration)])
            if parent != ROOT
            else 0
        )
        # What every earlier column would add is a better estimate of the frequencies.
        z = np.array([z_of(each) for each in gains - np.maximum(own, np.log(np.exp(gains).mean(0)))])
        if parent != ROOT:
            z[parent] = -np.inf
        tests += child
        if z.max() > worst:
            worst = float(z.max())
            found = f"columns {int(z.argmax())} and {child} are told best as children of one parent that is no column"
    p = min(1.0, float(scipy.stats.norm.sf(worst)) * max(1, tests))
    return Assumption(name, p > ASSUMPTION_LEVEL, p, found if p <= ASSUMPTION_LEVEL else "")


def one_matrix_for_all(first: Codes, second: Codes, parents: Sequence[int]) -> Assumption:
    """Whether columns without an edge have edges among themselves, with transitions other than the graph's: found on ``first``, tested on ``second``."""
    name = "all edges of a sequence share one transition matrix"
    rest = [column for column, parent in enumerate(parents) if parent == ROOT and column not in parents]
    if len(rest) == len(parents) or len(rest) < FEWEST_REST:
        return Assumption(name, True, 1.0, "")
    found = search(first.columns(rest))
    if found.concentration is None:
        return Assumption(name, True, 1.0, "")
    # Without edges the columns have one law in each sequence, whatever that is; so they are compared with redraws that keep the tokens of each sequence and of each column.
    others, concentration = second.columns(rest), found.concentration
    score = swap_test(others, [lambda drawn: polya(drawn, found.parents, concentration)], seed=len(rest))
    p = score[0].p_value
    edges = ", ".join(f"{rest[parent]} > {rest[child]}" for child, parent in enumerate(found.parents) if parent != ROOT)
    return Assumption(
        name, p > ASSUMPTION_LEVEL, p, f"other transitions run along {edges}" if p <= ASSUMPTION_LEVEL else ""
    )
