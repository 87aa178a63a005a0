"""One score for every head of a model, as a heat map of layer by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from causal_probe.errors import CausalProbeError
from causal_probe.viz.arrays import as_array
from causal_probe.viz.figure import Drawing, colour_scale, drawing_style, label_bar, set_title, write_cells

__all__ = ["heads"]

# Largest numbers of heads, in a layer and in all, for which values are written into the cells; beyond, they make a page heavy and say less than colours.
_WRITTEN = 16
_WRITTEN_IN_ALL = 144


def heads(scores: Any, *, score_name: str = "score", title: str | None = None, limit: float | None = None) -> Figure:
    """Draw one score for every head as a heat map, layer by head.

    Parameters
    ----------
    scores
        Real numbers of shape [layer, head], or one list per layer where layers have different numbers of heads.
    score_name
        What the score is, with its unit if it has one; it labels the colour bar.
    title
        A title above the drawing.
    limit
        The score at the end of the colour scale; the default is the largest absolute score. The scale starts at 0, or
        at ``-limit`` where there are negative scores.

    Returns
    -------
    matplotlib.figure.Figure
        Axes of the heat map and of the colour bar. Values stand in the cells of models with up to 16 heads a layer and 144 in all.

    Raises
    ------
    CausalProbeError
        If there is no score, a score isn't a finite number, or the limit isn't a positive one.

    Examples
    --------
    >>> figure = heads([[0.1, 0.9], [0.4]], score_name="attention on the true parent")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['0.10', '0.90', '0.40']
    """
    table = _as_table(scores)
    n_layers, n_heads = table.shape
    if limit is not None and not (np.isfinite(limit) and limit > 0):
        raise CausalProbeError(
            f"limit is the score at the end of the colour scale, a positive number; found {limit!r}."
        )
    largest = limit if limit is not None else float(np.nanmax(np.abs(table))) or 1.0
    scale, colours = colour_scale(largest, signed=bool(np.nanmin(table) < 0))
    written = n_heads <= _WRITTEN and n_heads * n_layers <= _WRITTEN_IN_ALL
    width, height = (0.5, 0.42) if written else (0.4, 0.2)  # of a cell, in inches
    with drawing_style():
        size = (float(np.clip(width * n_heads + 1.9, 4.0, 11.0)), float(np.clip(height * n_layers + 1.0, 1.9, 11.0)))
        figure = Drawing(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(
            np.ma.masked_invalid(table), cmap=colours, norm=scale, aspect="auto", interpolation="nearest"
        )
        axes.set(xlabel="head", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        # Fine white lines between cells.
        axes.set_xticks(np.arange(n_heads + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(n_layers + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.0)
        axes.tick_params(which="minor", length=0)
        if written:
            write_cells(axes, table, largest=largest, decimals=2)
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=size[1] / 0.17)
        label_bar(bar, score_name, inches=size[1] - 0.7)
        set_title(figure, title)
    return figure


def _as_table(scores: Any) -> NDArray[np.float64]:
    """[layer, head], with NaN where a layer has fewer heads than another."""
    if not isinstance(scores, Sequence):
        return as_array(scores, name="Scores", axes="layer head")
    if not scores:
        raise CausalProbeError("Scores of shape [layer, head] were to be drawn and there are none.")
    rows = [as_array(row, name=f"The scores of layer {layer}", axes="head") for layer, row in enumerate(scores)]
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for layer, row in enumerate(rows):
        table[layer, : len(row)] = row
    return table
