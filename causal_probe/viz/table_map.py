"""A small labelled table as a heat map."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from causal_probe.arguments import checked, shown
from causal_probe.errors import CausalProbeError
from causal_probe.viz.figure import Drawing, colour_scale, drawing_style, fit_lines, label_bar, set_title, write_cells
from causal_probe.viz.text import shorten

__all__ = ["table_map"]

#: Tables of more cells than this are no longer readable.
MOST = 1600
_LONGEST_NAME = 40


@checked
def table_map(
    table: Any,
    *,
    value_name: str = "value",
    row_name: str = "",
    column_name: str = "",
    title: str | None = None,
    limit: float | None = None,
) -> Figure:
    """Draw a labelled table of numbers as a heat map, with the numbers in the cells.

    Parameters
    ----------
    table
        A pandas DataFrame of real numbers; missing ones stay blank.
    value_name
        The quantity with its unit, the label of the colour bar.
    row_name, column_name
        The labels of the rows' and columns' axes.
    title
        A title above the drawing.
    limit
        The number at the end of the colour scale; the default is the largest in size. The scale starts at 0, or at ``-limit``
        where there are negative numbers.

    Raises
    ------
    CausalProbeError
        If there is no number, a number is infinite, or there are more than 1,600 cells.

    Examples
    --------
    >>> import pandas as pd
    >>> figure = table_map(pd.DataFrame({"chain": [0.9, 0.1]}, index=["small", "large"]), value_name="excess")
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['small', 'large']
    """
    try:
        values = np.asarray(table, dtype=float)
        named = table.index, table.columns
    except (AttributeError, TypeError, ValueError) as error:
        raise CausalProbeError(f"A table is a pandas DataFrame of numbers; this one is {shown(table)}.") from error
    if not values.size or not np.isfinite(values).any() or np.isinf(values).any():
        raise CausalProbeError("A table is drawn if it holds finite numbers, and no infinite ones; this one does not.")
    if values.size > MOST:
        raise CausalProbeError(f"A table of at most {MOST} cells can be read; this one has {values.size}.")
    largest = limit if limit is not None else float(np.nanmax(np.abs(values))) or 1.0
    scale, colours = colour_scale(largest, signed=bool(np.nanmin(values) < 0))
    rows, columns = ([shorten(str(name), _LONGEST_NAME) for name in names] for names in named)
    with drawing_style():
        longest = max(map(len, rows))
        turned = max(map(len, columns)) > 6
        below = 0.075 * max(map(len, columns)) if turned else 0.2
        above = 0.0 if title is None else 0.6
        size = (0.62 * len(columns) + 0.085 * longest + 1.7, 0.34 * len(rows) + below + above + 0.8)
        figure = Drawing(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, norm=scale, aspect="auto")
        axes.set_yticks(range(len(rows)), rows, parse_math=False)
        axes.set_xticks(range(len(columns)), columns, rotation=90 if turned else 0, parse_math=False)
        axes.set_xlabel(fit_lines(column_name, inches=0.62 * len(columns) + 0.8, fontsize=9), parse_math=False)
        axes.set_ylabel(fit_lines(row_name, inches=0.34 * len(rows) + 0.6, fontsize=9), parse_math=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        write_cells(axes, values, largest=largest, decimals=2 if largest < 10 else 1)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        label_bar(bar, value_name, inches=0.34 * len(rows) + 0.6)
        set_title(figure, title)
    return figure
