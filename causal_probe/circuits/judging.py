"""How edges are judged: prompts in three parts, a smallest effect of interest, a test for each edge, and what a circuit is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from causal_probe.circuits.found import CircuitEdge, Size
from causal_probe.circuits.interventions import Interventions
from causal_probe.circuits.known import Edge
from causal_probe.errors import CausalProbeError
from causal_probe.probes.p_values import holm, t_interval, t_p_value

__all__ = ["adjusted", "curve", "detectable", "judged", "mean_of", "missed", "smallest_effect", "split"]

#: Prompts in each of the three parts, at least.
FEWEST = 8
#: Random circuits of each size.
RANDOM = 3
POWER = 0.8


def split(n: int, seed: int, what: str = "prompts") -> list[Int[Tensor, " row"]]:
    """The rows of screen, test and report, drawn at random."""
    if n < 3 * FEWEST:
        raise CausalProbeError(
            f"{n} {what} can't be split into a screen, a test and a report of {FEWEST} or more each: give {3 * FEWEST} at least, and more for small effects."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    third = n // 3
    return [order[:third].sort().values, order[third : n - third].sort().values, order[n - third :].sort().values]


def smallest_effect(delta: float | None, clean: Tensor, fall: Tensor, name: str, ablated: str = "every edge") -> float:
    """The smallest effect of interest; a metric that doesn't fall is refused."""
    mean, stderr, n = mean_of(fall.cpu().numpy())
    if not bool(torch.isfinite(fall).all()):
        raise CausalProbeError(f"The metric ({name}) is not finite on some prompt, so its falls can't be averaged.")
    if t_p_value(mean, stderr, n) > 0.01:
        raise CausalProbeError(
            f"The metric ({name}) doesn't fall when {ablated} is ablated: {float(clean.mean()):.4g} without any change, and a fall of {mean:.3g} (standard error {stderr:.2g}). "
            "There is nothing to find: does the model do the task, and is the metric higher where it does?"
        )
    return mean / 100 if delta is None else delta


def mean_of(values: Float[np.ndarray, " row"]) -> tuple[float, float, int]:
    """Mean, standard error, and how many values."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), len(values)


def adjusted(p_values: list[float], correction: str) -> Float[np.ndarray, " test"]:
    """p-values corrected over the tests, ``"fdr"`` (Benjamini and Hochberg) or ``"family-wise"`` (Holm)."""
    each = np.array(p_values, dtype=float)
    if not len(each):
        return each
    found: np.ndarray = stats.false_discovery_control(each) if correction == "fdr" else holm(each)
    return found


def judged(
    edges: Sequence[Edge],
    effects: Float[np.ndarray, "edge row"],
    screened: dict[Edge, float],
    at_random: set[Edge],
    level: float,
    delta: float,
    correction: str,
) -> dict[Edge, CircuitEdge]:
    """Each edge's verdict."""
    means = [mean_of(each) for each in effects]
    above = adjusted([t_p_value(*mean, above=delta) for mean in means], correction)
    below = adjusted([t_p_value(-mean[0], *mean[1:], above=delta) for mean in means], correction)
    found = {}
    for edge, mean, p, p_negative in zip(edges, means, above, below, strict=True):
        low, high = t_interval(*mean, coverage=1 - 2 * level) if level < 0.5 else (mean[0], mean[0])
        within = -delta <= low and high <= delta
        status = (
            "confirmed"
            if p <= level
            else "negative"
            if p_negative <= level
            else "negligible"
            if within
            else "undecided"
        )
        value, stderr, _ = mean
        found[edge] = CircuitEdge(
            *edge, status, value, stderr, low, high, float(p), None, None, screened[edge], edge in at_random
        )
    return found


def missed(edges: Sequence[CircuitEdge], n_edges: int) -> tuple[int, int, float, float] | None:
    """Of edges that the screen left out: tested, confirmed, and the interval of the share (Clopper and Pearson)."""
    if len(edges) == n_edges:
        return None
    left = [edge.status == "confirmed" for edge in edges if edge.sampled]
    interval = stats.binomtest(sum(left), len(left)).proportion_ci(0.95)
    return len(left), sum(left), float(interval.low), float(interval.high)


def detectable(stderrs: Sequence[float], n: int, level: float, delta: float) -> float:
    """The effect that a test at level / (number of tests), the first step of either correction, finds with probability 0.8."""
    spread = float(np.median([each for each in stderrs if each > 0] or [0.0]))
    reach = stats.t.isf(level / len(stderrs), n - 1) + stats.t.ppf(POWER, n - 1)
    return delta + float(reach) * spread


def curve(
    run: Interventions,
    edges: Sequence[Edge],
    members: Sequence[Edge],
    baseline: Float[Tensor, " row"],
    n_sizes: int,
    draw: Callable[[int], Sequence[Edge]],
) -> tuple[Size, ...]:
    """The circuit kept alone and taken away alone, at some sizes, beside random circuits.

    Parameters
    ----------
    edges
        All, everywhere.
    members
        The circuit's, in the order in which they are added; at all positions or at single ones.
    baseline
        The metric without ``edges``.
    draw
        So many edges at random, of the kind of ``members``.
    """
    if not members:
        return ()
    n = len(members)
    wanted = sorted({max(1, round(n ** (i / n_sizes))) for i in range(1, n_sizes + 1)})
    span = (run.before - baseline).cpu().numpy()

    def share(values: Tensor, *, kept: bool) -> tuple[float, float]:
        part = (values - baseline if kept else run.before - values).cpu().numpy()
        ratio = part.mean() / span.mean()
        return float(ratio), float(np.std(part - ratio * span, ddof=1) / abs(span.mean()) / math.sqrt(len(part)))

    def both(circuit: Sequence[Edge]) -> tuple[float, float, float, float]:
        kept = run.without(edges, but=circuit)
        return *share(kept, kept=True), *share(run.without(circuit), kept=False)

    found = []
    for size in wanted:
        others = np.mean([both(draw(size)) for _ in range(RANDOM)], axis=0)
        found.append(Size(size, *both(members[:size]), float(others[0]), float(others[2])))
    return tuple(found)
