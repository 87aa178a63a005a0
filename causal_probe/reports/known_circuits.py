"""The report on methods that find circuits, on circuits that are known."""

from __future__ import annotations

from causal_probe import viz
from causal_probe.circuits.edge_methods import EDGE_METHODS
from causal_probe.experiments.judged_methods import JudgedMethods
from causal_probe.reports.pages import made, report
from causal_probe.reports.pictures import plot
from causal_probe.viz import report as page

__all__ = ["known_circuits_page"]

HOW_TO_READ = (
    "Every edge of these models is known: which source, read by which receiver, the answer depends on. A method gives each edge a number. AUROC is the probability that a true edge has a "
    "larger one than a false edge; 0.5 is chance. Each method is held to the truth of its own contrast: what a part and its replacement have in common is in no circuit. The column "
    "against all contrasts counts every edge that is true under any."
)
CLAIMS = "What is claimed at a level, and how much of it is not true. The circuit is the unit; bound: circuits with a false claim within the one-sided 99% binomial bound of the level."


@report.register
def known_circuits_page(result: JudgedMethods) -> viz.Report:
    """The report, to be written as one offline HTML file."""
    best, claims = result.summary(), result.false_claims()
    n = len({row.circuit for row in result.rows})
    columns = [
        "kind",
        "method",
        "contrast",
        "circuits",
        "auroc",
        "auroc_stderr",
        "average_precision",
        "auroc_all",
        "seconds",
    ]
    rows = best[columns].round(4).astype(object).where(best[columns].notna(), None).to_numpy().tolist()
    about = [(name, EDGE_METHODS[name].description) for name in result.settings["methods"] if name in EDGE_METHODS]
    sections = [
        page.Section(
            "Result",
            [
                page.Paragraph(HOW_TO_READ),
                page.Picture(plot(result), "AUROC by method and kind of circuit, mean over circuits."),
                page.Table(columns, rows, "Means over circuits; seconds: CPU time of one circuit."),
            ],
        ),
        page.Section("By kind of edge", [page.Picture(plot(result, "edges"), "AUROC by method and kind of edge.")]),
        page.Section("Methods", [page.Table(["method", "what it is"], about, "Each in one line.")]),
    ]
    if len(claims):
        shown = claims.round(4).astype(object).to_numpy().tolist()
        sections.insert(1, page.Section("Claims", [page.Table([*claims.columns], shown, CLAIMS)]))
    if result.refused:
        sections.append(
            page.Section(
                "Not asked",
                [
                    page.Table(
                        ["method, circuit", "why"], [*result.refused.items()], "What a method could not be asked for."
                    )
                ],
            )
        )
    return made(
        result,
        "Methods that find circuits, on circuits that are known",
        f"{n} circuits, {len(about)} methods.",
        sections,
    )
