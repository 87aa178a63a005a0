"""The forest with the largest score.

Up to five columns all forests are scored. Beyond, coordinate ascent from several starting points (a change of one parent changes the score by a
difference of two gains, so every step is exact), first at a fixed large concentration, where the score is smooth, then at the fitted one; then moves that
exchange or hand over all children of two columns, until none helps. The result is a local optimum: its ``tried`` says how often it was reached.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from causal_probe.discovery.sequences.agreement import starts
from causal_probe.discovery.sequences.codes import Codes
from causal_probe.discovery.sequences.counts import CONCENTRATIONS, ROOT, Counts, Parents

__all__ = ["Found", "ascend", "enumerate_forests", "hub_moves", "search"]

#: Up to this many columns all forests are scored.
ENUMERATED = 5
SWEEPS = 20
#: Concentrations of the first sweeps.
SMOOTH = (16.0, 3.0)
#: Starting points are ranked on this many sequences, and this many of them are kept.
RANKED_ON = 1000
GO_ON = 4
#: Moves that are scored on a few sequences, and of which a few are tried on all.
MOVES = 600
MOVES_ON = 500
MOVES_TRIED = 5
#: A better score is better by more than rounding.
LEAST = 1e-7


@dataclass(frozen=True)
class Found:
    """The best forest, its concentration (None without an edge), its mean score in nats, how many searches ended in it of how many, and its :attr:`.Codes.diagonal`."""

    parents: Parents
    concentration: float | None
    score: float
    reached: int
    tried: int
    diagonal: float = 1.0


def search(codes: Codes, *, begin: list[Parents] | None = None) -> Found:
    """The forest of the largest score over all columns, each column's parent before it; ``begin``: the starting points, by default :func:`.starts`."""
    columns = codes.local.shape[1]
    if columns <= ENUMERATED:
        return enumerate_forests(codes)
    begin = _ranked(codes, starts(codes) if begin is None else begin)
    counts = Counts(codes)
    scores: dict[tuple[int, ...], tuple[float, float | None]] = {(ROOT,) * columns: (0.0, None)}
    ends: _Ends = {}
    ended = [_climb(counts, graph, concentration, scores, ends) for graph in begin for concentration in SMOOTH]
    best = max(scores, key=lambda graph: scores[graph][0])
    few = codes.take(slice(MOVES_ON))
    while scores[best][1] is not None:
        concentration = scores[best][1] or 0.0
        moves = hub_moves(best)
        if len(moves) > MOVES:
            moves = [moves[i] for i in np.random.default_rng(0).choice(len(moves), MOVES, replace=False)]
        counts_few = Counts(few)
        ranked = sorted(moves, key=lambda graph: -counts_few.score(graph, concentration))
        before = scores[best][0]
        for graph in ranked[:MOVES_TRIED]:
            reached = _settle(counts, graph, concentration, scores)
            if scores[reached][0] > before + LEAST:
                best = reached
                break
        else:
            break
    often = sum(graph == best for graph in ended)
    return Found(list(best), scores[best][1], scores[best][0], often, len(ended), codes.diagonal)


def ascend(
    counts: Counts, parents: Sequence[int], concentration: float, *, fit: bool = True, sweeps: int = SWEEPS
) -> float | None:
    """Change one parent after another for the better until none changes; return the concentration, None if no edge is left."""
    counts.set(parents)
    left = counts.n_columns - 1  # so many columns may still change at this concentration
    for _ in range(sweeps):
        changed = False
        for child in range(1, counts.n_columns):
            if not left:
                break
            left -= 1
            gains = counts.mean_gains(child, None, concentration)
            leading = int(gains.argmax())
            parent = leading if gains[leading] > 0 else ROOT
            if parent != counts.parents[child]:
                counts.move(child, parent)
                changed, left = True, counts.n_columns - 2
        fitted = counts.fit() if fit else concentration
        if fitted is None:
            return None
        if not changed and fitted == concentration:
            break
        if fitted != concentration:
            concentration, left = fitted, counts.n_columns - 1
    return concentration


def enumerate_forests(codes: Codes) -> Found:
    """Score every forest at every concentration; there are n_columns! of them."""
    columns = codes.local.shape[1]
    counts = Counts(codes)
    best = Found([ROOT] * columns, None, 0.0, 1, 1, codes.diagonal)
    tried = 0
    for graph in itertools.product(*(range(ROOT, child) for child in range(columns))):
        tried += 1
        if max(graph) == ROOT:
            continue
        for concentration in CONCENTRATIONS:
            score = counts.score(graph, concentration)
            if score > best.score:
                best = Found(list(graph), float(concentration), score, 1, 1, codes.diagonal)
    return dataclasses.replace(best, reached=tried, tried=tried)


_Scores = dict[tuple[int, ...], tuple[float, float | None]]
#: Where the second part of a climb ends, by where it begins.
_Ends = dict[tuple[tuple[int, ...], float], tuple[int, ...]]


def _climb(counts: Counts, graph: Sequence[int], concentration: float, scores: _Scores, ends: _Ends) -> tuple[int, ...]:
    ascend(counts, graph, concentration, fit=False, sweeps=4)
    begin = tuple(counts.parents), concentration
    if begin not in ends:
        ends[begin] = _settle(counts, begin[0], concentration, scores)
    return ends[begin]


def _settle(counts: Counts, graph: Sequence[int], concentration: float, scores: _Scores) -> tuple[int, ...]:
    fitted = ascend(counts, graph, concentration)
    reached = tuple(counts.parents)
    if reached not in scores:
        scores[reached] = (0.0, None) if fitted is None else (counts.score(reached, fitted), fitted)
    return reached


def _ranked(codes: Codes, graphs: list[Parents]) -> list[Parents]:
    """The starting points that lead furthest on some of the sequences."""
    few = codes.take(slice(RANKED_ON))
    counts = Counts(few)
    scores: _Scores = {}
    ends: _Ends = {}
    for graph in graphs:
        for concentration in SMOOTH:
            _climb(counts, graph, concentration, scores, ends)
    ranked = sorted(scores, key=lambda graph: -scores[graph][0])
    return [list(graph) for graph in ranked[:GO_ON]]


def hub_moves(graph: Sequence[int]) -> list[Parents]:
    """Other graphs in which two columns have exchanged their children (and parents), or one has handed all of its children to another."""
    return [list(other) for other in dict.fromkeys(map(tuple, _hub_moves(graph))) if list(other) != list(graph)]


def _hub_moves(graph: Sequence[int]) -> Iterator[Parents]:
    children: dict[int, list[int]] = {column: [] for column in range(len(graph))}
    for child, parent in enumerate(graph):
        if parent != ROOT:
            children[parent].append(child)
    for first, second in itertools.combinations(range(len(graph)), 2):
        if children[first] or children[second]:
            exchanged = list(graph)
            for child in children[first]:
                if child > second:
                    exchanged[child] = second
            for child in children[second]:
                exchanged[child] = first
            yield exchanged
            if graph[second] < first:  # then each may have the other's parent
                yield [
                    graph[{first: second, second: first}[c]] if c in (first, second) else p
                    for c, p in enumerate(exchanged)
                ]
        for giver, taker in ((first, second), (second, first)):
            handed = [child for child in children[giver] if child > taker]
            if handed:
                yield [taker if child in handed else parent for child, parent in enumerate(graph)]
