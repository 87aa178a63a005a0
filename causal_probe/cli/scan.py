"""``causal-probe scan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["scan"]


def scan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder of a saved DisentangledTransformer or a Hugging Face model, a GGUF file, or a name on the hub.",
        ),
    ],
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
    dtype: Annotated[
        str | None, typer.Option(help="float64, float32, float16 or bfloat16. [default: float32, or as it was saved]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Ablate the heads that stand out: does the model use them?")
    ] = False,
    top: Annotated[int, typer.Option(help="How many heads of a type are listed at most.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the sequences.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for scan.json, scan.csv and report.html.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a result of other settings in that folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print scan.json alone on standard output.")] = False,
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
        dtype=dtype,
        device=device,
        verify=verify,
        top=top,
        out=out,
        overwrite=overwrite,
        progress=True,
    )
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    else:
        typer.echo(repr(result))
    if out is not None:
        typer.echo(f"Report: {out / 'report.html'}", err=as_json)
