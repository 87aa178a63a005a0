"""viz.curves: the values in the lines, the bands of two standard errors, named references, and no tick between whole steps."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from causal_probe import viz
from causal_probe.errors import CausalProbeError


def test_values_names_and_labels() -> None:
    panels = {
        "one": {"a": viz.Curve([0, 1, 2], [3.0, None, 1.0]), "b": viz.Curve([0, 2], [0.5, 0.25])},
        "two": {"_c$": viz.Curve([10.0, 20.0], [1.0, 2.0])},
    }
    figure = viz.curves(panels, x_name=("step", "length"), y_name="loss")
    first, second = figure.axes
    np.testing.assert_array_equal(first.lines[0].get_ydata(), [3.0, np.nan, 1.0])
    np.testing.assert_array_equal(first.lines[1].get_xdata(), [0, 2])
    assert [(axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [
        ("one", "step", "loss"),
        ("two", "length", "loss"),
    ]
    assert [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()] == ["a", "b", "_c$"]
    assert len({line.get_color() for line in first.lines}) == len({line.get_linestyle() for line in first.lines}) == 2
    assert len(second.lines) == 1


def test_a_band_of_two_standard_errors_and_a_named_reference() -> None:
    curve = viz.Curve([1, 2], [1.0, 2.0], error=[0.25, 0.5])
    axes = viz.curves({"": {"a": curve}}, x_name="x", y_name="y", references={"": {"the paper, 1.5": 1.5}}).axes[0]
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices
    assert {(1.0, 0.5), (1.0, 1.5), (2.0, 1.0), (2.0, 3.0)} <= {tuple(map(float, vertex)) for vertex in heights}
    assert [text.get_text() for text in axes.texts] == ["the paper, 1.5"]
    assert list(axes.lines[1].get_ydata()) == [1.5, 1.5]


@pytest.mark.parametrize(("x", "whole"), [([1, 2, 3], True), ([1, 2, 2.5], False)])
def test_whole_numbers_have_no_ticks_between_them(x: list[float], whole: bool) -> None:
    figure = viz.curves({"": {"a": viz.Curve(x, [1.0, 2.0, 3.0])}}, x_name="forest", y_name="y")
    FigureCanvasAgg(figure).draw()
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks()) == whole


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ({}, "one panel or more"),
        ({"": {}}, "one to 5 curves"),
        ({"": {str(name): viz.Curve([0], [0]) for name in range(6)}}, "one to 5 curves"),
        ({"": {"a": viz.Curve([0, 1], [0])}}, r"'a' has parts of different lengths: \[1, 2\]"),
        ({"": {"a": viz.Curve([0], [0], error=[1, 2])}}, r"'a' has parts of different lengths: \[1, 2\]"),
    ],
)
def test_what_cannot_be_drawn(panels: dict[str, dict[str, viz.Curve]], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        viz.curves(panels, x_name="x", y_name="y")


def test_few_points_of_a_logarithmic_axis_are_its_ticks() -> None:
    few = viz.curves({"": {"a": viz.Curve([16, 64, 1024], [0, 1, 2])}}, x_name="n", y_name="y", x_scale="log").axes[0]
    assert [label.get_text() for label in few.get_xticklabels()] == ["16", "64", "1,024"]
    assert not len(few.xaxis.get_minorticklocs())
    many = viz.curves({"": {"a": viz.Curve(range(1, 20), range(19))}}, x_name="n", y_name="y", x_scale="log").axes[0]
    assert len(many.xaxis.get_minorticklocs())
