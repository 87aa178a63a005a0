"""A causal graph as arcs over its positions: the truth above the line, what was found below it.

An edge that is right appears on both sides, as its own mirror image; whatever breaks the symmetry is a mistake, and is
told by its colour and its line style as well.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path
from numpy.typing import NDArray

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.graphs.check import backward_edges, listing, show_edge
from causal_probe.viz.figure import Drawing, drawing_style, fit_lines
from causal_probe.viz.palette import CANDIDATE, EXTRA, INK, MISSING, MUTED, PAPER, PLAIN, RIGHT, EdgeStyle
from causal_probe.viz.text import show_token

__all__ = ["graph"]

Edge = tuple[int, int]

# The axes fill the figure and one unit of data is one inch, so that text and arcs can be laid out together.
_WIDEST = 11.0
_NARROWEST = 6.5
_WIDEST_PITCH = 0.5
_TALLEST = 3.2
_LABEL_LIMIT = 14
_CROWDED = 40
_LEGEND = {
    "plain": "edges: {}",
    "candidate": "candidates, not claimed: {}",
    "right": "right: {}",
    "missing": "missing, in the truth only: {}",
    "extra": "extra, found only: {}",
}


@checked
def graph(
    truth: nx.Graph | None = None,
    found: nx.Graph | None = None,
    *,
    faint: nx.Graph | None = None,
    labels: Mapping[Any, object] | Sequence[object] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw one causal graph, or the true and the found one in one drawing.

    Nodes stand on a line in ascending order, components of a model (``"L1H0"``, ``"L1.mlp"``, ``"embed"``) by layer; edges are arcs from parent to child with an arrowhead at the child. Of two
    graphs, ``truth`` is drawn above the line and ``found`` below it: edges of both are solid and blue, missing ones
    (true, not found) dashed and vermillion, extra ones (found, not true) dotted and wine red. A reversed edge is one
    missing and one extra edge. One graph alone is drawn above the line, solid and dark.

    Parameters
    ----------
    truth, found
        Directed graphs (``networkx.DiGraph``) with edges parent -> child. Nodes are aligned by name, on the union of both. Among
        positions a parent comes before its child; only in a ``found`` graph beside the truth an edge may run back, as a mistake.
    faint
        Beside one graph alone, on the same side of the line: edges that are candidates, drawn pale and dashed where the graph hasn't them.
    labels
        The labels of the nodes: a mapping from node to label, or a sequence in the order of the nodes (the tokens of a
        sequence, say). The default are the nodes' own names. Labels are shown as text, whatever they hold, and cut
        after 14 characters; where nodes are too close for a label each, every k-th one is shown.
    title
        A title above the drawing.

    Returns
    -------
    matplotlib.figure.Figure
        Every arc is a patch with the gid ``{kind}-{parent}-{child}-{side}``: the kind is plain, right, missing or
        extra (or candidate), parent and child are positions on the line, the side is truth or found.

    Raises
    ------
    CausalProbeError
        If neither graph is given, one is undirected, a multigraph or has a self-loop, an edge runs back, there is no node at
        all, the nodes can't be ordered, or the labels don't fit the nodes.

    Examples
    --------
    >>> import networkx as nx
    >>> figure = graph(nx.DiGraph([(0, 1), (1, 2)]), nx.DiGraph([(0, 1), (0, 2)]), title="One edge of two is right")
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['right: 1', 'missing, in the truth only: 1', 'extra, found only: 1']
    >>> figure = graph(nx.DiGraph([("L2H3", "L10H0"), ("embed", "L2H3")]))
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['embed', 'L2H3', 'L10H0']
    """
    graphs = {side: given for side, given in (("truth", truth), ("found", found)) if given is not None}
    if faint is not None and len(graphs) != 1:
        raise CausalProbeError(f"Candidates are drawn beside one graph, and {len(graphs)} were given.")
    nodes = _ordered_nodes(graphs if faint is None else {**graphs, "candidates": faint})
    edges_between = [edge for given in graphs.values() for edge in given.edges] if all(map(_place_of, nodes)) else []
    if backward := [(u, v) for u, v in edges_between if _place_of(u) > _place_of(v)]:
        raise CausalProbeError(
            f"A component reads what earlier ones wrote; these edges run back: {listing(backward, show_edge)}."
        )
    place = {node: position for position, node in enumerate(nodes)}
    edges = {side: {(place[parent], place[child]) for parent, child in given.edges} for side, given in graphs.items()}
    kinds = _by_kind(edges)
    if faint is not None:
        side, claimed = next(iter(edges.items()))
        candidates = {(place[parent], place[child]) for parent, child in faint.edges}
        kinds, edges = {CANDIDATE: candidates - claimed, PLAIN: claimed}, {side: candidates | claimed}
    with drawing_style():
        return _draw(_node_labels(nodes, labels), edges, kinds, title)


def _ordered_nodes(graphs: Mapping[str, nx.Graph]) -> list[Hashable]:
    if not graphs:
        raise CausalProbeError("A graph was to be drawn and none was given. Pass truth=, found= or both.")
    problems = []
    for side, given in graphs.items():
        if not isinstance(given, nx.DiGraph) or given.is_multigraph():
            problems.append(f"{side} is a {type(given).__name__}, not a networkx.DiGraph")
        elif loops := sorted(nx.nodes_with_selfloops(given), key=repr):
            problems.append(f"{side} has edges from a node to itself, at {', '.join(map(repr, loops))}")
        elif (side == "truth" or len(graphs) == 1) and (backward := backward_edges(given)):
            problems.append(f"{side} has edges whose parent comes after its child, {listing(backward, show_edge)}")
    if problems:
        raise CausalProbeError(f"A causal graph was to be drawn, but {'; '.join(problems)}.")
    nodes = {node for given in graphs.values() for node in given.nodes}
    if not nodes:
        raise CausalProbeError("A graph was to be drawn and it has no node.")
    if all(_place_of(node) for node in nodes):
        return sorted(nodes, key=lambda node: (_place_of(node), str(node)))
    try:
        return sorted(nodes)
    except TypeError as error:
        raise CausalProbeError(f"The nodes are drawn in ascending order and these have none: {error}.") from error


def _place_of(node: Hashable) -> tuple[int, ...]:
    """Where a component of a model stands, by its name: embeddings, then by layer its heads, then its MLP, the logits last; empty for other nodes.

    >>> sorted(["logits", "L10H0", "L2.mlp", "L2H11", "L2H3.token", "embed"], key=_place_of)
    ['embed', 'L2H3.token', 'L2H11', 'L2.mlp', 'L10H0', 'logits']
    """
    if node == "logits":
        return (10**9,)
    if node in ("embed", "pos_embed", "token", "position"):
        return (-1,)
    # A part of a head's output goes by the head, as in L0H0.token.
    found = re.fullmatch(r"L(\d+)(?:H(\d+)(?:\..+)?|\.(heads|mlp))", node) if isinstance(node, str) else None
    if found is None:
        return ()
    layer, head, whole = found.groups()
    return (int(layer), 1, 0) if whole == "mlp" else (int(layer), 0, int(head or 0))


def _node_labels(nodes: list[Hashable], labels: Mapping[Any, object] | Sequence[object] | None) -> list[str]:
    if labels is None:
        texts = [str(node) for node in nodes]
    elif isinstance(labels, Mapping):
        if unknown := [node for node in nodes if node not in labels]:
            raise CausalProbeError(f"Every node needs a label; these have none: {', '.join(map(repr, unknown))}.")
        texts = [str(labels[node]) for node in nodes]
    elif isinstance(labels, str) or len(labels) != len(nodes):
        found = "one string" if isinstance(labels, str) else f"{len(labels)} labels"
        raise CausalProbeError(
            f"The graph has {len(nodes)} nodes and {found} came with it. Give one label for each node."
        )
    else:
        texts = [str(label) for label in labels]
    return [show_token(text, limit=_LABEL_LIMIT) for text in texts]


def _by_kind(edges: Mapping[str, set[Edge]]) -> dict[EdgeStyle, set[Edge]]:
    """The edges of each kind that this drawing can have, those to look at last (they are drawn on top)."""
    if len(edges) == 1:
        return {PLAIN: next(iter(edges.values()))}
    truth, found = edges["truth"], edges["found"]
    return {RIGHT: truth & found, MISSING: truth - found, EXTRA: found - truth}


def _draw(
    names: list[str], edges: Mapping[str, set[Edge]], kinds: Mapping[EdgeStyle, set[Edge]], title: str | None
) -> Figure:
    n = len(names)
    pitch = min(_WIDEST_PITCH, _WIDEST / n)
    width = max(_NARROWEST, n * pitch + 0.5)
    x = (width - n * pitch) / 2 + pitch * (np.arange(n, dtype=np.float64) + 0.5)
    row = _LabelRow.fitting(names, pitch)
    longest = max((abs(child - parent) for drawn in edges.values() for parent, child in drawn), default=1)

    def arc_height(span: int) -> float:
        """Inches over the line, less than proportional to the span: a far edge must not dwarf the near ones."""
        return float(min(0.2, _TALLEST / longest**0.6) * span**0.6)

    reach = row.half_height + arc_height(longest) + 0.2
    up, down = reach, reach if len(edges) == 2 else row.half_height + 0.1
    heading = None if title is None else fit_lines(title, inches=width, fontsize=11)
    title_height, legend_height = 0.05 if heading is None else 0.28 + 0.17 * len(heading.splitlines()), 0.4
    height = title_height + up + down + legend_height

    figure = Drawing(figsize=(width, height))
    axes = figure.add_axes((0, legend_height / height, 1, (up + down) / height))
    axes.set(xlim=(0, width), ylim=(-down, up))
    axes.set_axis_off()

    crowded = len(kinds) > 1 and sum(map(len, kinds.values())) > _CROWDED
    for layer, (style, of_kind) in enumerate(kinds.items()):
        for side, sign in zip(edges, (1, -1), strict=False):
            for parent, child in sorted(of_kind & edges[side]):
                # An arc leaves a node on the side of its child and arrives on the side of its parent: both stay apart.
                shift = np.sign(child - parent) * 0.2 * pitch
                _draw_arc(
                    axes,
                    start=x[parent] + shift,
                    end=x[child] - shift,
                    foot=sign * row.half_height,
                    height=sign * arc_height(abs(child - parent)),
                    head=sign * min(0.1, 0.6 * pitch),
                    style=style,
                    linewidth=float(np.clip(1.8 - n / 125, 0.9, 1.6)) * (1.0 if layer == 0 else 1.25),
                    # Among many edges the right ones step back, so that a wrong one is seen at once.
                    alpha=0.55 if layer == 0 and crowded else 1.0,
                    zorder=2 + layer,
                    gid=f"{style.name}-{parent}-{child}-{side}",
                )
    row.draw(axes, x)
    if len(edges) == 2:
        for side, y, align in (("truth", up - 0.05, "top"), ("found", 0.05 - down, "bottom")):
            axes.text(0.15, y, side, va=align, color=MUTED, fontsize=11, fontstyle="italic", parse_math=False)
    if heading is not None:
        y = 1 - 0.1 / height
        figure.text(0.5, y, heading, ha="center", va="top", fontsize=11, fontweight="bold", parse_math=False)
    _draw_legend(figure, kinds)
    return figure


def _draw_arc(
    axes: Axes,
    *,
    start: float,
    end: float,
    foot: float,
    height: float,
    head: float,
    style: EdgeStyle,
    linewidth: float,
    alpha: float,
    zorder: int,
    gid: str,
) -> None:
    # A cubic Bezier curve whose inner points stand 4/3 h over its ends rises to h, and ends upright: the arrowhead is
    # a triangle on the child, drawn apart so that a dashed line has a whole one.
    peak = foot + 4 / 3 * height
    path = Path([(start, foot), (start, peak), (end, peak), (end, foot + head)], [Path.MOVETO] + 3 * [Path.CURVE4])
    line = {"edgecolor": style.colour, "linestyle": style.line, "linewidth": linewidth, "clip_on": False}
    axes.add_patch(PathPatch(path, fill=False, alpha=alpha, zorder=zorder, gid=gid, **line))
    half = 0.4 * abs(head)
    corners = [(end, foot), (end - half, foot + head), (end + half, foot + head)]
    axes.add_patch(Polygon(corners, closed=True, facecolor=style.colour, edgecolor="none", alpha=alpha, zorder=zorder))


def _draw_legend(figure: Figure, kinds: Mapping[EdgeStyle, set[Edge]]) -> None:
    handles = []
    for style, edges in kinds.items():
        look: dict[str, Any] = {"color": style.colour, "linestyle": style.line, "linewidth": 1.8}
        handles.append(Line2D([], [], label=_LEGEND[style.name].format(len(edges)), **look))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), handlelength=3.2, fontsize=9)


@dataclasses.dataclass(frozen=True)
class _LabelRow:
    """The nodes' labels on the line, each in a rounded box: upright text where all fit side by side, else turned by 90 degrees."""

    names: list[str]
    pitch: float  # inches between nodes
    fontsize: float  # points
    turned: bool
    half_height: float  # inches from the line to where arcs start

    @classmethod
    def fitting(cls, names: list[str], pitch: float) -> _LabelRow:
        longest = max(map(_columns, names)) * 0.64  # ems
        room = 72 * pitch  # points
        turned = longest * 8 > 0.8 * room
        # Below 6 points nobody reads a label: then there are fewer of them.
        fontsize = float(np.clip(0.8 * room, 6, 9)) if turned else float(min(9, 0.8 * room / longest))
        length = (longest if turned else 1.2) * fontsize / 72
        return cls(names, pitch, fontsize, turned, half_height=length / 2 + 0.07)

    def draw(self, axes: Axes, x: NDArray[np.float64]) -> None:
        every = int(np.ceil(self.fontsize * 1.2 / (72 * self.pitch))) if self.turned else 1
        half_width = 0.41 * self.pitch
        rounding = min(0.06, 0.9 * half_width)
        across = {"rotation": 90, "va": "center"} if self.turned else {"rotation": 0, "va": "center_baseline"}
        look: dict[str, Any] = {
            "ha": "center",
            "fontsize": self.fontsize,
            "color": INK,
            "parse_math": False,
            "zorder": 6,
            **across,
        }
        for position, (name, centre) in enumerate(zip(self.names, x, strict=True)):
            corner = (centre - half_width + rounding, -self.half_height + rounding)
            size = (2 * (half_width - rounding), 2 * (self.half_height - rounding))
            box = FancyBboxPatch(corner, *size, boxstyle=f"round,pad={rounding}", facecolor=PAPER, edgecolor="none")
            box.set_zorder(1)
            axes.add_patch(box)
            if position % every == 0:
                axes.text(centre, 0, name, **look)


def _columns(text: str) -> int:
    """The width of ``text`` in columns of a terminal: two for a wide character of East Asia or an emoji."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
