"""``causal-probe recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from causal_probe.cli.options import AsJson, Device, Overwrite, show
from causal_probe.errors import CausalProbeError

__all__ = ["recover"]


def recover(
    graph: Annotated[
        str,
        typer.Option(help="chain, pairs, forest, two-parent, or a file in node-link JSON, GraphML or edge-list form."),
    ] = "forest",
    positions: Annotated[
        int | None, typer.Option(help="Tokens that the model sees, T. [default: the file's own, else 20]")
    ] = None,
    vocab: Annotated[int, typer.Option(help="Number of states.")] = 3,
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration of the transition rows.")] = 0.1,
    root_probability: Annotated[
        float, typer.Option(help="Probability that a node of a random forest is a root.")
    ] = 0.5,
    heads: Annotated[str, typer.Option(help="Heads per layer, from the first to the last.")] = "1,1",
    seed: Annotated[int, typer.Option(help="Seed of the graph, the weights and all sequences.")] = 0,
    training: Annotated[
        Literal["staged", "joint"],
        typer.Option(help="staged: the graph first, then the rest. joint: all weights together, nothing given."),
    ] = "staged",
    optimizer: Annotated[
        Literal["sgd", "adamw"] | None,
        typer.Option(help="Of joint training, or of the second stage. [default: sgd joint, adamw staged]"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Of joint training, or of the second stage. [default: 0.03 staged; joint: 1 sgd, 0.01 adamw]"
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Of joint training, or of the second stage. [default: 500 staged; joint: 384 sgd, 1024 adamw]"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Sequences per step of joint training, or of the second stage. [default: 512 staged; joint: 4096 sgd, 1024 adamw]"
        ),
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for result.json, graph.json, recovered.json, the model and report.html.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train a transformer on a task of known causal graph, read the graph out of it, and compare with the truth."""
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe import experiments

    result = experiments.recover(
        graph,
        positions=positions,
        vocab=vocab,
        alpha=alpha,
        root_probability=root_probability,
        heads=_numbers(heads),
        seed=seed,
        training=training,
        optimizer=optimizer,
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        device=device,
        out=out,
        overwrite=overwrite,
        progress=True,
    )
    show(result, as_json=as_json, out=out)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise CausalProbeError(
            f"--heads was given {text!r}; it takes whole numbers between commas, one per layer, such as 2,1."
        ) from None
