"""``causal-probe reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from causal_probe.cli.options import AsJson, Overwrite, resumable, show

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
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Do a paper's experiment again: its figures, and our numbers beside the paper's."""
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe import papers

    if name is None:
        typer.echo("\n".join(papers.REPRODUCTIONS))
        return

    def kept() -> str | None:
        parts = out and out / papers.PARTS
        return f"Finished parts and the training so far are kept in {parts}" if parts and parts.is_dir() else None

    with resumable(kept):
        result = papers.reproduce(name, quick=quick, seed=seed, out=out, overwrite=overwrite, progress=True)
    show(result, as_json=as_json, out=out)
