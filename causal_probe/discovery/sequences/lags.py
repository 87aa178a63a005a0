"""Streams without fixed positions: which lags matter in context?

A stream is cut into windows that don't overlap. For a lag k every token from position ``max_lag`` of its window on has the token k before it as its parent, with
transitions that are new in each window; the graphs of all lags have the same children, so their scores (:mod:`.counts`) can be compared. Windows are treated
as independent: where a stream's transitions change slowly, neighbouring windows are alike, and p-values are too small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy

from causal_probe.discovery.sequences.codes import Codes, code
from causal_probe.discovery.sequences.counts import CONCENTRATIONS, ROOT, Counts, Parents, polya
from causal_probe.discovery.sequences.models import Gain, compare_models
from causal_probe.discovery.sequences.study import LEVEL, MAX_MEMORY, check_level, kind_of_structure, structure_tests
from causal_probe.discovery.sequences.swaps import SwapTest
from causal_probe.discovery.sequences.verdicts import z_of
from causal_probe.errors import CausalProbeError
from causal_probe.results import Result, Table

__all__ = ["SequenceLags", "lags_from_stream"]

#: Positions of a window for each lag that is tried.
WINDOW = 4
SHORTEST = 16


@dataclass(frozen=True, eq=False, repr=False)
class SequenceLags(Result):
    """Which lag of a stream matters in context.

    Attributes
    ----------
    structure
        ``"in-context"``, ``"fixed"``, ``"both"`` or ``"none"``.
    candidate
        The lag of the largest score; None where no lag is better than none. It is no claim.
    lag
        The candidate, if every other lag and "no lag" are rejected and the structure is in context; else None.
    p_values
        p-value of "this lag, not the candidate, is the parent's", by lag; 0 is "no lag". Not corrected.
    in_context_test, gains
        As in :class:`~causal_probe.discovery.sequences.result.SequenceGraph`, along the candidate.
    level
        Probability of a wrong claim.
    """

    KIND = "sequence lags"
    RESULT: ClassVar[str] = "result.json"
    WORKS = ("nichani2024", "heckerman1995", "besag1989")

    structure: str
    candidate: int | None
    lag: int | None
    p_values: Mapping[int, float]
    in_context_test: SwapTest
    gains: Mapping[str, Gain]
    level: float
    n_windows: int
    window: int
    notes: tuple[str, ...]

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        return f"experiments.graph_from_file({self.settings.get('data', 'stream.npy')!r}, max_lag={self.settings['max_lag']!r}, level={self.level!r})"

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Lags up to {self.settings['max_lag']} were compared in {self.n_windows:,} windows of {self.window} tokens by the Dirichlet-multinomial score of "
            f"transitions that are new in each window, the leading one against all others, at a level of {self.level:g} ({self.measured_with})."
        )

    def table(self) -> Table:
        """One row a lag: verdict and p-value."""
        rows: list[tuple[object, str, float | None]] = [
            (lag or "no lag", "", p) for lag, p in sorted(self.p_values.items())
        ]
        if self.candidate is not None:
            said = "undecided" if self.lag is None else f"lag (level {self.level:g})"
            rows.insert(self.candidate, (self.candidate, said, None))
        claimed = "no lag is claimed" if self.lag is None else f"lag {self.lag}"
        title = f"Structure in {self.n_windows:,} windows of {self.window} tokens: {self.structure}; {claimed} (level {self.level:g})"
        return Table(title, ("lag", "verdict", "p-value against the candidate"), rows, self.notes)


def lags_from_stream(
    tokens: Any, *, max_lag: int, level: float = LEVEL, seed: int = 0, max_memory: int = MAX_MEMORY
) -> SequenceLags:
    """Which lag, t - k to t, carries transitions that are new in each window of a stream.

    Parameters
    ----------
    tokens
        Whole numbers [length], or [n_streams, length].
    max_lag
        The largest lag that is tried.
    level, seed, max_memory
        As in :func:`causal_probe.discovery.graph_from_sequences`.

    Raises
    ------
    CausalProbeError
        If the streams are shorter than two windows, or an argument can't be worked with.

    Examples
    --------
    >>> import numpy as np
    >>> lags_from_stream(np.random.default_rng(0).integers(3, size=8000), max_lag=3).structure
    'none'
    """
    check_level(level)
    if max_lag < 1:
        raise CausalProbeError(f"`max_lag` is {max_lag}. It must be at least 1.")
    table = np.atleast_2d(np.asarray(tokens))
    if table.shape[0] > 1 and table.shape[1] == 1:
        table = table.T  # a file with one number a line
    width = max(WINDOW * max_lag, SHORTEST)
    each = table.shape[1] // width
    if table.ndim != 2 or each * table.shape[0] < 2:
        raise CausalProbeError(
            f"The stream has the shape {list(table.shape)}: fewer than two windows of {width} tokens, {WINDOW} for each lag. Give a longer stream, or a "
            "smaller `max_lag`."
        )
    windows = code(table[:, : each * width].reshape(-1, width), max_memory=max_memory)
    shuffled = np.random.default_rng(seed).permutation(len(windows.local))
    first, second = (windows.take(half) for half in np.array_split(shuffled, 2))
    graphs = {lag: _lag_graph(width, lag, max_lag) for lag in range(1, max_lag + 1)}
    fitted = {lag: _fitted(first, graph) for lag, graph in graphs.items()}
    candidate = max(fitted, key=lambda lag: fitted[lag][1])
    concentration = fitted[candidate][0]
    tests = structure_tests(first, second, graphs[candidate], concentration, graphs[candidate], seed=seed)
    scores = {lag: polya(windows, graph, concentration) for lag, graph in graphs.items()}
    p_values = {
        lag: float(scipy.stats.norm.sf(z_of(scores[candidate] - its)))
        for lag, its in scores.items()
        if lag != candidate
    }
    counts = Counts(windows, graphs[candidate])
    over_root = np.sum([counts.over_root(child, concentration) for child in range(max_lag, width)], 0)
    p_values[0] = float(scipy.stats.norm.sf(z_of(over_root)))
    told = max(p_values.values()) <= level / max_lag
    sure = graphs[candidate] if told else [ROOT] * width
    gains = compare_models(first, second, graphs[candidate], graphs[candidate], sure, seed=seed + 2)
    structure, decided = kind_of_structure(gains, tests, level)
    claimed = told and decided and structure in ("in-context", "both")
    notes = ["Windows are treated as independent; where neighbouring windows are alike, p-values are too small."]
    if not decided:
        notes.append("There is dependence; whether it is fixed or new in each window isn't decided.")
    if structure == "fixed":
        notes.append(
            "The dependence is the same in all windows: an ordinary test of lagged mutual information asks further."
        )
    return SequenceLags(
        structure=structure,
        candidate=candidate if structure != "none" else None,
        lag=candidate if claimed else None,
        p_values=p_values if structure != "none" else {},
        in_context_test=tests[0],
        gains=gains,
        level=float(level),
        n_windows=len(windows.local),
        window=width,
        notes=tuple(notes),
        settings={"max_lag": max_lag, "level": float(level), "seed": seed},
    )


def _lag_graph(width: int, lag: int, max_lag: int) -> Parents:
    return [ROOT if child < max_lag else child - lag for child in range(width)]


def _fitted(codes: Codes, graph: Parents) -> tuple[float, float]:
    """The concentration of the best score, and that score."""
    concentration = Counts(codes, graph).fit() or float(CONCENTRATIONS[-1])
    return concentration, float(polya(codes, graph, concentration).mean())
