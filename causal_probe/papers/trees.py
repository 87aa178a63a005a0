"""Nichani, Damian & Lee 2024, Figures 2 and 6: on a tree, layer 0's attention becomes the graph and layer 1 compares states."""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
import numpy as np

from causal_probe import graphs, viz
from causal_probe.graphs import choose_graph
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.known_graphs import PAPER, Trained, mean_attention, parent_attention, train, true_graph
from causal_probe.papers.shared import quick_note
from causal_probe.tasks import InContextMarkov, generator, reference_losses
from causal_probe.training import evaluate, give_matcher, joint, staged

__all__ = ["figure_2", "figure_6"]

#: The paper's task.
POSITIONS, VOCAB, ALPHA, ROOT_PROBABILITY = 20, 10, 0.1, 0.5
#: The paper's training: plain SGD from zero, the rate falling along half a cosine; and how many of its steps are made.
BATCH, RATE = 1024, 1.0
STEPS = {False: 2**17, True: 2**10}
#: How often the attention is looked at in joint training.
LOOKS = 32
#: Stage 2 of staged training.
REST = {False: 500, True: 150}
EVALUATION = 2**13


@reproduction("figure-2", "The chain and the pairs: the first layer's attention becomes the graph", minutes=(3, 180))
def figure_2(run: Run) -> Reproduction:
    """The chain and the pairs."""
    trees = {"chain": graphs.chain(POSITIONS - 1), "pairs": graphs.pairs(POSITIONS - 1)}
    return _study(run, "figure-2", "The chain and the pairs: layer 0's attention becomes the graph", trees)


@reproduction("figure-6", "A random forest: the first layer's attention becomes the graph", minutes=(2, 90))
def figure_6(run: Run) -> Reproduction:
    """A random forest."""
    forest = choose_graph("forest", n_positions=POSITIONS, root_probability=ROOT_PROBABILITY, seed=run.seed)
    return _study(run, "figure-6", "A random forest: layer 0's attention becomes the graph", {"forest": forest})


def _study(run: Run, name: str, title: str, trees: Mapping[str, nx.DiGraph]) -> Reproduction:
    sgd = joint(steps=STEPS[run.quick], batch_size=BATCH, optimizer="sgd", learning_rate=RATE, schedule="cosine")
    stages = staged(n_positions=POSITIONS, steps=REST[run.quick])
    tasks = {tree: InContextMarkov(graph, VOCAB, ALPHA) for tree, graph in trees.items()}
    lines: list[Line] = []
    patterns, marks, matchers = {}, {}, {}
    panels: dict[str, dict[str, viz.Curve]] = {}
    found = {}
    for tree, task in tasks.items():
        models = {
            "staged": train(run, f"staged-{tree}", task, stages, start=give_matcher, every=5),
            "joint SGD": train(run, f"joint-{tree}", task, sgd, every=STEPS[run.quick] // LOOKS),
        }
        panels[f"{tree}: joint SGD"] = {"joint SGD": viz.Curve(models["joint SGD"].step, models["joint SGD"].attention)}
        for way, trained in models.items():
            pattern, matcher, attention, new = _measure(run, tree, way, task, trained)
            lines += new
            found[tree, way] = attention
            patterns[f"{tree}, {way}"] = pattern
            marks[f"{tree}, {way}"] = [(child, parent) for parent, child in true_graph(task).edges]
            matchers[f"{tree}, {way}"] = matcher
    steps = f"{STEPS[run.quick]:,} steps of {BATCH:,}"
    told = "; ".join(
        f"{tree}: {found[tree, 'staged']:.3f} staged, {found[tree, 'joint SGD']:.3f} joint" for tree in tasks
    )
    return Reproduction(
        name=name,
        title=title,
        paper=PAPER,
        summary=f"Mean attention on the true parent: {told} (joint SGD after {steps} sequences).",
        lines=tuple(lines),
        figures={
            "attention": viz.blocks(patterns, marks=marks, columns=2, value_name="attention"),
            "matcher": viz.blocks(matchers, columns=2, value_name="entry of A"),
            "training": viz.curves(panels, x_name="training step", y_name="mean attention on the true parent"),
        },
        captions={
            "attention": "Mean attention of layer 0; true edges are outlined. Rows of roots attend somewhere, too.",
            "matcher": "The block of layer 1's matrix that compares the query's state with the one that layer 0 copied: a multiple of the identity and of all ones.",
            "training": "Attention on the true parent along joint training.",
        },
        notes=(
            "Figures 2 and 6 show the chain, the pairs and a random graph; which of the two shows which is our arrangement. The random graph is drawn anew.",
            "The paper's figures are heat maps without numbers: that the true parent leads in every row is what they show.",
            *quick_note(run, f"joint SGD is cut to {steps} of the paper's 131,072 steps, its rate falling to zero over these: too few for the paper's picture."),
        ),
        method="Disentangled transformers were trained on in-context Markov tasks over trees, and layer 0's attention was compared with the tree.",
        settings={
            **run.settings, "n_positions": POSITIONS, "d_vocab": VOCAB, "concentration": ALPHA, "edges": {tree: list(graph.edges) for tree, graph in trees.items()},
            "joint": sgd, "staged": stages, "evaluation_sequences": EVALUATION,
        },
    )  # fmt: skip


def _measure(
    run: Run, tree: str, way: str, task: InContextMarkov, trained: Trained
) -> tuple[np.ndarray, np.ndarray, float, list[Line]]:
    """Layer 0's mean attention, layer 1's matcher, the mean attention on true parents, and the lines of the table."""
    attention = mean_attention(run, trained.model, task)
    on_parent, leading = parent_attention(task, attention)
    held_out = task.sample(EVALUATION, generator(run.seed, "evaluation"))
    loss, known = evaluate(trained.model, [held_out]), reference_losses(task, held_out)
    matcher = trained.model.block(1, 0, query="token", key="L0H0.token").numpy()
    same = np.eye(task.d_vocab, dtype=bool)
    contrast = float(matcher[same].mean() - matcher[~same].mean())
    judged = way == "staged" or not run.quick
    steps = f"{trained.sequences:,} sequences"
    shown = "every true parent leads, in the paper's heat maps"
    lines = [
        Line(f"{tree}, {way}: mean attention on the true parent", on_parent, None, "close to 1", shown, None, steps),
        Line(f"{tree}, {way}: true parents that lead", leading, None, 1.0, shown, leading == 1 if judged else None, "all" if judged else "too few steps to compare"),
        Line(f"{tree}, {way}: diagonal over off-diagonal of layer 1's comparison, difference of means", contrast, None, "positive", "a multiple of the identity", contrast > 0 if judged else None, "above 0"),
        Line(f"{tree}, {way}: loss (nats)", loss, None, None, "", None, f"known graph {known['known-graph']:.4f}, in-context unigram {known['in-context unigram']:.4f}"),
    ]  # fmt: skip
    return np.asarray(attention.values[0][0]), matcher, on_parent, lines
