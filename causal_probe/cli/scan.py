"""``causal-probe scan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from causal_probe.cli.options import AsJson, Device, Dtype, Model, Overwrite, show

__all__ = ["scan"]


def scan(
    model: Model,
    templates: Annotated[
        str | None,
        typer.Option(
            help="Head types between commas: previous-token, duplicate-token, induction, induction-2gram, current-token, "
            "first-token, offset-3; graph:FILE or successor-of-parent:FILE for a known graph; FILE.py:NAME for your own "
            "function. [default: all but those that need a number or a file]"
        ),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="How many sequences. [default: 32, more where they are short]")
    ] = None,
    period: Annotated[
        int | None, typer.Option(help="Tokens before they repeat. [default: 50, or what the model can take]")
    ] = None,
    bos: Annotated[
        Literal["auto", "yes", "no"],
        typer.Option(help="Whether a BOS token comes first; auto: what the tokenizer does by itself."),
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences in a forward pass. [default: what 256 MiB hold]")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Scan text instead of random tokens: a text file, .jsonl, .parquet, or a folder of them. Intervals by bootstrap."
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Of the corpus: tokens in a sequence. [default: 128, or what the model can take]")
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(
            help="Of the corpus: the line between two documents of a text file. [default: a file is one document]"
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Of the corpus: where a line of JSON, or a row, has its text.")] = "text",
    shard: Annotated[
        str,
        typer.Option(help="Of the corpus: i/n, every n-th document from i. `causal-probe merge` puts them together."),
    ] = "0/1",
    dtype: Dtype = None,
    device: Device = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Ablate the heads that stand out: does the model use them?")
    ] = False,
    blocks: Annotated[
        bool,
        typer.Option("--blocks", help="Take the best heads' scores apart: which earlier heads make them attend there?"),
    ] = False,
    top: Annotated[int, typer.Option(help="How many heads of a type are listed at most.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the sequences.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for scan.json, scan.csv and report.html.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Score every attention head of a model: previous-token, duplicate-token, induction and other heads."""
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe import experiments

    result = experiments.scan(
        model,
        templates=None if templates is None else [name.strip() for name in templates.split(",")],
        sequences=sequences,
        period=period,
        bos=bos,
        seed=seed,
        batch_size=batch_size,
        corpus=corpus,
        length=length,
        separator=separator,
        field=field,
        shard=shard,
        dtype=dtype,
        device=device,
        verify=verify,
        blocks=blocks,
        top=top,
        out=out,
        overwrite=overwrite,
        progress=True,
    )
    show(result, as_json=as_json, out=out)
