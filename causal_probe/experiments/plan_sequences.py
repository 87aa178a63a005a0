"""``causal-probe plan``: how many sequences a causal graph needs, by simulation. It uses nothing of anyone's data: it is no power after the fact."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from causal_probe.discovery.sequences import graph_from_sequences
from causal_probe.discovery.sequences.counts import ROOT
from causal_probe.discovery.sequences.redrawn import dirichlet, walk
from causal_probe.discovery.sequences.verdicts import identifiable
from causal_probe.options import takes
from causal_probe.options.recover import PlanOptions
from causal_probe.results import Result, Table

__all__ = ["Planned", "SequencePlan", "plan_sequences"]

#: Weight of even rows, so that every matrix has one stationary law.
EVEN = 1e-9
#: How much heavier the diagonal is than the rest, where it is.
DIAGONAL = 4


@dataclass(frozen=True)
class Planned:
    """One line of the table: the setting, and over its graphs the identifiable edges, those claimed, and the graphs with any wrong claim."""

    n_positions: int
    d_vocab: int
    concentration: float
    prior: str
    n_sequences: int
    edges: int
    claimed: int
    wrong_graphs: int


@dataclass(frozen=True, eq=False, repr=False)
class SequencePlan(Result):
    """The result of :func:`plan_sequences`: ``lines``, one for each setting."""

    KIND = "sequence plan"
    RESULT: ClassVar[str] = "plan.json"
    WORKS = ("nichani2024", "heckerman1995")

    lines: tuple[Planned, ...]

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        return PlanOptions.call("plan_sequences", self.settings)

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The share of edges that are claimed at level {self.settings['level']:g} was simulated on {self.settings['forests']} random forests for each setting "
            f"({self.measured_with})."
        )

    def table(self) -> Table:
        """One row a setting."""
        rows = [
            (
                each.n_positions,
                each.d_vocab,
                each.concentration,
                each.prior,
                each.n_sequences,
                each.claimed / each.edges if each.edges else None,
                each.wrong_graphs,
            )
            for each in self.lines
        ]
        title = f"Share of identifiable edges claimed at level {self.settings['level']:g}, over {self.settings['forests']} random forests each"
        columns = ("T", "S", "concentration", "prior", "sequences", "edges claimed", "graphs with a wrong claim")
        return Table(title, columns, rows, shown=max(1, len(rows)))


@takes(PlanOptions)
def plan_sequences(o: PlanOptions) -> SequencePlan:
    """How many sequences does a causal graph need? On simulated data whose transitions are new in each sequence.

    Examples
    --------
    >>> plan_sequences(n_positions=[8], concentration=[0.1], n_sequences=[400], forests=1).lines[0].wrong_graphs
    0
    """
    lines = []
    for columns, states, concentration, prior, n in itertools.product(
        o.n_positions, o.d_vocab, o.concentration, o.prior, o.n_sequences
    ):
        edges = claimed = wrong = 0
        for index in range(o.forests):
            rng = np.random.default_rng([o.seed, index, columns])
            parents = [
                ROOT if i == 0 or rng.random() < o.root_probability else int(rng.integers(i)) for i in range(columns)
            ]
            matrices = dirichlet(_parameters(prior, states, concentration), n, rng)
            tokens = walk(parents, (1 - EVEN) * matrices + EVEN / states, rng)
            found = graph_from_sequences(tokens, level=o.level, seed=o.seed)
            right = sum(parents[child] == parent for parent, child in found.edges)
            claimed += right
            edges += sum(parent != ROOT for parent in parents) if identifiable(parents) else 0
            wrong += right < len(found.edges) or any(parents[root] != ROOT for root in found.roots)
        lines.append(Planned(columns, states, concentration, prior, n, edges, claimed, wrong))
    return SequencePlan(tuple(lines), settings=o.settings())


def _parameters(prior: str, states: int, concentration: float) -> NDArray[np.float64]:
    even = np.full((states, states), concentration)
    if prior == "diagonal":
        return even + (DIAGONAL - 1) * concentration * np.eye(states)
    if prior == "asymmetric":
        halving = 0.5 ** np.arange(states)
        return np.asarray(even * states * halving / halving.sum())
    return even
