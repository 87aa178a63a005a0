"""Pictures and reports: what was found, drawn so that it can be shown to others.

Every function returns an object and shows nothing by itself: a :class:`matplotlib.figure.Figure` (made without pyplot)
or circuitsvis' ``RenderedHTML``. A :class:`Report` gathers them in one HTML file that needs no network.

- :func:`graph`: the true graph and the one that was found, in one drawing;
- :func:`mixed`: a graph over the tokens of a text whose edges have a mark at either end;
- :func:`blocks`: blocks of the attention matrices as heat maps;
- :func:`heads`: one score for every head, as a heat map;
- :func:`table_map`: a small labelled table, as a heat map;
- :func:`curves`: quantities against a common axis, with their standard errors;
- :func:`training`: a loss curve beside its reference predictors;
- :func:`attention`: attention patterns over the tokens of one sequence, by circuitsvis.
"""

from __future__ import annotations

from causal_probe.viz.attention import attention
from causal_probe.viz.blocks import blocks
from causal_probe.viz.curves import Curve, curves
from causal_probe.viz.figure import write_svg
from causal_probe.viz.graph import graph
from causal_probe.viz.heads import heads
from causal_probe.viz.mixed import mixed
from causal_probe.viz.report import Report
from causal_probe.viz.table_map import table_map
from causal_probe.viz.training import training

__all__ = [
    "Curve",
    "Report",
    "attention",
    "blocks",
    "curves",
    "graph",
    "heads",
    "mixed",
    "table_map",
    "training",
    "write_svg",
]


def __dir__() -> list[str]:
    return [*__all__]
