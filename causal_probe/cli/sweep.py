"""``causal-probe sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from causal_probe.cli.options import AsJson, resumable, show

__all__ = ["sweep"]


def sweep(
    spec: Annotated[
        Path,
        typer.Argument(
            help="A YAML file: probes (recover, gradient, scan, head_graphs), a grid of values by option or a list of cells, settings "
            "that all share, threads."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for cells/ (Parquet), failed/, summary.csv and report.html. What is finished there is not run again."
        ),
    ],
    jobs: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    backend: Annotated[
        Literal["loky", "dask"], typer.Option(help="loky: processes on this machine. dask: a Dask cluster.")
    ] = "loky",
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler. [default: a cluster on this machine]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run probes over many models, tasks, seeds and settings. Run it again to go on after an interruption."""
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe.sweep import sweep as run

    with resumable(lambda: "Finished cells are kept"):
        found = run(spec, out=out, jobs=jobs, backend=backend, scheduler=scheduler, progress=True)
    show(found, as_json=as_json, out=out)
    if found.failed:
        raise SystemExit(1)
