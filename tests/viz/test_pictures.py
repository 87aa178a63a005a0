"""What is at hand in a notebook: ``.plot()``, rows that print, the called heads in circuitsvis, graphs over components."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from scipy import stats

from causal_probe import experiments, graphs, models, probes, viz
from causal_probe.errors import CausalProbeError
from causal_probe.probes.head_scores import HeadScores
from causal_probe.results.showing import Rows


@pytest.fixture(scope="module")
def model() -> Any:
    made = models.DisentangledTransformer(d_vocab=12, n_positions=24)
    made.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    made.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)
    return made


@pytest.fixture(scope="module")
def scores(model: Any) -> HeadScores:
    return probes.scan(model, templates=["previous-token", "induction"], n_sequences=6, period=10)


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


# --------------------------------------------------------------------------------------------------------------------- plot


def test_scores_are_drawn_by_template(scores: HeadScores) -> None:
    figure = scores.plot("induction", title="mine")
    assert figure.get_suptitle() == "mine"
    excess = scores.heatmap("induction")
    assert texts(figure) == [f"{excess[layer][0]:.2f}".replace("-", "\N{MINUS SIGN}") for layer in (0, 1)]
    assert [axes.get_title() for axes in scores.plot().axes[:-1]] == [*scores.names]
    assert texts(scores.plot("induction", value="chance")) == [f"{scores.of(0, 0, 'induction').chance:.2f}"] * 2


def test_evidence_is_drawn_head_by_head(model: Any) -> None:
    tokens = probes.repeated_tokens(model, n_sequences=4, period=10).tokens
    found = probes.head_graphs(model, tokens)
    drawn = found.plot("L0H0", truth=graphs.chain(20))
    assert drawn.legends[0].get_texts()[0].get_text() == "right: 19"
    assert [axes.get_title() for axes in found.plot().axes[:2]] == ["L0H0", "L1H0"]


def test_what_there_is_no_picture_of_is_said(scores: HeadScores) -> None:
    with pytest.raises(CausalProbeError, match="'inductoin' was not scored"):
        scores.plot("inductoin")
    found = experiments.recover("chain", n_positions=5, steps=3, batch_size=32, probe_sequences=256)
    assert found.plot("training").axes[0].get_xlabel() == "training step"
    with pytest.raises(CausalProbeError, match=r"no picture 'weights' here; there is graph, training\."):
        found.plot("weights")


# --------------------------------------------------------------------------------------------------------------------- rows


def test_called_heads_print_as_a_table(scores: HeadScores) -> None:
    called = scores.called("induction")
    assert isinstance(called, tuple)
    assert called == (scores.of("L1H0", "induction"),)
    assert repr(called).splitlines()[0] == "1 row"
    assert "L1H0" in repr(called)
    assert "<td>L1H0</td>" in called._repr_html_()
    assert repr(scores.called("induction", minimum=2)) == "no rows"


def test_of_a_template_or_of_a_head(scores: HeadScores) -> None:
    assert scores.of("induction") == scores.top("induction", 2)
    assert [row.template for row in scores.of("L1H0")] == ["previous-token", "induction"]
    assert scores.of(1, 0) == scores.of("L1H0")
    assert scores.of("induction").to_pandas()["score"].is_monotonic_decreasing
    with pytest.raises(CausalProbeError, match="'inductoin' was not scored"):
        scores.of("inductoin")


def test_rows_show_estimates_as_they_are_reported(model: Any, scores: HeadScores) -> None:
    verified = probes.verify(scores, model, period=10, n_sequences=4, random_sets=2).called("causal")
    assert isinstance(verified, Rows)
    assert all("±" in line for line in repr(verified).splitlines()[2:])


def test_intervals_and_p_values_of_a_scan() -> None:
    noisy = models.DisentangledTransformer(d_vocab=12, n_positions=24)
    generator = torch.Generator().manual_seed(0)
    for parameter in noisy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    scores = probes.scan(noisy, templates=["previous-token", "induction"], n_sequences=6, period=10)
    for row in scores.to_pandas().itertuples():
        sums = scores.sums[row.template]
        rows, chances = sums.of_layer(row.layer)
        each, chance = sums.attention[row.layer][:, row.head] / rows, chances / rows
        # With the same chance in every sequence the excess is a mean over sequences, and scipy's own test is the reference.
        assert np.ptp(chance) < 1e-9
        excess = (each - row.chance) / (1 - row.chance)
        test = stats.ttest_1samp(excess, 0, alternative="greater")
        interval = stats.ttest_1samp(excess, 0).confidence_interval(0.95)
        assert (row.excess_low, row.excess_high) == pytest.approx((interval.low, interval.high), abs=1e-6)
        assert row.p_value == pytest.approx(test.pvalue, abs=1e-6)


def test_intervals_of_evidence(model: Any) -> None:
    tokens = torch.randint(12, (5, 24), generator=torch.Generator().manual_seed(0))
    found = probes.head_graphs(model, tokens).to_pandas()
    reach = stats.t.ppf(0.975, 4) * found["stderr"]
    np.testing.assert_allclose(found["high"] - found["low"], 2 * reach, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------------ circuitsvis


def test_called_heads_in_circuitsvis(model: Any, scores: HeadScores) -> None:
    widget = scores.plot(model=model)
    assert widget.props["attentionHeadNames"] == ["L0H0", "L1H0"]
    assert [note.name for note in widget.heads] == ["L0H0", "L1H0"]
    assert [*widget.scores] == ["previous-token", "induction"]
    tokens = torch.arange(12).repeat(2)
    _, cache = model.run_with_cache(tokens[None])
    alone = scores.plot("induction", model=model, tokens=tokens)
    assert alone.props["attentionHeadNames"] == ["L1H0"]
    np.testing.assert_allclose(alone.props["attention"][0], cache["pattern", 1][0, 0], atol=1e-3)
    assert (
        str(alone) == repr(alone) == "<AttentionHeads: 1 head, 24 tokens; a notebook shows it, local_src is its HTML>"
    )


def test_no_called_head_and_two_sequences_are_said(model: Any, scores: HeadScores) -> None:
    still = probes.scan(
        models.DisentangledTransformer(d_vocab=12, n_positions=24), templates="induction", n_sequences=4
    )
    with pytest.raises(CausalProbeError, match="No head is called"):
        still.plot(model=model)
    with pytest.raises(CausalProbeError, match=r"found \[2, 12\]"):
        scores.plot(model=model, tokens=torch.zeros(2, 12, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------- graphs of components


def test_components_stand_by_layer() -> None:
    drawn = viz.graph(nx.DiGraph([("L2H3", "L10H0"), ("L2H11", "L2.mlp"), ("embed", "L2H3"), ("L2.mlp", "L10H0")]))
    assert texts(drawn) == ["embed", "L2H3", "L2H11", "L2.mlp", "L10H0"]
    assert texts(viz.graph(nx.DiGraph([("token", "L2H0"), ("L2H0.token", "L10H0")]))) == [
        "token",
        "L2H0",
        "L2H0.token",
        "L10H0",
    ]
    with pytest.raises(CausalProbeError, match=r"run back: .*L10H0.*L2H3"):
        viz.graph(nx.DiGraph([("L10H0", "L2H3")]))


def test_what_is_no_component_keeps_its_order() -> None:
    assert texts(viz.graph(nx.DiGraph([("L10H0", "loss")]))) == ["L10H0", "loss"]
