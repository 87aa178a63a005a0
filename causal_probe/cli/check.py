"""``causal-probe check``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["check"]


def check(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder of a saved DisentangledTransformer or a Hugging Face model, a GGUF file, or a name on the hub.",
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="float64, float32, float16 or bfloat16. [default: float32, or as it was saved]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Say what will work on a model: its hooks are looked at, and asked what is known beforehand. Exit code 1 if not all will."""
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe import experiments

    found = experiments.check_model(model, dtype=dtype, device=device)
    typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else str(found))
    if not found.ok:
        raise typer.Exit(1)
