"""A mixed graph over the tokens of a text: arcs with a mark at either end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import networkx as nx
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.graphs.mixed import mixed_edges
from causal_probe.viz.figure import Drawing, drawing_style, fit_lines
from causal_probe.viz.palette import EXTRA, INK, MISSING, MUTED, PAPER, RIGHT
from causal_probe.viz.text import show_token

__all__ = ["mixed"]

_TALLEST = 3.4


@checked
def mixed(
    graph: nx.DiGraph,
    labels: Sequence[object],
    *,
    highlight: Collection[int] = (),
    target: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw a mixed graph over the nodes 0..n-1, which stand on a line in the order of the text.

    At each end of an arc stands its mark: a triangle for an arrow, an open ring for a circle, nothing for a tail. Arcs with two
    arrows (a common latent cause) run below the line, all others above it; those at the target are drawn strong.

    Parameters
    ----------
    graph
        A mixed graph (:mod:`causal_probe.graphs.mixed`).
    labels
        Labels of the nodes, shown as text and cut after 14 characters.
    highlight
        Nodes to mark, of an explanation say.
    target
        The node that is explained.
    title
        A title above the drawing.

    Raises
    ------
    CausalProbeError
        If the graph is not over 0..n-1 or the labels don't fit.

    Examples
    --------
    >>> from causal_probe.graphs import mixed_graph
    >>> figure = mixed(mixed_graph(3, [(0, "o", ">", 1), (1, "<", ">", 2)]), ["a", "b", "c"])
    >>> sorted(patch.get_gid() for patch in figure.axes[0].patches if patch.get_gid())
    ['edge-0-1', 'edge-1-2']
    """
    n = len(labels)
    if sorted(graph) != list(range(n)) or not n:
        raise CausalProbeError(
            f"The graph has {len(graph)} nodes and {n} labels came with it. Give one for each node 0..n-1."
        )
    with drawing_style():
        return _draw(graph, [show_token(str(label), limit=14) for label in labels], set(highlight), target, title)


def _draw(graph: nx.DiGraph, names: list[str], highlight: set[int], target: int | None, title: str | None) -> Figure:
    n = len(names)
    pitch = float(np.clip(11 / n, 0.24, 0.6))
    width = max(6.5, n * pitch + 0.5)
    x = (width - n * pitch) / 2 + pitch * (np.arange(n) + 0.5)
    half = 0.06 + 0.5 * 0.64 * 9 / 72 * max(map(len, names))
    edges = mixed_edges(graph)
    two_arrows = {(u, v) for u, v in edges if graph.edges[u, v]["mark"] == graph.edges[v, u]["mark"] == "arrow"}
    spans = [[v - u for u, v in edges if ((u, v) in two_arrows) == below] for below in (False, True)]
    up, down = (half + 0.25 + (_rise(max(side), n) if side else 0) for side in spans)
    heading = fit_lines(title, inches=width, fontsize=11) if title else ""
    top, bottom = 0.1 + (0.13 + 0.17 * len(heading.splitlines()) if heading else 0.0), 0.45
    height = up + down + top + bottom
    figure = Drawing(figsize=(width, height))
    axes = figure.add_axes((0, bottom / height, 1, (up + down) / height))
    axes.set(xlim=(0, width), ylim=(-down, up))
    axes.set_axis_off()
    for u, v in sorted(edges, key=lambda edge: target in edge):
        sign = -1 if (u, v) in two_arrows else 1
        strong = target is None or target in (u, v)
        colour = MISSING.colour if sign < 0 else RIGHT.colour
        look: dict[str, Any] = {"alpha": 0.9 if strong else 0.18, "zorder": 3 if strong else 2, "clip_on": False}
        foot, peak = sign * half, sign * (half + 4 / 3 * _rise(v - u, n))
        ends = {u: x[u] + 0.16 * pitch, v: x[v] - 0.16 * pitch}
        marks = {u: graph.edges[v, u]["mark"], v: graph.edges[u, v]["mark"]}
        size = min(0.1, 0.4 * pitch)
        feet = {end: foot + (0 if marks[end] == "tail" else sign * size) for end in (u, v)}
        path = Path(
            [(ends[u], feet[u]), (ends[u], peak), (ends[v], peak), (ends[v], feet[v])],
            [Path.MOVETO] + 3 * [Path.CURVE4],
        )
        axes.add_patch(PathPatch(path, fill=False, edgecolor=colour, linewidth=1.3, gid=f"edge-{u}-{v}", **look))
        for end in (u, v):
            if marks[end] == "arrow":
                corners = [
                    (ends[end], foot),
                    *((ends[end] + side * size, foot + sign * size) for side in (-0.45, 0.45)),
                ]
                axes.add_patch(Polygon(corners, closed=True, facecolor=colour, edgecolor="none", **look))
            elif marks[end] == "circle":
                centre = (ends[end], foot + sign * size / 2)
                axes.add_patch(Circle(centre, size / 2, facecolor="white", edgecolor=colour, linewidth=1.1, **look))
    for node, name in enumerate(names):
        box = EXTRA.colour if node in highlight else INK if node == target else PAPER
        corner = (x[node] - 0.32 * pitch, -half + 0.06)
        look = {"boxstyle": "round,pad=0.03", "facecolor": box, "edgecolor": "none", "zorder": 4}
        axes.add_patch(FancyBboxPatch(corner, 0.64 * pitch, 2 * half - 0.12, **look))
        ink = "white" if node in highlight or node == target else INK
        look = {"ha": "center", "va": "center", "rotation": 90, "parse_math": False}
        axes.text(x[node], 0, name, fontsize=9, color=ink, zorder=6, **look)
    look = {"ha": "center", "parse_math": False}
    if heading:
        figure.text(0.5, 1 - 0.08 / height, heading, va="top", fontsize=11, fontweight="bold", **look)
    note = "triangle: arrow (not a cause) · ring: circle (undecided) · bare: tail (a cause) · below the line: <-> (a latent common cause)"
    figure.text(0.5, 0.1 / height, note, va="bottom", fontsize=8, color=MUTED, **look)
    return figure


def _rise(span: int, n: int) -> float:
    """Inches over the line, less than proportional to the span."""
    return float(min(0.28, _TALLEST / max(n - 1, 1) ** 0.6) * span**0.6)
