"""Head scores by plain loops, written from the definition alone."""

from __future__ import annotations

import math


def is_target(name, tokens, i, j, *, edges=()):
    """Whether a head of a type, at query i, may look at key j <= i; ``tokens`` is a list."""
    if name == "previous-token":
        return j == i - 1
    if name == "duplicate-token":
        return j < i and tokens[j] == tokens[i]
    if name.startswith("induction"):
        n = int(name.removeprefix("induction-").removesuffix("gram")) if "-" in name else 1
        return j - n >= 0 and i - n + 1 >= 0 and all(tokens[j - 1 - m] == tokens[i - m] for m in range(n))
    if name == "current-token":
        return j == i
    if name == "first-token":
        return j == 0
    if name.startswith("offset-"):
        return j == i - int(name.removeprefix("offset-"))
    if name == "graph":
        return (j, i) in edges
    if name == "successor-of-parent":
        return any(child == j and tokens[parent] == tokens[i] for parent, child in edges if parent < len(tokens))
    raise AssertionError(name)


def score(name, pattern, tokens, *, edges=(), queries=None):
    """Score, chance, excess, stderr, sink, rows and sequences of one head; ``pattern`` [sequence][query][key] as lists."""
    scores, chances, sinks, rows = [], [], [], 0
    for attention, sequence in zip(pattern, tokens, strict=True):
        found = []
        for i in range(len(sequence)):
            targets = [j for j in range(i + 1) if is_target(name, sequence, i, j, edges=edges)]
            if 0 < len(targets) < i + 1 and (queries is None or i in queries):
                found.append((sum(attention[i][j] for j in targets), len(targets) / (i + 1), attention[i][0]))
        if found:
            rows += len(found)
            of_score, of_chance, of_sink = (sum(column) / len(found) for column in zip(*found, strict=True))
            scores.append(of_score)
            chances.append(of_chance)
            sinks.append(of_sink)
    n = len(scores)
    if not n:
        return None, None, None, None, None, 0, 0
    mean, chance = sum(scores) / n, sum(chances) / n
    spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n) if n > 1 else None
    return mean, chance, (mean - chance) / (1 - chance), spread, sum(sinks) / n, rows, n
