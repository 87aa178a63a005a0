"""``causal-probe recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from causal_probe.cli.by_gradient import by_gradient
from causal_probe.cli.options import AsJson, Device, Dtype, Overwrite, options_given, resumable, show
from causal_probe.errors import CausalProbeError

__all__ = ["recover"]


#: Options that say how a model is trained, with what they mean to one that is only read.
ABOUT_TRAINING = {
    "vocab": "the states are --states",
    "heads": "it has its own",
    "training": "nothing is trained",
    "optimizer": "nothing is trained",
    "learning_rate": "nothing is trained",
    "steps": "nothing is trained",
    "batch_size": "it follows from the length",
    "root_probability": "give the forest as a file",
}
#: Options that say how a model is read.
ABOUT_READING = ("states", "sequences", "bos", "words", "verify", "dtype")


def recover(
    graph: Annotated[
        str,
        typer.Option(
            help="chain, pairs, lag-2 (any number), forest, two-parent, or a file in node-link JSON, GraphML or edge-list form."
        ),
    ] = "forest",
    model: Annotated[
        str | None,
        typer.Option(
            help="Train nothing: ask this model whether it reads the graph in its context. A folder, a GGUF file, or a name on "
            "the hub; the states become words of its vocabulary."
        ),
    ] = None,
    method: Annotated[
        Literal["training", "gradient"],
        typer.Option(help="training: train a model and probe it. gradient: train nothing, read one gradient."),
    ] = "training",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Token sequences of your own instead of a task: a .npy file of whole numbers [sequence, T + 1], the last token being "
            "what came next. Parents are found by gradient; whether a position has one is not decided."
        ),
    ] = None,
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
        Path | None,
        typer.Option(
            help="Folder for result.json, graph.json, recovered.json, the model and report.html. While a model trains, a checkpoint "
            "is kept there: the same command goes on where it was interrupted."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    states: Annotated[int, typer.Option(help="With --model: number of states.")] = 8,
    sequences: Annotated[
        int,
        typer.Option(
            help="With --model or --method gradient: how many sequences. [default: 64; 32768 for a gradient, 131072 for several parents]",
            show_default=False,
        ),
    ] = 64,
    bos: Annotated[
        Literal["auto", "yes", "no"],
        typer.Option(help="With --model: whether a BOS token comes first; auto: what the tokenizer does by itself."),
    ] = "auto",
    words: Annotated[
        str | None,
        typer.Option(help="With --model: a word for each state, between commas. [default: drawn for every sequence]"),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="With --model: ablate the heads that see the graph; does the answer get worse?")
    ] = True,
    dtype: Dtype = None,
) -> None:
    """Train a transformer on a task of known causal graph, read the graph out of it, and compare with the truth."""
    values = locals()
    given = options_given()
    # torch and TransformerLens take seconds to import: --help needs neither.
    from causal_probe import experiments

    if data is not None or method == "gradient":
        show(by_gradient(values, given), as_json=as_json, out=out)
        return
    if model is not None:
        if named := [f"--{name.replace('_', '-')} ({why})" for name, why in ABOUT_TRAINING.items() if name in given]:
            raise CausalProbeError(f"With --model these options mean nothing: {', '.join(named)}. Leave them out.")
        show(
            experiments.in_context_graph(
                model,
                graph,
                positions=positions,
                states=states,
                alpha=alpha,
                sequences=sequences,
                words=None if words is None else [word.strip() for word in words.split(",")],
                bos=bos,
                seed=seed,
                verify=verify,
                dtype=dtype,
                device=device,
                out=out,
                overwrite=overwrite,
                progress=True,
            ),
            as_json=as_json,
            out=out,
        )
        return
    if named := [f"--{name}" for name in ABOUT_READING if name in given]:
        raise CausalProbeError(f"{', '.join(named)} is about reading a model that is named with --model, and none was.")

    def kept() -> str | None:
        checkpoint = out and out / experiments.CHECKPOINT_FILE
        return f"The training so far is kept in {checkpoint}" if checkpoint and checkpoint.is_file() else None

    with resumable(kept):
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
