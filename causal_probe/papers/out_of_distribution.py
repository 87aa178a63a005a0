"""Trained where transition rows are nearly deterministic, tested where they are not: does the learnt mechanism carry over?

The trained model estimates transitions in context from the (parent, child) pairs of the graph. If so, it does that for
transition matrices that its training never drew. Each kind of test holds matrices by themselves: every one is a test distribution of its
own, on which the divergence is averaged over sequences; reported are the mean and the worst of the matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from causal_probe import viz
from causal_probe.first_gradient.graph import gradient_graph
from causal_probe.models import DisentangledTransformer
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.known_graphs import PAPER, parent_attention, train
from causal_probe.papers.shared import forest
from causal_probe.probes import head_graphs
from causal_probe.tasks import Batch, InContextMarkov, generator
from causal_probe.tasks.dirichlet import dirichlet
from causal_probe.tasks.predictors import in_context_unigram, known_graph
from causal_probe.training import give_matcher, staged

__all__ = ["ood"]

#: The paper's task over a random forest, at several lengths.
VOCAB, ALPHA, ROOT_PROBABILITY = 3, 0.1, 0.5
LENGTHS = {False: (10, 20, 40, 80, 160), True: (10, 20, 40)}
#: Of stage 2.
STEPS = {False: 1000, True: 300}
#: The laws of the test matrices' rows; the first is the training's.
CONCENTRATIONS = (0.1, 0.3, 1.0, 5.0)
#: A near-permutation is a uniform permutation of the states, kept with this probability; else the next state is uniform.
KEPT = 0.95
#: Single matrices of each kind, and sequences of each.
MATRICES = 100
SEQUENCES = {False: 256, True: 64}
#: Sequences from which the graph is read out of data of one kind.
READING = 2**14
KINDS = (*(f"alpha {alpha:g}" for alpha in CONCENTRATIONS), "near-permutations")


@reproduction("ood", "The learnt mechanism on transition matrices that training never drew", minutes=(2, 10))
def ood(run: Run) -> Reproduction:
    """Divergence from the known-graph predictor on five kinds of transition matrices, against T."""
    lengths, rows = LENGTHS[run.quick], []
    for length in lengths:
        task = forest(
            run.seed, n_positions=length, d_vocab=VOCAB, concentration=ALPHA, root_probability=ROOT_PROBABILITY
        )
        stages = staged(n_positions=length, steps=STEPS[run.quick])
        trained = train(run, f"model-{length}", task, stages, start=give_matcher, every=20)
        name = f"tests-{length}"
        rows.append(run.part(name, partial(measure, run, task, trained.model)))

    lines = []
    for length, row in zip(lengths, rows, strict=True):
        for kind in KINDS:
            its = row[kind]
            better = its["model"]["mean"] < its["unigram"]["mean"]
            where = f"{kind}, T = {length}"
            words = "the paper, in words: the trained model holds out of distribution"
            lines += [
                Line(f"{where}: mean KL from the known-graph predictor (nats)", its["model"]["mean"], its["model"]["stderr"], "small", words, better, f"below in-context unigram, {its['unigram']['mean']:.4f}"),
                Line(f"{where}: worst matrix of {MATRICES}", its["model"]["worst"], None, None, "", None, f"in-context unigram: {its['unigram']['worst']:.4f}"),
            ]  # fmt: skip
    last, all_of_them = rows[-1], len(rows) * len(KINDS)
    right, gradient = (sum(row[kind][what] == 1 for row in rows for kind in KINDS) for what in ("leading", "gradient"))
    lines += [
        Line("kinds and lengths in which every true parent leads in the model's attention", f"{right} of {all_of_them}", None, "the same graph", "the paper, in words", right == all_of_them, "all"),
        Line(f"kinds and lengths in which one gradient over {READING:,} of the test's sequences shows every true parent", f"{gradient} of {all_of_them}", None, None, "an untrained model on the same data", None, "where rows are nearly uniform a gradient needs more sequences"),
    ]  # fmt: skip
    panels = {
        statistic: {kind: viz.Curve(lengths, [row[kind]["model"][statistic] for row in rows]) for kind in KINDS}
        for statistic in ("mean", "worst")
    }
    beside = {
        "in-context unigram": {
            kind: viz.Curve(lengths, [row[kind]["unigram"]["mean"] for row in rows]) for kind in KINDS
        }
    }
    worst = max(last[kind]["model"]["mean"] for kind in KINDS[1:])
    return Reproduction(
        name="ood",
        title="Out of distribution: trained at alpha 0.1, tested on other transition matrices",
        paper=PAPER,
        summary=f"At T = {lengths[-1]} the mean KL from the known-graph predictor is {last[KINDS[0]]['model']['mean']:.4f} nats in distribution and at most "
        f"{worst:.4f} out of it; in-context unigram is at {min(last[kind]['unigram']['mean'] for kind in KINDS[1:]):.4f} or more there.",
        lines=tuple(lines),
        figures={"divergence": viz.curves({"trained model, mean": panels["mean"], "trained model, worst matrix": panels["worst"], "in-context unigram, mean": beside["in-context unigram"]}, x_name="length T", y_name="KL (nats)", x_scale="log", y_scale="log")},
        captions={"divergence": f"KL divergence from the known-graph predictor to the trained model and to in-context unigram: mean and worst of {MATRICES} transition matrices."},
        notes=(
            "The known-graph predictor smooths with the training's alpha throughout: it is what a model trained at that alpha can be at its best. On matrices of "
            "another alpha a predictor that knew this would be better.",
            "The trained model's logits are linear in a frequency and can't equal a smoothed count, so the divergence does not vanish in distribution either.",
            "Layer 0 of the staged model attends by position alone, so its attention is the same on all data by construction; one gradient of an untrained "
            "model is read from each kind of data by itself.",
            f"The paper gives no number for these kinds; forests are drawn anew for each T, S = {VOCAB}.",
        ),
        method="A disentangled transformer trained on one Dirichlet concentration was tested on single transition matrices of other kinds.",
        settings={
            **run.settings, "d_vocab": VOCAB, "concentration": ALPHA, "root_probability": ROOT_PROBABILITY, "lengths": lengths, "steps": STEPS[run.quick],
            "concentrations": CONCENTRATIONS, "kept": KEPT, "matrices": MATRICES, "n_sequences": SEQUENCES[run.quick], "reading": READING,
        },
    )  # fmt: skip


def measure(run: Run, task: InContextMarkov, model: DisentangledTransformer) -> dict[str, Any]:
    """By kind of matrices: KL of the model and of in-context unigram, and which parents lead in attention and in one gradient."""
    found = {}
    for kind in KINDS:
        source = generator(run.seed, f"test {kind}")
        matrices = draw_matrices(kind, MATRICES, source)
        batch = sequences_of(task, matrices.repeat_interleave(SEQUENCES[run.quick], 0), source)
        with torch.no_grad():
            target = known_graph(task, batch.tokens).double()
            predictions = {
                "model": model.predict(batch.tokens).double().log_softmax(-1),
                "unigram": in_context_unigram(task, batch.tokens).double().log(),
            }
        fresh = sequences_of(task, draw_matrices(kind, READING, source), source)
        candidates = gradient_graph(fresh).candidates
        children = [child for child in task.children if task.parents[child]]
        found[kind] = {
            **{name: _divergence(target, log_q) for name, log_q in predictions.items()},
            "leading": parent_attention(task, head_graphs(model, batch.tokens[:2048], batch_size=1024))[1],
            "gradient": float(np.mean([(candidates[child],) == task.parents[child] for child in children])),
        }
    return found


def draw_matrices(kind: str, number: int, source: torch.Generator) -> Float[Tensor, "number state state"]:
    """Transition matrices of one of :data:`KINDS`."""
    if kind != "near-permutations":
        return dirichlet(float(kind.removeprefix("alpha ")), (number, VOCAB, VOCAB), generator=source)
    order = torch.rand(number, VOCAB, generator=source).argsort(-1)
    return KEPT * one_hot(order, VOCAB).float() + (1 - KEPT) / VOCAB


def sequences_of(
    task: InContextMarkov, transition: Float[Tensor, "batch state state"], source: torch.Generator
) -> Batch:
    """One sequence of the task for each given matrix."""
    tables: Mapping[int, Tensor] = {1: transition}
    tokens = task.sample_tokens(tables, source)
    target = transition[torch.arange(len(tokens)), tokens[:, -1]]
    return Batch(tokens, target, tables)


def _divergence(p: Float[Tensor, "batch state"], log_q: Float[Tensor, "batch state"]) -> dict[str, float]:
    """KL(p || q) in nats: its mean over sequences of each matrix, then mean, standard error and worst over matrices."""
    each = (p * (p.log() - log_q)).sum(-1).reshape(MATRICES, -1).mean(1)
    return {"mean": float(each.mean()), "stderr": float(each.std() / MATRICES**0.5), "worst": float(each.max())}
