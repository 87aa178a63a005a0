"""The one place for colours and line styles: the same colour means the same in every picture.

Hues are from the colour-blind-safe sets of Okabe & Ito ("Color Universal Design", 2008) and Tol ("Colour Schemes",
SRON/EPS/TN/09-002). Nothing is told by hue alone: edges differ by line style too, and heat maps by lightness.
"""

from __future__ import annotations

import dataclasses

from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.typing import LineStyleType

__all__ = [
    "BLUE",
    "CANDIDATE",
    "DIVERGING",
    "EXTRA",
    "GRID",
    "INK",
    "MISSING",
    "MUTED",
    "PAPER",
    "PLAIN",
    "RIGHT",
    "SEQUENTIAL",
    "EdgeStyle",
]

#: Text and outlines.
INK = "#1f2933"
#: Secondary text, axes, reference lines.
MUTED = "#5f6b7a"
#: Hairlines and separators.
GRID = "#d8dee6"
#: Faint fills: nodes, stages of a training run, masked cells.
PAPER = "#eef1f5"
#: Measured values: a loss curve, attention, a positive matrix entry.
BLUE = "#0072b2"
#: The opposite of :data:`BLUE` in diverging heat maps.
VERMILLION = "#d55e00"


@dataclasses.dataclass(frozen=True)
class EdgeStyle:
    """How one kind of edge looks: ``colour`` (hex) and ``line`` (a matplotlib line style); ``name`` says which kind."""

    name: str
    colour: str
    line: LineStyleType


#: An edge of a graph that is drawn alone, with nothing to compare it with.
PLAIN = EdgeStyle("plain", INK, "solid")
#: An edge of both the truth and the found graph.
RIGHT = EdgeStyle("right", BLUE, "solid")
#: An edge of the truth that was not found.
MISSING = EdgeStyle("missing", VERMILLION, (0, (4, 2)))
#: An edge that was found and is not true.
EXTRA = EdgeStyle("extra", "#882255", (0, (1, 1.2)))

#: From 0 to the largest value.
SEQUENTIAL: Colormap = LinearSegmentedColormap.from_list(
    "causal_probe_sequential", ["#ffffff", "#9ecae9", BLUE, "#00304d"]
)
#: From the largest negative to the largest positive value, white at 0.
DIVERGING: Colormap = LinearSegmentedColormap.from_list(
    "causal_probe_diverging", ["#5c2600", VERMILLION, "#f6c29b", "#ffffff", "#9ecae9", BLUE, "#00304d"]
)
#: An edge that nothing was claimed of.
CANDIDATE = EdgeStyle("candidate", "#b0bac6", (0, (3, 2)))
