"""The graph from one gradient: exact where it can be, silent where it can't, and equal to autograd's gradient."""

from __future__ import annotations

import itertools
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.first_gradient import gradient_graph, gradient_graphs
from causal_probe.first_gradient.result import GradientGraph
from causal_probe.first_gradient.stream import GradientStream, blocks_stderr
from causal_probe.models import ReducedTransformer
from causal_probe.tasks import Batch, InContextMarkov, generator
from causal_probe.tasks.randomness import numpy_generator
from causal_probe.tasks.root_test import log_bets


def forest(seed: int, n: int = 19, *, d_vocab: int = 3, concentration: float = 0.1) -> InContextMarkov:
    drawn = graphs.random_forest(n, root_probability=0.5, seed=numpy_generator(seed, "graph"))
    return InContextMarkov(drawn, d_vocab, concentration)


def sample(task: InContextMarkov, n: int, seed: int = 0) -> Batch:
    return task.sample(n, generator(seed, "gradient"))


def test_forty_forests_are_read_exactly_edges_and_roots() -> None:
    """The first of the thousand of ``tests/benchmarks/bench_gradient.py``."""
    tasks = [forest(seed) for seed in range(40)]
    found = gradient_graphs(tasks, [generator(seed, "gradient") for seed in range(40)])
    assert [its.compare(task.graph).exact for its, task in zip(found, tasks, strict=True)] == [True] * 40
    assert all(its.status == "edges" and its.n_sequences == 1024 for its in found)
    assert max(its.stable_after for its in found) < 1024


def test_side_by_side_is_as_one_by_one() -> None:
    tasks = [forest(seed) for seed in range(3)]
    together = gradient_graphs(tasks, [generator(seed, "gradient") for seed in range(3)], n_sequences=500)
    for seed, (task, its) in enumerate(zip(tasks, together, strict=True)):
        alone = gradient_graph(sample(task, 500, seed))
        np.testing.assert_allclose(its.evidence, alone.evidence, rtol=1e-5, atol=1e-5)
        assert its.log_e_values is not None
        assert alone.log_e_values is not None
        np.testing.assert_allclose(its.log_e_values, alone.log_e_values, rtol=1e-6)
        assert (its.parents, its.stable_after) == (alone.parents, alone.stable_after)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_evidence_is_the_reduced_transformer_s_gradient(beta: float) -> None:
    task = forest(0, 7)
    batches = [sample(task, 37, seed) for seed in range(3)]
    model = ReducedTransformer(3, 8, beta=beta, dtype=torch.float64)
    patterns = []

    def keep(pattern: torch.Tensor, hook: object) -> None:
        pattern.retain_grad()
        patterns.append(pattern)

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", keep)]):
        for batch in batches:
            model.loss(batch.tokens, batch.target.double()).sum().backward()
    gradient = -sum(pattern.grad.sum((0, 1)) for pattern in patterns if pattern.grad is not None) / 111
    found = gradient_graph(batches, beta=beta)
    np.testing.assert_allclose(found.evidence, np.tril(gradient[:7, :7] * 3 * 8 / beta), rtol=1e-4, atol=1e-4)
    assert model.A1.grad is not None
    by_scores = -model.A1.grad[:7, :7].numpy() / 111 * 3 * 8 / beta * np.arange(1, 8)[:, None]
    assert np.diff(by_scores[5, :6]) == pytest.approx(np.diff(found.evidence[5, :6]), abs=1e-4)


def test_batches_may_be_cut_anywhere() -> None:
    whole = sample(forest(1), 700)
    cuts = [0, 3, 100, 101, 640, 700]
    parts = [
        Batch(whole.tokens[a:b], whole.target[a:b], {1: whole.tables[1][a:b]}) for a, b in itertools.pairwise(cuts)
    ]
    one, several = gradient_graph(whole), gradient_graph(iter(parts))
    assert one.n_sequences == several.n_sequences == 700
    np.testing.assert_allclose(one.evidence, several.evidence, rtol=1e-5, atol=1e-5)
    assert one.graph.edges == several.graph.edges


def test_the_bets_are_on_what_led_before() -> None:
    """By hand: nothing on the first 16 sequences, then each block on the parents that led in all before it."""
    task = forest(2, 5)
    batch = sample(task, 64)
    expected, against = torch.zeros(6, dtype=torch.float64), np.zeros((6, 6))
    for start in range(16, 64, 16):
        before = gradient_graph(Batch(batch.tokens[:start], batch.target[:start], {1: batch.tables[1][:start]}))
        led = torch.tensor([-1 if parent is None else parent for parent in before.candidates] + [0])
        piece = slice(start, start + 16)
        expected += log_bets(batch.tokens[piece], batch.tables[1][piece], led.expand(16, -1)).sum(0)
        for sequence, pi in zip(batch.tokens[piece].tolist(), batch.tables[1][piece].tolist(), strict=True):
            for child, bet in enumerate(led.tolist()):
                for rival in range(child):
                    ratio = pi[sequence[bet]][sequence[child]] / max(2**-20, pi[sequence[rival]][sequence[child]])
                    against[child, rival] += np.log((1 + ratio) / 2) if bet >= 0 else 0
    found = gradient_graph(batch)
    assert found.log_e_values is not None
    np.testing.assert_allclose(found.log_e_values, expected[:5], atol=1e-9)
    assert found.log_e_rivals is not None
    np.testing.assert_allclose(found.log_e_rivals, np.tril(against[:5, :5], -1), atol=1e-4)


def test_standard_errors_are_those_of_blocks_and_cover() -> None:
    stream = GradientStream(1, 3, scale=2.0)
    values = torch.randn(1, 1000, 3, generator=torch.Generator().manual_seed(0))
    for piece in stream.pieces(1000):
        stream.add(values[:, piece], torch.ones_like(values[:, piece]))
    means, sizes = stream.block_means()
    assert sizes.tolist() == [32.0] * 31 + [8.0]
    np.testing.assert_allclose((means * sizes[None, :, None, None]).sum(1) / 1000, stream.mean, atol=1e-5)
    error = stream.stderr()
    assert error is not None
    assert error[0, 2, 1].item() == pytest.approx(2 / np.sqrt(1000), rel=0.35)
    equal = torch.tensor([[1.0, 2.0, 6.0]])[..., None]
    by_hand = np.std([1, 2, 6], ddof=1) / np.sqrt(3)
    assert blocks_stderr(equal, torch.ones(3)).item() == pytest.approx(by_hand)  # type: ignore[union-attr]


@pytest.mark.parametrize("sizes", [[16, 1], [16, 15], [16, 16, 16, 3], [8, 8, 8, 8]])
def test_the_squared_standard_error_is_unbiased_whatever_the_last_block_holds(sizes: list[int]) -> None:
    """Means of blocks of independent numbers of variance 1: the mean of all N has the variance 1 / N."""
    held = torch.tensor(sizes, dtype=torch.float64)
    draws = 40_000
    means = torch.randn(1, len(sizes), draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = blocks_stderr(means / held.sqrt()[:, None], held)
    assert error is not None
    squared = error.square() * held.sum()
    assert squared.mean().item() == pytest.approx(1, abs=5 * squared.std().item() / draws**0.5)


# ---------------------------------------------------------------------------------------------------------- saying no


def test_an_all_roots_graph_has_no_edges() -> None:
    task = InContextMarkov(graphs.from_parents([None] * 19), 3, 0.1)
    found = gradient_graph(sample(task, 4096))
    assert found.status == "no edges"
    assert found.graph.number_of_edges() == 0
    assert found.compare(task.graph).exact


@pytest.mark.parametrize("graph", [graphs.from_parents([None] * 19), graphs.chain(19)], ids=["roots", "chain"])
def test_too_little_signal_is_insufficient_not_no_edges(graph: nx.DiGraph) -> None:
    found = gradient_graph(sample(InContextMarkov(graph, 3, 100.0), 1024))
    assert found.status == "insufficient"
    assert found.edge_value is not None
    assert found.detection_limit is not None
    assert found.edge_value < found.detection_limit
    assert "insufficient" in repr(found)


def test_what_is_left_holds_the_truth_at_its_level() -> None:
    """Where most nodes are not decided (little signal), at level 0.2: the truth of some node is given up on a fifth of the graphs at most."""
    tasks = [forest(seed, 7, concentration=3.0) for seed in range(200)]
    found = gradient_graphs(tasks, [generator(seed, "gradient") for seed in range(200)], n_sequences=1024, level=0.2)
    held, several, wrong = 0, 0, 0
    for its, task in zip(found, tasks, strict=True):
        assert its.left is not None
        truth = [parents[0] if parents else None for parents in task.parents[:7]]
        held += all(parent in left for parent, left in zip(truth, its.left, strict=True))
        wrong += any(parent not in (None, true) for parent, true in zip(its.parents, truth, strict=True))
        several += sum(its.to_pandas()["decision"] == "child")
    assert held >= 200 * 0.8 - 3 * np.sqrt(200 * 0.8 * 0.2)
    assert several > 0
    assert 200 - held >= wrong


def test_a_child_whose_parent_did_not_lead_is_not_called_a_root() -> None:
    """At alpha = 10 another node than the parent leads now and then: then bets on it lose, which is no sign of a root."""
    tasks = [forest(seed, 7, concentration=10.0) for seed in range(12)]
    found = gradient_graphs(tasks, [generator(seed, "gradient") for seed in range(12)], n_sequences=2**15)
    undecided, roots = 0, 0
    for its, task in zip(found, tasks, strict=True):
        assert its.left is not None
        for child in range(1, 7):
            truth = task.parents[child][0] if task.parents[child] else None
            assert truth in its.left[child]
            undecided += child in its.undecided
            roots += its.left[child] == (None,)
        assert its.status == ("insufficient" if its.undecided else "edges" if its.graph.edges else "no edges")
    assert undecided > 0
    assert roots > 10


def test_where_there_is_hardly_any_signal_no_edge_is_claimed_for_another() -> None:
    """That a node is no root doesn't say which node is its parent: the leading one is mostly wrong here."""
    graph = graphs.chain(19)
    found = gradient_graph(sample(InContextMarkov(graph, 3, 100.0), 2**14))
    assert sum(candidate == child - 1 for child, candidate in enumerate(found.candidates) if child) < 9
    assert all(graph.has_edge(*edge) for edge in found.graph.edges)
    assert found.status == "insufficient"
    assert len(found.undecided) + found.graph.number_of_edges() == 18
    assert f"{len(found.undecided)} nodes not decided" in repr(found)
    assert found.left is not None
    assert all(child - 1 in left for child, left in enumerate(found.left) if child)


@pytest.mark.parametrize("graph", [graphs.from_parents([None] * 9), graphs.chain(9)], ids=["roots", "chain"])
def test_near_deterministic_rows_are_worked_with(graph: nx.DiGraph) -> None:
    found = gradient_graph(sample(InContextMarkov(graph, 3, 1e-3), 2**13))
    assert found.status == ("edges" if graph.number_of_edges() else "no edges")
    assert found.compare(graph).root_accuracy == 1
    assert np.isfinite(found.evidence).all()


def test_a_handful_of_sequences_is_insufficient() -> None:
    for n in (1, 16, 20):
        assert gradient_graph(sample(InContextMarkov(graphs.from_parents([None] * 9), 3), n)).status == "insufficient"


@pytest.mark.parametrize(("d_vocab", "n"), [(2, 19), (3, 2), (10, 6)])
def test_other_shapes(d_vocab: int, n: int) -> None:
    task = InContextMarkov(graphs.chain(n), d_vocab, 0.1)
    assert gradient_graph(sample(task, 4096)).compare(task.graph).exact


# ---------------------------------------------------------------------------------------------------- tokens of your own


def hard(task: InContextMarkov, n: int) -> torch.Tensor:
    batch = task.sample(n, generator(0, "hard"), targets="hard")
    return torch.cat([batch.tokens, batch.target.argmax(-1, keepdim=True)], 1)


def test_own_tokens_give_parents_with_margins_and_no_roots() -> None:
    task = forest(0)
    found = gradient_graph(hard(task, 2**15))
    assert found.status == "undecided"
    assert not found.decided
    assert found.log_e_values is None
    assert found.edge_value is found.detection_limit is None
    assert all(found.candidates[child] == its[0] for child, its in enumerate(task.parents[:19]) if its)
    assert found.graph.number_of_edges() == 18  # roots have candidates too, and nothing says which they are
    for margin, error in zip(found.margin[2:], found.margin_stderr[2:], strict=True):
        assert margin is not None
        assert error is not None
        assert margin >= 0 < error
    assert "roots are not decided" in repr(found)


def test_own_tokens_are_the_task_s_with_its_transitions_forgotten() -> None:
    task = forest(0)
    batch = task.sample(300, generator(0, "hard"), targets="hard")
    tokens = torch.cat([batch.tokens, batch.target.argmax(-1, keepdim=True)], 1)
    np.testing.assert_allclose(gradient_graph(tokens, d_vocab=3).evidence, gradient_graph(batch).evidence, rtol=1e-6)


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "no sequences"),
        (torch.zeros(0, 5, dtype=torch.long), "no sequences"),
        (torch.zeros(4, 5), "whole numbers"),
        (torch.zeros(4, dtype=torch.long), "whole numbers of the shape"),
        (torch.full((4, 5), -1), "Token -1 is outside"),
        (torch.zeros(4, 3, dtype=torch.long), "T must be at least 3"),
        ([torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, 6, dtype=torch.long)], "lengths 4 and 5"),
        ([torch.zeros(4, 5, dtype=torch.long), torch.full((4, 5), 7)], "Token 7 is outside"),
        ([sample(forest(0, 4), 4), torch.zeros(4, 6, dtype=torch.long)], "can't be mixed"),
    ],
)
def test_bad_batches_are_refused(batches: object, says: str) -> None:
    with pytest.raises(CausalProbeError, match=says):
        gradient_graph(batches)


def test_bad_arguments_are_refused() -> None:
    task = forest(0, 4)
    with pytest.raises(CausalProbeError, match="T must be at least 3"):
        gradient_graph(sample(InContextMarkov(graphs.chain(1), 3), 8))
    with pytest.raises(CausalProbeError, match="beta"):
        gradient_graph(sample(task, 8), beta=0)
    with pytest.raises(CausalProbeError, match="level"):
        gradient_graph(sample(task, 8), level=1)
    two = InContextMarkov(graphs.two_parent_tree(6), 3)
    with pytest.raises(CausalProbeError, match="gradient_slots"):
        gradient_graph(sample(two, 8))
    huge = torch.zeros(20, 6, dtype=torch.long)
    with pytest.raises(CausalProbeError, match="at most 268 sequences"):
        gradient_graph(torch.zeros(300, 6, dtype=torch.long), d_vocab=1_000_000)
    huge[3, 5] = 2**30
    with pytest.raises(CausalProbeError, match="Number the states that occur from 0 on"):
        gradient_graph(huge)
    with pytest.raises(CausalProbeError, match="batches over 3 and over 4 states"):
        gradient_graph([sample(task, 8), sample(InContextMarkov(task.graph, 4), 8)])
    with pytest.raises(CausalProbeError, match="share T and d_vocab"):
        gradient_graphs([task, forest(0, 5)], [generator(0, "x")] * 2)
    with pytest.raises(CausalProbeError, match="as many generators"):
        gradient_graphs([task], [])


# --------------------------------------------------------------------------------------------------------- the result


@pytest.fixture(scope="module")
def found() -> GradientGraph:
    return gradient_graph(sample(forest(0), 2048))


def test_it_prints_and_shows_every_node(found: GradientGraph) -> None:
    assert len(found.to_pandas()) == 18
    assert set(found.to_pandas()["decision"]) == {"edge", "root"}
    assert "2,048 sequences" in repr(found)
    assert "<table" in found._repr_html_()
    assert "nichani2024" in found.cite().bibtex


def test_it_is_saved_and_comes_back(found: GradientGraph, tmp_path: Path) -> None:
    own = gradient_graph(torch.randint(3, (40, 6), generator=generator(0, "own")))
    for result in (found, own):
        result.save(tmp_path / "a.safetensors")
        again = GradientGraph.load(tmp_path / "a.safetensors")
        assert again.to_dict() == result.to_dict()
        assert again.to_dict()["edges"] == [list(edge) for edge in result.graph.edges]
        assert repr(again) == repr(result)
        np.testing.assert_array_equal(again.evidence, result.evidence)
        assert list(again.graph.edges(data=True)) == list(result.graph.edges(data=True))
