"""A circuit of one prompt, drawn over its tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from causal_probe.viz.figure import Drawing, drawing_style, set_title, style_axes
from causal_probe.viz.palette import BLUE, GRID, INK, MUTED
from causal_probe.viz.text import show_token

__all__ = ["over_text"]

#: Inches for a token and for a level.
WIDE, HIGH = 0.9, 0.42
#: The width of a component's name, in tokens.
NODE = 0.62


def over_text(
    text: Sequence[str],
    edges: Iterable[tuple[str, str, float]],
    attention: Iterable[tuple[str, int, int, float]],
    *,
    title: str | None = None,
) -> Figure:
    """Components stand over the token at which they write or read, one level for each layer's heads and each layer's MLP.

    Parameters
    ----------
    text
        The prompt's tokens.
    edges
        (source, receiver, effect): ``("L16H0@5", "L18H6.k@5", 1.2)``; grey arrows, as wide as their effect.
    attention
        (head, query, key, share): blue arrows from the position that is read to the one that reads, as wide as the share.

    Returns
    -------
    matplotlib.figure.Figure
    """
    with drawing_style():
        return _draw(text, [*edges], [*attention], title)


def _draw(
    text: Sequence[str],
    edges: Sequence[tuple[str, str, float]],
    attention: Sequence[tuple[str, int, int, float]],
    title: str | None,
) -> Figure:
    nodes = {node for source, receiver, _ in edges for node in (source, _component(receiver))}
    nodes |= {f"{head}@{at}" for head, query, key, _ in attention for at in (query, key)}
    levels = {key: at for at, key in enumerate(sorted({_level(node) for node in nodes}))}
    used = sorted({_position(node) for node in nodes})
    standing: dict[tuple[int, int], list[str]] = {}  # by position and level
    for node in sorted(nodes):
        standing.setdefault((_position(node), levels[_level(node)]), []).append(node)
    column, width = {}, 0.0  # by position, its middle; a column is as wide as its fullest level
    for position in range(used[0], used[-1] + 1):
        own = max([1.0, *(NODE * len(here) for (at, _), here in standing.items() if at == position)])
        column[position] = width + own / 2
        width += own
    place = {
        node: (column[position] + NODE * (at - (len(here) - 1) / 2), height)
        for (position, height), here in standing.items()
        for at, node in enumerate(here)
    }
    figure = Drawing(figsize=(1.0 + WIDE * width, 1.2 + HIGH * len(levels)), layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes)
    most = max([abs(effect) for _, _, effect in edges], default=1.0) or 1.0
    for source, receiver, effect in edges:
        start, end = place[source], place[_component(receiver)]
        rise = end[1] - start[1]
        bend = 0.0 if rise <= 1 else 1 / (4 + rise)  # around what stands between
        thick = 0.6 + 2.4 * abs(effect) / most
        axes.add_patch(_arrow(start, end, thick, MUTED, bend, gid=f"edge-{source}-{receiver}"))
    for head, query, key, share in attention:
        if query != key:
            start, end = place[f"{head}@{key}"], place[f"{head}@{query}"]
            axes.add_patch(_arrow(start, end, 0.6 + 2.4 * share, BLUE, -0.15, gid=f"attention-{head}-{key}-{query}"))
    for node, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": INK, "linewidth": 0.7}
        axes.text(x, y, node.partition("@")[0], fontsize=6.5, ha="center", va="center", bbox=box, zorder=5)
    axes.set_xlim(-0.2, width + 0.2)
    axes.set_ylim(-0.8, len(levels) - 0.2)
    axes.set_xticks([*column.values()], [f"{show_token(text[at], limit=12)}\n{at}" for at in column], parse_math=False)
    axes.set_yticks(range(len(levels)), ["" for _ in levels])
    axes.grid(visible=True, axis="x", color=GRID, linewidth=0.5)
    axes.set_xlabel("token; grey: what is written and read there, blue: attention, from the token that is read")
    set_title(figure, title)
    return figure


def _arrow(
    start: tuple[float, float], end: tuple[float, float], width: float, colour: str, bend: float, *, gid: str
) -> FancyArrowPatch:
    return FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=7,
        linewidth=width,
        color=colour,
        alpha=0.8,
        connectionstyle=f"arc3,rad={bend}",
        shrinkA=9,
        shrinkB=9,
        gid=gid,
    )


def _component(receiver: str) -> str:
    return re.sub(r"\.[qkv]@", "@", receiver)


def _position(node: str) -> int:
    return int(node.rpartition("@")[2])


def _level(node: str) -> tuple[int, int]:
    """Embeddings, then each layer's heads and its MLP, then the logits."""
    name = node.partition("@")[0]
    if found := re.fullmatch(r"L(\d+)(\..*)?(H\d+)?", name):
        return int(found[1]), 0 if found[3] else 1
    return (10**6, 0) if name == "logits" else (-1, 0)
