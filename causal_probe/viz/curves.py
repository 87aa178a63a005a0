"""Quantities against a common axis: losses over a sweep, metrics over training, errors over lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.viz.figure import Drawing, drawing_style, fit_lines, set_title, style_axes
from causal_probe.viz.palette import BLUE, EXTRA, INK, MUTED, VERMILLION
from causal_probe.viz.text import shorten

__all__ = ["Curve", "curves"]

#: So many points of a logarithmic axis are its ticks.
MOST_TICKS = 8

#: Colour, line style and marker of the first, second, ... curve of a panel: no two are told apart by hue alone.
_LOOKS = (
    (BLUE, "solid", "o"),
    (VERMILLION, "dashed", "s"),
    (INK, "dotted", "^"),
    (EXTRA.colour, "dashdot", "D"),
    (MUTED, (0, (5, 1, 1, 1)), "v"),
)


@checked
@dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes
    ----------
    x, y
        Of one length; None in ``y`` where it is undefined.
    error
        Standard errors of ``y``, drawn as a band of two to each side; None: none.
    """

    x: Sequence[float] | NDArray[Any]
    y: Sequence[float | None] | NDArray[Any]
    error: Sequence[float] | None = None


@checked
def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    x_name: str | Sequence[str],
    y_name: str | Sequence[str],
    references: Mapping[str, Mapping[str, float]] | None = None,
    x_scale: Literal["linear", "log"] = "linear",
    y_scale: Literal["linear", "log"] = "linear",
    title: str | None = None,
) -> Figure:
    """Draw curves side by side, in one panel or several.

    Parameters
    ----------
    panels
        By the panel's title (``""``: none), its curves by their names.
    x_name, y_name
        Labels of the axes; one for all panels, or one for each.
    references
        By the panel's title, values that are drawn as labelled horizontal lines.
    x_scale, y_scale
        Of all panels.

    Returns
    -------
    matplotlib.figure.Figure
        One axes for each panel, in the order given.

    Raises
    ------
    CausalProbeError
        If there is no panel, a panel has no curve or more than five, or lengths differ.

    Examples
    --------
    >>> figure = curves({"": {"model": Curve([0, 1], [2.0, 1.0])}}, x_name="step", y_name="loss")
    >>> len(figure.axes)
    1
    """
    if not panels or any(not 1 <= len(panel) <= len(_LOOKS) for panel in panels.values()):
        raise CausalProbeError(f"A drawing has one panel or more, and a panel one to {len(_LOOKS)} curves.")
    for name, curve in ((name, curve) for panel in panels.values() for name, curve in panel.items()):
        lengths = {len(part) for part in (curve.x, curve.y, curve.error) if part is not None}
        if len(lengths) != 1:
            raise CausalProbeError(f"The curve {name!r} has parts of different lengths: {sorted(lengths)}.")
    x_names = [x_name] * len(panels) if isinstance(x_name, str) else x_name
    y_names = [y_name] * len(panels) if isinstance(y_name, str) else y_name
    if not len(panels) == len(x_names) == len(y_names):
        raise CausalProbeError(
            f"A drawing of {len(panels)} panels has a name of each axis for all, or one for each panel."
        )
    with drawing_style():
        figure = Drawing(figsize=(4.4 * len(panels) + 0.6, 3.5), layout="constrained")
        for axes, (heading, panel), x_label, y_label in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), x_names, y_names, strict=True
        ):
            style_axes(axes, grid=True)
            for curve, (colour, line, marker) in zip(panel.values(), _LOOKS, strict=False):
                x = np.asarray(curve.x, dtype=np.float64)
                y = np.asarray([np.nan if value is None else value for value in curve.y], dtype=np.float64)
                few: dict[str, Any] = {"marker": marker, "markersize": 3.5} if len(x) <= 40 else {}
                axes.plot(x, y, color=colour, linestyle=line, linewidth=1.5, **few)
                if curve.error is not None:
                    error = 2 * np.asarray(curve.error, dtype=np.float64)
                    axes.fill_between(x, y - error, y + error, color=colour, alpha=0.15, linewidth=0)
            axes.set_xscale(x_scale)
            if x_scale == "linear" and all(float(x).is_integer() for curve in panel.values() for x in curve.x):
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 2.5
            points = sorted({float(x) for curve in panel.values() for x in curve.x})
            if x_scale == "log" and len(points) <= MOST_TICKS:  # its own ticks would run into one another
                axes.set_xticks(points, [f"{x:,g}" for x in points])
                axes.xaxis.set_minor_locator(NullLocator())
            axes.set_yscale(y_scale)
            for index, (name, value) in enumerate((references or {}).get(heading, {}).items()):
                axes.axhline(value, color=MUTED, linewidth=1, linestyle=("dashed", "dotted", "dashdot")[index % 3])
                axes.annotate(
                    shorten(name, 60), (1, value), xycoords=("axes fraction", "data"), fontsize=8, color=MUTED,
                    ha="right", va="bottom", parse_math=False,
                )  # fmt: skip
            axes.set_xlabel(fit_lines(x_label, inches=3.6, fontsize=9), parse_math=False)
            axes.set_ylabel(fit_lines(y_label, inches=2.8, fontsize=9), parse_math=False)
            axes.set_title(fit_lines(heading, inches=4.2, fontsize=9.5), parse_math=False)
            # As texts: matplotlib leaves out what begins with an underscore, and reads dollar signs as mathematics.
            legend = axes.legend(axes.lines[: len(panel)], [str(place) for place in range(len(panel))], fontsize=8)
            for text, name in zip(legend.get_texts(), panel, strict=True):
                text.set_text(shorten(name, 60))
                text.set_parse_math(False)
        set_title(figure, title)
    return figure
