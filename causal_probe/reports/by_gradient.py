"""The report on a graph that was read from gradients."""

from __future__ import annotations

import numpy as np

from causal_probe import viz
from causal_probe.experiments.gradient_recovery import GradientRecovery
from causal_probe.first_gradient.result import GradientGraph
from causal_probe.reports.pages import made, plus_minus, report
from causal_probe.reports.pictures import plot
from causal_probe.viz import report as page

__all__ = ["gradient_page"]

#: More positions than this are not drawn as a heat map: a cell would be smaller than a pixel or two. The page says so.
DRAWN = 64


@report.register
def gradient_page(result: GradientRecovery) -> viz.Report:
    """The report that ``causal-probe recover --method gradient`` writes."""
    truth, why = result.truth, result.why_undecided
    compared = "" if truth is None else " The true graph above the line, the found one below it."
    return made(
        result,
        "A causal graph, read from a gradient",
        "No model was trained. The gradient of an untrained two-layer model's loss with respect to its attention was taken once, and "
        "its largest entries name each position's candidate parent."
        f"{'' if why is None else f' Whether a position has a parent at all is not decided: {why}.'}",
        [
            page.Section(
                "Result",
                [
                    page.Picture(plot(result), f"An arc runs from parent to child.{compared}"),
                    page.Table(
                        ["what", "value"],
                        result.table().rows,
                        "What was found, and the losses of exact predictors beside it (nats).",
                    ),
                ],
            ),
            page.Section("Evidence", [*_heat_maps(result), _table(result)]),
        ],
    )


def _heat_maps(result: GradientRecovery) -> list[page.Picture]:
    found = result.found
    if isinstance(found, GradientGraph):
        maps = {"gradient: child x parent": np.tril(found.evidence, -1)}
    else:
        maps = {f"query {query}: child x parent": np.tril(found.evidence[query], -1) for query in found.queries}
    size = found.evidence.shape[-1]
    if not maps or size > DRAWN:
        return []
    edges = [] if result.truth is None else [(c, p) for p, c in result.truth.edges if c < size]
    return [
        page.Picture(
            viz.blocks(maps, marks=dict.fromkeys(maps, edges), value_name="minus the gradient"),
            "Minus the gradient with respect to layer 0's pattern, in the units of chi-square information."
            + (" True edges are outlined." if edges else ""),
        )
    ]


def _table(result: GradientRecovery) -> page.Table:
    found = result.found
    size = found.evidence.shape[-1]
    undrawn = (
        f" Heat maps of the evidence are left out, as there are more than {DRAWN} positions ({size}): attention.safetensors holds all of it."
        if size > DRAWN
        else ""
    )
    log_e = found.log_e_values
    if isinstance(found, GradientGraph):
        decided = (
            f" Root or parent, what has more than {found.limit:.1f} nats against it is given up; what is left is a confidence set, and an edge "
            "where the leading node is all of it."
        )
        return page.Table(
            ["child", "leading", "evidence", "margin", "nats against a root", "may be", "decision"],
            [
                (
                    row.child,
                    row.candidate,
                    plus_minus(row.evidence, row.stderr),
                    plus_minus(found.margin[row.child], found.margin_stderr[row.child]),
                    None if log_e is None else float(log_e[row.child]),
                    row.left,
                    row.decision,
                )
                for row in found.to_pandas().itertuples()
            ],
            "Each with one standard error. Margin: the largest entry minus the second-largest, undefined where there is no second."
            f"{decided if found.decided else ''}{undrawn}",
        )
    tested = (
        f" A node gets parents where a bet on some wins more nats against a root than a level of {found.settings['level']:g} asks for; "
        "which nodes they are is the largest evidence, not a test, and a node whose number of parents is neither the "
        "predicted one's nor one appears as a root."
    )
    cut = (
        f" The search was cut off at {len(found.queries)}, as more need too large a derivative: the predicted node may have more parents, "
        "and so may others."
    )
    return page.Table(
        ["node", "parents", "nats against a root"],
        [(node, parents or None, nats) for node, parents, nats in found.table().rows],
        f"The last node is the predicted one; its parents are the queries that carry signal. Gains: "
        f"{', '.join(f'{g:.4f}' for g in found.gains)} nats.{'' if log_e is None else tested}{cut if found.cut_off else ''}{undrawn}",
    )
