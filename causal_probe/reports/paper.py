"""The report on the reproduction of a figure: our numbers beside the paper's."""

from __future__ import annotations

import dataclasses

from causal_probe import viz
from causal_probe.papers.base import Reproduction
from causal_probe.reports.pages import made, report
from causal_probe.viz import report as page

__all__ = ["reproduction_page"]

#: The columns of a report's table.
LINES = "Each quantity: ours with its standard error, where it is an estimate; the paper's; what ours was checked by; whether it holds."


@report.register
def reproduction_page(result: Reproduction) -> viz.Report:
    """The report on this result, to be written as one offline HTML file."""
    columns = ["quantity", "ours", "standard error", "paper", "checked by", "holds", "note"]
    rows = [tuple(_cell(value) for value in dataclasses.astuple(line)) for line in result.lines]
    pictures = [page.Picture(figure, result.captions.get(name, "")) for name, figure in result.figures.items()]
    sections = [page.Section("Result", [page.Table(columns, rows, LINES)])]
    if pictures:
        sections.append(page.Section("Figures", pictures))
    if result.notes:
        sections.append(page.Section("Notes", [page.Paragraph("\n\n".join(result.notes))]))
    return made(result, result.title, result.summary, sections)


def _cell(value: object) -> object:
    return "" if value is None else value
