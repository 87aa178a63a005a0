"""Figures without pyplot, and their way into a page as SVG."""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from causal_probe.arguments import checked
from causal_probe.results import write_text
from causal_probe.viz.palette import DIVERGING, GRID, INK, MUTED, PAPER, SEQUENTIAL
from causal_probe.viz.text import clean, shorten, show_number

__all__ = [
    "Drawing",
    "colour_scale",
    "drawing_style",
    "fit_lines",
    "label_bar",
    "set_title",
    "style_axes",
    "to_svg",
    "write_cells",
    "write_svg",
]

_STYLE: dict[Any, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 9.0,
    "text.color": INK,
    "text.usetex": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "legend.frameon": False,
    # Text stays text: small, searchable, selectable, and drawn in the reader's fonts, which know more scripts than ours.
    "svg.fonttype": "none",
    # The ids of clip paths and markers then depend on the drawing alone.
    "svg.hashsalt": "causal-probe",
}


class Drawing(Figure):
    """A figure that a notebook shows as it is: one that pyplot doesn't know is shown there by its name alone."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with drawing_style():
            self.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
        return buffer.getvalue()


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Our fonts and colours for the time of a drawing, whatever the user's matplotlib settings are."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A glyph that the font for measuring lacks is found by the browser in another one.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def set_title(figure: Figure, title: str | None) -> None:
    """Set the figure's title, if there is one. Dollar signs mean themselves."""
    if title is not None:
        text = fit_lines(title, inches=figure.get_figwidth(), fontsize=11)
        figure.suptitle(text, fontsize=11, fontweight="bold", parse_math=False)


def fit_lines(text: str, *, inches: float, fontsize: float, lines: int = 3) -> str:
    """``text`` in as many lines as it needs at that width, ``lines`` at most; the rest is an ellipsis."""
    # A sans-serif letter is some 0.6 of the font size wide.
    width = max(8, int(72 * inches / (0.6 * fontsize)))
    wrapped = textwrap.wrap(shorten(text, width * lines + 1), width) or [""]
    return "\n".join(
        wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], shorten(wrapped[lines - 1] + " ", width) + "…"]
    )


def label_bar(bar: Colorbar, text: str, *, inches: float) -> None:
    """Name what a colour bar of that height shows, in lines that aren't longer than it."""
    bar.set_label(fit_lines(text, inches=inches, fontsize=9), parse_math=False)
    bar.outline.set_visible(False)


def colour_scale(largest: float, *, signed: bool) -> tuple[Normalize, Colormap]:
    """From 0 to the largest value, or symmetric about 0; what is undefined is grey."""
    scale = Normalize(-largest if signed else 0.0, largest)
    return scale, (DIVERGING if signed else SEQUENTIAL).with_extremes(bad=PAPER)


def write_cells(axes: Axes, table: NDArray[np.float64], *, largest: float, decimals: int) -> None:
    """Write the finite numbers of a table into the cells of its heat map, whose colours end at ``largest``."""
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            ink = "white" if abs(value) > 0.55 * largest else INK
            text = show_number(value, decimals)
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink)


def style_axes(axes: Axes, *, grid: bool = False) -> None:
    """Leave the left and bottom spines only, with fine ticks; ``grid`` adds faint horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3, width=0.8)
    if grid:
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)


def to_svg(figure: Figure, *, prefix: str, description: str = "") -> str:
    """``figure`` as an ``<svg>`` element for use inside an HTML page.

    Parameters
    ----------
    figure
        Any matplotlib figure.
    prefix
        Put before every id, so that several drawings on a page don't share clip paths and markers.
    description
        A description of the drawing for readers who can't see it (alt text).

    Returns
    -------
    str
        The same for the same figure and prefix, in whatever process. The element has no fixed size: the page sets it.
    """
    buffer = io.StringIO()
    with drawing_style():
        # Without metadata there is neither a date nor a link in the drawing.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, bbox_inches="tight")
    # The user's own text may hold what XML can't: that is shown as its escape.
    svg = clean(buffer.getvalue())
    svg = svg[svg.index("<svg") :]  # no XML declaration, no document type
    # This rule would hold for the whole page; as attributes of the drawing both properties are inherited within it alone.
    svg = re.sub(r"\s*<defs>\s*<style type=\"text/css\">.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    # matplotlib escapes < and > in text and in attributes, so that this matches tags and nothing else.
    svg = re.sub(r"<[^>]*>", lambda tag: _tidy(tag.group(), prefix), re.sub(r">\s+<", "><", svg))
    label = html.escape(clean(description))
    root = f'<svg role="img" aria-label="{label}" stroke-linejoin="round" style="{_FAMILY.removesuffix("; ")}" '
    return svg.replace("<svg ", root, 1).strip()


@checked
def write_svg(figure: Figure, path: str | os.PathLike[str], *, description: str = "") -> None:
    """Write ``figure`` as an SVG file, whole or not at all; the same for the same figure. ``description`` is for those who can't see it.

    Raises
    ------
    CausalProbeError
        If the folder is missing or can't be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from causal_probe import graphs, viz
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_svg(viz.graph(graphs.chain(4)), Path(folder) / "chain.svg")
    ...     (Path(folder) / "chain.svg").read_text()[:4]
    '<svg'
    """
    write_text(path, to_svg(figure, prefix="", description=description) + "\n")


#: The fonts of every text, as matplotlib writes them: stated once for the whole drawing.
_FAMILY = "font-family: 'DejaVu Sans', 'Verdana', 'Arial', 'Helvetica', sans-serif; "


def _tidy(tag: str, prefix: str) -> str:
    """A tag with its ids prefixed, and without what goes without saying: a third of a heat map's text."""
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag.replace(_FAMILY, "").replace(" \n", " "))
    # A hundredth of a point is finer than any screen; matplotlib writes a millionth.
    tag = re.sub(r' (?:d|x|y|width|height)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found.group()), tag)
    if tag.startswith("<image"):  # equal heat maps have equal ids, and nothing refers to them
        tag = re.sub(r' id="[^"]*"', "", tag)
    tag = re.sub(r'(\sid=")', rf"\g<1>{prefix}", tag)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", tag)
