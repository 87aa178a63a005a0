"""The report on a graph that was read from gradients."""

from __future__ import annotations

import numpy as np

from causal_probe import viz
from causal_probe.experiments.recover_by_gradient import GradientRecovery
from causal_probe.first_gradient.result import GradientGraph
from causal_probe.reports.pages import report
from causal_probe.results import versions
from causal_probe.viz import report as page

__all__ = ["gradient_page"]

#: More positions than this are not drawn as a heat map: a cell would be smaller than a pixel or two. The page says so.
DRAWN = 64


@report.register
def gradient_page(result: GradientRecovery) -> viz.Report:
    """The report that ``causal-probe recover --method gradient`` writes."""
    truth = result.truth
    return viz.Report(
        title="A causal graph, read from a gradient",
        summary=(
            "No model was trained. The gradient of an untrained two-layer model's loss with respect to its attention was taken once, and "
            "its largest entries name each position's parent."
            + (
                ""
                if result.why_undecided is None
                else f" Whether a position has a parent at all is not decided: {result.why_undecided}."
            )
        ),
        sections=[
            page.Section(
                "Result",
                [
                    page.Picture(
                        viz.graph(result.recovered) if truth is None else viz.graph(truth, result.recovered),
                        "An arc runs from parent to child."
                        + ("" if truth is None else " The true graph above the line, the found one below it."),
                    ),
                    page.Table(
                        ["what", "value"],
                        result.rows(),
                        "What was found, and the losses of exact predictors beside it (nats).",
                    ),
                ],
            ),
            page.Section("Evidence", [*_heat_maps(result), *_tables(result)]),
        ],
        settings=result.settings,
        versions=versions(),
        call=result.call,
        citation=result.cite(),
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


def _tables(result: GradientRecovery) -> list[page.Table]:
    found = result.found
    size = found.evidence.shape[-1]
    undrawn = (
        f" Heat maps of the evidence are left out, as there are more than {DRAWN} positions ({size}): attention.safetensors holds all of it."
        if size > DRAWN
        else ""
    )
    if isinstance(found, GradientGraph):
        rows = [
            (
                row.child,
                row.candidate,
                _with_error(row.evidence, row.stderr),
                _with_error(found.margin[row.child], found.margin_stderr[row.child]),
                None if found.log_e_values is None else float(found.log_e_values[row.child]),
                row.left,
                row.decision,
            )
            for row in found.to_pandas().itertuples()
        ]
        return [
            page.Table(
                ["child", "leading", "evidence", "margin", "nats against a root", "may be", "decision"],
                rows,
                "Each with one standard error. Margin: the largest entry minus the second-largest, undefined where there is no second."
                + (
                    f" Root or parent, what has more than {found.limit:.1f} nats against it is given up; what is left is a confidence set, and an edge where "
                    "the leading node is all of it."
                    if found.decided
                    else ""
                )
                + undrawn,
            )
        ]
    log_e = found.log_e_values
    return [
        page.Table(
            ["node", "parents", "nats against a root"],
            [
                (
                    node,
                    ", ".join(map(str, its)) or None,
                    None if log_e is None or node >= len(log_e) else float(log_e[node]),
                )
                for node, its in enumerate(found.parents)
            ],
            f"The last node is the predicted one; its parents are the queries that carry signal. Gains: {', '.join(f'{g:.4f}' for g in found.gains)} nats."
            + (
                ""
                if log_e is None
                else f" A node gets parents where a bet on some wins more nats against a root than a level of {found.settings['level']:g} asks for; "
                "which nodes they are is the largest evidence, not a test, and a node whose number of parents is neither the "
                "predicted one's nor one appears as a root."
            )
            + (
                f" The search was cut off at {len(found.queries)}, as more need too large a derivative: the predicted node may have more parents, "
                "and so may others."
                if found.cut_off
                else ""
            )
            + undrawn,
        )
    ]


def _with_error(value: float | None, error: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.3f}" if error is None or error != error else f"{value:.3f}\u00a0±\u00a0{error:.3f}"
