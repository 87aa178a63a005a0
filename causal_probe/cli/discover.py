"""``causal-probe discover``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from causal_probe.errors import CausalProbeError

__all__ = ["discover"]


def discover(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder of a Hugging Face model (encoders and classifiers too), a GGUF file, or a name on the hub.",
        ),
    ],
    text: Annotated[str, typer.Option(help="The text whose tokens are the nodes.")],
    layer: Annotated[int, typer.Option(help="Counted from 0; negative from the end.")] = -1,
    head: Annotated[str, typer.Option(help="all, a number, or mean (the average of all heads).")] = "all",
    algorithm: Annotated[
        Literal["pc", "fci", "icd", "ordered-icd"] | None,
        typer.Option(help="[default: ordered-icd where no token attends to a later one, else icd]"),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level of the tests of independence.")] = 0.01,
    samples: Annotated[str, typer.Option(help="auto (the model's width), or what the correlations count as.")] = "auto",
    source: Annotated[
        Literal["attention", "values"],
        typer.Option(help="Correlations from attention alone, or from the heads' outputs."),
    ] = "attention",
    residual: Annotated[
        float,
        typer.Option(
            help="Share of each token's own value that is counted beside attention; below 1. 0: the paper's reading."
        ),
    ] = 0.0,
    words: Annotated[bool, typer.Option("--words", help="Merge tokens into words.")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Explain the decision at this token: its text, or its number.")
    ] = None,
    max_size: Annotated[int, typer.Option(help="The largest explaining set that is tried.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="float64, float32, float16 or bfloat16. [default: float32]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for discovery.json and report.html.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a result of other settings in that folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print discovery.json alone on standard output.")] = False,
) -> None:
    """Read a causal graph over the tokens of a text out of a layer's attention, and explain a decision."""
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe import experiments

    chosen: Any = head if head in ("all", "mean") else _number("--head", head)
    result = experiments.discover_in_text(
        model,
        text,
        layer=layer,
        head=chosen,
        algorithm=algorithm,
        alpha=alpha,
        samples="auto" if samples == "auto" else _number("--samples", samples),
        source=source,
        residual=residual,
        words=words,
        explain=explain,
        max_size=max_size,
        dtype=dtype,
        device=device,
        out=out,
        overwrite=overwrite,
    )
    typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False) if as_json else repr(result))
    if out is not None:
        typer.echo(f"Report: {out / 'report.html'}", err=as_json)


def _number(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise CausalProbeError(
            f"{option} is {text!r}. It must be a whole number, or one of the words in --help."
        ) from error
