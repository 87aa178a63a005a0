"""A search for edges in three parts: screened on the first rows, tested on the second, reported on the third."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from causal_probe.circuits.contrasts import ABOUT
from causal_probe.circuits.found import Circuit, CircuitEdge, Gate, members_of
from causal_probe.circuits.interventions import Interventions, edges_of
from causal_probe.circuits.judging import adjusted, curve, detectable, judged, mean_of, missed, smallest_effect
from causal_probe.circuits.known import Edge
from causal_probe.circuits.partial import SIDES, Layers
from causal_probe.circuits.screen import attributions
from causal_probe.errors import CausalProbeError
from causal_probe.probes.p_values import t_p_value

__all__ = ["Asked", "screen_test_report"]

#: Among so many unconfirmed edges all pairs are tested, where every edge is.
PAIRED = 16


@dataclass(frozen=True)
class Asked:
    """How edges are searched for; the arguments of :func:`~causal_probe.circuits.find_circuit` of these names.

    Raises
    ------
    CausalProbeError
        For a value that is none.
    """

    level: float
    delta: float | None
    correction: Literal["fdr", "family-wise"]
    most: int
    sampled: int
    pairs: int | None
    sizes: int
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 0:
            raise CausalProbeError(f"pairs is {self.pairs}; it is a whole number of at least 0.")
        if self.sampled > self.most:
            raise CausalProbeError(
                f"sampled is {self.sampled}, and only {self.most} edges are tested (`most`). Draw fewer at random."
            )
        if self.level >= 0.5:
            raise CausalProbeError(f"level is {self.level}; a test of edges has a level below one half.")
        if self.delta is not None and not 0 <= self.delta < math.inf:
            raise CausalProbeError(f"delta is {self.delta}; it is a finite number of at least 0.")


class _Candidates:
    """All edges, and the estimate of each: everywhere, or one for each position."""

    def __init__(self, edges: Sequence[Edge], screened: dict[Edge, Float[Tensor, " pos"]], by_position: bool) -> None:
        self.edges, self.by_position = edges, by_position
        values = torch.stack([screened[edge] for edge in edges]).double()
        self.estimates: np.ndarray = (values if by_position else values.sum(1, keepdim=True)).numpy()

    def __len__(self) -> int:
        return self.estimates.size

    def __getitem__(self, number: int) -> Edge:
        source, receiver = self.edges[number // self.estimates.shape[1]]
        position = number % self.estimates.shape[1]
        return (f"{source}@{position}", f"{receiver}@{position}") if self.by_position else (source, receiver)

    def some(self, n: int, drawn: np.random.Generator) -> list[Edge]:
        """So many at random."""
        return [self[int(i)] for i in drawn.choice(len(self), n, replace=False)]

    def chosen(self, most: int, sampled: int, drawn: np.random.Generator) -> tuple[dict[Edge, float], set[Edge]]:
        """The edges that are tested, with their estimates, and those among them that were drawn at random."""
        every = self.estimates.ravel()
        best, others = np.arange(len(every)), np.arange(0)
        if len(every) > most:
            order = np.argsort(-abs(every), kind="stable")
            best, others = order[: most - sampled], order[most - sampled :]
            others = drawn.choice(others, sampled, replace=False)
        wanted = np.sort(np.concatenate([best, others]))
        return {self[int(i)]: float(every[i]) for i in wanted}, {self[int(i)] for i in others}


def screen_test_report(
    layers: Layers,
    runs: Callable[[int], Interventions],
    metric: str,
    contrast: str,
    asked: Asked,
    *,
    by_position: bool = False,
) -> Circuit:
    """The circuit that three parts of the rows show.

    Parameters
    ----------
    runs
        The part's number (0 to screen, 1 to test, 2 to report) -> its rows.
    by_position
        Whether an edge is one at each position.

    Raises
    ------
    CausalProbeError
        If the metric doesn't fall when every edge is ablated.
    """
    drawn = np.random.default_rng(asked.seed)
    # 1. Screen
    run = runs(0)
    edges, split = edges_of(layers, run.read), [len(run.before)]
    fall = run.before - run.without(edges)
    delta = smallest_effect(asked.delta, run.before, fall, metric)
    candidates = _Candidates(edges, attributions(run), by_position)
    del run
    screened, at_random = candidates.chosen(asked.most, asked.sampled, drawn)
    # 2. Test
    run, chosen = runs(1), [*screened]
    with tqdm(total=len(chosen), desc="edges", disable=not asked.progress) as bar:
        effects = run.effects(chosen, bar.update).cpu().numpy()
    tested = judged(chosen, effects, screened, at_random, asked.level, delta, asked.correction)
    confirmed = sorted(
        (edge for edge in chosen if tested[edge].status == "confirmed"), key=lambda edge: -tested[edge].effect
    )
    pairs = (PAIRED if len(chosen) == len(candidates) else 0) if asked.pairs is None else asked.pairs
    gates = _gates(run, chosen, effects, tested, screened, pairs, asked.level, delta, asked.correction)
    members = members_of(confirmed, gates)
    split.append(len(run.before))
    del run
    # 3. Report
    run = runs(2)
    split.append(len(run.before))
    baseline = run.without(edges)
    for edge, values in zip(members, run.effects(members).cpu().numpy(), strict=True):
        value, stderr, _ = mean_of(values)
        tested[edge] = tested[edge]._replace(again=value, again_stderr=stderr)
    worth = curve(run, edges, members, baseline, asked.sizes, lambda n: candidates.some(n, drawn))
    found = [*tested.values()]
    return Circuit(
        edges=tuple(sorted(found, key=lambda edge: -edge.effect)),
        clean=float(run.before.mean()),
        baseline=float(baseline.mean()),
        delta=delta,
        level=asked.level,
        contrast=contrast,
        metric=metric,
        candidates=len(candidates),
        missed=missed(found, len(candidates)),
        detectable=detectable([edge.stderr for edge in found], split[1], asked.level, delta),
        sizes=worth,
        gates=gates,
        settings={
            "split": split,
            "contrast_is": ABOUT[contrast],
            "correction": asked.correction,
            "most": asked.most,
            "sampled": asked.sampled,
            "pairs": pairs,
            "seed": asked.seed,
            "shape": layers.shape,
            "attention_not_read": [f"L{layer}" for layer in layers.carriers if layers.attends[layer] != SIDES],
            "mlps_not_read": [
                f"L{layer}.mlp" for layer, read in enumerate(layers.mlps) if layers.reader.has_mlps and not read
            ],
        },
        provenance={},
    )


def _gates(
    run: Interventions,
    edges: Sequence[Edge],
    effects: Float[np.ndarray, "edge row"],
    tested: dict[Edge, CircuitEdge],
    screened: dict[Edge, float],
    n: int,
    level: float,
    delta: float,
    correction: str,
) -> tuple[Gate, ...]:
    """Pairs of unconfirmed edges that have an effect together, and of confirmed edges into one receiver that need each other."""
    if n < 2:
        return ()
    alone = dict(zip(edges, effects, strict=True))
    weak = sorted(
        (e for e in edges if tested[e].status in ("negligible", "undecided")), key=lambda e: -abs(screened[e])
    )[:n]
    strong = sorted((e for e in edges if tested[e].status == "confirmed"), key=lambda e: -tested[e].effect)[:n]
    both = [("or", *pair) for pair in combinations(weak, 2)]
    both += [("and", *pair) for pair in combinations(strong, 2) if pair[0][1] == pair[1][1]]
    joint, p_values = [], []
    for kind, first, second in both:
        together = (run.before - run.without([first, second])).cpu().numpy()
        more = together - alone[first] - alone[second]
        tests = [together, more] if kind == "or" else [-more]
        joint.append(together)
        p_values.append(max(t_p_value(*mean_of(each), above=delta) for each in tests))
    found = [
        Gate(kind, " -> ".join(first), " -> ".join(second), *mean_of(together)[:2], float(p))
        for (kind, first, second), together, p in zip(both, joint, adjusted(p_values, correction), strict=True)
        if p <= level
    ]
    return tuple(sorted(found, key=lambda gate: (gate.kind != "or", -gate.effect)))
