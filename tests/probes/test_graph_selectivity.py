"""Heads that follow each sequence's graph, told from heads that don't."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from scipy import stats
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.probes import graph_selectivity, head_graphs
from causal_probe.tasks import GraphMixture, generator

LAGS = (1, 2, 4)
T, BURN_IN = 56, 40
TASK = GraphMixture.of_lags(LAGS, T + 1, 5, concentration=0.3)


class Looks(HookedRootModule):
    """One layer without weights, whose heads' patterns are functions of the tokens."""

    def __init__(self, *heads: Any) -> None:
        super().__init__()
        self.looks = heads
        self.cfg = SimpleNamespace(
            n_layers=1,
            n_heads=len(heads),
            d_vocab=5,
            n_ctx=T + 1,
            device="cpu",
            dtype=torch.float64,
            model_name="looks",
        )
        self.blocks = torch.nn.ModuleList([torch.nn.Module()])
        self.blocks[0].attn = torch.nn.Module()  # type: ignore[union-attr]
        self.blocks[0].attn.hook_pattern = HookPoint()  # type: ignore[union-attr]
        self.setup()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        pattern: torch.Tensor = self.blocks[0].attn.hook_pattern(torch.stack([look(tokens) for look in self.looks], 1))  # type: ignore[union-attr, operator]
        return pattern


def selects(tokens: torch.Tensor) -> torch.Tensor:
    """Row t looks at the parent of token t + 1, lag by lag as likely as the tokens up to t say (a selective induction head)."""
    posterior = TASK.posterior(torch.nn.functional.pad(tokens, (0, 1)))[..., 1:]  # [batch, lag, t]: given tokens 0..t
    return sum(
        (at_lag(lag - 1)(tokens) * posterior[:, i, :, None] for i, lag in enumerate(LAGS)),
        torch.zeros(len(tokens), T, T),
    )


def at_lag(back: int) -> Any:
    def look(tokens: torch.Tensor) -> torch.Tensor:
        row = torch.arange(T)
        pattern = torch.zeros(T, T, dtype=torch.float64)
        pattern[row, (row - back).clamp_min(0)] = 1
        return pattern.expand(len(tokens), T, T)

    return look


def noise(tokens: torch.Tensor) -> torch.Tensor:
    """Random scores that depend on the tokens, and not on the lag."""
    table = torch.randn(T, T, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scores = table + 0 * tokens[:, :1, None]
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    batch = TASK.sample(240, generator(0, "selectivity"))
    return batch.tokens[:, :T], batch.labels


def test_a_head_that_selects_and_heads_that_do_not(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, labels = drawn
    model = Looks(selects, at_lag(1), noise)
    found = graph_selectivity(model, tokens, labels, TASK.graphs, shift=1, burn_in=BURN_IN)
    selective, fixed, random = found.selectivity[0]
    assert selective >= 0.999
    assert found.own[0][0] >= 0.999
    assert found.p_value[0] == (0.001, 1.0, 1.0)
    assert fixed == pytest.approx(0, abs=1e-12)
    assert random == pytest.approx(0, abs=1e-12)
    assert repr(found).splitlines()[2].split()[0] == "L0H0"


def test_it_is_the_mean_over_pairs_by_plain_loops(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, labels = (each[:40] for each in drawn)
    model = Looks(selects, noise)
    found = graph_selectivity(model, tokens, labels, dict(zip("abc", TASK.graphs, strict=True)), shift=1, burn_in=6)
    pattern = model(tokens).numpy()
    for head in range(2):
        pairs, own = [], []
        for g, o in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]:
            edges = [(c - 1, p) for p, c in set(TASK.graphs[g].edges) - set(TASK.graphs[o].edges) if 6 <= c - 1 < T]
            its = [np.mean([pattern[n, head, row, key] for row, key in edges]) for n in range(40)]
            means = [np.mean([its[n] for n in range(40) if labels[n] == label]) for label in (g, o)]
            pairs.append(means[0] - means[1])
            own.append(means[0])
        assert found.selectivity[0][head] == pytest.approx(np.mean(pairs), abs=1e-9)
        assert found.own[0][head] == pytest.approx(np.mean(own), abs=1e-9)
    assert found.names == ("a", "b", "c")


def test_what_a_head_follows_by_plain_loops_and_its_picture(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, labels = (each[:40] for each in drawn)
    model = Looks(noise, selects)
    found = graph_selectivity(model, tokens, labels, dict(zip("abc", TASK.graphs, strict=True)), shift=1, batch_size=7)
    assert found.best == "L0H1"
    assert found.rows == tuple(range(3, T))  # token 4 is the first that every lag gives a parent
    pattern = model(tokens).numpy()
    for head in range(2):
        for label in range(3):
            for other, lag in enumerate(LAGS):
                its = [
                    [pattern[n, head, row, row + 1 - lag] for row in found.rows]
                    for n in range(40)
                    if labels[n] == label
                ]
                np.testing.assert_allclose(found.of(0, head)[label, other], np.mean(its, 0), atol=1e-9)
    figure = found.plot()
    assert [axes.get_title() for axes in figure.axes] == [
        "sequences of a",
        "sequences of b",
        "sequences of c",
        "all sequences",
    ]
    np.testing.assert_allclose(figure.axes[1].lines[1].get_ydata(), found.of("L0H1")[1, 1])
    np.testing.assert_allclose(
        figure.axes[3].lines[0].get_ydata(), pattern[:, 1, range(3, T), range(3, T)].mean(0), atol=1e-9
    )
    with pytest.raises(CausalProbeError, match="no head L0H2"):
        found.plot("L0H2")


def test_graphs_that_cant_be_laid_side_by_side() -> None:
    forests = [graphs.from_parents([None, 0, None, 2]), graphs.from_parents([None, None, 0, None])]
    task = GraphMixture(forests, 3)
    batch = task.sample(20, generator(0, "apart"))
    model = Looks(lambda tokens: at_lag(0)(tokens)[:, :4, :4])
    found = graph_selectivity(model, batch.tokens, batch.labels, task.graphs)
    with pytest.raises(CausalProbeError, match="In no row"):
        found.plot()


def test_p_values_are_uniform_where_labels_say_nothing() -> None:
    """Heads that follow the tokens, and labels that were drawn apart from them: 200 data sets."""
    batch = TASK.sample(200 * 24, generator(1, "null"))
    labels = torch.arange(24) % 3
    model = Looks(selects)
    values = [
        graph_selectivity(model, part[:, :T], labels, TASK.graphs, shift=1, burn_in=8, permutations=99).p_value[0][0]
        for part in batch.tokens.split(24)
    ]
    assert stats.kstest(np.array(values) - 0.005, "uniform").pvalue > 0.01
    assert np.mean(np.array(values) <= 0.05) < 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_the_standard_error_is_the_spread_over_data_sets() -> None:
    batch = TASK.sample(60 * 45, generator(2, "spread"))
    model = Looks(selects)
    made = []
    for tokens, labels in zip(batch.tokens.split(45), batch.labels.split(45), strict=True):
        if np.bincount(labels, minlength=3).min() >= 2:
            found = graph_selectivity(model, tokens[:, :T], labels, TASK.graphs, shift=1, burn_in=4, permutations=19)
            made.append((found.selectivity[0][0], found.stderr[0][0]))
    values, errors = np.array(made).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(ddof=1), rel=0.3)


def test_graphs_by_group_of_sequences_and_what_their_mean_hides(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, labels = drawn
    model = Looks(selects)
    found = head_graphs(model, tokens, by=[f"lag {LAGS[label]}" for label in labels.tolist()])
    assert found.labels == ("lag 1", "lag 2", "lag 4")
    assert sum(found.n_by_label) == len(tokens)
    rows = range(BURN_IN, T)
    for label, lag in enumerate(LAGS):
        alone = head_graphs(model, tokens[labels == label])
        np.testing.assert_array_equal(found.at(f"lag {lag}").values[0], alone.values[0])
        graph = alone.graph(0, 0)
        assert all(
            set(graph.pred[row]) == ({row + 1 - lag} if lag > 1 else set()) for row in rows
        )  # lag 1: the row itself
    mean = head_graphs(model, tokens)
    assert not any(mean.graph(0, 0).pred[row] for row in rows)  # no lag has half of the attention


@pytest.mark.parametrize(
    ("by", "options", "message"),
    [
        ([0.5] * 240, {}, "found float64"),
        ([0] * 9, {}, "one label for each of 240 sequences"),
        ([0] * 240, {"per": "sequence"}, "per='sequence'"),
    ],
)
def test_bad_groups(drawn: tuple[torch.Tensor, torch.Tensor], by: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        head_graphs(Looks(selects), drawn[0], by=by, **options)


def test_it_is_saved_and_cited(drawn: tuple[torch.Tensor, torch.Tensor], tmp_path: Any) -> None:
    found = graph_selectivity(Looks(selects), *(each[:30] for each in drawn), TASK.graphs, shift=1)
    found.save(tmp_path / "found.safetensors")
    again = type(found).load(tmp_path / "found.safetensors")
    assert again.to_dict() == found.to_dict()
    np.testing.assert_array_equal(again.of(), found.of())
    assert "dangelo2025" in found.cite().bibtex


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(30)}, "found float32 of shape [30]"),
        ({"labels": torch.zeros(29, dtype=torch.long)}, "one for each of 30 sequences"),
        ({"labels": torch.full((30,), 3)}, "there are 3 graphs, and labels from 3 to 3"),
        ({"labels": torch.zeros(30, dtype=torch.long)}, "graph 1 (0), graph 2 (0)"),
        ({"graphs": TASK.graphs[:1]}, "there are 1 graphs"),
        ({"graphs": [graphs.chain(9), graphs.chain(9), graphs.lag(9, k=2)]}, "graph 0 has no parent that graph 1 lacks"),
        ({"graphs": [nx.DiGraph([(1, 0)])] * 3}, "1 -> 0"),
        ({"burn_in": T}, "nothing tells them apart there"),
        ({"shift": -1}, "`shift` is -1. It must be a whole number of at least 0"),
        ({"permutations": 3}, "`permutations` is 3. It must be a whole number of at least 19"),
        ({"tokens": [[1, 2]]}, "one for each of 1 sequences"),
    ],
)  # fmt: skip
def test_bad_input(drawn: tuple[torch.Tensor, torch.Tensor], change: dict[str, Any], message: str) -> None:
    given = {"tokens": drawn[0][:30], "labels": torch.arange(30) % 3, "graphs": TASK.graphs} | change
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        graph_selectivity(Looks(selects), given.pop("tokens"), given.pop("labels"), given.pop("graphs"), **given)
