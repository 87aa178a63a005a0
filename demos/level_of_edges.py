"""Does a confirmed edge name the right parent? The p-values of wrong candidates, against their law: ``make level``.

Random forests and stars of 8 nodes; models that hold the graph, models that hold another graph, untrained models with random weights, and
jointly trained ones. Of every node, every earlier node that is not its parent is tested. Under the true hypothesis (the true parent, or none) a p-value is uniform;
an edge rejects all its rivals, so what decides is the largest p-value. ``--graphs N`` takes N graphs of each kind.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from scipy import stats

from causal_probe import graphs, models, tasks, training, viz
from causal_probe.probes.edge_effects import Editing, Rivals
from causal_probe.viz import Curve

NODES, STATES, SEQUENCES = 8, 3, 2048
LEVEL = 0.05


def loss(model: Any, batch: Any) -> torch.Tensor:
    return training.task_loss(model.predict(batch.tokens), batch.target)


def holding(graph: nx.DiGraph, seed: int) -> Any:
    return models.hand_set(graph, STATES, match_scale=8.0, output_scale=3.0)


def holding_another(graph: nx.DiGraph, seed: int) -> Any:
    return holding(graphs.random_forest(NODES, root_probability=0.3, seed=seed + 1000), seed)


def untrained(graph: nx.DiGraph, seed: int) -> Any:
    model = models.DisentangledTransformer(STATES, NODES + 1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def trained_jointly(graph: nx.DiGraph, seed: int) -> Any:
    task = tasks.InContextMarkov(graph, STATES, 0.1)
    model = models.DisentangledTransformer(STATES, NODES + 1)
    stages = training.joint(n_layers=2, steps=100, batch_size=512)
    training.fit(model, task, stages, generator=tasks.generator(seed, "training"))
    return model


def p_values(build: Callable[[nx.DiGraph, int], Any], seeds: range) -> Iterator[tuple[float, float]]:
    """Of every wrong candidate: the p-value of the true hypothesis, and the one that decides."""
    for seed in seeds:
        star = seed % 4 == 3
        truth = (
            graphs.from_parents([None, *[0] * (NODES - 1)])
            if star
            else graphs.random_forest(NODES, root_probability=0.3, seed=seed)
        )
        task = tasks.InContextMarkov(truth, STATES, 0.1)
        batches = [task.sample(SEQUENCES, tasks.generator(seed, "probing"))]
        redraw = partial(task.redraw, generator=tasks.generator(seed, "redrawing"))
        rivals = Rivals(Editing(build(truth, seed), loss, 0, 0), batches, redraw, nx.freeze(truth))
        for child in range(1, NODES):
            true = next(iter(truth.predecessors(child)), None)
            for parent in (node for node in range(child) if node != true):
                margins = rivals.margins((parent, child))
                t = (margins.mean / margins.stderr.clamp(min=1e-12)).numpy()
                p = stats.t.sf(t, margins.count - 1)
                names = [None, *(node for node in range(child) if node != parent)]
                yield float(p[names.index(true)]), float(p.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("out/level.svg"))
    given = parser.parse_args()
    curves = {"uniform law": Curve([0, 1], [0, 1])}
    print(
        f"{'models':<18} {'wrong candidates':>16} {'p <= 0.05, true':>16} {'p <= 0.05, decides':>19} {'KS distance':>12}"
    )
    for build in (holding, holding_another, untrained, trained_jointly):
        with torch.no_grad() if build is not trained_jointly else torch.enable_grad():
            found = np.array(list(p_values(build, range(given.graphs))))
        true, decides = found.T
        name = build.__name__.replace("_", " ")
        distance = stats.kstest(true, "uniform").statistic
        print(
            f"{name:<18} {len(found):>16,} {np.mean(true <= LEVEL):>16.4f} {np.mean(decides <= LEVEL):>19.4f} {distance:>12.4f}",
            flush=True,
        )
        quantiles = (np.arange(len(true)) + 0.5) / len(true)
        curves[f"{name}: true hypothesis"] = Curve(quantiles, np.sort(true))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    viz.curves(
        {"p-values of the true hypothesis": curves}, x_name="quantile of the uniform law", y_name="p-value"
    ).savefig(given.out)
    print(f"Picture: {given.out}")


if __name__ == "__main__":
    main()
