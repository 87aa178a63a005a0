"""``causal-probe leaderboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from causal_probe.cli.options import AsJson, Device, Dtype, Overwrite, show

__all__ = ["leaderboard"]


def leaderboard(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Folders of models, GGUF files, or names on the hub, one or more."),
    ],
    graphs: Annotated[
        str, typer.Option(help="Graphs between commas: chain, pairs, lag-2 (any number), forest, or files.")
    ] = "chain,pairs,lag-2,lag-3",
    positions: Annotated[
        int | None, typer.Option(help="Tokens of a sequence. [default: 64, or what the context holds]")
    ] = None,
    states: Annotated[int, typer.Option(help="Number of states, each a word of the model's vocabulary.")] = 8,
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration of the transition rows.")] = 0.1,
    sequences: Annotated[int, typer.Option(help="How many sequences of each graph.")] = 64,
    bos: Annotated[
        Literal["auto", "yes", "no"],
        typer.Option(help="Whether a BOS token comes first; auto: what the tokenizer does by itself."),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the sequences.")] = 0,
    dtype: Dtype = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for leaderboard.json, leaderboard.csv and report.html.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Which causal structures can these models read in their context?"""
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe import experiments

    result = experiments.leaderboard(
        models,
        [name.strip() for name in graphs.split(",")],
        positions=positions,
        states=states,
        alpha=alpha,
        sequences=sequences,
        bos=bos,
        seed=seed,
        dtype=dtype,
        device=device,
        out=out,
        overwrite=overwrite,
        progress=True,
    )
    show(result, as_json=as_json, out=out)
