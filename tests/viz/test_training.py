"""viz.training: the curve, the reference lines and their labels, the stages."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from causal_probe import viz
from causal_probe.errors import CausalProbeError

HISTORY = {
    "step": [0, 1, 2, 3, 4, 5],
    "loss": [1.1, 1.0, None, 0.9, 0.8, 0.7],
    "stage": ["first"] * 2 + ["second"] * 4,
}
REFERENCES = {"uniform": 1.0986, "unigram": 0.8, "known graph": 0.600, "one parent": 0.601, "unknown": None}


def test_the_curve_holds_the_measured_losses() -> None:
    curve = viz.training(HISTORY).axes[0].lines[0]
    np.testing.assert_array_equal(curve.get_xdata(), [0, 1, 3, 4, 5])
    np.testing.assert_array_equal(curve.get_ydata(), [1.1, 1.0, 0.9, 0.8, 0.7])


def test_a_history_may_be_an_object() -> None:
    @dataclasses.dataclass(frozen=True)
    class History:
        step: tuple[int, ...] = (0, 5)
        loss: tuple[float, ...] = (1.0, 0.5)
        sequences: int = 7

    np.testing.assert_array_equal(viz.training(History()).axes[0].lines[0].get_ydata(), [1.0, 0.5])


def test_references_are_labelled_lines() -> None:
    axes = viz.training(HISTORY, REFERENCES).axes[0]
    lines = [line for line in axes.lines if (line.get_gid() or "").startswith("reference")]
    assert sorted(line.get_ydata()[0] for line in lines) == [0.6, 0.601, 0.8, 1.0986]
    labels = {text.get_text() for text in axes.texts}
    assert {"uniform  1.099", "unigram  0.800", "known graph  0.600", "one parent  0.601"} <= labels
    low, high = axes.get_ylim()
    assert low < 0.6
    assert high > 1.1


def test_labels_of_close_references_stay_apart() -> None:
    figure = viz.training(HISTORY, {f"predictor {i}": 0.6 + i / 1000 for i in range(6)})
    FigureCanvasAgg(figure).draw()  # lays the figure out
    texts = [text for text in figure.axes[0].texts if text.get_text().startswith("predictor")]
    heights = sorted(figure.axes[0].transData.transform(text.get_position())[1] for text in texts)
    assert len(heights) == 6
    assert all(above - below >= texts[0].get_fontsize() * figure.dpi / 72 for below, above in pairwise(heights))


def test_stages_are_marked_where_they_begin() -> None:
    axes = viz.training(HISTORY).axes[0]
    assert [text.get_text() for text in axes.texts] == ["first", "second"]
    assert 2.0 in [line.get_xdata()[0] for line in axes.lines[1:]]


def test_long_runs_are_logarithmic_from_step_1() -> None:
    axes = viz.training({"step": [0, 1, 10, 1000], "loss": [4.0, 3.0, 2.0, 1.0]}).axes[0]
    assert axes.get_xscale() == "symlog"
    assert "logarithmic" in axes.get_xlabel()


def test_losses_that_are_not_finite_are_told() -> None:
    axes = viz.training({"step": [0, 1, 2], "loss": [1.0, float("nan"), float("inf")]}).axes[0]
    assert [text.get_text() for text in axes.texts] == [
        "The loss is NaN or infinite at 2 of 3 steps, which are left out."
    ]


def test_hostile_names() -> None:
    history = {"step": [0, 1], "loss": [1.0, 2.0], "stage": ["$\ud800", "$\x00"]}
    FigureCanvasAgg(viz.training(history, {"$\ud800": 1.5}, title="$\ud800", loss_name="$\ud800")).draw()


@pytest.mark.parametrize(
    ("history", "references", "message"),
    [
        ({"step": [0]}, {}, "lacks loss"),
        ({}, {}, "lacks step and loss"),
        ({"step": [0, 1], "loss": [1.0]}, {}, "{'step': 2, 'loss': 1}"),
        ({"step": [], "loss": []}, {}, "at least 1"),
        ({"step": [0, 0], "loss": [1.0, 1.0]}, {}, "must ascend"),
        ({"step": [0], "loss": ["x"]}, {}, "must be numbers"),
        ({"step": [0], "loss": [None]}, {}, "none of its losses"),
        ({"step": [0], "loss": [1.0]}, {"uniform": float("nan")}, "is nan. It must be a finite number or None"),
    ],
)
def test_bad_history(history: dict[str, list[object]], references: dict[str, float], message: str) -> None:
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        viz.training(history, references)
