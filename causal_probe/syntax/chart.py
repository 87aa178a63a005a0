"""The best binary tree over a sentence's words, given how good each span is; and how trees are compared.

A chart [n, n] holds for words i <= j the score of the span i..j. A tree's value is the sum over its inner nodes (i, j), split at k, of
``chart[i, k] + chart[k + 1, j]``. :func:`best_tree` finds the largest value (CKY); :func:`greedy_tree` splits from the top, each time where the two parts
are best, as Murty et al. do, which on random charts of ten words is the best tree in 2 of 100 cases. A tree is the set of its inner nodes' spans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from causal_probe.syntax.treebank import Sentence

__all__ = [
    "Brackets",
    "TreeF1",
    "agreement",
    "balanced_tree",
    "best_tree",
    "bracket_f1",
    "branching_tree",
    "centred",
    "brackets_of",
    "greedy_tree",
    "micro_f1",
    "random_tree",
    "redrawn_chart",
    "t_score",
    "without_trivial",
]

#: Spans (first word, last word), both included, of two words or more.
Brackets = frozenset[tuple[int, int]]
#: Inner nodes with the word after which each is split.
Splits = dict[tuple[int, int], int]


def best_tree(chart: Float[np.ndarray, "word word"]) -> Splits:
    """The tree of the largest value.

    >>> chart = np.zeros((3, 3))
    >>> chart[1, 2] = 1
    >>> best_tree(chart)
    {(0, 2): 0, (1, 2): 1}
    """
    n = len(chart)
    best, split = np.zeros((n, n)), np.zeros((n, n), int)
    for length in range(2, n + 1):
        for i in range(n - length + 1):
            j = i + length - 1
            values = chart[i, i:j] + chart[i + 1 : j + 1, j] + best[i, i:j] + best[i + 1 : j + 1, j]
            split[i, j] = i + int(values.argmax())
            best[i, j] = values.max()
    return _grow(n, lambda i, j: int(split[i, j]))


def greedy_tree(chart: Float[np.ndarray, "word word"]) -> Splits:
    """The tree of the best split at the top, then of each part."""
    return _grow(len(chart), lambda i, j: i + int((chart[i, i:j] + chart[i + 1 : j + 1, j]).argmax()))


def branching_tree(n: int, *, right: bool) -> Splits:
    """One word at a time, from the left or from the right."""
    return _grow(n, (lambda i, j: i) if right else (lambda i, j: j - 1))


def balanced_tree(n: int) -> Splits:
    """Halves of halves; the left one is the longer."""
    return _grow(n, lambda i, j: (i + j) // 2)


def random_tree(n: int, rng: np.random.Generator) -> Splits:
    """Each split at random, every place alike."""
    return _grow(n, lambda i, j: int(rng.integers(i, j)))


def _grow(n: int, split: Callable[[int, int], int]) -> Splits:
    tree: Splits = {}
    open_spans = [(0, n - 1)]
    while open_spans:
        i, j = open_spans.pop()
        if j > i:
            tree[i, j] = k = split(i, j)
            open_spans += [(k + 1, j), (i, k)]
    return tree


def t_score(chart: Float[np.ndarray, "word word"], tree: Splits) -> float:
    """Sum over inner nodes of the split's value less the mean over all splits of the node: 0 for a tree of random splits, on average."""
    total = 0.0
    for (i, j), k in tree.items():
        values = chart[i, i:j] + chart[i + 1 : j + 1, j]
        total += float(values[k - i] - values.mean())
    return total


def agreement(chart: Float[np.ndarray, "word word"], tree: Splits) -> float:
    """The tree's value over its number of terms: the mean score of all its spans but the whole sentence, single words included."""
    value = sum(float(chart[i, k] + chart[k + 1, j]) for (i, j), k in tree.items())
    return value / (2 * len(tree))


def centred(charts: Sequence[Float[np.ndarray, "_word _word"]]) -> list[np.ndarray]:
    """Charts less the mean of all their spans of the same length.

    >>> [chart.tolist() for chart in centred([np.array([[4.0, 3.0], [0, 2.0]]), np.array([[4.0, 1.0], [0, 2.0]])])]
    [[[1.0, 1.0], [0.0, -1.0]], [[1.0, -1.0], [0.0, -1.0]]]
    """
    longest = max(map(len, charts))
    means = [np.mean(np.concatenate([np.diagonal(chart, k) for chart in charts])) for k in range(longest)]
    return [chart - sum(np.eye(len(chart), k=k) * means[k] for k in range(len(chart))) for chart in charts]


def redrawn_chart(chart: Float[np.ndarray, "word word"], rng: np.random.Generator) -> Float[np.ndarray, "word word"]:
    """The chart with the scores of all spans of one length in random order: longer spans still score higher, where they did."""
    n = len(chart)
    drawn = chart.copy()
    for length in range(n):
        first = np.arange(n - length)
        drawn[first, first + length] = rng.permutation(chart[first, first + length])
    return drawn


def brackets_of(sentence: Sentence) -> Brackets:
    """The constituents of a dependency tree: the words below each word, and it, where they are neighbours and two or more.

    >>> sorted(brackets_of(Sentence(("the", "cat", "sleeps"), (1, 2, -1), ("det", "nsubj", "root"))))
    [(0, 1), (0, 2)]
    """
    n = len(sentence.words)
    below = np.eye(n, dtype=bool)
    for word in range(n):
        governor = sentence.governors[word]
        while governor >= 0:
            below[governor, word] = True
            governor = sentence.governors[governor]
    found = set()
    for row in below:
        words = np.flatnonzero(row)
        if len(words) > 1 and words[-1] - words[0] + 1 == len(words):
            found.add((int(words[0]), int(words[-1])))
    return frozenset(found)


def without_trivial(brackets: Brackets, n: int) -> Brackets:
    """Without the whole sentence, which is in every tree."""
    return brackets - {(0, n - 1)}


def bracket_f1(found: Brackets, true: Brackets) -> float:
    """F1 of one sentence's brackets.

    >>> bracket_f1(frozenset([(0, 1), (0, 2)]), frozenset([(0, 1), (1, 2)]))
    0.5
    """
    return 2 * len(found & true) / max(1, len(found) + len(true))


def micro_f1(found: Sequence[Brackets], true: Sequence[Brackets]) -> float:
    """F1 of all sentences' brackets together."""
    both = sum(len(a & b) for a, b in zip(found, true, strict=True))
    return 2 * both / max(1, sum(map(len, found)) + sum(map(len, true)))


class TreeF1(NamedTuple):
    """Bracket F1 of a kind of tree with the sentences' trees.

    Attributes
    ----------
    tree
        ``"encoder"`` (the best tree of its charts), ``"encoder, centred"`` (of charts from which the mean over all sentences' spans of a length is subtracted, so that long spans are not
        liked for their length), ``"encoder, greedy"`` (the paper's), and trees that look at nothing.
    f1
        Mean over sentences, the whole sentence's bracket left out; None where no sentence has another.
    f1_paper
        As in the paper: all sentences' brackets together, whole sentences included.
    ahead, stderr, p_value
        By how much the encoder's best trees have a larger F1, its standard error over sentences, and the one-sided p-value, corrected over all trees that
        look at nothing; None for the encoder's own.
    """

    tree: str
    f1: float | None
    f1_paper: float
    ahead: float | None = None
    stderr: float | None = None
    p_value: float | None = None
