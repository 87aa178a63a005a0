"""The lemma, measured; and how many sequences one gradient needs."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.first_gradient import gradient_graph, gradient_sample_complexity, measure_lemma
from causal_probe.tasks import InContextMarkov, generator
from causal_probe.tasks.information import information

T = 1024
FAMILIES = {
    "chain": graphs.chain(T - 1),
    "fork": graphs.from_parents([None if node % 3 == 0 else node - node % 3 for node in range(T - 1)]),
    "forest": graphs.random_forest(T - 1, seed=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_the_information_that_is_predicted(name: str) -> None:
    """On at least 95% of all pairs within two standard errors; and nowhere beyond the data-processing bound, after Bonferroni."""
    table = measure_lemma(InContextMarkov(FAMILIES[name], 3, 1.0), n_sequences=512, draws=512)
    assert len(table) == (T - 1) * (T - 2) // 2
    assert (table.z.abs() <= 2).mean() >= 0.95
    edges = table[table.edge]
    assert (edges.z.abs() <= 2).mean() >= 0.93  # 1,022 edges at most: 0.95 and its own error
    # All edges share the sequences' transitions and the drawn ones, as many of each: their mean is no more certain than one.
    assert abs(edges.measured.mean() - edges.predicted.mean()) < 4 * np.sqrt(2) * edges.predicted_stderr.mean()
    assert table.over_bound.max() < 7
    np.testing.assert_allclose(edges.chi2, edges.predicted, rtol=1e-6)


@pytest.mark.parametrize("name", ["chain", "fork", "forest", "star"])
def test_at_any_length_the_gradient_is_the_information_about_the_sequence_s_own_frequencies(name: str) -> None:
    """With them in the place of the stationary law the prediction holds at small T too, and on the star."""
    family = {
        "chain": graphs.chain(95),
        "fork": graphs.from_parents([None if node % 3 == 0 else node - node % 3 for node in range(95)]),
        "forest": graphs.random_forest(95, seed=0),
        "star": graphs.from_parents([None, *[0] * 94]),
    }
    table = measure_lemma(InContextMarkov(family[name], 3, 1.0), n_sequences=1024, draws=256)
    assert (table.z_at_this_length.abs() <= 2).mean() >= 0.93  # the 4,465 pairs share their sequences
    edges = table[table.edge]
    assert (edges.z_at_this_length.abs() <= 2).mean() >= 0.9


def test_on_a_star_the_lemma_fails_at_every_length() -> None:
    """A probe that can say no: all tokens hang on one root, the frequencies tend to pi(. | s_0), and the gradient to 0."""
    ratios = []
    for n in (16, 64, 255):
        star = measure_lemma(
            InContextMarkov(graphs.from_parents([None, *[0] * (n - 1)]), 3, 1.0), n_sequences=512, draws=256
        )
        edges = star[star.edge]
        ratios.append(edges.measured.mean() / edges.predicted.mean())
        assert abs(edges.at_this_length.mean() - edges.measured.mean()) < 0.05 * edges.predicted.mean()
    assert max(map(abs, ratios)) < 0.3
    assert abs(ratios[-1]) < 0.05


def test_h_by_plain_loops() -> None:
    task = InContextMarkov(graphs.chain(4), 3, 0.5)
    table = measure_lemma(task, n_sequences=50, draws=16)
    batch = task.sample(50, generator(0, "at this length"))
    for row in table.itertuples():
        values = []
        for tokens, pi in zip(batch.tokens.tolist(), batch.tables[1].tolist(), strict=True):
            share = [tokens.count(state) / 5 for state in range(3)]
            after = pi[tokens[row.parent]]
            values.append(
                after[tokens[row.child]] / share[tokens[row.child]]
                - sum(p for p, f in zip(after, share, strict=True) if f)
            )
        assert row.at_this_length == pytest.approx(np.mean(values), rel=1e-4, abs=1e-5)
        assert row.at_this_length_stderr == pytest.approx(np.std(values, ddof=1) / 50**0.5, rel=0.02)


def test_a_table_s_row_is_gradient_graph_s_and_information_s() -> None:
    task = InContextMarkov(graphs.chain(5), 3, 0.5)
    table = measure_lemma(task, n_sequences=64, draws=16, seed=3)
    found = gradient_graph(task.sample(64, generator(3, "gradient")), beta=1e-2)
    np.testing.assert_allclose(table.measured, found.evidence[table.child, table.parent], rtol=1e-4, atol=1e-5)
    assert table[["child", "parent"]].to_numpy().tolist() == [[c, p] for c in range(5) for p in range(c)]
    assert (table.bound + 1e-12 >= table.predicted.abs()).all()
    with pytest.raises(CausalProbeError, match="no standard error"):
        measure_lemma(task, n_sequences=1)


def test_the_measured_spread_is_over_sequences() -> None:
    task = InContextMarkov(graphs.chain(4), 3, 0.5)
    small, large = (measure_lemma(task, n_sequences=n, draws=16) for n in (1000, 16000))
    assert (small.measured_stderr / large.measured_stderr).median() == pytest.approx(4, rel=0.2)
    assert isinstance(task.graph, nx.DiGraph)
    assert information(task.graph, task.sample(2, generator(0, "x")).tables[1]).draws == 2


def test_more_sequences_recover_more_graphs_and_soft_targets_are_no_worse() -> None:
    curve = gradient_sample_complexity([64, 512, 2048], graphs=12, n_positions=10)
    by = curve.set_index(["targets", "sequences"])
    assert by.exact["soft", 2048] == 1
    assert by.exact["soft", 64] < 1
    assert by.parents["soft", 512] >= by.parents["hard", 512]
    assert ((by.low <= by.exact) & (by.exact <= by.high)).all()
    assert by.parents["hard", 2048] > by.parents["hard", 64]
    with pytest.raises(CausalProbeError, match="at least one"):
        gradient_sample_complexity([], graphs=1)
