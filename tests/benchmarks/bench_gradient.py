"""One gradient, one graph: time, and the share of random forests that are read exactly, edges and roots."""

from __future__ import annotations

from typing import Any

import pytest

from causal_probe import graphs
from causal_probe.first_gradient import gradient_graph, gradient_graphs, gradient_slots
from causal_probe.tasks import InContextMarkov, generator
from causal_probe.tasks.randomness import numpy_generator


def forests(count: int, *, positions: int, d_vocab: int) -> list[InContextMarkov]:
    drawn = (
        graphs.random_forest(positions - 1, root_probability=0.5, seed=numpy_generator(s, "graph"))
        for s in range(count)
    )
    return [InContextMarkov(graph, d_vocab, 0.1) for graph in drawn]


def test_a_thousand_graphs_of_twenty_positions(benchmark: Any) -> None:
    tasks = forests(1000, positions=20, d_vocab=3)

    def run() -> int:
        found = gradient_graphs(tasks, [generator(seed, "gradient") for seed in range(1000)])
        exact = (its.compare(task.graph).exact for its, task in zip(found, tasks, strict=True))
        return sum(right and not its.undecided for right, its in zip(exact, found, strict=True))

    exact = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info["exact"] = exact
    print(f"\n1,024 sequences each: {exact} of 1,000 exact, every edge and every root shown")
    assert exact >= 998


@pytest.mark.parametrize(
    ("positions", "d_vocab", "count"),
    [(100, 10, 50), (256, 3, 50), (1024, 3, 1)],
    ids=["T=100,S=10", "T=256", "T=1024"],
)
def test_longer_sequences(benchmark: Any, positions: int, d_vocab: int, count: int) -> None:
    tasks = forests(count, positions=positions, d_vocab=d_vocab)
    size = 2**20 // positions

    def run() -> int:
        exact = 0
        for seed, task in enumerate(tasks):
            source = generator(seed, "gradient")
            batches = (task.sample(min(size, 2**15 - start), source) for start in range(0, 2**15, size))
            exact += gradient_graph(batches).compare(task.graph).exact
        return exact

    exact = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info["exact"] = exact
    print(f"\n32,768 sequences each: {exact} of {count} exact")
    assert exact == count


def test_fifty_graphs_of_two_parents(benchmark: Any) -> None:
    tasks = [InContextMarkov(graphs.random_dag(21, parents=2, seed=seed), 3, 0.1) for seed in range(50)]

    def run() -> tuple[int, int, int]:
        right = wrong = swaps = 0
        for seed, task in enumerate(tasks):
            source = generator(seed, "slots")
            found = gradient_slots(task.sample(4096, source) for _ in range(32))
            pairs = list(zip(map(set, found.parents), map(set, task.parents), strict=True))
            right += sum(len(its & true) for its, true in pairs)
            wrong += sum(len(its - true) for its, true in pairs)
            swaps += len(found.swaps(task.graph))
        return right, wrong, swaps

    right, wrong, swaps = benchmark.pedantic(run, rounds=1)
    total = sum(len(its) for task in tasks for its in task.parents)
    benchmark.extra_info.update(
        n=50, n_positions=20, d_vocab=3, n_sequences=2**17, parents=total, right=right, wrong=wrong
    )
    print(f"\n131,072 sequences each: {right} of {total} parents, {wrong} wrong ones, {swaps} swapped slots")
    assert right >= 0.98 * total
