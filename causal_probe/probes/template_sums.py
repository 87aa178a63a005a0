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
        Number of scored rows, [sequence, layer]; one column where all layers see the same keys.
    chance
        Sum over the scored rows of the share of visible keys that are targets, likewise.
    nothing
        By layer: sum over the scored rows of each head's attention on nothing (a learnt sink); empty where no layer has that.
    """

    attention: tuple[Float[np.ndarray, "sequence _head"], ...]
    sink: tuple[Float[np.ndarray, "sequence _head"], ...]
    rows: Int[np.ndarray, "sequence layer"]
    chance: Float[np.ndarray, "sequence layer"]
    nothing: tuple[Float[np.ndarray, "sequence _head"], ...] = ()

    def merge(self, *others: TemplateSums) -> TemplateSums:
        """The sums of the sequences of all, in order."""
        all_of = (self, *others)
        width = max(one.rows.shape[1] for one in all_of)
        rows, chance = (
            np.concatenate([np.broadcast_to(getattr(one, name), (len(one.rows), width)) for one in all_of]) for name in ("rows", "chance")
        )  # fmt: skip
        return TemplateSums(
            attention=tuple(map(np.concatenate, zip(*(one.attention for one in all_of), strict=True))),
            sink=tuple(map(np.concatenate, zip(*(one.sink for one in all_of), strict=True))),
            rows=rows,
            chance=chance,
            nothing=tuple(map(np.concatenate, zip(*(one.nothing for one in all_of), strict=True))),
        )

    def first(self, n: int) -> TemplateSums:
        """The sums of the first ``n`` sequences."""
        attention, sink, nothing = (
            tuple(layer[:n] for layer in layers) for layers in (self.attention, self.sink, self.nothing)
        )
        return TemplateSums(attention, sink, self.rows[:n], self.chance[:n], nothing)

    def of_layer(self, layer: int) -> tuple[Int[np.ndarray, " sequence"], Float[np.ndarray, " sequence"]]:
        """One layer's ``rows`` and ``chance``."""
        column = 0 if self.rows.shape[1] == 1 else layer
        return self.rows[:, column], self.chance[:, column]

    @property
    def covariance(self) -> tuple[tuple[float, Float[np.ndarray, " _head"]] | None, ...]:
        """By layer, the sampling variance of the chance, and the covariance of each head's score with it; None below two sequences.

        With them, the counts, scores and standard errors of several parts give those of the whole.
        """
        found: list[tuple[float, Float[np.ndarray, " _head"]] | None] = []
        for layer, attention in enumerate(self.attention):
            rows, chance = self.of_layer(layer)
            used = rows > 0
            n = int(used.sum())
            chances = chance[used] / rows[used]
            off = (chances - chances.mean()) / (n * (n - 1)) if n > 1 else chances
            both = (
                (float(off @ (chances - chances.mean())), off @ (attention[used] / rows[used, None])) if n > 1 else None
            )
            found.append(both)
        return tuple(found)

    @cached_property
    def summary(self) -> tuple[dict[str, Float[np.ndarray, " _head"]], ...] | None:
        """By layer, ``score``, ``chance``, ``excess``, ``stderr``, ``excess_stderr``, ``sink`` and ``nothing`` of each head.

        The standard errors are NaN for one sequence, all numbers where no row of the layer is scored. None if none is in any layer.
        """
        if not (self.rows > 0).any():
            return None
        return tuple(self._summary(layer) for layer in range(len(self.attention)))

    def _summary(self, layer: int) -> dict[str, Float[np.ndarray, " _head"]]:
        rows, chance_sums = self.of_layer(layer)
        used = rows > 0
        if not used.any():
            nothing = np.full(self.attention[layer].shape[1], np.nan)
            return dict.fromkeys(("score", "chance", "excess", "stderr", "excess_stderr", "sink", "nothing"), nothing)
        rows = rows[used]
        chances = chance_sums[used] / rows
        chance = chances.mean()
        scores = self.attention[layer][used] / rows[:, None]  # float64, as rows is integer
        score = scores.mean(0)
        excess = (score - chance) / (1 - chance)
        # excess is the root of mean(score - chance - excess (1 - chance)): what each sequence adds to that, to first order
        residuals = scores - chances[:, None] - excess * (1 - chances[:, None])
        return {
            "score": score,
            "chance": np.full_like(score, chance),
            "excess": excess,
            "stderr": _stderr(scores),
            "excess_stderr": _stderr(residuals) / (1 - chance),
            "sink": (self.sink[layer][used] / rows[:, None]).mean(0),
            "nothing": (self.nothing[layer][used] / rows[:, None]).mean(0) if self.nothing else np.zeros_like(score),
        }


def _stderr(values: Float[np.ndarray, "sequence _head"]) -> Float[np.ndarray, " _head"]:
    """Sample standard deviation (n - 1) over sqrt(n); NaN for one sequence."""
    n = len(values)
    if n < 2:
        return np.full(values.shape[1], np.nan)
    return np.asarray(values.std(0, ddof=1) / np.sqrt(n))
