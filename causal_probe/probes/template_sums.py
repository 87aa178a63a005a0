"""The raw sums behind head scores: what every head puts on a template's targets, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

__all__ = ["TemplateSums"]


@dataclass(frozen=True, eq=False)
class TemplateSums:
    """The raw sums for one template, sequence by sequence.

    Attributes
    ----------
    attention
        By layer: sum over the scored rows of each head's attention on the targets.
    sink
        By layer: sum over the scored rows of each head's attention on position 0.
    rows
        Number of scored rows.
    chance
        Sum over the scored rows of the share of visible keys that are targets.
    """

    attention: tuple[Float[np.ndarray, "sequence _head"], ...]
    sink: tuple[Float[np.ndarray, "sequence _head"], ...]
    rows: Int[np.ndarray, " sequence"]
    chance: Float[np.ndarray, " sequence"]

    def merge(self, *others: TemplateSums) -> TemplateSums:
        """The sums of the sequences of all, in order."""
        all_of = (self, *others)
        return TemplateSums(
            attention=tuple(map(np.concatenate, zip(*(one.attention for one in all_of), strict=True))),
            sink=tuple(map(np.concatenate, zip(*(one.sink for one in all_of), strict=True))),
            rows=np.concatenate([one.rows for one in all_of]),
            chance=np.concatenate([one.chance for one in all_of]),
        )

    def first(self, n: int) -> TemplateSums:
        """The sums of the first ``n`` sequences."""
        attention, sink = (tuple(layer[:n] for layer in layers) for layers in (self.attention, self.sink))
        return TemplateSums(attention, sink, self.rows[:n], self.chance[:n])

    @property
    def covariance(self) -> tuple[float, tuple[Float[np.ndarray, " _head"], ...]] | None:
        """The sampling variance of the chance, and by layer the covariance of each head's score with it; None below two sequences.

        With them, the counts, scores and standard errors of several parts give those of the whole.
        """
        used = self.rows > 0
        n = int(used.sum())
        if n < 2:
            return None
        chances = self.chance[used] / self.rows[used]
        off = (chances - chances.mean()) / (n * (n - 1))
        return float(off @ (chances - chances.mean())), tuple(
            off @ (layer[used] / self.rows[used, None]) for layer in self.attention
        )

    @cached_property
    def summary(self) -> tuple[dict[str, Float[np.ndarray, " _head"]], ...] | None:
        """By layer, ``score``, ``chance``, ``excess``, ``stderr``, ``excess_stderr`` and ``sink`` of each head.

        The standard errors are NaN for one sequence. None if no row of any sequence is scored.
        """
        used = self.rows > 0
        n = int(used.sum())
        if not n:
            return None
        rows = self.rows[used]
        chances = self.chance[used] / rows
        chance = chances.mean()
        found = []
        for attention, sink in zip(self.attention, self.sink, strict=True):
            scores = attention[used] / rows[:, None]  # float64, as rows is integer
            score = scores.mean(0)
            excess = (score - chance) / (1 - chance)
            # excess is the root of mean(score - chance - excess (1 - chance)): what each sequence adds to that, to first order
            residuals = scores - chances[:, None] - excess * (1 - chances[:, None])
            found.append(
                {
                    "score": score,
                    "chance": np.full_like(score, chance),
                    "excess": excess,
                    "stderr": _stderr(scores),
                    "excess_stderr": _stderr(residuals) / (1 - chance),
                    "sink": (sink[used] / rows[:, None]).mean(0),
                }
            )
        return tuple(found)


def _stderr(values: Float[np.ndarray, "sequence _head"]) -> Float[np.ndarray, " _head"]:
    """Sample standard deviation (n - 1) over sqrt(n); NaN for one sequence."""
    n = len(values)
    if n < 2:
        return np.full(values.shape[1], np.nan)
    return np.asarray(values.std(0, ddof=1) / np.sqrt(n))
