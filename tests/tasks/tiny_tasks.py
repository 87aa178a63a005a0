"""Tiny tasks whose law can be written down, state by state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from causal_probe import graphs
from causal_probe.tasks import InContextMarkov

#: The parents of each node, by the names of the tasks; of a k-parent task, the last node is the one to be predicted.
TREES = {
    "two roots with children": [(), (0,), (), (2,), (0,)],
    "a late root": [(), (0,), (1,), (), (3,)],
    "nothing but roots": [(), (), ()],
    "one node": [()],
}
DAGS = {
    "two parents": [(), (), (0, 1), (1, 2), (2, 3)],
    "one and two parents": [(), (0,), (), (1, 2), (3,), (0, 4)],
    "three parents": [(), (), (), (0, 1, 2), (0, 2, 3)],
    "two-parent tables that only the target uses": [(), (0,), (1,), (0, 2)],
}


def make(parents: Sequence[Sequence[int]], d_vocab: int = 3, concentration: float = 0.5) -> InContextMarkov:
    return InContextMarkov(graphs.from_parents(parents), d_vocab, concentration)


def random_tables(task: InContextMarkov, seed: int) -> dict[int, NDArray[np.float64]]:
    """One table per in-degree, [context, d_vocab], far from uniform and nowhere zero."""
    generator = np.random.default_rng(seed)
    degrees = [1] if task.is_tree else sorted({len(p) for p in task.parents if p})
    return {k: generator.dirichlet([0.7] * task.d_vocab, task.d_vocab**k) for k in degrees}


def repeated(tables: Mapping[int, NDArray[np.float64]], n: int) -> dict[int, torch.Tensor]:
    """The same tables for each of n sequences."""
    return {k: torch.tensor(table).expand(n, -1, -1) for k, table in tables.items()}


def law(
    parents: Sequence[Sequence[int]], tables: Mapping[int, NDArray[np.float64]], d_vocab: int, *, tree: bool
) -> NDArray[np.float64]:
    """The probability of every sequence of tokens, by the definition: one axis per token."""
    root = np.full(d_vocab, 1 / d_vocab)
    if tree:
        values, vectors = np.linalg.eig(tables[1].T)
        root = vectors[:, np.argmax(values.real)].real
        root = root / root.sum()
    tokens = parents if tree else parents[:-1]
    probability = np.zeros((d_vocab,) * (len(tokens) + tree))
    for states in product(range(d_vocab), repeat=probability.ndim):
        p = 1 / d_vocab if tree else 1.0  # a tree's last token is uniform
        for node, its in enumerate(tokens):
            if its:
                context = int("".join(str(states[parent]) for parent in sorted(its)), d_vocab)
                p *= tables[len(its)][context, states[node]]
            else:
                p *= root[states[node]]
        probability[states] = p
    return probability


def frequencies(tokens: torch.Tensor, d_vocab: int) -> NDArray[np.float64]:
    counts = np.zeros((d_vocab,) * tokens.shape[1])
    np.add.at(counts, tuple(tokens.numpy().T), 1)
    return counts / len(tokens)


def total_variation(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    return float(np.abs(p - q).sum() / 2)


def tolerance(probability: NDArray[np.float64], n: int) -> float:
    """What the total variation between a law and the frequencies of n draws from it exceeds once in a million times.

    Its mean is at most half the sum of the frequencies' standard deviations (Jensen); one draw moves it by at most 1/n, so it
    exceeds its mean by t with a probability of at most exp(-2 n t^2) (McDiarmid).
    """
    mean = np.sqrt(probability * (1 - probability) / n).sum() / 2
    return float(mean + math.sqrt(math.log(1e6) / (2 * n)))
