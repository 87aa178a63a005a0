"""The selective transformer set by hand, against plain loops over lags and transitions."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from causal_probe import models, probes, tasks
from causal_probe.errors import CausalProbeError
from causal_probe.models.selective import EVEN, EVIDENCE
from causal_probe.models.standard import StandardTransformer
from causal_probe.tasks import GraphMixture, generator

LAGS = (1, 3, 4)
#: Another matrix than those on which the two constants of the construction were chosen.
TASK = GraphMixture.of_lags(LAGS, n_positions=64, d_vocab=5, concentration=0.3, seed=7)


@pytest.fixture(scope="module")
def model() -> models.DisentangledTransformer:
    assert TASK.matrix is not None
    return models.selective_induction(LAGS, TASK.matrix, 64)


@pytest.fixture(scope="module")
def batch() -> tasks.graph_mixture.LabelledBatch:
    return TASK.sample(150, generator(7, "selective"))


def test_every_layer_by_plain_loops() -> None:
    task = GraphMixture.of_lags((2, 3), n_positions=12, d_vocab=3, seed=3)
    P = task.matrix
    assert P is not None
    made = models.selective_induction((2, 3), P, 12, dtype=torch.float64)
    tokens = task.sample(3, generator(0, "loops")).tokens
    with torch.no_grad():
        logits, cache = made.run_with_cache(tokens)
    for n, x in enumerate(tokens.tolist()):
        likelihood = {
            s: {k: float(P[x[s - k], x[s]]) / sum(float(P[x[s - each], x[s]]) for each in (2, 3)) for k in (2, 3)}
            for s in range(4, 12)
        }
        for s, each in likelihood.items():
            # one group of positions for each residue modulo 2, though 2 and 3 differ modulo 2
            for k, p in each.items():
                assert float(cache["pattern", 0][n, s % 2, s, s - k]) == pytest.approx(p, abs=1e-9)
            assert float(cache["pattern", 0][n, 1 - s % 2, s, 0]) == pytest.approx(1, abs=1e-9)
        for t in range(6, 12):
            shares = {}
            for k in (2, 3):
                counted = [s for s in range(4, t + 1) if s != t + 1 - k]
                against = np.mean([np.exp(-EVIDENCE * likelihood[s][k]) for s in counted])
                shares[k] = 1 / (1 + np.exp(EVIDENCE * EVEN) * against)
                assert float(cache["pattern", 1][n, k - 2, t, t + 1 - k]) == pytest.approx(shares[k], abs=1e-9)
            chosen = max(shares, key=shares.__getitem__)
            if abs(shares[2] - shares[3]) > 0.1:
                assert float(cache["pattern", 2][n, 0, t, t + 1 - chosen]) == pytest.approx(1, abs=1e-6)
                said = logits[n, t].softmax(-1).numpy()
                np.testing.assert_allclose(said, P[x[t + 1 - chosen]].numpy(), atol=1e-6)


def test_its_last_head_is_selective_and_its_others_are_less_so(model: Any, batch: Any) -> None:
    found = probes.graph_selectivity(model, batch.tokens, batch.labels, TASK.graphs, shift=1, burn_in=48)
    assert found.selectivity[2][0] >= 0.999
    assert found.own[2][0] >= 0.999
    assert found.p_value[2][0] == 0.001
    assert max(*found.selectivity[0], *found.selectivity[1]) < 0.5


def test_its_loss_is_that_of_the_likeliest_lag(model: Any, batch: Any) -> None:
    with torch.no_grad():
        predictions = model(batch.tokens).double().softmax(-1)
    mine = tasks.graph_mixture.next_token_losses(predictions[:, :-1], batch.tokens[:, 1:])[:, 40:].mean()
    references = TASK.references()
    its = {
        name: float(tasks.graph_mixture.next_token_losses(references[name](batch), batch.tokens)[:, 41:].mean())
        for name in ("maximum likelihood", "in-context bigram", "lag 1")
    }
    assert float(mine) == pytest.approx(its["maximum likelihood"], abs=0.01)
    assert float(mine) < min(its["in-context bigram"], its["lag 1"]) - 0.2


def test_its_graph_is_right_for_every_lag_and_their_mean_is_not(model: Any, batch: Any) -> None:
    rows = range(48, 63)
    by_lag = probes.head_graphs(model, batch.tokens, by=[f"lag {LAGS[label]}" for label in batch.labels.tolist()])
    for lag in LAGS:
        graph = by_lag.at(f"lag {lag}").graph(2, 0)
        assert all(set(graph.pred[row]) == ({row + 1 - lag} if lag > 1 else set()) for row in rows)
    mean = probes.head_graphs(model, batch.tokens).graph(2, 0)
    assert not any(mean.pred[row] for row in rows)


def test_heads_that_do_not_select_have_none() -> None:
    """A head that looks for its own token, one at a fixed distance, and random weights; lags of which neither explains such matches."""
    task = GraphMixture.of_lags((3, 5), n_positions=40, d_vocab=5, concentration=0.3, seed=8)
    batch = task.sample(300, generator(8, "controls"))
    model = models.DisentangledTransformer(5, 40, heads=(3,))
    model.block(0, 0, query="token", key="token").diagonal().fill_(30)
    model.block(0, 1, query="position", key="position").diagonal(-1).fill_(30)
    model.A[0].data[2] = torch.randn(45, 45, generator=torch.Generator().manual_seed(1))
    found = probes.graph_selectivity(model, batch.tokens, batch.labels, task.graphs, shift=1, burn_in=20)
    for value, stderr in zip(found.selectivity[0], found.stderr[0], strict=True):
        assert abs(value) <= 3 * stderr + 1e-6
    assert found.stderr[0][0] < 0.01


def test_random_models_do_not_select_on_average() -> None:
    """The unit is the model. One random head's attention depends on the tokens, and so a little on the graph (some pass five standard errors over sequences); with
    the other sign of its query weights it would depend the other way, so that the mean over models is zero."""
    task = GraphMixture.of_lags((1, 2, 3), n_positions=24, d_vocab=5, concentration=0.3, seed=9)
    batch = task.sample(150, generator(9, "random models"))
    means = []
    for seed in range(30):
        model = StandardTransformer(5, 24, d_model=24, n_layers=2, n_heads=1, d_head=12, norm=True)
        source = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.data = torch.randn(weight.shape, generator=source) / weight.shape[-2] ** 0.5
        found = probes.graph_selectivity(
            model, batch.tokens, batch.labels, task.graphs, shift=1, burn_in=12, permutations=19
        )
        means.append(np.mean(found.selectivity))
    assert abs(np.mean(means)) < 3 * np.std(means, ddof=1) / len(means) ** 0.5
    assert np.abs(means).max() < 0.02


def test_behind_another_prefix_it_follows_the_prefix(model: Any, batch: Any) -> None:
    """Forty-eight tokens under one lag and six under another: the head still looks where the first lag's parents are."""
    spliced, tails = batch.splice(at=48)
    assert bool((spliced.labels != tails).all())
    short = spliced.tokens[:, :54]
    graphs = [graph.subgraph(range(54)) for graph in TASK.graphs]
    prefix = probes.graph_selectivity(model, short, spliced.labels, graphs, shift=1, burn_in=48)
    tail = probes.graph_selectivity(model, short, tails, graphs, shift=1, burn_in=48)
    assert prefix.selectivity[2][0] > 0.95
    assert tail.selectivity[2][0] < 0


def test_splice_takes_another_laws_tail(batch: Any) -> None:
    spliced, tails = batch.splice(at=20)
    assert torch.equal(spliced.tokens[:, :20], batch.tokens[:, :20])
    assert torch.equal(spliced.labels, batch.labels)
    given = {tuple(row): label for row, label in zip(batch.tokens[:, 20:].tolist(), batch.labels.tolist(), strict=True)}
    for row, tail in zip(spliced.tokens[:, 20:].tolist(), tails.tolist(), strict=True):
        assert given[tuple(row)] == tail
    with pytest.raises(CausalProbeError, match="`at` is 64"):
        batch.splice(at=64)
    with pytest.raises(CausalProbeError, match="two labels or more"):
        tasks.graph_mixture.LabelledBatch(batch.tokens, torch.zeros_like(batch.labels)).splice(at=20)


@pytest.mark.parametrize(
    ("lags", "matrix", "message"),
    [
        ((1,), torch.eye(3), "two or more different whole numbers"),
        ((1, 1), torch.eye(3), "two or more different whole numbers"),
        ((0, 2), torch.eye(3), "from 1 to 14"),
        ((1, 15), torch.eye(3), "from 1 to 14"),
        ((1, 2), torch.ones(3, 3), "row sums from 3 to 3"),
        ((1, 2), torch.ones(3, 2) / 2, "found the shape [3, 2]"),
        ((1, 2), torch.full((2, 2), float("nan")), "row sums"),
    ],
)
def test_bad_input(lags: Any, matrix: torch.Tensor, message: str) -> None:
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        models.selective_induction(lags, matrix, 16)
