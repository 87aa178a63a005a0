"""Change-points against brute force and made series, and the order of the stages along a run."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from causal_probe import graphs, training
from causal_probe.errors import CausalProbeError
from causal_probe.mechanisms import Watch
from causal_probe.mechanisms.dynamics import change_point, dynamics
from causal_probe.models import DisentangledTransformer, hand_set
from causal_probe.tasks import InContextMarkov

TASK = InContextMarkov(graphs.chain(7), 3, concentration=0.1)
TOKENS = TASK.sample(256, torch.Generator().manual_seed(5)).tokens


@pytest.mark.parametrize("switch", [3, 11, 17])
def test_a_switch_between_models_is_found(switch: int) -> None:
    """A hand-made sequence of models: zeros, then the construction, each with noise on its weights."""
    watch, generator = Watch(TASK, TOKENS), torch.Generator().manual_seed(switch)
    for time in range(20):
        model = (
            hand_set(TASK.graph, 3, graph_scale=8, match_scale=8) if time >= switch else DisentangledTransformer(3, 8)
        )
        model = copy.deepcopy(model)
        for A in model.A:
            A.data += 0.3 * torch.randn(A.shape, generator=generator)
        watch(10 * time, model)
    found = watch.dynamics()
    for name in ("layer 0: parents", "layer 1: matches", "edge 2 -> 3"):
        change = found.changes[name]
        assert change is not None
        assert abs(change.step - 10 * switch) <= 10  # within one checkpoint
        assert change.low <= 10 * switch <= change.high
        assert change.explained > 0.8


def test_the_interval_covers_and_widens_with_the_noise() -> None:
    """Steps with independent noise, which the interval is made for: it covers at least as often as it says, sampling error apart."""
    generator = np.random.default_rng(0)
    widths = []
    for noise in (0.3, 1.0):
        covered, width = 0, 0
        for _ in range(200):
            values = np.where(np.arange(40) >= 15, 1.0, 0.0) + noise * generator.normal(size=40)
            change = change_point(range(40), values.tolist())
            assert change is not None
            covered += change.low <= 15 <= change.high
            width += change.high - change.low
        assert covered >= 0.92 * 200
        widths.append(width / 200)
    assert widths[0] < 1.5 < widths[1]


def test_the_split_is_the_best_of_all() -> None:
    values = np.random.default_rng(1).normal(size=12).cumsum()
    steps = list(range(0, 24, 2))
    best = min(range(1, 12), key=lambda k: values[:k].var() * k + values[k:].var() * (12 - k))
    change = change_point(steps, values.tolist())
    assert change is not None
    assert change.step == steps[best]
    assert (change.before, change.after) == pytest.approx((values[:best].mean(), values[best:].mean()))
    assert change.low <= change.step <= change.high


def test_a_line_has_no_clear_switch() -> None:
    change = change_point(range(41), np.linspace(0, 1, 41).tolist())
    assert change is not None
    assert change.explained == pytest.approx(0.75, abs=0.01)
    assert change.high - change.low >= 4


def test_what_never_moves_has_no_change_point() -> None:
    found = dynamics(range(5), {"still": [1.0] * 5, "moves": [0.0, 0, 0, 1, 1]})
    assert found.changes["still"] is None
    assert found.order == ("moves",)
    assert found.to_dict()["undefined"] == {"changes.still": "all values are equal"}
    assert len(found.to_pandas()) == 2


def test_stage_1_comes_before_stage_2() -> None:
    watch, model = Watch(TASK, TOKENS), DisentangledTransformer(3, 8)
    training.give_matcher(model)
    stages = training.staged(n_positions=8, graph_batch_size=512, steps=40, batch_size=128)
    calls: list[int] = []

    def probe(step: int, model: DisentangledTransformer) -> None:
        calls.append(step)
        watch(step, model)

    training.fit(model, TASK, stages, generator=torch.Generator().manual_seed(0), probe=probe, probe_every=2)
    assert calls == list(range(0, 61, 2))
    found = watch.dynamics()
    parents, matches = (found.changes[name] for name in ("layer 0: parents", "layer 1: matches"))
    assert parents is not None
    assert matches is not None
    assert parents.high < matches.low
    assert found.order.index("layer 0: parents") < found.order.index("layer 1: matches")
    assert len(found.series) == 2 + 6
    assert found.figure().axes[0].get_xlabel() == "training step"
    assert "edge 0 -> 1" in repr(found)


@pytest.mark.parametrize(
    ("steps", "values"), [([0, 1, 2], [0.0, 1, 1]), ([0, 1, 2, 3], [0.0, 1, 1]), ([0, 1, 1, 2], [0.0, 1, 1, 1])]
)
def test_bad_series(steps: list[int], values: list[float]) -> None:
    with pytest.raises(CausalProbeError, match="four finite values or more at ascending steps"):
        change_point(steps, values)


def test_nothing_to_watch() -> None:
    with pytest.raises(CausalProbeError, match="no edge to be watched"):
        Watch(InContextMarkov(graphs.random_forest(5, root_probability=1, seed=0), 3), TOKENS)


def test_a_probe_needs_its_rhythm() -> None:
    with pytest.raises(CausalProbeError, match="`probe` is called every `probe_every` steps: give both"):
        training.fit(
            DisentangledTransformer(3, 8),
            TASK,
            training.joint(steps=1),
            generator=torch.Generator(),
            probe=lambda step, model: None,
        )


def test_more_series_than_colours() -> None:
    steps = list(range(8))
    series = {f"L0H{head}": [0.0] * 4 + [0.1 * head] * 4 for head in range(9)}
    figure = dynamics(steps, series).figure()
    legend = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert legend == {f"L0H{head}" for head in (4, 5, 6, 7, 8)}  # those that change most
    assert (
        len([line for line in figure.axes[0].lines if line.get_gid() != "change" and len(line.get_xdata()) == 8]) == 9
    )
