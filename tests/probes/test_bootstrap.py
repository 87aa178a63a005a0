"""Intervals by resampling sequences, beside scipy's bootstrap and the standard error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from causal_probe import CausalProbeError, probes
from causal_probe.probes.bootstrap import bootstrap_intervals
from tests.tiny_models import disentangled, random_tokens


@pytest.fixture(scope="module")
def scores():
    return probes.scan(disentangled(), random_tokens(60), templates=["previous-token", "duplicate-token"])


def test_it_is_scipys_percentile_bootstrap(scores):
    table = bootstrap_intervals(scores, resamples=4000)
    assert list(zip(table["layer"], table["head"], table["template"], strict=True)) == [one[:3] for one in scores]
    for row in table.to_dict("records"):
        evidence = scores.sums[row["template"]]
        rows, chances = evidence.of_layer(row["layer"])
        used = rows > 0
        each = evidence.attention[row["layer"]][used, row["head"]] / rows[used]
        chance = chances[used] / rows[used]

        def excess(scored, chances, axis=-1):
            return (scored.mean(axis) - chances.mean(axis)) / (1 - chances.mean(axis))

        options = {"method": "percentile", "n_resamples": 4000, "rng": np.random.default_rng(1)}
        for name, data, statistic in (("score", (each,), np.mean), ("excess", (each, chance), excess)):
            wanted = stats.bootstrap(data, statistic, paired=True, vectorized=True, **options).confidence_interval
            noise = 0.15 * (wanted.high - wanted.low)  # of the quantiles of 4,000 resamples
            assert row[f"{name}_low"] == pytest.approx(wanted.low, abs=noise)
            assert row[f"{name}_high"] == pytest.approx(wanted.high, abs=noise)
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]


def test_sequences_that_are_alike_leave_no_doubt():
    tokens = torch.tensor([[0, 1, 2, 0, 1, 2, 0]]).repeat(5, 1)
    table = bootstrap_intervals(probes.scan(disentangled(), tokens, templates="induction"))
    assert (table["score_high"] - table["score_low"]).max() < 1e-12


def test_what_has_no_interval(scores):
    one = probes.scan(disentangled(), random_tokens(1), templates="previous-token")
    assert bootstrap_intervals(one)["score_low"].isna().all()
    for options in ({"resamples": 10}, {"coverage": 1.0}):
        with pytest.raises(CausalProbeError, match="100 resamples or more"):
            bootstrap_intervals(scores, **options)
