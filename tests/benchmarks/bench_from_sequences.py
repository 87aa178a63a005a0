"""How well and how fast a graph is found in sequences: ``python tests/benchmarks/bench_from_sequences.py PART [--seed S] [--n N]``.

Parts: forests, priors, shapes, permuted, short, nulls, fixed, baselines, rivals (these without PC), cost. Each prints its figures. The method was settled on seeds below 100,000; reported figures
are those of seeds from 500,000 on.
"""

from __future__ import annotations

import argparse
import itertools
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from causal_probe.discovery.sequences import graph_from_sequences
from causal_probe.discovery.sequences.codes import code
from causal_probe.discovery.sequences.result import SequenceGraph
from causal_probe.discovery.sequences.study import decide, measure
from causal_probe.discovery.sequences.verdicts import identifiable

Array = NDArray[Any]
LEVELS = (0.05, 0.001)
HELD_OUT = 500_000
#: Graphs between two lines of progress.
SHOWN = 20
ROOT_PROBABILITIES = (0.0, 0.3, 0.5, 0.8)
#: S, T, N, concentration.
SETTINGS = ((3, 20, 2000, 0.1), (3, 20, 2000, 1.0), (10, 32, 5000, 0.1), (2, 20, 5000, 0.5))


# Planted data.


def dirichlet(concentrations: Array, n: int, rng: np.random.Generator) -> Array:
    """Rows [n, *concentrations.shape]; logarithms, for small concentrations underflow."""
    shape = (n, *concentrations.shape)
    logs = np.log(rng.gamma(concentrations + 1, size=shape)) + np.log(rng.random(shape)) / concentrations
    rows = np.exp(logs - logs.max(-1, keepdims=True)) + 1e-12
    return rows / rows.sum(-1, keepdims=True)


def letters() -> Array:
    """Bigram counts of frequent letters in this project's README."""
    text = re.sub("[^a-z]+", " ", (Path(__file__).parents[2] / "README.md").read_text().lower())
    alphabet = "etaoinsrhldc "
    counts = np.zeros((len(alphabet),) * 2)
    for first, second in itertools.pairwise(text):
        if first in alphabet and second in alphabet:
            counts[alphabet.index(first), alphabet.index(second)] += 1
    return counts


def matrices(prior: str, n: int, states: int, concentration: float, rng: np.random.Generator) -> Array:
    """One transition matrix a sequence."""
    if prior == "iid rows":
        return dirichlet(np.full((states, states), concentration), n, rng)
    if prior == "diagonal-heavy":
        return dirichlet(np.full((states, states), concentration) + 3 * concentration * np.eye(states), n, rng)
    if prior == "asymmetric":
        base = np.array([0.6, 0.3, 0.1]) * concentration * states
        return dirichlet(np.tile(base, (states, 1)), n, rng)
    counts = letters()  # rows of text bigrams: three letters a sequence
    chosen = np.argsort(rng.random((n, len(counts))), 1)[:, :states]
    rows = counts[chosen[:, :, None], chosen[:, None, :]] + 0.5
    return rows / rows.sum(2, keepdims=True)


def sample(parents: Sequence[int], pi: Array, rng: np.random.Generator) -> Array:
    """Tokens [n, column]: roots from the stationary law, children from their parent's row."""
    n, states, _ = pi.shape
    system = np.swapaxes(pi, 1, 2) - np.eye(states)
    system[:, -1] = 1
    right = np.zeros((n, states, 1))
    right[:, -1] = 1
    stationary = np.linalg.solve(system, right)[..., 0].clip(0)
    laws = np.cumsum(pi, 2)
    root = np.cumsum(stationary, 1)
    tokens = np.zeros((n, len(parents)), int)
    for child, parent in enumerate(parents):
        law = root if parent < 0 else laws[np.arange(n), tokens[:, parent]]
        tokens[:, child] = np.minimum((rng.random((n, 1)) * law[:, -1:] >= law).sum(1), states - 1)
    return tokens


def forest(columns: int, root_probability: float, rng: np.random.Generator) -> list[int]:
    """Parents, -1 for roots."""
    return [-1 if i == 0 or rng.random() < root_probability else int(rng.integers(i)) for i in range(columns)]


SHAPES: dict[str, Callable[[int], list[int]]] = {
    "chain": lambda t: list(range(-1, t - 1)),
    "pairs": lambda t: [i - 1 if i % 2 else -1 for i in range(t)],
    "caterpillar": lambda t: [-1 if i == 0 else i - 1 if i < t // 2 else i - t // 2 for i in range(t)],
    "two components": lambda t: [-1 if i < 2 else i - 2 for i in range(t)],
    "two stars": lambda t: [-1 if i < 2 else i % 2 for i in range(t)],
    "one edge": lambda t: [-1] * (t - 1) + [t // 2],
    "no edge": lambda t: [-1] * t,
    "star": lambda t: [-1] + [0] * (t - 1),
}


def text_characters(n: int, columns: int, rng: np.random.Generator) -> Array:
    """English characters, shuffled."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    codes = np.unique(np.frombuffer(text.encode("ascii", "ignore"), np.uint8), return_inverse=True)[1]
    return rng.permutation(np.resize(codes, max(len(codes), n * columns)))[: n * columns].reshape(n, columns)


def null(kind: str, n: int, columns: int, states: int, rng: np.random.Generator) -> Array:
    """Data without an edge."""
    if kind == "independent":
        return rng.integers(states, size=(n, columns))
    if kind == "constant columns":
        tokens = rng.integers(states, size=(n, columns))
        tokens[:, ::3] = rng.integers(states, size=len(range(0, columns, 3)))
        return tokens
    if kind == "shuffled English":
        return text_characters(n, columns, rng)
    logits = np.log(dirichlet(np.full(states, 0.5), n, rng))[:, None, :]
    if kind == "sequence x column effects":
        logits = logits + rng.normal(size=(1, columns, states))
    law = np.exp(logits - logits.max(2, keepdims=True)).cumsum(2)
    return (rng.random((n, columns, 1)) * law[..., -1:] >= law).sum(2).clip(0, states - 1)


# What is measured.


def wrong(found: SequenceGraph, parents: Sequence[int]) -> int:
    """Wrong claims: an edge that isn't one, or a child that is called a root."""
    edges = sum(parents[child] != parent for parent, child in found.edges)
    return edges + sum(parents[column] >= 0 for column in found.roots)


def bound(level: float, trials: int) -> int:
    """Largest number of errors within the one-sided 99% bound."""
    return int(stats.binom.ppf(0.99, trials, level))


class Tally:
    """Claims over many graphs."""

    def __init__(self, name: str) -> None:
        self.name, self.graphs, self.seconds = name, 0, 0.0
        self.exact = self.wrong = self.edges = self.roots = self.true_edges = self.true_roots = self.identifiable = 0
        self.structure: dict[str, int] = {}
        self.rejected: dict[str, int] = {}

    def add(self, found: SequenceGraph, parents: Sequence[int], seconds: float) -> None:
        self.graphs += 1
        self.seconds += seconds
        self.exact += list(found.candidates) == list(parents)
        self.wrong += wrong(found, parents) > 0
        if identifiable(parents):
            self.identifiable += 1
            self.true_edges += sum(p >= 0 for p in parents)
            self.true_roots += sum(p < 0 for p in parents[1:])
        self.edges += sum(parents[child] == parent for parent, child in found.edges)
        self.roots += sum(parents[column] < 0 for column in found.roots if column)
        self.structure[found.structure] = self.structure.get(found.structure, 0) + 1
        for a in found.assumptions:
            if not a.holds:
                self.rejected[a.name] = self.rejected.get(a.name, 0) + 1

    def show(self, level: float, where: TextIO = sys.stdout) -> None:
        print(
            f"{self.name} | level {level:g} | {self.graphs} graphs | wrong graphs {self.wrong} (bound {bound(level, self.graphs)}) | best graph exact {self.exact} | edges "
            f"claimed {self.edges}/{self.true_edges} = {self.edges / max(1, self.true_edges):.1%} | roots {self.roots}/{self.true_roots} | {self.structure} | "
            f"rejected {self.rejected} | {self.seconds / max(1, self.graphs):.2f} CPU s each",
            flush=True,
            file=where,
        )


def study(tokens: Array, levels: Sequence[float] = LEVELS) -> tuple[list[SequenceGraph], float]:
    """The results at each level, and the CPU seconds of one."""
    started = time.process_time()
    measured = measure(code(tokens, max_memory=2**33))
    found = [decide(measured, level=level) for level in levels]
    return found, time.process_time() - started


def tally(name: str, cases: Iterator[tuple[list[int], Array]]) -> None:
    tallies = [Tally(name) for _ in LEVELS]
    for parents, tokens in cases:
        results, seconds = study(tokens)
        for found, its in zip(results, tallies, strict=True):
            its.add(found, parents, seconds)
        if tallies[0].graphs % SHOWN == 0:  # so that a run that is cut short has said something
            for level, its in zip(LEVELS, tallies, strict=True):
                its.show(level, sys.stderr)
    for level, its in zip(LEVELS, tallies, strict=True):
        its.show(level)


def forests(seed: int, n: int, priors: Sequence[str], settings: Sequence[tuple[int, int, int, float]]) -> None:
    """Random forests, ``n`` for each root probability."""
    for states, columns, sequences, concentration in settings:
        for prior in priors:

            def cases(
                states: int = states,
                columns: int = columns,
                sequences: int = sequences,
                concentration: float = concentration,
                prior: str = prior,
                p: float = 0.0,
            ) -> Iterator[tuple[list[int], Array]]:
                for index in range(n):
                    rng = np.random.default_rng([seed, index, int(10 * p)])
                    parents = forest(columns, p, rng)
                    yield parents, sample(parents, matrices(prior, sequences, states, concentration, rng), rng)

            def everything() -> Iterator[tuple[list[int], Array]]:
                for p in ROOT_PROBABILITIES:
                    yield from cases(p=p)

            tally(f"S={states} T={columns} N={sequences} concentration {concentration} {prior}", everything())


def shapes(seed: int, n: int) -> None:
    """Fixed shapes, S=3, T=20, N=2,000, concentration 0.1."""
    for name, build in SHAPES.items():

        def cases(build: Callable[[int], list[int]] = build) -> Iterator[tuple[list[int], Array]]:
            for index in range(n):
                rng = np.random.default_rng([seed, index])
                yield build(20), sample(build(20), matrices("iid rows", 2000, 3, 0.1, rng), rng)

        tally(name, cases())


def permuted(seed: int, n: int) -> None:
    """Columns in random order: a directed claim is wrong unless it is an edge of the graph with its columns so named."""
    for name, states in (("chain", 3), ("forest", 3), ("forest", 2)):
        out_of_order(seed, n, name, states, 20, 2000)


def short(seed: int, n: int) -> None:
    """Columns in random order, and few of them, and of sequences."""
    out_of_order(seed, n, "forest", 3, 14, 1000)


def out_of_order(seed: int, n: int, name: str, states: int, columns: int, sequences: int) -> None:
    def cases() -> Iterator[tuple[list[int], Array]]:
        for index in range(n):
            rng = np.random.default_rng([seed, index])
            parents = SHAPES["chain"](columns) if name == "chain" else forest(columns, 0.3, rng)
            tokens = sample(parents, matrices("iid rows", sequences, states, 0.1 if states == 3 else 0.5, rng), rng)
            order = rng.permutation(columns)
            place = np.argsort(order)
            named = [-1 if parents[old] < 0 else int(place[parents[old]]) for old in order]
            yield named, tokens[:, order]

    tally(f"permuted {name} S={states} T={columns} N={sequences}", cases())


def nulls(seed: int, n: int) -> None:
    """Data without an edge, N=500; p-values against uniform."""
    kinds = (
        "independent",
        "frequencies new in each",
        "sequence x column effects",
        "constant columns",
        "shuffled English",
    )
    for kind in kinds:
        claims = dict.fromkeys(LEVELS, 0)
        p_values: list[float] = []
        directed = 0
        for index in range(n):
            rng = np.random.default_rng([seed, index])
            tokens = null(kind, 500, 20, 3, rng)
            found = graph_from_sequences(tokens)
            p = min(1.0, 2 * min(found.in_context_test.p_value, found.fixed_test.p_value))
            if (
                max(found.candidates) >= 0 and found.in_context_test.n_pairs
            ):  # else there is nothing to test, and p is 1
                p_values.append(found.in_context_test.p_value)
            directed += bool(found.edges)
            for level in LEVELS:
                claims[level] += p <= level
        uniform = stats.kstest(p_values, "uniform").pvalue
        said = ", ".join(f"{count} at level {level:g} (bound {bound(level, n)})" for level, count in claims.items())
        print(
            f"{kind} | {n} data sets | structure claimed {said} | with an edge {directed} | KS p of the {len(p_values)} p-values {uniform:.3f}",
            flush=True,
        )


def fixed(seed: int, n: int) -> None:
    """One matrix for all sequences."""
    structure: dict[str, int] = {}
    right = total = claimed = 0
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        parents = forest(20, 0.0, rng)
        pi = np.repeat(matrices("iid rows", 1, 3, 0.5, rng), 2000, 0)
        found = graph_from_sequences(sample(parents, pi, rng))
        structure[found.structure] = structure.get(found.structure, 0) + 1
        truth = {frozenset((p, c)) for c, p in enumerate(parents) if p >= 0}
        right += len(truth & {frozenset(edge) for edge in found.fixed_tree})
        total += len(truth)
        claimed += len(found.edges)
    print(
        f"one fixed matrix | {n} data sets | {structure} | edges of the tree right {right}/{total} | in-context edges claimed {claimed}",
        flush=True,
    )


def baselines(seed: int, n: int, *, with_pc: bool = True) -> None:
    """Parents right, on forests of root probability 0.3, S=3, T=20, N=2,000. PC takes minutes a forest."""
    from causal_probe.discovery.sequences.agreement import mutual_information
    from causal_probe.discovery.sequences.models import chow_liu

    for prior in ("iid rows", "diagonal-heavy", "asymmetric", "text bigrams"):
        right = dict.fromkeys(
            (
                "this method, claimed",
                "this method, best graph",
                "least information",
                "most information",
                "Chow-Liu skeleton",
                "PC skeleton",
                "one gradient",
            ),
            0,
        )
        total = 0
        for index in range(n):
            rng = np.random.default_rng([seed, index])
            parents = forest(20, 0.3, rng)
            tokens = sample(parents, matrices(prior, 2000, 3, 0.1, rng), rng)
            edges = {(p, c) for c, p in enumerate(parents) if p >= 0}
            total += len(edges)
            found = graph_from_sequences(tokens)
            right["this method, claimed"] += len(edges & set(found.edges))
            right["this method, best graph"] += sum(found.candidates[c] == p for p, c in edges)
            information = mutual_information((tokens[:, :, None] == np.arange(3)).astype(np.float32))
            right["least information"] += sum(int(information[c, :c].argmin()) == p for p, c in edges)
            right["most information"] += sum(int(information[c, :c].argmax()) == p for p, c in edges)
            tree, _ = chow_liu(tokens)
            undirected = {frozenset((p, c)) for c, p in enumerate(tree) if p >= 0}
            right["Chow-Liu skeleton"] += sum(frozenset(edge) in undirected for edge in edges)
            right["PC skeleton"] += _pc(tokens, edges) if with_pc else 0
            right["one gradient"] += _one_gradient(tokens, edges)
        asked = {name: count for name, count in right.items() if with_pc or "PC" not in name}
        print(f"{prior} | {total} edges | " + ", ".join(f"{name} {count}" for name, count in asked.items()), flush=True)


def _pc(tokens: Array, edges: set[tuple[int, int]]) -> int:
    from causallearn.search.ConstraintBased.PC import pc

    found = pc(tokens, 0.05, "gsq", show_progress=False).G.graph
    return sum(found[p, c] != 0 or found[c, p] != 0 for p, c in edges)


def _one_gradient(tokens: Array, edges: set[tuple[int, int]]) -> int:
    """``recover --data``'s way: the last column is taken for the successor of the one before it."""
    import torch

    from causal_probe.first_gradient import gradient_graph

    found = gradient_graph(torch.from_numpy(tokens), d_vocab=3)
    return sum(c < len(found.candidates) and found.candidates[c] == p for p, c in edges)


def cost(seed: int) -> None:
    """CPU seconds and peak memory."""
    for states, columns, sequences, concentration in (
        (3, 32, 5000, 0.1),
        (50_000, 32, 5000, 0.0),
        (3, 128, 20_000, 0.1),
    ):
        rng = np.random.default_rng([seed, columns])
        parents = forest(columns, 0.3, rng)
        few = 3 if states < 1000 else 8
        tokens = sample(parents, matrices("iid rows", sequences, few, concentration or 0.1, rng), rng)
        if states > 1000:  # every sequence names its states anew among 50,000 symbols
            names = np.argsort(rng.random((sequences, 64)), 1)[:, :few] * 781 + rng.integers(781, size=(sequences, 1))
            tokens = np.take_along_axis(names, tokens, 1)
        [found], seconds = study(tokens, (0.05,))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"vocabulary {states} T={columns} N={sequences} | {seconds:.1f} CPU s | peak of the process so far {peak:.2f} GiB, stated {found.settings['memory'] / 2**30:.2f} GiB "
            f"| {found.structure} | edges {len(found.edges)} of {sum(p >= 0 for p in parents)} | wrong {wrong(found, parents)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--seed", type=int, default=HELD_OUT)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--setting", type=int, default=None)
    asked = parser.parse_args()
    chosen = SETTINGS if asked.setting is None else SETTINGS[asked.setting : asked.setting + 1]
    parts: dict[str, Callable[[], None]] = {
        "forests": lambda: forests(asked.seed, asked.n, ("iid rows",), chosen),
        "priors": lambda: forests(asked.seed, asked.n, ("diagonal-heavy", "asymmetric", "text bigrams"), SETTINGS[:1]),
        "shapes": lambda: shapes(asked.seed, asked.n),
        "permuted": lambda: permuted(asked.seed, asked.n),
        "short": lambda: short(asked.seed, asked.n),
        "nulls": lambda: nulls(asked.seed, asked.n),
        "fixed": lambda: fixed(asked.seed, asked.n),
        "baselines": lambda: baselines(asked.seed, asked.n),
        "rivals": lambda: baselines(asked.seed, asked.n, with_pc=False),
        "cost": lambda: cost(asked.seed),
    }
    parts[asked.part]()


if __name__ == "__main__":
    main()
