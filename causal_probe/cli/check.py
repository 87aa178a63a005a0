"""``causal-probe check``."""

from __future__ import annotations

import json

import typer

from causal_probe.cli.options import AsJson, Device, Dtype, Model

__all__ = ["check"]


def check(
    model: Model,
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what will work on a model: its hooks are looked at, and asked what is known beforehand. Exit code 1 if not all will."""
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe import experiments

    found = experiments.check_model(model, dtype=dtype, device=device)
    typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else str(found))
    if not found.ok:
        raise typer.Exit(1)
