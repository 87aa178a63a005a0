"""Which evidence finds the causal graph, and at what cost? Discovery from attention beside the other ways to read a model.

On the in-context tasks of :mod:`causal_probe.tasks` the graph is known. A trained model and hand-set ones are read in every way that this
package has: causal discovery from one input's attention (ABCD: Rohekar, Gurwicz & Nisimov 2023), mean attention, gradients of the
scores, ablation, and the first gradient of an untrained model, which needs no model at all. All answers are put on one scale.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import networkx as nx
import torch
from tqdm.auto import tqdm

from causal_probe.arguments import checked
from causal_probe.experiments.compared_evidence import Agreement, EvidenceRow, EvidenceTable
from causal_probe.experiments.methods import BATCH, METHODS, Asked, Method
from causal_probe.experiments.recover import recover
from causal_probe.experiments.saving import kept
from causal_probe.graphs import choose_graph
from causal_probe.models import DisentangledTransformer, hand_set
from causal_probe.options import takes
from causal_probe.options.studies import EvidenceOptions, MeasureOptions
from causal_probe.tasks import Batch, InContextMarkov, generator, sample_batches

__all__ = ["compare_evidence", "measure_evidence"]

#: Circuits that are set by hand.
CIRCUITS: tuple[Literal["copy parents", "step to children"], ...] = ("copy parents", "step to children")


@takes(EvidenceOptions)
def compare_evidence(o: EvidenceOptions) -> EvidenceTable:
    """Read the graph of every task out of every model by every kind of evidence, and compare with the truth.

    Raises
    ------
    CausalProbeError
        If there is no graph or model, a model is unknown, or an argument is out of range.
    """
    settings = o.settings()
    with kept(o, settings, EvidenceTable) as saved:
        rows: list[EvidenceRow] = []
        with tqdm(total=len(o.graphs) * (1 + len(o.models)), disable=not o.progress, desc="reading") as bar:
            for graph in o.graphs:
                truth = choose_graph(graph, n_positions=o.n_positions, seed=o.seed)
                task = InContextMarkov(truth, o.d_vocab)
                rows += without_model(task, graph=graph, seed=o.seed)
                bar.update()
                for name in o.models:
                    if (model := _model(name, task, o.seed)) is not None:
                        rows += measure_evidence(model, task, graph=graph, name=name, **o.shared(MeasureOptions))
                    bar.update()
        return saved(EvidenceTable(tuple(rows), settings=settings))


def _model(name: str, task: InContextMarkov, seed: int) -> DisentangledTransformer | None:
    """None where there is no such model of the task."""
    if name == "trained":
        # Its own probing isn't compared here, so it is kept as small as possible.
        heads = (task.n_slots, 1)
        return recover(nx.DiGraph(task.graph), d_vocab=task.d_vocab, heads=heads, seed=seed, probe_sequences=2).model
    if name == "step to children" and not task.is_tree:
        return None
    (circuit,) = (each for each in CIRCUITS if each == name)
    return hand_set(task.graph, task.d_vocab, circuit=circuit, match_scale=8.0, output_scale=4.0, graph_scale=16.0)


@checked
def measure_evidence(
    model: DisentangledTransformer,
    task: InContextMarkov,
    *,
    graph: str = "",
    name: str = "",
    inputs: int = 16,
    n_sequences: int = 4096,
    level: float = 0.01,
    seed: int = 0,
) -> tuple[EvidenceRow, ...]:
    """Read one model's graph by every kind of evidence, layer by layer.

    Where a layer has several heads, a kind's answer is the union of their edges (an end on which they disagree gets a circle). The
    nodes are the positions 0..T-2: the last row is the query's. The kinds and their descriptions are in
    :data:`causal_probe.experiments.methods.METHODS`.

    Parameters
    ----------
    model
        A model of the task's tokens.
    graph, name
        The meaning of the rows.
    inputs, n_sequences, level, seed
        See :func:`compare_evidence`.

    Raises
    ------
    CausalProbeError
        If ``inputs`` is below 1, ``n_sequences`` below 2, or ``level`` not between 0 and 1.

    Examples
    --------
    >>> from causal_probe import graphs, models, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(5), d_vocab=3, concentration=0.1)
    >>> model = models.hand_set(graphs.chain(5), 3, match_scale=8.0, output_scale=4.0)
    >>> rows = measure_evidence(model, task, inputs=2, n_sequences=64)
    >>> "attention" in {row.evidence for row in rows}
    True
    """
    MeasureOptions(inputs=inputs, n_sequences=n_sequences, level=level, seed=seed)  # refuses what can't be worked with
    study = _Study(model, task, graph, name)
    single = task.sample(inputs, generator(seed, "inputs")).tokens
    batches = list(sample_batches(task, n_sequences, generator(seed, "evidence"), batch_size=BATCH))
    return tuple(
        study.row(method, Asked(layer, single, level, seed), batches, variant)
        for layer in range(len(model.heads))
        for method in METHODS.values()
        if method.of_model
        for variant in method.variants()
    )


def without_model(task: InContextMarkov, *, graph: str = "", seed: int = 0) -> tuple[EvidenceRow, ...]:
    """The methods that need no model: no evidence at all, the learners with a perfect test, and the first gradient of an untrained model."""
    study = _Study(None, task, graph, "none")
    asked = Asked(0, torch.empty(0, task.n_positions, dtype=torch.long), 0.0, seed)
    return tuple(
        study.row(method, asked, [], variant)
        for method in METHODS.values()
        if not method.of_model
        for variant in method.variants()
    )


class _Study:
    """One model on one task."""

    def __init__(self, model: Any, task: InContextMarkov, graph: str, name: str) -> None:
        self.model, self.task, self.graph, self.name = model, task, graph, name
        self.truth = nx.freeze(task.graph.subgraph(task.children))
        self.drawn = 0

    def row(self, method: Method, asked: Asked, batches: Sequence[Batch], variant: Mapping[str, Any]) -> EvidenceRow:
        """The graphs of one kind of evidence, with the number of sequences run through the model and the seconds."""
        self.drawn = 0
        handle = None if self.model is None else self.model.register_forward_pre_hook(self._count)
        started = time.perf_counter()
        try:
            found = method.graphs(self.model, self.task, batches, asked, variant)
        finally:
            if handle is not None:
                handle.remove()
        seconds = time.perf_counter() - started
        return EvidenceRow(
            graph=self.graph,
            model=self.name,
            evidence=method.name,
            **{name: variant.get(name) for name in ("algorithm", "source", "samples")},
            layer=asked.layer if method.of_model else None,
            readings=len(found.graphs),
            skeleton=Agreement.of(found.graphs, self.truth, "skeleton"),
            arrowheads=Agreement.of(found.graphs, self.truth, "arrowheads"),
            sequences=self.drawn + found.n_sequences,
            seconds=seconds / len(found.graphs),
        )

    def _count(self, module: Any, passed: tuple[Any, ...]) -> None:
        self.drawn += len(passed[0])
