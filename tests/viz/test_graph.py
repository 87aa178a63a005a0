"""viz.graph: which edges are drawn, on which side, and how they look; that labels stay apart."""

from __future__ import annotations

import re
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

from causal_probe import viz
from causal_probe.errors import CausalProbeError
from causal_probe.viz import palette


def graph_of(n: int, *edges: tuple[int, int]) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(edges)
    return graph


def arcs(figure: Figure) -> dict[str, PathPatch]:
    """The arcs of a drawing by their gid."""
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]
    return {str(patch.get_gid()): patch for patch in patches}


TRUTH = graph_of(5, (0, 1), (1, 2), (0, 4))
FOUND = graph_of(5, (0, 1), (0, 2), (0, 4), (2, 3))


def test_edges_by_kind_and_side() -> None:
    assert set(arcs(viz.graph(TRUTH, FOUND))) == {
        "right-0-1-truth",
        "right-0-1-found",
        "right-0-4-truth",
        "right-0-4-found",
        "missing-1-2-truth",
        "extra-0-2-found",
        "extra-2-3-found",
    }


def test_colours_and_lines_are_the_palettes() -> None:
    drawn = arcs(viz.graph(TRUTH, FOUND))
    for style in (palette.RIGHT, palette.MISSING, palette.EXTRA):
        of_kind = [patch for gid, patch in drawn.items() if gid.startswith(style.name)]
        assert {patch.get_edgecolor() for patch in of_kind} == {matplotlib_colour(style.colour)}
        assert {patch.get_linestyle() for patch in of_kind} == {style.line}


def matplotlib_colour(colour: str) -> tuple[float, ...]:
    return (*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)


def test_arcs_join_parent_and_child_above_and_below() -> None:
    drawn = arcs(viz.graph(TRUTH, FOUND))
    places = {text.get_text(): text.get_position()[0] for text in viz.graph(TRUTH, FOUND).axes[0].texts}
    for gid, patch in drawn.items():
        _, parent, child, side = gid.split("-")
        (start, foot), *_, (end, _) = np.asarray(patch.get_path().vertices)
        halfway = 0.5 * abs(places["1"] - places["0"])
        assert abs(start - places[parent]) < halfway
        assert abs(end - places[child]) < halfway
        assert (foot > 0) == (side == "truth")


def test_the_drawing_of_an_exact_recovery_is_its_own_mirror_image() -> None:
    drawn = arcs(viz.graph(TRUTH, TRUTH))
    assert len(drawn) == 2 * TRUTH.number_of_edges()
    for parent, child in TRUTH.edges:
        above = drawn[f"right-{parent}-{child}-truth"].get_path().vertices
        below = drawn[f"right-{parent}-{child}-found"].get_path().vertices
        np.testing.assert_allclose(np.asarray(above) * [1, -1], below)


def test_a_reversed_edge_is_one_missing_and_one_extra() -> None:
    assert set(arcs(viz.graph(graph_of(2, (0, 1)), graph_of(2, (1, 0))))) == {"missing-0-1-truth", "extra-1-0-found"}


@pytest.mark.parametrize("side", ["truth", "found"])
def test_one_graph_alone_is_plain_and_above_the_line(side: str) -> None:
    figure = viz.graph(**{side: TRUTH})
    assert set(arcs(figure)) == {f"plain-{parent}-{child}-{side}" for parent, child in TRUTH.edges}
    assert all(np.asarray(patch.get_path().vertices)[0, 1] > 0 for patch in arcs(figure).values())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["edges: 3"]


def test_nodes_are_aligned_by_name() -> None:
    """The second graph lacks node 0: its edges must not slide to the left."""
    found = nx.DiGraph([(1, 2)])
    assert set(arcs(viz.graph(graph_of(3, (1, 2)), found))) == {"right-1-2-truth", "right-1-2-found"}


def test_no_edges() -> None:
    legend = viz.graph(graph_of(3), graph_of(3)).legends[0]
    assert [text.get_text()[-1] for text in legend.get_texts()] == ["0", "0", "0"]


def label_boxes(figure: Figure, names: list[str]) -> list[tuple[float, float]]:
    """The horizontal extent of each label, in pixels, from left to right."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.axes[0].texts if text.get_text() in names]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    return sorted((box.x0, box.x1) for box in boxes)


@pytest.mark.parametrize(
    ("n", "labels"), [(20, None), (100, None), (20, "a longer token"), (100, "token"), (250, None)]
)
def test_labels_do_not_overlap(n: int, labels: str | None) -> None:
    names = [f"{labels}{i}"[-14:] if labels else str(i) for i in range(n)]
    graph = graph_of(n, (0, 1), (n - 2, n - 1))
    boxes = label_boxes(viz.graph(graph, graph, labels=names), [name.replace(" ", "␣") for name in names])
    assert len(boxes) == n if n <= 100 else n / 5 < len(boxes) < n
    assert all(right <= left for (_, right), (left, _) in pairwise(boxes))


def test_labels_are_shown_as_text() -> None:
    hostile = {0: "$x^2", 1: "</text><script>", 2: "\ud800", 3: "\n", 4: "\N{RIGHT-TO-LEFT OVERRIDE}a"}
    figure = viz.graph(TRUTH, labels=hostile, title="$\\nothing \ud800")
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == ["$x^2", "</text><scrip…", "\\ud800", "\\n", "\\u202ea"]
    FigureCanvasAgg(figure).draw()  # a dollar sign would be read as mathematics here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "none was given"),
        ({"truth": nx.Graph([(0, 1)])}, "truth is a Graph"),
        ({"found": nx.MultiDiGraph([(0, 1)])}, "found is a MultiDiGraph"),
        ({"truth": nx.DiGraph([(3, 3)])}, "from a node to itself, at 3"),
        ({"truth": nx.DiGraph([(5, 2)])}, "truth has edges whose parent comes after its child, 5 -> 2"),
        ({"found": nx.DiGraph([(5, 2), (0, 1)])}, "found has edges whose parent comes after its child, 5 -> 2"),
        ({"truth": nx.DiGraph([(5, 2)]), "found": TRUTH}, "truth has edges whose parent comes after its child, 5 -> 2"),
        ({"truth": nx.DiGraph()}, "no node"),
        ({"truth": nx.DiGraph([(0, "a")])}, "ascending order"),
        ({"truth": TRUTH, "labels": ["a"]}, "5 nodes and 1 labels"),
        ({"truth": TRUTH, "labels": "abcde"}, "`labels` is 'abcde'"),
        ({"truth": TRUTH, "labels": {0: "a", 2: "b"}}, "have none: 1, 3, 4"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        viz.graph(**arguments)


def test_all_problems_at_once() -> None:
    with pytest.raises(CausalProbeError, match=r"truth is a Graph.*found has edges from a node to itself"):
        viz.graph(nx.Graph([(0, 1)]), nx.DiGraph([(1, 1)]))


# ------------------------------------------------------------------------------------------------------- colour blindness

# Machado, Oliveira & Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
# severity 1.0, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(colour: str, deficiency: np.ndarray) -> np.ndarray:
    """CIELAB of a colour as it is seen."""
    rgb = np.array(matplotlib_colour(colour)[:3])
    linear = np.clip(deficiency @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = np.cbrt(xyz / [0.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_kinds_of_edges_differ_for_every_eye(deficiency: str) -> None:
    kinds = [lab(style.colour, DEFICIENCIES[deficiency]) for style in (palette.RIGHT, palette.MISSING, palette.EXTRA)]
    distances = [float(np.linalg.norm(a - b)) for i, a in enumerate(kinds) for b in kinds[:i]]
    assert min(distances) > 25  # about 2.3 is just noticeable


def test_no_two_kinds_share_a_line_style() -> None:
    assert len({palette.RIGHT.line, palette.MISSING.line, palette.EXTRA.line}) == 3
