"""The report on a sweep: what was run, what it gave at each point, and what failed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from causal_probe import viz
from causal_probe.reports.pages import made, report
from causal_probe.sweep.result import Sweep
from causal_probe.viz import report as page
from causal_probe.viz.report import Block

__all__ = ["sweep_page"]

#: So many points and errors are listed; summary.csv and failed/ hold all.
LISTED = 60
#: Of a table's columns, what is a point's and not a metric.
ABOUT = ("cell", "probe", "seed", "status", "error", "rows")


@report.register
def sweep_page(result: Sweep) -> viz.Report:
    """The report that ``causal-probe sweep`` writes."""
    table = result.summary()
    finished = len(result.cells) - len(result.failed)
    return made(
        result,
        "A sweep",
        f"{finished} of {len(result.cells)} cells are finished, {len(result.failed)} failed.",
        [
            page.Section("Result", [page.Headline(_headline(result, table)), *_points(result, table)]),
            *([page.Section("What failed", list(_failures(result)))] if result.failed else []),
        ],
        settings=dict(result.spec),
        call=f"from causal_probe import sweep\n\nsweep.sweep({dict(result.spec)!r}, out={str(result.folder)!r})",
    )


def _headline(result: Sweep, table: pd.DataFrame) -> list[tuple[str, object, str]]:
    return [
        ("cells", len(result.cells), "a probe at a point with a seed"),
        ("finished", len(result.cells) - len(result.failed), "their rows are in cells/"),
        ("failed", len(result.failed), "they are tried again when the sweep is run again"),
        ("seeds", int(table["seed"].nunique()), "different ones"),
    ]


def _points(result: Sweep, table: pd.DataFrame) -> Iterator[Block]:
    """By probe: each point's metrics, their mean over seeds."""
    for probe in dict.fromkeys(cell.probe for cell in result.cells):
        its = table[(table["probe"] == probe) & (table["status"] == "finished")].dropna(axis=1, how="all")
        if its.empty:
            continue
        named = {name for cell in result.cells if cell.probe == probe for name in cell.options}
        varied = [name for name in its.columns if name in named and its[name].astype(str).nunique() > 1]
        metrics = [
            name
            for name in its.columns
            if name not in (*ABOUT, *named) and pd.to_numeric(its[name], errors="coerce").notna().any()
        ]
        groups = list(its.groupby([its[name].astype(str) for name in varied] or (lambda _: ""), sort=False))
        rows = [
            (
                *(_option(of_point[name].iloc[0]) for name in varied),
                len(of_point),
                *(_mean(of_point[name]) for name in metrics),
            )
            for _, of_point in groups[:LISTED]
        ]
        left = (
            f" Left out: {len(groups) - LISTED} more points, which are in summary.csv." if len(groups) > LISTED else ""
        )
        yield page.Table(
            [*varied, "cells", *(name.replace("_", " ") for name in metrics)],
            rows,
            f"{probe}: the options that vary, the number of cells at each point, and the mean of each metric over them; yes "
            f"counts as 1.{left}",
        )


def _failures(result: Sweep) -> Iterator[Block]:
    failed = [(cell, result.failed[cell.key]) for cell in result.cells if cell.key in result.failed]
    rows = [
        (cell.probe, ", ".join(f"{name}={value}" for name, value in cell.options.items()), cell.seed, error)
        for cell, error in failed[:LISTED]
    ]
    left = len(result.failed) - len(rows)
    yield page.Table(
        ["probe", "options", "seed", "error"],
        rows,
        f"Each with its traceback in failed/.{f' Left out: {left} more.' if left else ''}",
    )


def _option(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _mean(values: pd.Series[Any]) -> float | None:
    mean = float(pd.to_numeric(values, errors="coerce").astype(float).mean())
    return None if math.isnan(mean) else mean
