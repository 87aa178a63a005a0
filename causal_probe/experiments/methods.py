"""The ways to read a task's causal graph: each method of evidence by its name, told once.

A method is a function from a model, its task and batches of sequences to evidence, or to graphs over the task's nodes. Whoever adds one
with :func:`method` sees it in :func:`~causal_probe.experiments.compare_evidence`, its command and its report.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import networkx as nx
from jaxtyping import Int
from torch import Tensor

from causal_probe import probes
from causal_probe.discovery import DSeparation, Learned, icd, ordered_icd, pc
from causal_probe.first_gradient.graph import gradient_graph
from causal_probe.first_gradient.slots import gradient_slots
from causal_probe.graphs.mixed import as_mixed
from causal_probe.models import DisentangledTransformer
from causal_probe.probes.evidence import Evidence
from causal_probe.tasks import Batch, InContextMarkov, generator, sample_batches
from causal_probe.training import task_loss

__all__ = ["METHODS", "Asked", "Found", "Method", "method", "union"]

ALGORITHMS: Mapping[str, Callable[[DSeparation], Learned]] = {"pc": pc, "icd": icd, "ordered-icd": ordered_icd}
#: The matrices whose correlations are taken, by name: A A^T as in the paper, the heads' outputs, and A A^T with half a residual stream (ours).
SOURCES: Mapping[str, Mapping[str, Any]] = {
    "attention": {"source": "attention"},
    "values": {"source": "values"},
    "residual": {"source": "attention", "residual": 0.5},
}
#: Assumed number of samples behind the correlations: the paper's convention, and one so large that only rounding counts as zero.
SAMPLES: tuple[int | Literal["auto"], ...] = ("auto", 10**6)
LEVEL = 1e-3
#: Sequences in a forward pass.
BATCH = 2048
#: Of the first gradients: for one parent, and for several (of which some are held out).
FIRST_SEQUENCES = {True: 2**13, False: 2**17}


@dataclass(frozen=True)
class Asked:
    """Settings beside the model, the task and the batches.

    Attributes
    ----------
    layer
        Whose heads are read, from 0; methods that read no model are asked for layer 0.
    inputs
        Sequences for methods that read one input at a time.
    level
        Of tests of independence.
    seed
        Of random draws.
    """

    layer: int
    inputs: Int[Tensor, "input pos"]
    level: float
    seed: int


class Found(NamedTuple):
    """Graphs over the task's nodes, one for each reading, and the sequences that went through another model to find them."""

    graphs: Sequence[nx.DiGraph]
    n_sequences: int = 0


#: A method's result: evidence, of which each head's graph is taken by its own claim; or graphs.
Answer: TypeAlias = Evidence | Sequence[nx.DiGraph] | Found


@dataclass(frozen=True)
class Method:
    """A way to read a graph.

    Attributes
    ----------
    name, description
        The latter in one line.
    read
        ``read(model, task, batches, asked, **variant)``.
    of_model
        Whether it reads a model; others are asked once for each task.
    variants
        Its options: all their combinations are read.
    """

    name: str
    description: str
    read: Callable[..., Answer]
    of_model: bool = True
    variants: Callable[[], Iterable[Mapping[str, Any]]] = lambda: [{}]

    def graphs(
        self, model: Any, task: InContextMarkov, batches: Sequence[Batch], asked: Asked, variant: Mapping[str, Any]
    ) -> Found:
        """One graph for each reading, the heads of the layer together."""
        found = self.read(model, task, batches, asked, **variant)
        if isinstance(found, Evidence):
            n_nodes = len(task.children)
            (layer, n_heads), *_ = [its for its in found.heads.items() if its[0] == asked.layer]
            return Found([union([found.graph(layer, head, nodes=n_nodes) for head in range(n_heads)])])
        return found if isinstance(found, Found) else Found(found)


#: Every method by its name.
METHODS: dict[str, Method] = {}


def method(
    name: str, *, of_model: bool = True, variants: Callable[[], Iterable[Mapping[str, Any]]] = lambda: [{}]
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Put a function among the :data:`METHODS`; the first line of its docstring is the description."""

    def register(read: Callable[..., Answer]) -> Callable[..., Answer]:
        METHODS[name] = Method(name, (read.__doc__ or "").partition("\n")[0], read, of_model, variants)
        return read

    return register


@method("every pair", of_model=False)
def every_pair(model: None, task: InContextMarkov, batches: Sequence[Batch], asked: Asked) -> Answer:
    """All edges from earlier to later nodes: a baseline that needs no evidence."""
    nodes = range(len(task.children))
    return [_graph(task, itertools.combinations(nodes, 2))]


@method("perfect test", of_model=False, variants=lambda: [{"algorithm": name} for name in ALGORITHMS])
def perfect_test(
    model: None, task: InContextMarkov, batches: Sequence[Batch], asked: Asked, *, algorithm: str
) -> Answer:
    """The learners, asking d-separation in the true graph instead of correlations: the most they can know."""
    truth = nx.DiGraph(task.graph.subgraph(task.children))
    return [ALGORITHMS[algorithm](DSeparation(truth)).marks.to_networkx()]


@method("first gradient", of_model=False)
def first_gradient(model: None, task: InContextMarkov, batches: Sequence[Batch], asked: Asked) -> Answer:
    """The first gradient of an untrained model, from sequences and their tables of transitions."""
    n = FIRST_SEQUENCES[task.is_tree]
    drawn = list(sample_batches(task, n, generator(asked.seed, "first gradient"), batch_size=BATCH))
    found: Any = gradient_graph(drawn) if task.is_tree else gradient_slots(drawn)
    return Found([_graph(task, found.graph.edges)], n)


def _discoveries() -> Iterator[dict[str, Any]]:
    for algorithm, source, samples in itertools.product(ALGORITHMS, SOURCES, SAMPLES):
        yield {"algorithm": algorithm, "source": source, "samples": samples}


@method("discovery", variants=_discoveries)
def discovery(
    model: DisentangledTransformer,
    task: InContextMarkov,
    batches: Sequence[Batch],
    asked: Asked,
    *,
    algorithm: str,
    source: str,
    samples: Any,
) -> Answer:
    """Causal discovery from one input's attention at a time, by PC, ICD and Ordered ICD (``probes.discover_from_attention``)."""
    options: dict[str, Any] = {"algorithm": algorithm, **SOURCES[source], "samples": samples, "level": asked.level}
    groups = [[node] for node in range(len(task.children))]
    found = []
    for tokens in asked.inputs:
        each = probes.discover_from_attention(model, tokens, layer=asked.layer, groups=groups, **options)
        found.append(union([head.graph for head in each.graphs]))
    return found


@method("attention")
def attention(model: DisentangledTransformer, task: InContextMarkov, batches: Sequence[Batch], asked: Asked) -> Answer:
    """Mean attention of at least one half (``probes.head_graphs``)."""
    return probes.head_graphs(model, [batch.tokens for batch in batches])


@method("gradient")
def gradient(model: DisentangledTransformer, task: InContextMarkov, batches: Sequence[Batch], asked: Asked) -> Answer:
    """The largest score gradient of a row, above zero by a z-test at 0.001, Bonferroni over all pairs (``probes.score_gradients``)."""
    return probes.score_gradients(model, batches, _loss, layers=[asked.layer])


@method("ablation")
def ablation(model: DisentangledTransformer, task: InContextMarkov, batches: Sequence[Batch], asked: Asked) -> Answer:
    """Effects of edges on the loss, of the position that each row attends to most (``probes.edge_effects``)."""
    layer, n_nodes = asked.layer, len(task.children)
    seen = probes.head_graphs(model, [batch.tokens for batch in batches])
    redraw = task.redraw
    if redraw is not None:
        redraw = partial(redraw, generator=generator(asked.seed, "redrawing"))
    each = []
    for head in range(seen.heads[layer]):
        candidates = seen.graph(layer, head, claim=0, nodes=n_nodes)
        effects = probes.edge_effects(
            model, batches, _loss, layer=layer, head=head, candidates=candidates, level=LEVEL / seen.heads[layer], redraw=redraw
        )  # fmt: skip
        each.append(effects.graph(n_nodes))
    return [union(each)]


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


def _loss(model: Any, batch: Batch) -> Tensor:
    return task_loss(model(batch.tokens)[:, -1], batch.target)


def _graph(task: InContextMarkov, edges: Iterable[tuple[int, int]]) -> nx.DiGraph:
    n_nodes = len(task.children)
    graph = nx.empty_graph(n_nodes, create_using=nx.DiGraph)
    graph.add_edges_from((parent, child) for parent, child in edges if child < n_nodes)
    return graph
