"""Nichani, Damian & Lee 2024, Figure 8: a standard transformer with an MLP learns the same first layer."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig

from causal_probe import graphs, viz
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.known_graphs import PAPER, parent_attention, true_graph
from causal_probe.papers.shared import quick_note, set_weights, thinned, weights_of
from causal_probe.probes import head_graphs, scan
from causal_probe.tasks import InContextMarkov, generator, reference_losses
from causal_probe.training import minimise, task_loss
from causal_probe.training.stages import Stage

__all__ = ["figure_8"]

#: The paper's task and model: a residual stream of width 30, one head in each of two layers, ReLU.
POSITIONS, VOCAB, ALPHA = 20, 10, 0.1
WIDTH, LAYERS, HEADS, HIDDEN = 30, 2, 1, 120
#: The paper's training, and the one of quick runs.
RATE, DECAY = 1e-2, 2e-4
SIZE = {False: {"steps": 2**12, "batch_size": 1024}, True: {"steps": 2**10, "batch_size": 256}}
#: Layer 0's mean attention to the previous token: the paper's, read off its figure, and what ours must attain.
THEIRS, ATTAINED = 0.7, 0.65
WATCHING, EVALUATION = 256, 2**13


@reproduction("figure-8", "A standard transformer with an MLP learns the chain in its first layer", minutes=(1, 8))
def figure_8(run: Run) -> Reproduction:
    """A TransformerLens model on the chain, and the probes of this package on it."""
    task = InContextMarkov(graphs.chain(POSITIONS - 1), VOCAB, ALPHA)
    size = SIZE[run.quick]
    stage = Stage("training", **size, optimizer="adamw", learning_rate=RATE, moves=("all",), schedule="cosine", weight_decay=DECAY)  # fmt: skip
    every = max(1, size["steps"] // 32)
    settings = {"stage": dataclasses.asdict(stage), "every": every}

    def fit_it() -> dict[str, Any]:
        model = residual_transformer(run.seed)
        source = generator(run.seed, "training")
        watching = task.sample(WATCHING, generator(run.seed, "watching")).tokens
        checkpoint = run.checkpoint("model", settings=settings)
        notes: dict[str, Any] = {} if checkpoint is None else checkpoint.notes

        def loss(batch_size: int) -> Tensor:
            batch = task.sample(batch_size, source)
            return task_loss(model(batch.tokens)[:, -1], batch.target).mean()

        def watch(step: int) -> None:
            if step % every == 0:
                notes.setdefault("seen", []).append([step, parent_attention(task, head_graphs(model, watching))[0]])

        history = minimise(
            model, loss, [stage], callback=watch, generator=source, checkpoint=checkpoint, progress=run.progress
        )
        step, attention = zip(*notes["seen"], strict=True)
        return {"step": step, "attention": attention, "losses": thinned(history.loss), **weights_of(model)}

    kept = run.part("model", fit_it, settings=settings)
    model = set_weights(residual_transformer(run.seed), kept)
    batch = task.sample(EVALUATION, generator(run.seed, "evaluation"))
    pieces = torch.split(batch.tokens, 1024)
    # The rows of the chain's children: row 0 has no token before it, and the last token is a query whose predecessor says nothing.
    scores = scan(model, pieces, templates=["previous-token"], queries=list(range(1, POSITIONS - 1)))
    first, second = list(scores)[:2]
    attention = head_graphs(model, pieces)
    on_parent, leading = parent_attention(task, attention)
    with torch.no_grad():
        logits = torch.cat([model(piece)[:, -1] for piece in pieces])
    losses = task_loss(logits, batch.target).double()
    known = reference_losses(task, batch)
    assert first.score is not None
    called = [f"L{score.layer}H{score.head}" for score in scores.called()]
    steps = f"{size['steps']:,} steps of {size['batch_size']:,}"
    lines = (
        Line("layer 0: mean attention to the previous token (scan)", first.score, first.stderr, f"about {THEIRS}", "read off the paper's figure", first.score >= ATTAINED, f"at least {ATTAINED}"),
        Line("layer 1: mean attention to the previous token (scan)", second.score, second.stderr, None, "", None, "the layer that compares"),
        Line("heads that the scan calls previous-token", ", ".join(called) or "none", None, "layer 0's", "the paper, in words", called == ["L0H0"], "L0H0 alone"),
        Line("layer 0: mean attention on the true parent (head graphs)", on_parent, None, f"about {THEIRS}", "on the chain it is the same quantity, by another probe", abs(on_parent - first.score) < 1e-3, "equal to the scan's, within 1e-3"),
        Line("layer 0: true parents that lead", leading, None, None, "", leading == 1, "all"),
        Line("loss (nats)", float(losses.mean()), float(losses.std() / len(losses) ** 0.5), None, "", bool(losses.mean() < known["in-context unigram"]), f"below in-context unigram, {known['in-context unigram']:.4f}; known graph {known['known-graph']:.4f}"),
    )  # fmt: skip
    patterns = {f"layer {layer}": attention.values[layer][0] for layer in range(LAYERS)}
    edges = [(child, parent) for parent, child in true_graph(task).edges]
    stretch = size["steps"] / len(kept["losses"])
    return Reproduction(
        name="figure-8",
        title="A standard transformer with an MLP learns the chain in its first layer",
        paper=PAPER,
        summary=f"After {steps} sequences layer 0 attends to the previous token with weight {first.score:.3f} (the paper: about {THEIRS}); the loss is "
        f"{float(losses.mean()):.4f} nats beside {known['known-graph']:.4f} for the known-graph predictor.",
        lines=lines,
        figures={
            "training": viz.curves(
                {
                    "loss": {"model": viz.Curve(stretch * (np.arange(len(kept["losses"])) + 0.5), kept["losses"])},
                    "layer 0": {"attention to the previous token": viz.Curve(kept["step"], kept["attention"])},
                },
                x_name="training step",
                y_name=("loss (nats)", "mean attention"),
                references={
                    "loss": {name: known[name] for name in ("in-context unigram", "known-graph")},
                    "layer 0": {f"the paper, about {THEIRS}": THEIRS},
                },
            ),
            "attention": viz.blocks(patterns, marks={"layer 0": edges}, value_name="attention"),
        },
        captions={
            "training": "The loss falls as layer 0 learns to attend to the previous token.",
            "attention": "Mean attention of both layers; the edges of the chain are outlined.",
        },
        notes=(
            "The model is TransformerLens' own (HookedTransformer on 3.9, the native bridge on 4.3), without normalization, an MLP of width "
            f"{HIDDEN}, and TransformerLens' initialisation; the paper's code has its own. The graph is the chain.",
            "The paper's number is read off a figure, so it is a rough one.",
            *quick_note(run, f"{steps} sequences; the paper has 4,096 steps of 1,024."),
        ),
        method="A two-layer residual transformer with ReLU MLPs was trained on in-context Markov chains, and its heads were scored as previous-token heads.",
        settings={
            **run.settings, "n_positions": POSITIONS, "d_vocab": VOCAB, "concentration": ALPHA, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "hidden": HIDDEN,
            "training": stage, "evaluation_sequences": EVALUATION,
        },
    )  # fmt: skip


def residual_transformer(seed: int) -> Any:
    """A standard two-layer transformer of TransformerLens, whichever line is installed."""
    shape: dict[str, Any] = {
        "d_model": WIDTH, "d_head": WIDTH // HEADS, "n_layers": LAYERS, "n_heads": HEADS, "n_ctx": POSITIONS, "d_vocab": VOCAB, "d_mlp": HIDDEN,
        "act_fn": "relu", "normalization_type": None, "default_prepend_bos": False, "device": "cpu", "seed": seed, "model_name": "residual-transformer",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # TransformerLens draws its weights from the global generator, and 3.9 warns that 4 removes the class.
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        try:
            from transformer_lens import HookedTransformer
        except ImportError:
            from transformer_lens.model_bridge.sources import boot_native

            return boot_native(TransformerBridgeConfig(**shape), device="cpu", model_name=shape["model_name"])
        return HookedTransformer(shape)
