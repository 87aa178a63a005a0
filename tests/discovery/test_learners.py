"""The learners on data: invariances, planted models, causal-learn, and the search's bookkeeping."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import networkx as nx
import numpy as np
import pytest

from causal_probe.discovery import DSeparation, FisherZ, fci, icd, ordered_icd, pc
from causal_probe.discovery import independence as engine
from causal_probe.discovery import search as bookkeeping
from causal_probe.probes.attention_correlation import attention_correlation

LEARNERS: dict[str, Any] = {"pc": pc, "icd": icd, "ordered-icd": ordered_icd}


def random_pattern(n: int, seed: int, *, causal: bool = False) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=(n, n)) * 2
    if causal:
        scores[np.triu_indices(n, 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def marks_of(learned: Any) -> dict[tuple[int, int], str]:
    return {(u, v): data["mark"] for u, v, data in learned.marks.to_networkx().edges(data=True)}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", ["pc", "icd"])
def test_the_order_of_the_tokens_plays_no_part(name: str, seed: int) -> None:
    """Relabelled tokens give the relabelled graph. Not so in the mode that follows the authors: there the order decides."""
    matrix = attention_correlation(random_pattern(12, seed)).matrix
    order = np.random.default_rng(seed).permutation(12)
    plain = marks_of(LEARNERS[name](FisherZ(matrix, samples=500)))
    moved = marks_of(LEARNERS[name](FisherZ(matrix[np.ix_(order, order)], samples=500)))
    assert {(int(order[u]), int(order[v])): mark for (u, v), mark in moved.items()} == plain


def test_without_stability_the_order_decides() -> None:
    differ = 0
    for seed in range(12):
        matrix = attention_correlation(random_pattern(12, seed)).matrix
        order = np.random.default_rng(seed).permutation(12)
        plain = marks_of(icd(FisherZ(matrix, samples=500), stable=False))
        moved = marks_of(icd(FisherZ(matrix[np.ix_(order, order)], samples=500), stable=False))
        differ += {(int(order[u]), int(order[v])): mark for (u, v), mark in moved.items()} != plain
    assert differ > 0


@pytest.mark.parametrize("name", LEARNERS)
def test_batch_size_and_dtype_play_no_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = random_pattern(12, 3, causal=name == "ordered-icd")
    found = attention_correlation(pattern)
    expected = marks_of(LEARNERS[name](FisherZ(found.matrix, samples=500, tolerance=found.tolerance)))
    single = attention_correlation(pattern.astype(np.float32))
    assert marks_of(LEARNERS[name](FisherZ(single.matrix, samples=500, tolerance=single.tolerance))) == expected
    monkeypatch.setattr(engine, "AT_ONCE", 50)
    monkeypatch.setattr(bookkeeping, "COLLECTED", 7)
    assert marks_of(LEARNERS[name](FisherZ(found.matrix, samples=500, tolerance=found.tolerance))) == expected


def planted(seed: int) -> tuple[nx.DiGraph, list[int], np.ndarray]:
    """A random linear model with latent nodes, and its attention A = (I - G)^-1 Lambda, rows normalised."""
    rng = np.random.default_rng(seed)
    n = 12
    graph = nx.empty_graph(n, create_using=nx.DiGraph)
    graph.add_edges_from((i, j) for i, j in combinations(range(n), 2) if rng.random() < 0.25)
    latent = set(rng.permutation(n - 2)[:3].tolist())
    effects = np.zeros((n, n))
    for parent, child in graph.edges:
        effects[child, parent] = rng.uniform(0.3, 1.0)
    attention = np.linalg.inv(np.eye(n) - effects) @ np.diag(rng.uniform(0.5, 1.5, n))
    return graph, [node for node in range(n) if node not in latent], attention / attention.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("block", range(4))
def test_planted_models_are_found(block: int) -> None:
    """The PAG of 100 of 100, at 10^10 samples: correlations along long paths are weak. Some have bidirected edges."""
    bidirected = 0
    for seed in range(block, 100, 4):
        graph, observed, attention = planted(seed)
        truth = marks_of(icd(DSeparation(graph, observed)))
        found = attention_correlation(attention, groups=[[node] for node in observed])
        learned = icd(FisherZ(found.matrix, samples=10**10, tolerance=found.tolerance))
        assert marks_of(learned) == truth, seed
        bidirected += any(truth[end] == truth[end[::-1]] == "arrow" for end in truth)
    assert bidirected > 2


def test_causal_learn_agrees_on_planted_models() -> None:
    """FCI and ICD are other algorithms: where the samples suffice, they find the same graph."""
    same = 0
    for seed in range(8):
        _, observed, attention = planted(seed)
        test = FisherZ(attention_correlation(attention, groups=[[node] for node in observed]).matrix, samples=200_000)
        same += marks_of(fci(test)) == marks_of(icd(test))
    assert same >= 4


def test_what_is_kept_of_the_tests() -> None:
    matrix = np.array([[1, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 1]])  # 0 - 1 - 2
    for learner in (pc, icd, ordered_icd):
        learned = learner(FisherZ(matrix, samples=1000))
        assert learned.separating == {(0, 2): (1,)}
        assert learned.evidence[0, 2].p == pytest.approx(1)
        assert learned.evidence[0, 2].given == (1,)
        assert 0 <= learned.evidence[0, 1].p <= 0.01
        assert [(count.order, count.tests) for count in learned.by_order][:2] == [
            (0, 3),
            (1, 2 if learner is ordered_icd else 3),
        ]


def test_a_search_that_would_need_too_many_tests_stops_and_says_so() -> None:
    matrix = attention_correlation(random_pattern(14, 0)).matrix
    learned = pc(FisherZ(matrix, samples=500), max_tests=200)
    assert learned.stopped == 1
    assert sum(count.tests for count in learned.by_order) <= 200
    assert pc(FisherZ(matrix, samples=500), max_order=0).stopped is None


#: Signs at v of the edges (u, v), row by row without the diagonal: - tail, > arrow, o circle, . no edge.
GOLDEN = {
    "pc": "->..... ->..... --...-- .....>. .....>> ....... ..>--.- ..>.-.>",
    "icd": "o>>.... o>..... ooo..>> o.>..>. .....>> ....... ..>>o.o ..>.o.>",
    "ordered-icd": ">>>.... o>...>. oo>..>> -.-.>>. ....>>> ...>>.. .>>>>.> ..>.>.>",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_the_authors_code_finds(name: str) -> None:
    """PC, ICD and Ordered ICD of IntelLabs' causality-lab (812235d) on one causal pattern of 8 tokens, 768 samples, alpha 0.01."""
    matrix = attention_correlation(random_pattern(8, 7, causal=True)).matrix
    found = marks_of(LEARNERS[name](FisherZ(matrix, samples=768), stable=False))
    signs = {"tail": "-", "arrow": ">", "circle": "o"}
    rows = ("".join(signs[found[u, v]] if (u, v) in found else "." for v in range(8) if u != v) for u in range(8))
    assert " ".join(rows) == GOLDEN[name]
