"""One score for every head of a model, as a heat map of layer by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.viz.arrays import as_array
from causal_probe.viz.figure import Drawing, colour_scale, drawing_style, label_bar, set_title, write_cells
from causal_probe.viz.text import shorten

__all__ = ["heads"]

# Largest numbers of heads, in a layer and in all, for which values are written into the cells; beyond, they make a page heavy and say less than colours.
_WRITTEN = 16
_WRITTEN_IN_ALL = 144
# Small maps side by side.
_IN_A_ROW = 4


@checked
def heads(scores: Any, *, score_name: str = "score", title: str | None = None, limit: float | None = None) -> Figure:
    """Draw one score for every head as a heat map, layer by head; or several, side by side.

    Parameters
    ----------
    scores
        Real numbers of shape [layer, head], or one list per layer where layers have different numbers of heads; None in a list is a head without a
        score, whose cell stays empty. Several of these by name, as a mapping, are drawn as small maps on one colour scale.
    score_name
        The score's name, with its unit if it has one: the label of the colour bar.
    title
        A title above the drawing.
    limit
        The score at the end of the colour scale; the default is the largest absolute score. Negative scores get another colour, and the bar
        ends at the lowest one.

    Returns
    -------
    matplotlib.figure.Figure
        Axes of the heat maps and of the colour bar. Values stand in the cells of a single map of up to 16 heads a layer and 144 in all.

    Raises
    ------
    CausalProbeError
        If there is no score, a score isn't a finite number, or the limit isn't a positive one.

    Examples
    --------
    >>> figure = heads([[0.1, 0.9], [0.4]], score_name="attention on the true parent")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['0.10', '0.90', '0.40']
    >>> figure = heads({"induction": [[0.1, 0.9]], "previous-token": [[0.8, 0.0]]})
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['induction', 'previous-token']
    """
    given = scores if isinstance(scores, Mapping) else {None: scores}
    tables = {name: _as_table(each) for name, each in given.items()}
    if not tables:
        raise CausalProbeError("Scores of shape [layer, head] were to be drawn and there are none.")
    if limit is not None and not (np.isfinite(limit) and limit > 0):
        raise CausalProbeError(
            f"limit is the score at the end of the colour scale, a positive number; found {limit!r}."
        )
    n_layers, n_heads = (max(table.shape[axis] for table in tables.values()) for axis in (0, 1))
    largest = limit if limit is not None else max(float(np.nanmax(np.abs(table))) for table in tables.values()) or 1.0
    lowest = min(float(np.nanmin(table)) for table in tables.values())
    scale, colours = colour_scale(largest, signed=lowest < 0)
    alone = len(tables) == 1
    written = alone and n_heads <= _WRITTEN and n_heads * n_layers <= _WRITTEN_IN_ALL
    # Of a cell, in inches; of a map, whatever the model's size, a screen shows two rows of small ones.
    width, height = (0.5, 0.42) if written else (0.4, 0.2) if alone else (0.16, 0.09)
    columns = min(len(tables), _IN_A_ROW)
    rows = -(-len(tables) // columns)
    least, most = ((4.0, 1.9), (11.0, 11.0)) if alone else ((1.5, 1.5), (11.0 / columns, 3.4))
    size = np.clip(
        [width * n_heads + (1.9 if alone else 0.5), height * n_layers + (1.0 if alone else 0.7)], least, most
    )
    with drawing_style():
        figure = Drawing(figsize=(size[0] * columns + (0 if alone else 0.9), size[1] * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat[len(tables) :]:
            axes.remove()
        drawn = list(panels.flat[: len(tables)])
        for axes, (name, table) in zip(drawn, tables.items(), strict=True):
            image = _draw(axes, table, cmap=colours, norm=scale)
            if not alone:
                axes.set_title(shorten(str(name), 32), fontsize=9, parse_math=False)
            if written:
                write_cells(axes, table, largest=largest, decimals=2)
        for row in panels:
            row[0].set_ylabel("layer")
        for axes in drawn[-columns:]:
            axes.set_xlabel("head")
        bar = figure.colorbar(image, ax=drawn, pad=0.02, aspect=size[1] * rows / 0.17)
        if lowest < 0:  # the part of the scale that is used
            bar.ax.set_ylim(max(lowest, -largest), largest)
        label_bar(bar, score_name, inches=size[1] * rows - 0.7)
        set_title(figure, title or (str(next(iter(tables))) if alone and isinstance(scores, Mapping) else None))
    return figure


def _draw(axes: Axes, table: NDArray[np.float64], **colours: Any) -> AxesImage:
    image = axes.imshow(np.ma.masked_invalid(table), aspect="auto", interpolation="nearest", **colours)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # Fine white lines between cells.
    axes.set_xticks(np.arange(table.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(table.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0 if table.shape[0] <= 16 else 0.4)
    axes.tick_params(which="minor", length=0)
    return image


def _as_table(scores: Any) -> NDArray[np.float64]:
    """[layer, head], with NaN where a layer has fewer heads than another, and where a head has no score."""
    if not isinstance(scores, Sequence):
        return as_array(scores, name="Scores", axes="layer head")
    if not scores:
        raise CausalProbeError("Scores of shape [layer, head] were to be drawn and there are none.")
    rows = [_as_row(row, layer) for layer, row in enumerate(scores)]
    if all(np.isnan(row).all() for row in rows):
        raise CausalProbeError("No head has a score: each is None, so there is nothing to draw.")
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for layer, row in enumerate(rows):
        table[layer, : len(row)] = row
    return table


def _as_row(scores: Any, layer: int) -> NDArray[np.float64]:
    missing = [each is None for each in scores] if isinstance(scores, (list, tuple)) else []
    row = as_array(
        [each or 0.0 for each in scores] if any(missing) else scores, name=f"The scores of layer {layer}", axes="head"
    )
    return np.where(missing, np.nan, row) if any(missing) else row
