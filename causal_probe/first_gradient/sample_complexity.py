"""How many sequences does one gradient need?"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from scipy import stats

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.first_gradient.graph import gradient_graphs
from causal_probe.graphs import random_forest
from causal_probe.tasks import InContextMarkov, generator
from causal_probe.tasks.markov import Targets
from causal_probe.tasks.randomness import numpy_generator

__all__ = ["gradient_sample_complexity"]


@checked
def gradient_sample_complexity(
    n_sequences: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    *,
    targets: Sequence[Targets] = ("soft", "hard"),
    graphs: int = 100,
    first_seed: int = 0,
    n_positions: int = 20,
    d_vocab: int = 3,
    concentration: float = 0.1,
    root_probability: float = 0.5,
) -> pd.DataFrame:
    """The share of random forests that one gradient recovers exactly, against the number of sequences.

    Parameters
    ----------
    n_sequences
        The numbers of sequences; every point draws its own.
    targets
        ``"soft"``: the loss knows the next token's distribution; ``"hard"``: one draw from it. The test for roots knows the
        transitions either way.
    graphs, first_seed
        How many forests, of the seeds from ``first_seed`` on; the same ones at every point.
    n_positions, d_vocab, concentration, root_probability
        Of the task.

    Returns
    -------
    pandas.DataFrame
        One row per kind of target and number of sequences: ``targets``, ``sequences``, ``graphs``, ``exact`` (share of the forests with
        every edge and root right) with its Wilson interval ``low``, ``high`` of 95%, and ``parents`` (share of all true edges
        whose parent leads, whatever the test for roots says).

    Raises
    ------
    CausalProbeError
        If there is no point or no graph.

    Examples
    --------
    >>> gradient_sample_complexity([512], targets=["soft"], graphs=2, n_positions=8).columns.tolist()
    ['targets', 'sequences', 'graphs', 'exact', 'low', 'high', 'parents']
    """
    if not n_sequences or not targets or graphs < 1:
        raise CausalProbeError("A curve needs at least one number of sequences, one kind of target and one graph.")
    seeds = range(first_seed, first_seed + graphs)
    tasks = [
        InContextMarkov(
            random_forest(n_positions - 1, root_probability=root_probability, seed=numpy_generator(seed, "graph")),
            d_vocab,
            concentration,
        )
        for seed in seeds
    ]
    rows = []
    for kind in targets:
        for n in n_sequences:
            sources = [generator(seed, f"sample complexity {kind} {n}") for seed in seeds]
            found = gradient_graphs(tasks, sources, n_sequences=n, targets=kind)
            exact = sum(its.compare(task.graph).exact for its, task in zip(found, tasks, strict=True))
            leads = [
                (its.candidates[child],) == parents
                for its, task in zip(found, tasks, strict=True)
                for child, parents in enumerate(task.parents[: n_positions - 1])
                if parents
            ]
            interval = stats.binomtest(exact, graphs).proportion_ci(method="wilson")
            rows.append(
                (
                    kind,
                    n,
                    graphs,
                    exact / graphs,
                    interval.low,
                    interval.high,
                    sum(leads) / len(leads) if leads else None,
                )
            )
    return pd.DataFrame(rows, columns=["targets", "sequences", "graphs", "exact", "low", "high", "parents"])
