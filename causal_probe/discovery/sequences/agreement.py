"""Where a search begins: pairs of columns whose tokens agree with other pairs' tokens, within a sequence more than between sequences.

Two true edges carry the same transition matrix in one sequence and different ones in two. With x_i the centred one-hot vector of column i's
token and G_ij = <x_i, x_j>, the agreement of the edges (a -> b) and (c -> d) is E[G_ac G_bd] minus the same between different sequences. So
the agreement of one edge with a weighted graph W is (G W G)_ij averaged over sequences, minus its part between sequences: N T^3
operations, and no table over pairs of edges.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from causal_probe.discovery.sequences.codes import Codes
from causal_probe.discovery.sequences.counts import ROOT, Parents

__all__ = ["agreement", "one_hot", "starts"]

ROUNDS = 8
#: Weights within a child: agreement relative to its best candidate, to this power.
SHARPNESS = 4
#: Sequences that starting points are taken from, and entries of the table over pairs of edges.
SEQUENCES = 2000
PAIR_ENTRIES = 2**23
PAIRS_UP_TO = 32
#: A child whose best agreement is below this share of the largest starts as a root.
SHARES = (0.0, 0.15, 0.4)


def agreement(
    onehot: NDArray[np.float32], *, centre: bool = True, standardise: bool = False, ordered: bool = True
) -> NDArray[np.float64]:
    """How far each candidate edge agrees with the others, [child, parent], 0 where parent >= child.

    Parameters
    ----------
    onehot
        Tokens [n_sequences, n_columns, distinct].
    centre
        Subtract what is the same between different sequences.
    standardise
        Divide the child's deviations by the root of the token's frequency (chi-square instead of a product of counts).
    ordered
        A parent stands before its child. False: every other column is a candidate, and only the diagonal is 0.
    """
    n, columns, _ = onehot.shape
    frequency = onehot.mean(1, keepdims=True)
    parent = onehot - frequency
    child = parent / np.sqrt(np.maximum(frequency, 0.5 / columns)) if standardise else parent
    parents, children = parent @ parent.transpose(0, 2, 1), child @ child.transpose(0, 2, 1)
    flat_child, flat_parent = child.transpose(1, 2, 0).reshape(-1, n), parent.transpose(1, 2, 0).reshape(-1, n)
    between = (flat_child @ flat_parent.T / n).reshape(columns, child.shape[2], columns, child.shape[2])
    candidates = np.tri(columns, k=-1, dtype=bool) if ordered else ~np.eye(columns, dtype=bool)
    weights = (candidates / np.maximum(candidates.sum(1, keepdims=True), 1)).astype(np.float32)
    found = np.zeros((columns, columns))
    for _ in range(ROUNDS):
        found = np.matmul(np.matmul(children, weights), parents).mean(0, dtype=np.float64)
        if centre:
            found -= np.einsum("ixjy,xy->ij", between, np.einsum("axby,ab->xy", between, weights))
        found = np.where(candidates, found.clip(0), 0)
        best = found.max(1, keepdims=True)
        if best.max() <= 0:
            break
        sharp = (found / np.maximum(best, 1e-30)) ** SHARPNESS
        weights = (sharp / np.maximum(sharp.sum(1, keepdims=True), 1e-30) * best / best.max() * candidates).astype(
            np.float32
        )
    return found


def starts(codes: Codes) -> list[Parents]:
    """Graphs to begin a search from: by agreement, by pooled mutual information, and the pairs of edges that agree most."""
    some = codes.take(slice(SEQUENCES))
    columns = some.local.shape[1]
    onehot = one_hot(some.local)
    found = []
    for options in ({}, {"standardise": True}, {"centre": False}):
        scores = agreement(onehot, **options)
        found += [_leading(scores, share * scores.max()) for share in SHARES]
    equal = (some.local[:, :, None] == some.local[:, None, :]).mean(0)
    shared = one_hot(some.shared)
    information = mutual_information(shared)
    for table in (information, -information, equal):
        found.append(_leading(np.where(np.tri(columns, k=-1, dtype=bool), table, -np.inf), -np.inf))
    if columns <= PAIRS_UP_TO:
        found += _agreeing_pairs(onehot)
    return [list(graph) for graph in dict.fromkeys(map(tuple, found))]


def mutual_information(onehot: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mutual information of each pair of columns over all sequences, in nats, [column, column]."""
    n, columns, distinct = onehot.shape
    flat = onehot.transpose(1, 2, 0).reshape(-1, n)
    joint = (flat @ flat.T / n).reshape(columns, distinct, columns, distinct).astype(np.float64)
    law = onehot.mean(0, dtype=np.float64)
    expected = law[:, :, None, None] * law[None, None]
    terms = joint * np.log(np.where(joint > 0, joint, 1) / np.where(joint > 0, expected, 1))
    return np.asarray(terms.sum((1, 3)))


def one_hot(codes: NDArray[np.intp]) -> NDArray[np.float32]:
    """[sequence, column, token]."""
    return np.asarray(codes[:, :, None] == np.arange(codes.max() + 1), np.float32)


def _leading(scores: NDArray[np.float64], least: float) -> Parents:
    return [ROOT] + [
        int(row[:child].argmax()) if row[:child].max() > least else ROOT for child, row in enumerate(scores) if child
    ]


def _agreeing_pairs(onehot: NDArray[np.float32], pairs: int = 3) -> list[Parents]:
    """Graphs of two edges each that agree most; where few columns have a parent, the weights of all candidates drown them."""
    columns, distinct = onehot.shape[1:]
    child, parent = np.tril_indices(columns, -1)
    n = max(2, min(len(onehot), PAIR_ENTRIES // (len(child) * distinct**2)))
    onehot = onehot[:n]
    frequency = onehot.mean(1, keepdims=True)
    standard = (onehot - frequency) / np.sqrt(np.maximum(frequency, 0.5 / columns))
    edges = (onehot[:, parent, :, None] * standard[:, child, None, :]).transpose(1, 0, 2, 3)
    means = edges.mean(1).reshape(len(child), -1)
    flat = edges.reshape(len(child), -1)
    within = flat @ flat.T / n
    touching = (child[:, None] == child) | (child[:, None] == parent) | (parent[:, None] == child)
    touching |= parent[:, None] == parent  # edges of one parent agree in every sequence, whatever the parent
    found = []
    for table in (within - means @ means.T, within):
        table = np.where(touching, -np.inf, table)
        for _ in range(pairs):
            first, second = np.unravel_index(int(table.argmax()), table.shape)
            graph = [ROOT] * columns
            graph[child[first]], graph[child[second]] = int(parent[first]), int(parent[second])
            found.append(graph)
            for a, b in ((first, second), (second, first)):
                table[np.ix_(child == child[a], child == child[b])] = -np.inf
    return found
