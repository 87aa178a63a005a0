"""With a perfect test, the learners find the equivalence class of a graph: compared with its enumeration, member by member."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations, product

import networkx as nx
import numpy as np
import pytest

from causal_probe.discovery import DSeparation, icd, ordered_icd, pc

Marks = dict[tuple[int, int], str]

#: What an edge i < j can be in a graph without selection bias: (mark at i, mark at j).
KINDS = (("tail", "arrow"), ("arrow", "tail"), ("arrow", "arrow"))


def random_graph(rng: np.random.Generator, *, latents: int) -> tuple[nx.DiGraph, list[int]]:
    """A random DAG whose numbering is a topological order, and its observed nodes: four to six, few enough edges to enumerate."""
    while True:
        observed = int(rng.integers(4, 7))
        n = observed + latents
        graph = nx.empty_graph(n, create_using=nx.DiGraph)
        density = rng.uniform(0.25, 0.55)
        graph.add_edges_from((i, j) for i, j in combinations(range(n), 2) if rng.random() < density)
        hidden = set(rng.permutation(n - 1)[:latents].tolist())
        seen = [node for node in range(n) if node not in hidden]
        if sum(not sets for sets in independences(graph, seen).values()) <= 6:
            return graph, seen


def subsets(nodes: set[int]) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(sorted(nodes), size) for size in range(len(nodes) + 1))


def independences(graph: nx.DiGraph, observed: list[int]) -> dict[tuple[int, int], frozenset[frozenset[int]]]:
    """For each pair of observed nodes (by place) all sets that separate it."""
    places = range(len(observed))
    found = {}
    for i, j in combinations(places, 2):
        rest = [k for k in places if k not in (i, j)]
        found[i, j] = frozenset(
            frozenset(given)
            for given in subsets(set(rest))
            if nx.is_d_separator(graph, observed[i], observed[j], {observed[k] for k in given})
        )
    return found


def canonical(marks: Marks, n: int) -> nx.DiGraph | None:
    """The DAG of a mixed graph, a latent cause for each <->; None if the graph is not ancestral."""
    dag = nx.empty_graph(n, create_using=nx.DiGraph)
    spouses = [(u, v) for (u, v), mark in marks.items() if u < v and mark == marks[v, u] == "arrow"]
    dag.add_edges_from((u, v) for (u, v), mark in marks.items() if mark == "arrow" and marks[v, u] == "tail")
    if not nx.is_directed_acyclic_graph(dag) or any(
        nx.has_path(dag, *e) or nx.has_path(dag, *e[::-1]) for e in spouses
    ):
        return None
    for latent, (u, v) in enumerate(spouses, start=n):
        dag.add_edges_from([(latent, u), (latent, v)])
    return dag


def equivalent_graphs(graph: nx.DiGraph, observed: list[int]) -> Iterator[Marks]:
    """Every maximal ancestral graph over the observed nodes with exactly the independences of ``graph``."""
    n = len(observed)
    wanted = independences(graph, observed)
    edges = [pair for pair, sets in wanted.items() if not sets]
    apart = {pair: sets for pair, sets in wanted.items() if sets}
    joined = {*edges, *((v, u) for u, v in edges)}
    # Cheap first: graphs with the same independences have the same unshielded colliders.
    collides = {
        (x, z, y): not any(z in given for given in sets)
        for (x, y), sets in apart.items()
        for z in range(n)
        if (x, z) in joined and (y, z) in joined
    }
    for kinds in product(KINDS, repeat=len(edges)):
        marks: Marks = {}
        for (u, v), (at_u, at_v) in zip(edges, kinds, strict=True):
            marks[v, u], marks[u, v] = at_u, at_v
        if any((marks[x, z] == marks[y, z] == "arrow") != expected for (x, z, y), expected in collides.items()):
            continue
        dag = canonical(marks, n)
        if dag is not None and all(
            nx.is_d_separator(dag, i, j, set(given)) == (frozenset(given) in sets)
            for (i, j), sets in apart.items()
            for given in subsets(set(range(n)) - {i, j})
        ):
            yield marks


def shared(members: list[Marks]) -> Marks:
    """The marks that all members have; elsewhere a circle."""
    ends = {end: {member[end] for member in members} for end in members[0]}
    return {end: marks.pop() if len(marks) == 1 else "circle" for end, marks in ends.items()}


def marks_of(graph: nx.DiGraph) -> Marks:
    return {(u, v): data["mark"] for u, v, data in graph.edges(data=True)}


@pytest.mark.parametrize("block", range(4))
def test_200_random_graphs(block: int) -> None:
    """The exact CPDAG without latent nodes and the exact PAG with 0 to 2 of them, in both modes.

    Ordered ICD: the exact skeleton, and every mark holds in each member that respects the order.
    """
    sizes = []
    for seed in range(block, 200, 4):
        latents = seed % 3
        graph, observed = random_graph(np.random.default_rng(seed), latents=latents)
        members = list(equivalent_graphs(graph, observed))
        sizes.append(len(members))
        for stable in (True, False):
            found = marks_of(icd(DSeparation(graph, observed), stable=stable).marks.to_networkx())
            assert found == shared(members), (seed, stable)
            ordered = marks_of(ordered_icd(DSeparation(graph, observed), stable=stable).marks.to_networkx())
            # What is known beforehand: no node is a cause of an earlier one.
            respecting = shared([m for m in members if all(m[u, v] == "arrow" for u, v in m if u < v)])
            assert ordered.keys() == respecting.keys(), (seed, stable)
            assert all(mark in ("circle", respecting[end]) for end, mark in ordered.items()), (seed, stable)
            if not latents:
                dags = shared([m for m in members if not any(m[u, v] == m[v, u] for u, v in m)])
                cpdag = {end: "tail" if mark == "circle" else mark for end, mark in dags.items()}
                assert marks_of(pc(DSeparation(graph, observed), stable=stable).marks.to_networkx()) == cpdag
    assert min(sizes) >= 1
    assert max(sizes) > 5
