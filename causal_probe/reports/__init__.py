"""The pages: one offline HTML report for each kind of result, its picture, and the folder in which a result and its page are kept."""

from __future__ import annotations

# Each registers its pages.
from causal_probe.reports import (  # noqa: F401
    by_gradient,
    circuit,
    discovery,
    evidence,
    in_context,
    known_circuits,
    node_circuit,
    paper,
    recovery,
    scan,
    sequences,
    structure,
    sweep,
)
from causal_probe.reports.pages import report
from causal_probe.reports.pictures import plot as plot
from causal_probe.reports.saving import load, save, write_page

__all__ = ["load", "report", "save", "write_page"]


def __dir__() -> list[str]:
    return [*__all__]
