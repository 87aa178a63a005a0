"""The loss of a training run beside the losses of predictors that are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.viz.figure import Drawing, drawing_style, fit_lines, set_title, style_axes
from causal_probe.viz.palette import BLUE, MUTED, PAPER
from causal_probe.viz.text import shorten

__all__ = ["training"]

# From this number of steps on, the beginning of a run is lost on a linear axis.
_MANY_STEPS = 200
_REFERENCE_LINES = ("dashed", "dotted", "dashdot", (0, (6, 2)), (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))


@checked
def training(
    history: Any,
    references: Mapping[str, float | None] | None = None,
    *,
    title: str | None = None,
    loss_name: str = "loss (nats)",
) -> Figure:
    """Draw a loss curve, with the loss of each reference predictor as a labelled horizontal line.

    Parameters
    ----------
    history
        A mapping with these entries, or an object with these attributes, all of one length: ``step``, ascending numbers;
        ``loss``, the loss at each step, None where it wasn't measured; optionally ``stage``, the name of the stage that
        each step belongs to. Stages are marked along the top.
    references
        The loss of each reference predictor by its name, in the unit of the losses. One that is None is left out.
    title
        A title above the drawing.
    loss_name
        The label of the vertical axis.

    Returns
    -------
    matplotlib.figure.Figure
        The curve is the first line of the first axes. Steps are on a linear axis to step 200; runs that are longer get
        one that is linear to step 1 and logarithmic beyond, because most learning happens early.

    Raises
    ------
    CausalProbeError
        If ``step`` or ``loss`` is missing, lengths differ, steps don't ascend, or no loss is a finite number.

    Examples
    --------
    >>> figure = training({"step": [0, 10, 20], "loss": [1.1, 0.9, 0.7]}, {"uniform": 1.0986, "known graph": 0.68})
    >>> figure.axes[0].get_xscale()
    'linear'
    """
    steps, losses, stages = _checked(history if isinstance(history, Mapping) else getattr(history, "__dict__", {}))
    measured = [index for index, loss in enumerate(losses) if loss is not None]
    curve = np.asarray([losses[index] for index in measured], dtype=np.float64)
    finite = np.isfinite(curve)
    levels = {name: loss for name, loss in (references or {}).items() if loss is not None}
    if wrong := [name for name, loss in levels.items() if not np.isfinite(loss)]:
        raise CausalProbeError(
            f"The loss of a reference predictor must be a finite number or None: {', '.join(wrong)}."
        )
    if not finite.any():
        raise CausalProbeError("A history was to be drawn and none of its losses is a finite number.")
    with drawing_style():
        figure = Drawing(figsize=(8.0, 3.9), layout="constrained")
        axes = figure.subplots()
        style_axes(axes, grid=True)
        marker = "o" if len(curve) <= 40 else ""
        axes.plot(
            steps[measured], np.where(finite, curve, np.nan), color=BLUE, linewidth=1.6, marker=marker, markersize=2.5
        )
        axes.set_xlabel("training step")
        axes.set_ylabel(fit_lines(loss_name, inches=3.0, fontsize=9), parse_math=False)
        if steps[-1] > _MANY_STEPS:
            axes.set_xscale("symlog", linthresh=1.0, linscale=0.3)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
            axes.set_xlabel("training step (logarithmic from step 1)")
        axes.set_xlim(steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1)
        values = np.concatenate([curve[finite], [*levels.values()]])
        margin = 0.08 * (float(np.ptp(values)) or 1.0)
        axes.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
        _draw_references(axes, levels)
        _draw_stages(axes, steps, stages)
        if not finite.all():
            note = f"The loss is NaN or infinite at {(~finite).sum()} of {len(curve)} steps, which are left out."
            axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", color=MUTED)
        set_title(figure, title)
    return figure


def _checked(history: Mapping[str, Any]) -> tuple[NDArray[np.float64], list[float | None], list[str]]:
    """Steps, losses and, if there are any, stages."""
    if absent := [key for key in ("step", "loss") if key not in history]:
        raise CausalProbeError(f"A history holds its steps and its losses; this one lacks {' and '.join(absent)}.")
    lengths = {key: len(history[key]) for key in ("step", "loss", "stage") if key in history}
    if len(set(lengths.values())) != 1 or not lengths["step"]:
        raise CausalProbeError(f"The lists of a history must be of one length of at least 1; found {lengths}.")
    try:
        steps = np.asarray([float(step) for step in history["step"]])
        losses = [None if loss is None else float(loss) for loss in history["loss"]]
    except (TypeError, ValueError) as error:
        raise CausalProbeError(f"The steps and losses of a history must be numbers: {error}.") from error
    if not np.isfinite(steps).all() or (np.diff(steps) <= 0).any():
        raise CausalProbeError("The steps of a history must ascend, each larger than the one before.")
    return steps, losses, [shorten(str(stage), 24) for stage in history.get("stage", ())]


def _draw_references(axes: Axes, levels: Mapping[str, float]) -> None:
    """Horizontal lines, each with its name and value at the right; names of lines that are close are moved apart."""
    ordered = sorted(levels.items(), key=lambda item: item[1])
    low, high = axes.get_ylim()
    apart = 0.055 * (high - low)  # a line of text, in units of the loss
    heights = _spread([level for _, level in ordered], apart)
    for index, ((name, level), height) in enumerate(zip(ordered, heights, strict=True)):
        line = _REFERENCE_LINES[index % len(_REFERENCE_LINES)]
        axes.axhline(level, color=MUTED, linestyle=line, linewidth=1.1, gid=f"reference-{index}")
        axes.annotate(
            f"{shorten(name, 40)}  {level:.3f}",
            xy=(1.0, level),
            xytext=(1.025, height),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=MUTED,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0},
            annotation_clip=False,
            parse_math=False,
        )


def _spread(levels: Sequence[float], apart: float) -> list[float]:
    """Ascending ``levels``, moved as little as keeps each ``apart`` from the next: clusters spread about their mean."""
    clusters: list[list[float]] = []
    for level in levels:
        clusters.append([level])
        # Is the top of the one, and a distance more, above the bottom of the next?
        while len(clusters) > 1 and (
            _bottom(clusters[-2], apart) + apart * (len(clusters[-2]) - 1) + apart > _bottom(clusters[-1], apart)
        ):
            last = clusters.pop()
            clusters[-1].extend(last)
    return [_bottom(cluster, apart) + apart * index for cluster in clusters for index in range(len(cluster))]


def _bottom(cluster: Sequence[float], apart: float) -> float:
    return sum(cluster) / len(cluster) - apart * (len(cluster) - 1) / 2


def _draw_stages(axes: Axes, steps: NDArray[np.float64], stages: Sequence[str]) -> None:
    if not stages:
        return
    runs = [
        (name, [steps[index] for index, _ in group])
        for name, group in groupby(enumerate(stages), key=lambda pair: pair[1])
    ]
    edges = [taken[0] for _, taken in runs] + [axes.get_xlim()[1]]
    for index, ((name, _), start, end) in enumerate(zip(runs, edges[:-1], edges[1:], strict=True)):
        if index % 2 == 0:
            axes.axvspan(start, end, color=PAPER, zorder=0, linewidth=0, gid=f"stage-{index}")
        if index:
            axes.axvline(start, color=MUTED, linewidth=0.7, zorder=1)
        # The middle of the stage as it is seen, on whatever scale the steps are.
        left, right = axes.transData.transform([(start, 0), (end, 0)])[:, 0]
        middle = axes.transAxes.inverted().transform(((left + right) / 2, 0))[0]
        look: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8.5, "color": MUTED, "parse_math": False}
        axes.text(middle, 1.02, name, transform=axes.transAxes, **look)
