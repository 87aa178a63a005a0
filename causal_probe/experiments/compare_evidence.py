"""Which evidence finds the causal graph, and at what cost? Discovery from attention beside the other ways to read a model.

On the in-context tasks of :mod:`causal_probe.tasks` the graph is known. A trained model and hand-set ones are read in every way that this
package has: causal discovery from one input's attention (ABCD: Rohekar, Gurwicz & Nisimov 2023), mean attention, gradients of the
scores, ablation, and the first gradient of an untrained model, which needs no model at all. All answers are put on one scale.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import networkx as nx
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from causal_probe import probes
from causal_probe.discovery import DSeparation, Learned, icd, ordered_icd, pc
from causal_probe.experiments.compared_evidence import Agreement, EvidenceRow, EvidenceTable
from causal_probe.experiments.recover import recover
from causal_probe.first_gradient.graph import gradient_graph
from causal_probe.first_gradient.slots import gradient_slots
from causal_probe.graphs import choose_graph
from causal_probe.graphs.mixed import as_mixed
from causal_probe.models import DisentangledTransformer, hand_set
from causal_probe.options import EvidenceOptions, MeasureOptions, takes
from causal_probe.results import check_results_folder
from causal_probe.tasks import Batch, InContextMarkov, batches, generator
from causal_probe.training import task_loss

__all__ = ["compare_evidence", "measure_evidence"]

#: Circuits that are set by hand.
CIRCUITS: tuple[Literal["copy parents", "step to children"], ...] = ("copy parents", "step to children")
ALGORITHMS: Mapping[str, Callable[[DSeparation], Learned]] = {"pc": pc, "icd": icd, "ordered-icd": ordered_icd}
#: What the correlations are of, by name: A A^T as in the paper, the heads' outputs, and A A^T with half a residual stream (ours).
SOURCES: Mapping[str, Mapping[str, Any]] = {
    "attention": {"source": "attention"},
    "values": {"source": "values"},
    "residual": {"source": "attention", "residual": 0.5},
}
#: What the correlations count as: the paper's convention, and so many that only rounding counts as zero.
SAMPLES: tuple[int | Literal["auto"], ...] = ("auto", 10**6)
LEVEL = 1e-3
#: Sequences in a forward pass.
BATCH = 2048
#: Of the first gradients: for one parent, and for several (of which some are held out).
FIRST_SEQUENCES = {True: 2**13, False: 2**17}


@takes(EvidenceOptions)
def compare_evidence(o: EvidenceOptions) -> EvidenceTable:
    """Read the graph of every task out of every model by every kind of evidence, and compare with the truth.

    Raises
    ------
    CausalProbeError
        If there is no graph or model, a model is unknown, or an argument is out of range.
    """
    settings = o.settings()
    if o.out is not None:
        check_results_folder(o.out, settings=settings, overwrite=o.overwrite, result="evidence.json")
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
    result = EvidenceTable(tuple(rows), settings)
    if o.out is not None:
        result.save(o.out, overwrite=o.overwrite)
    return result


def _model(name: str, task: InContextMarkov, seed: int) -> DisentangledTransformer | None:
    """None where there is no such model of the task."""
    if name == "trained":
        # Its own probing is not what is compared here: as little of it as there can be.
        heads = (task.n_slots, 1)
        return recover(nx.DiGraph(task.graph), d_vocab=task.d_vocab, heads=heads, seed=seed, probe_sequences=2).model
    if name == "step to children" and not task.is_tree:
        return None
    (circuit,) = (each for each in CIRCUITS if each == name)
    return hand_set(task.graph, task.d_vocab, circuit=circuit, match_scale=8.0, output_scale=4.0, graph_scale=16.0)


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
    nodes are the positions 0..T-2: the last row is the query's.

    - **discovery**: :func:`causal_probe.probes.discover_from_attention` on one input at a time, by PC, ICD and Ordered ICD, from attention, the heads'
      outputs (``values``), and attention beside half a residual stream (``residual``), at the paper's number of samples and at 10^6.
    - **attention**: :meth:`causal_probe.probes.HeadGraphs.graph` of mean attention, threshold one half.
    - **gradient**: a child's parent is the earlier position with the largest entry of
      :func:`causal_probe.probes.score_gradients`, if it is above zero by a one-sided z-test at 0.001, Bonferroni over all pairs.
    - **ablation**: :func:`causal_probe.probes.edge_effects` on the position that each row attends to most; with redrawn
      children where the task is a tree.

    Parameters
    ----------
    model
        A model of the task's tokens.
    graph, name
        What the rows say.
    inputs, n_sequences, level, seed
        See :func:`compare_evidence`.

    Raises
    ------
    CausalProbeError
        If ``inputs`` is below 1, ``n_sequences`` below 2, or ``level`` not between 0 and 1.

    Examples
    --------
    >>> from causal_probe import graphs, models, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(5), d_vocab=3, alpha=0.1)
    >>> model = models.hand_set(graphs.chain(5), 3, match_scale=8.0, output_scale=4.0)
    >>> rows = measure_evidence(model, task, inputs=2, n_sequences=64)
    >>> "attention" in {row.evidence for row in rows}
    True
    """
    MeasureOptions(inputs=inputs, n_sequences=n_sequences, level=level, seed=seed)  # refuses what can't be worked with
    study = _Study(model, task, graph, name, seed)
    single = task.sample(inputs, generator(seed, "inputs")).tokens
    drawn = list(batches(task, n_sequences, generator(seed, "evidence"), at_once=BATCH))
    rows = []
    for layer in range(len(model.heads)):
        for algorithm in ALGORITHMS:
            for source in SOURCES:
                for samples in SAMPLES:
                    options = {"algorithm": algorithm, **SOURCES[source], "samples": samples, "alpha": level}
                    shown = {"algorithm": algorithm, "source": source, "samples": samples}
                    rows.append(study.row("discovery", layer, partial(study.discovered, single, layer, options), shown))
        rows.append(study.row("attention", layer, partial(study.attended, drawn, layer)))
        rows.append(study.row("gradient", layer, partial(study.by_gradient, drawn, layer)))
        rows.append(study.row("ablation", layer, partial(study.ablated, drawn, layer)))
    return tuple(rows)


def without_model(task: InContextMarkov, *, graph: str = "", seed: int = 0) -> tuple[EvidenceRow, ...]:
    """What needs no model: no evidence at all, the learners with a perfect test, and the first gradient of an untrained model.

    - **every pair**: all edges from earlier to later nodes. What it scores is what being right takes no evidence for.
    - **perfect test**: the learners, asking d-separation in the true graph instead of correlations: the most they can know.
    - **first gradient**: :func:`~causal_probe.first_gradient.graph` (one parent) or
      :func:`~causal_probe.first_gradient.slots` (several), from sequences and their tables of transitions.
    """
    study = _Study(None, task, graph, "none", seed)
    nodes = len(task.children)
    every = nx.DiGraph((i, j) for j in range(nodes) for i in range(j))
    every.add_nodes_from(range(nodes))
    truth = nx.DiGraph(study.truth)
    rows = [study.row("every pair", None, lambda: [every])]
    for algorithm, learner in ALGORITHMS.items():
        learned = partial(lambda learner: [learner(DSeparation(truth)).marks.to_networkx()], learner)
        rows.append(study.row("perfect test", None, learned, {"algorithm": algorithm}))
    rows.append(study.row("first gradient", None, study.from_first_gradient))
    return tuple(rows)


class _Study:
    """One model on one task."""

    def __init__(self, model: Any, task: InContextMarkov, graph: str, name: str, seed: int) -> None:
        self.model, self.task, self.graph, self.name, self.seed = model, task, graph, name, seed
        self.nodes = len(task.children)
        self.truth = nx.freeze(task.graph.subgraph(task.children))
        self.drawn = 0

    def row(
        self,
        evidence: str,
        layer: int | None,
        read: Callable[[], list[nx.DiGraph]],
        options: Mapping[str, Any] | None = None,
    ) -> EvidenceRow:
        """What one kind of evidence says, with the sequences that went through the model and the seconds it took."""
        self.drawn = 0
        handle = None if self.model is None else self.model.register_forward_pre_hook(self._count)
        started = time.perf_counter()
        try:
            found = read()
        finally:
            if handle is not None:
                handle.remove()
        seconds = time.perf_counter() - started
        return EvidenceRow(
            graph=self.graph,
            model=self.name,
            evidence=evidence,
            algorithm=(options or {}).get("algorithm"),
            source=(options or {}).get("source"),
            samples=(options or {}).get("samples"),
            layer=layer,
            readings=len(found),
            skeleton=Agreement.of(found, self.truth, "skeleton"),
            arrowheads=Agreement.of(found, self.truth, "arrowheads"),
            sequences=self.drawn,
            seconds=seconds / len(found),
        )

    def _count(self, module: Any, passed: tuple[Any, ...]) -> None:
        self.drawn += len(passed[0])

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return task_loss(model(batch.tokens)[:, -1], batch.target)

    def discovered(self, tokens: Tensor, layer: int, options: Mapping[str, Any]) -> list[nx.DiGraph]:
        groups = [[node] for node in range(self.nodes)]
        found = []
        for row in tokens:
            each = probes.discover_from_attention(self.model, row, layer=layer, groups=groups, **options)
            found.append(union([head.graph for head in each.graphs]))
        return found

    def attended(self, batches: list[Batch], layer: int) -> list[nx.DiGraph]:
        attention = probes.head_graphs(self.model, [batch.tokens for batch in batches])
        return [union([attention.graph(layer, h, nodes=self.nodes) for h in range(self.model.heads[layer])])]

    def by_gradient(self, batches: list[Batch], layer: int) -> list[nx.DiGraph]:
        found = probes.score_gradients(self.model, batches, self.loss, layers=[layer])
        heads = self.model.heads[layer]
        pairs = heads * self.nodes * (self.nodes - 1) / 2
        bound = float(stats.norm.isf(LEVEL / pairs))
        each = []
        for head in range(heads):
            z = found.z_values(layer, head)
            assert z is not None  # two sequences at least
            leading = found.leading(layer, head)[: self.nodes]
            edges = [(p, child) for child, p in enumerate(leading) if p is not None and z[child, p] > bound]
            each.append(self._graph(edges))
        return [union(each)]

    def ablated(self, batches: list[Batch], layer: int) -> list[nx.DiGraph]:
        attention = probes.head_graphs(self.model, [batch.tokens for batch in batches])
        redraw = None
        if self.task.is_tree:
            source = generator(self.seed, "redrawing")

            def redraw(batch: Batch, child: int, edges: nx.DiGraph) -> Batch:
                return self.task.redraw_as_root(batch, child, edges, source)

        heads = self.model.heads[layer]
        each = []
        for head in range(heads):
            candidates = attention.graph(layer, head, threshold=0, nodes=self.nodes)
            effects = probes.edge_effects(
                self.model, batches, self.loss, layer=layer, head=head, candidates=candidates, level=LEVEL / heads, redraw=redraw
            )  # fmt: skip
            each.append(effects.graph(self.nodes))
        return [union(each)]

    def from_first_gradient(self) -> list[nx.DiGraph]:
        self.drawn = FIRST_SEQUENCES[self.task.is_tree]
        drawn = list(batches(self.task, self.drawn, generator(self.seed, "first gradient"), at_once=BATCH))
        found: Any = gradient_graph(drawn) if self.task.is_tree else gradient_slots(drawn)
        return [self._graph((p, child) for p, child in found.graph.edges if child < self.nodes)]

    def _graph(self, edges: Iterable[tuple[int, int]]) -> nx.DiGraph:
        graph = nx.empty_graph(self.nodes, create_using=nx.DiGraph)
        graph.add_edges_from(edges)
        return graph


def union(found: Sequence[nx.DiGraph]) -> nx.DiGraph:
    """All edges of several graphs over the same nodes, with marks: an end on which they disagree gets a circle.

    Examples
    --------
    >>> from causal_probe.graphs import mixed_graph
    >>> from causal_probe.graphs.mixed import mixed_edges, show_mixed_edge
    >>> both = union([mixed_graph(3, [(0, "-", ">", 1)]), mixed_graph(3, [(0, "o", ">", 1), (1, "-", "-", 2)])])
    >>> [show_mixed_edge(both, *edge) for edge in mixed_edges(both)]
    ['0 o-> 1', '1 --- 2']
    """
    together = nx.empty_graph(found[0].nodes, create_using=nx.DiGraph)
    for graph in found:
        for u, v, data in as_mixed(graph).edges(data=True):
            known = together.get_edge_data(u, v, data)["mark"]
            together.add_edge(u, v, mark=known if known == data["mark"] else "circle")
    return together
