"""``causal-probe merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from causal_probe.cli.options import AsJson, Overwrite, show

__all__ = ["merge"]


def merge(
    shards: Annotated[
        list[Path], typer.Argument(help="Folders that `causal-probe scan --corpus ... --shard i/n --out` has written.")
    ],
    partial: Annotated[bool, typer.Option("--partial", help="Go on if shards are missing; say which.")] = False,
    top: Annotated[int, typer.Option(help="How many heads of a type are listed at most.")] = 10,
    out: Annotated[
        Path | None, typer.Option(help="Folder for scan.json, scan.csv, scores.safetensors and report.html.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Put the scans of a corpus' shards together: exactly what one scan of the whole would give."""
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe import experiments

    found = experiments.merge_scans(shards, partial=partial, top=top, out=out, overwrite=overwrite)
    show(found, as_json=as_json, out=out)
