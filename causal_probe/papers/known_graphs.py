"""Shared by the reproductions of Nichani, Damian & Lee 2024: training in parts that go on, and reading the graph that was learnt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import numpy as np

from causal_probe import graphs
from causal_probe.experiments.recover import tested_edges
from causal_probe.graphs import GraphComparison
from causal_probe.models import DisentangledTransformer
from causal_probe.papers.base import Run
from causal_probe.papers.shared import set_weights, thinned, weights_of
from causal_probe.probes import head_graphs, match_heads
from causal_probe.probes.evidence import Evidence
from causal_probe.tasks import Batch, InContextMarkov, generator, sample_batches
from causal_probe.training import fit
from causal_probe.training.stages import Stage

__all__ = ["Trained", "mean_attention", "parent_attention", "read_tree", "train", "true_graph"]

PAPER = ("nichani2024",)
#: Sequences whose mean attention is watched in training, and those whose mean attention is reported.
WATCHING, ATTENTION = 256, 4096
#: Steps between two checkpoints.
CHECKPOINT = 500


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model and measurements taken during its training.

    Attributes
    ----------
    step, attention, leading
        At some numbers of steps: mean attention on the true parent, and the share of true parents that lead (:func:`parent_attention`).
    losses
        Training losses in nats, averaged over at most 200 stretches of equal length.
    sequences
        How many were drawn in training.
    """

    model: DisentangledTransformer
    step: list[int]
    attention: list[float]
    leading: list[float]
    losses: list[float]
    sequences: int


def train(
    run: Run,
    name: str,
    task: InContextMarkov,
    stages: Sequence[Stage],
    *,
    heads: Sequence[int] = (1, 1),
    start: Callable[[DisentangledTransformer], object] | None = None,
    every: int,
    seed: int | None = None,
) -> Trained:
    """Fit a disentangled transformer in the part ``name`` of the run; an interrupted one goes on from its last checkpoint.

    Parameters
    ----------
    start
        Sets the initial weights; without it they are zero.
    every
        Steps between two looks at the attention.
    seed
        Of the sequences; the run's by default.
    """
    seed = run.seed if seed is None else seed
    settings = {
        "edges": list(task.graph.edges),
        "n_positions": task.n_positions,
        "d_vocab": task.d_vocab,
        "concentration": task.concentration,
        "heads": heads,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "start": None if start is None else getattr(start, "__name__", "given"),
        "every": every,
        "seed": seed,
    }

    def compute() -> dict[str, Any]:
        model = DisentangledTransformer(task.d_vocab, task.n_positions, heads)
        if start is not None:
            start(model)
        watching = task.sample(WATCHING, generator(seed, "watching")).tokens
        checkpoint = run.checkpoint(name, every=CHECKPOINT, settings=settings)
        notes: dict[str, Any] = {} if checkpoint is None else checkpoint.notes

        def watch(step: int, model: DisentangledTransformer) -> None:
            notes.setdefault("seen", []).append([step, *parent_attention(task, head_graphs(model, watching))])

        history = fit(
            model,
            task,
            stages,
            generator=generator(seed, "training"),
            probe_every=every,
            probe=watch,
            checkpoint=checkpoint,
            progress=run.progress,
        )
        return {
            "seen": notes["seen"],
            "losses": thinned(history.loss),
            "sequences": history.n_sequences,
            **weights_of(model),
        }

    kept = run.part(name, compute, settings=settings)
    step, attention, leading = (list(column) for column in zip(*kept["seen"], strict=True))
    model = set_weights(DisentangledTransformer(task.d_vocab, task.n_positions, heads), kept)
    return Trained(model, step, attention, leading, kept["losses"], kept["sequences"])


def true_graph(task: InContextMarkov) -> nx.DiGraph:
    """The task's graph over the nodes whose parents are asked for."""
    return nx.freeze(task.graph.subgraph(task.children))


def parent_attention(task: InContextMarkov, attention: Evidence) -> tuple[float, float]:
    """Mean attention from a child to its true parent, and the share of true parents that lead their child's past.

    Both are over all true edges, in the head of layer 0 that is matched to the parent's slot, after averaging over sequences.
    """
    truth = true_graph(task)
    match = match_heads(attention, truth, shift=0)  # the task asks at the last position alone
    leads = [
        head is not None and int(attention.values[0][head, child, :child].argmax()) == parent
        for child in truth
        for head, parent in zip(match.heads, sorted(truth.predecessors(child)), strict=False)
    ]
    return match.mean_parent_attention, float(np.mean(leads))


def mean_attention(run: Run, model: Any, task: InContextMarkov) -> Evidence:
    """The mean attention that is reported."""
    return head_graphs(model, task.sample(ATTENTION, generator(run.seed, "attention")).tokens, batch_size=1024)


def read_tree(
    model: DisentangledTransformer, task: InContextMarkov, *, seed: int, sequences: int
) -> tuple[Evidence, GraphComparison]:
    """Mean attention, and the edges that layer 0 holds, decided as :func:`causal_probe.experiments.recover` does and compared with the truth."""
    attention = head_graphs(model, _sample(task, ATTENTION, seed, "attention"))
    (effects,) = tested_edges(model, task, _sample(task, sequences, seed, "probing"), attention, seed=seed)
    nodes = len(task.graph)
    return attention, graphs.compare(
        effects.graph(nodes), task.graph, weights=effects.weights(nodes), children=task.children
    )


def _sample(task: InContextMarkov, sequences: int, seed: int, purpose: str) -> list[Batch]:
    return list(sample_batches(task, sequences, generator(seed, purpose)))
