"""``causal-probe reproduce``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["reproduce"]


def reproduce(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Which experiment; without it, all names are listed.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller one, in less than five minutes.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for result.json, the figures and report.html. The same command goes on where it stopped."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a result of other settings in that folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print result.json alone on standard output.")] = False,
) -> None:
    """Do a paper's experiment again: its figures, and our numbers beside the paper's."""
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe import experiments

    if name is None:
        typer.echo("\n".join(experiments.REPRODUCTIONS))
        return
    result = experiments.reproduce(name, quick=quick, seed=seed, out=out, overwrite=overwrite, progress=True)
    typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False) if as_json else repr(result))
    if out is not None:
        typer.echo(f"Report: {out / 'report.html'}", err=as_json)
