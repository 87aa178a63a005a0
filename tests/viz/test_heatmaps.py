"""viz.blocks and viz.heads: the right numbers in the right cells, one scale, labelled axes."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

from causal_probe import viz
from causal_probe.errors import CausalProbeError
from causal_probe.viz.figure import to_svg

RNG = np.random.default_rng(0)
BLOCKS = {
    (0, 0, "token", "position"): RNG.normal(size=(3, 5)),
    (0, 0, "position", "position"): -7.0 * np.eye(5),
    "L1H0 token × L0H0.token": np.ones((3, 3)),
    "anything": np.zeros((2, 2)),
}


def test_every_block_is_drawn_on_one_scale() -> None:
    figure = viz.blocks(BLOCKS)
    *panels, bar = figure.axes
    assert len(panels) == len(BLOCKS)
    for axes, block in zip(panels, BLOCKS.values(), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), block)
        assert axes.images[0].get_clim() == (-7.0, 7.0)
    assert "±7" in bar.get_ylabel()


def test_without_negative_entries_the_scale_starts_at_0() -> None:
    figure = viz.blocks({"attention": np.array([[1.0, 0.0], [0.25, 0.75]]), "other": np.zeros((2, 2))})
    *panels, bar = figure.axes
    assert [axes.images[0].get_clim() for axes in panels] == [(0.0, 1.0)] * 2
    assert " ".join(bar.get_ylabel().split()) == "entry of A (one scale for all, 0 to 1)"


def test_axes_say_which_subspace_they_run_over() -> None:
    labels = [(axes.get_title(), axes.get_ylabel(), axes.get_xlabel()) for axes in viz.blocks(BLOCKS).axes[:-1]]
    assert labels == [
        ("L0H0: token × position", "query: token", "key: position"),
        ("L0H0: position × position", "query: position", "key: position"),
        ("L1H0 token × L0H0.token", "query: token", "key: L0H0.token"),
        ("anything", "query", "key"),
    ]


def test_marked_cells_are_outlined() -> None:
    name = (0, 0, "token", "position")
    axes = viz.blocks(BLOCKS, marks={name: [(2, 1)]}).axes[0]
    (outline,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert outline.get_xy() == (0.5, 1.5)  # the cell of row 2 and column 1 begins half a cell before its centre
    assert not outline.get_fill()


def test_a_model_stands_for_its_blocks() -> None:
    class Model:
        def named_blocks(self) -> dict[tuple[int, int, str, str], torch.Tensor]:
            return {(1, 0, "token", "token"): torch.eye(2, dtype=torch.bfloat16, requires_grad=True)}

    axes = viz.blocks(Model()).axes[0]
    assert axes.get_title() == "L1H0: token × token"
    np.testing.assert_array_equal(axes.images[0].get_array(), np.eye(2))


def test_only_zeros() -> None:
    FigureCanvasAgg(viz.blocks({"zero": np.zeros((2, 3))})).draw()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "nothing in it"),
        (({"a": np.zeros(3)},), "The block a were expected in the shape [query key]; found the shape [3]"),
        (({"a": [[np.nan, 1.0]]},), "1 of 2 values that are NaN"),
        (({"a": [["x"]]},), "numbers of shape [query key]"),
        ((7,), "int was found"),
    ],
)
def test_bad_blocks(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        viz.blocks(*arguments)


def test_bad_marks_are_all_named() -> None:
    with pytest.raises(CausalProbeError, match=r"no block b; a is 2 by 3 and has no cell \(2, 0\)"):
        viz.blocks({"a": np.zeros((2, 3))}, marks={"b": [], "a": [(1, 2), (2, 0)]})


def test_heads_hold_the_scores_and_say_what_they_are() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.2], [0.4, 0.3, 0.0]])
    figure = viz.heads(scores, score_name="induction score", title="Heads")
    axes, bar = figure.axes
    np.testing.assert_allclose(axes.images[0].get_array(), scores)
    assert axes.images[0].get_clim() == pytest.approx((0.0, 0.9))
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("head", "layer", "induction score")
    assert {text.get_position(): text.get_text() for text in axes.texts}[1, 0] == "0.90"


def test_heads_of_layers_that_differ() -> None:
    axes = viz.heads([[0.1, -0.9], [0.4]]).axes[0]
    cells = axes.images[0].get_array()
    assert cells.shape == (2, 2)
    assert np.ma.getmaskarray(cells).tolist() == [[False, False], [False, True]]
    assert axes.images[0].get_clim() == (-0.9, 0.9)


def test_several_scores_share_one_scale_whose_bar_ends_at_the_lowest() -> None:
    maps = {f"type {i}": np.full((3, 2), value) for i, value in enumerate((0.9, -0.2, 0.5, 0.1, 0.3))}
    *panels, bar = viz.heads(maps, score_name="excess", limit=1).axes
    assert [axes.get_title() for axes in panels] == list(maps)
    assert {axes.images[0].get_clim() for axes in panels} == {(-1, 1)}
    for axes, scores in zip(panels, maps.values(), strict=True):
        np.testing.assert_allclose(axes.images[0].get_array(), scores)
    assert [axes.get_ylabel() for axes in panels] == ["layer", "", "", "", "layer"]
    assert [axes.get_xlabel() for axes in panels] == ["", "head", "head", "head", "head"]
    assert bar.get_ylim() == pytest.approx((-0.2, 1))
    assert not any(axes.texts for axes in panels)


def test_many_heads_have_no_numbers() -> None:
    assert not viz.heads(np.ones((4, 32))).axes[0].texts
    assert not viz.heads(np.ones((30, 9))).axes[0].texts
    assert len(viz.heads(np.ones((12, 12))).axes[0].texts) == 144


def test_many_heads_take_little_room() -> None:
    drawn = viz.heads(np.random.default_rng(0).uniform(-1, 1, (30, 9)))
    assert len(to_svg(drawn, prefix="p")) < 40_000


def test_what_rounds_to_zero_has_no_sign() -> None:
    axes = viz.heads([[-0.001, 0.004, -0.006]]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.00", "0.00", "\N{MINUS SIGN}0.01"]


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([], {}, "there are none"),
        ({}, {}, "there are none"),
        ([[]], {}, "The scores of layer 0"),
        ([[0.1], [np.inf]], {}, "layer 1 hold 1 of 1 values"),
        (np.zeros((2, 2, 2)), {}, "[layer head]; found the shape [2, 2, 2]"),
        ([[0.1]], {"limit": 0.0}, "a positive number; found 0.0"),
    ],
)
def test_bad_scores(scores: object, options: dict[str, float], message: str) -> None:
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        viz.heads(scores, **options)


# --------------------------------------------------------------------------------------------------------------- table_map


def test_a_labelled_table() -> None:
    table = pd.DataFrame([[0.5, np.nan], [-0.001, 1.0]], index=["<b>one</b>", "two"], columns=["chain", "lag-2"])
    figure = viz.table_map(table, value_name="skill", row_name="model", column_name="graph", title="Who reads what")
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.00", "1.00"]  # what is missing stays blank
    assert [label.get_text() for label in axes.get_yticklabels()] == ["<b>one</b>", "two"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["chain", "lag-2"]
    assert (axes.get_ylabel(), axes.get_xlabel(), bar.get_ylabel()) == ("model", "graph", "skill")
    assert axes.images[0].get_clim() == (-1.0, 1.0)
    assert viz.table_map(table.abs()).axes[0].images[0].get_clim() == (0.0, 1.0)
    assert "&lt;b&gt;" in to_svg(figure, prefix="t")


@pytest.mark.parametrize(
    ("table", "wording"),
    [
        (pd.DataFrame(), "finite numbers"),
        (pd.DataFrame([[np.nan]]), "finite numbers"),
        (pd.DataFrame([[np.inf, 1.0]]), "finite numbers"),
        (pd.DataFrame(np.zeros((50, 50))), "at most 1600 cells"),
    ],
)
def test_a_table_that_cannot_be_drawn(table: pd.DataFrame, wording: str) -> None:
    with pytest.raises(CausalProbeError, match=wording):
        viz.table_map(table)


def test_heads_without_a_score_stay_empty_and_none_at_all_are_refused() -> None:
    for row in ([None, 2.0], (None, 2.0)):
        drawn = viz.heads([row, [1.0, 0.5]]).axes[0].images[0].get_array()
        assert drawn.mask.tolist() == [[True, False], [False, False]]
    with pytest.raises(CausalProbeError, match="No head has a score"):
        viz.heads([[None], [None, None]])
