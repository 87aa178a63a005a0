"""Blocks of the attention matrices A as heat maps, all on one colour scale."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.viz.arrays import as_array
from causal_probe.viz.figure import Drawing, colour_scale, drawing_style, label_bar, set_title
from causal_probe.viz.palette import INK
from causal_probe.viz.text import shorten

__all__ = ["blocks"]

_PANEL = 2.35  # inches
_LONGEST_NAME = 44
_SPACED_NAME = re.compile(r"(?:(?P<head>.*)[\s:,]\s*)?(?P<query>\S+)\s+[x×]\s+(?P<key>\S+)")


@checked
def blocks(
    matrices: Any,
    *,
    marks: Mapping[Any, Iterable[tuple[int, int]]] | None = None,
    columns: int | None = None,
    value_name: str = "entry of A",
    title: str | None = None,
) -> Figure:
    """Draw named blocks of attention matrices as heat maps on one shared colour scale.

    The scale is symmetric about 0, or starts at 0 where no entry is negative, as in attention patterns.

    Parameters
    ----------
    matrices
        A mapping from name to block, each a matrix [query dimension, key dimension] of real numbers. A name is a string,
        or a tuple ``(layer, head, query, key)`` or ``(query, key)``: from a tuple, and from a string such as
        ``"L0H0 position × position"``, the axes are labelled with the subspaces that they run over. A model with a
        method ``named_blocks()``, which returns such a mapping, stands for all its blocks.
    marks
        For some of the names, the cells (row, column) to be outlined: those of the true edges (child, parent) in the
        position × position block, say.
    columns
        The number of heat maps in a row; by default as many as make the drawing about square, at most 4.
    value_name
        The quantity, the label of the colour bar.
    title
        A title above the drawing.

    Returns
    -------
    matplotlib.figure.Figure
        One axes per block in the order given, and one for the colour bar, which states the scale.

    Raises
    ------
    CausalProbeError
        If there is no block, one is no matrix of finite numbers, or a mark names a block or a cell that isn't there.

    Examples
    --------
    >>> import numpy as np
    >>> figure = blocks({(0, 0, "position", "position"): np.eye(4)}, marks={(0, 0, "position", "position"): [(2, 1)]})
    >>> figure.axes[0].get_ylabel()
    'query: position'
    """
    named = matrices.named_blocks() if hasattr(matrices, "named_blocks") else matrices
    if not isinstance(named, Mapping) or not named:
        raise CausalProbeError(
            f"Blocks were to be drawn: a mapping from name to matrix was expected, and {type(named).__name__} was found"
            f"{' with nothing in it' if isinstance(named, Mapping) else ''}."
        )
    arrays = {
        name: as_array(block, name=f"The block {_title_of(name)}", axes="query key") for name, block in named.items()
    }
    outlined = _checked_marks(marks or {}, arrays)
    # A matrix of zeros still needs a scale.
    limit = max(float(np.abs(block).max()) for block in arrays.values()) or 1.0
    signed = any(bool((block < 0).any()) for block in arrays.values())
    scale, colours = colour_scale(limit, signed=signed)

    n_columns = min(len(arrays), max(1, columns) if columns is not None else min(4, math.isqrt(len(arrays) - 1) + 1))
    n_rows = -(-len(arrays) // n_columns)
    with drawing_style():
        figure = Drawing(
            figsize=(_PANEL * n_columns + 0.9, _PANEL * n_rows + (0.4 if title else 0.0)), layout="constrained"
        )
        panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
        for place, (axes, (name, block)) in enumerate(zip(panels, arrays.items(), strict=False)):
            _draw_block(axes, name, block, scale, colours)
            for row, column in outlined.get(name, ()):
                outline = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=0.9)
                outline.set_gid(f"mark-{place}-{row}-{column}")
                axes.add_patch(outline)
        for axes in panels[len(arrays) :]:
            axes.remove()
        bar = figure.colorbar(
            ScalarMappable(scale, colours), ax=list(panels[: len(arrays)]), shrink=min(1, 1.6 / n_rows), pad=0.02
        )
        shared = "" if len(arrays) == 1 else "one scale for all, "
        ends = f"±{limit:.3g}" if signed else f"0 to {limit:.3g}"
        label_bar(bar, f"{value_name} ({shared}{ends})", inches=_PANEL * min(n_rows, 1.6) - 0.5)
        set_title(figure, title)
    return figure


def _checked_marks(
    marks: Mapping[Any, Iterable[tuple[int, int]]], arrays: Mapping[Any, NDArray[np.float64]]
) -> dict[Any, list[tuple[int, int]]]:
    cells = {name: list(of_block) for name, of_block in marks.items()}
    problems = [f"there is no block {_title_of(name)}" for name in cells if name not in arrays]
    problems += [
        f"{_title_of(name)} is {rows} by {columns} and has no cell ({row}, {column})"
        for name in cells
        if name in arrays
        for rows, columns in [arrays[name].shape]
        for row, column in cells[name]
        if not (0 <= row < rows and 0 <= column < columns)
    ]
    if problems:
        raise CausalProbeError(f"Cells of blocks were to be outlined, but {'; '.join(problems)}.")
    return cells


def _draw_block(axes: Axes, name: Any, block: NDArray[np.float64], scale: Normalize, colours: Colormap) -> None:
    axes.imshow(block, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
    axes.set_box_aspect(1)  # whatever the shape of the block, so that the panels stand in line
    query, key = _subspaces_of(name)
    title = _title_of(name)
    # A title that is wider than its panel would run into the next one.
    axes.set_title(title, fontsize=min(9.5, 72 * _PANEL / (0.62 * max(len(title), 1))), parse_math=False)
    axes.set_xlabel(f"key: {key}" if key else "key", fontsize=8, parse_math=False)
    axes.set_ylabel(f"query: {query}" if query else "query", fontsize=8, parse_math=False)
    axes.tick_params(length=2, labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.spines[:].set_linewidth(0.6)


def _title_of(name: Any) -> str:
    if isinstance(name, tuple) and len(name) == 4:
        layer, head, query, key = name
        return shorten(f"L{layer}H{head}: {query} × {key}", _LONGEST_NAME)
    if isinstance(name, tuple) and len(name) == 2:
        return shorten(f"{name[0]} × {name[1]}", _LONGEST_NAME)
    return shorten(str(name), _LONGEST_NAME)


def _subspaces_of(name: Any) -> tuple[str, str]:
    """The names of the query's and the key's subspace; empty where the block's name doesn't tell."""
    found = _SPACED_NAME.fullmatch(_title_of(name))
    return (found["query"], found["key"]) if found else ("", "")
