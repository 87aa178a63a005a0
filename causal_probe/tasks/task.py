"""Tasks: data whose causal graph is known, and the predictors that a model of it is compared with.

A task need not inherit from anything here; :class:`Task` states the protocol, and gives the members that follow from the graph to a class
that inherits from it. What a model's loss is compared with are the task's *own* reference predictors, which no task can inherit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import networkx as nx
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.arguments import Count, checked
from causal_probe.errors import CausalProbeError

__all__ = [
    "Batch",
    "Predictor",
    "Redraw",
    "Redrawn",
    "Task",
    "sample_batches",
    "check_task",
    "cross_entropy",
    "join_batches",
    "reference_losses",
]

#: Sequences in one forward pass, where nothing else is asked for.
AT_ONCE = 1024

Drawn = TypeVar("Drawn", covariant=True)


@dataclass(frozen=True)
class Batch:
    """Sequences and the targets to predict after them.

    Attributes
    ----------
    tokens : Int[Tensor, "batch pos"]
        The model's input.
    target : Float[Tensor, "batch d_vocab"]
        The next token's distribution (``targets="soft"``) or one draw from it, one-hot (``targets="hard"``).
    tables : Mapping[int, Float[Tensor, "batch context d_vocab"]]
        The transitions of each sequence by in-degree k, with d_vocab^k contexts: ``tables[1]`` is a tree's pi.
    """

    tokens: Int[Tensor, "batch pos"]
    target: Float[Tensor, "batch d_vocab"]
    tables: Mapping[int, Float[Tensor, "batch context d_vocab"]]

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, rows: Int[Tensor, " row"]) -> Batch:
        """Some of the sequences, by number."""
        return Batch(self.tokens[rows], self.target[rows], {k: table[rows] for k, table in self.tables.items()})


#: From a batch to the predicted distributions of the next token, [batch, d_vocab].
Predictor = Callable[[Batch], Float[Tensor, "batch d_vocab"]]


@dataclass(frozen=True)
class Redrawn:
    """The same sequences with each state that a node might have had.

    Attributes
    ----------
    laws
        The probability of each state, given everything earlier, if the node is a root (first), or the child of node 0, 1, ....
    states
        The state that the node has.
    asked
        Whether what is predicted is the law after the state of node 0, 1, ..., before this one.
    draw
        ``draw(rows)``: the sequences that are named, by number, once for each state, all with the first state before those with the second. The
        node has the state, and all later nodes are drawn anew, with the same random numbers for each state, and whichever sequences are named.
    """

    laws: Float[Tensor, "batch hypothesis state"]
    states: Int[Tensor, " batch"]
    asked: Bool[Tensor, "batch node"]
    draw: Callable[[Int[Tensor, " row"]], Batch]

    @property
    def batches(self) -> tuple[Batch, ...]:
        """All sequences, one batch for each state."""
        every = torch.arange(len(self.states), device=self.states.device)
        drawn = self.draw(every)
        return tuple(drawn.of(len(every) * state + every) for state in range(self.laws.shape[-1]))


@runtime_checkable
class Redraw(Protocol):
    """How sequences are drawn anew from a node on."""

    def __call__(self, batch: Batch, node: int, edges: nx.DiGraph, generator: torch.Generator) -> Redrawn:
        """The same sequences with each state of the node, and all later nodes drawn anew along the edges."""


@runtime_checkable
class Task(Protocol):
    """Sequences of ``n_positions`` tokens over ``d_vocab`` states, drawn along a causal graph.

    One of two forms. In a *tree task* no node has several parents; the graph has T - 1 nodes, and the last of the T tokens is a query, which is
    no node: its successor is the target. Otherwise the graph has T + 1 nodes, and node T is to be predicted.

    Attributes
    ----------
    graph
        Edges parent -> child over nodes 0..n-1, each parent before its child.
    n_positions, d_vocab
        Number T of tokens that a model sees, and number of states.
    is_tree
        Whether no node has several parents.
    children
        The nodes whose parents are asked for, 0..T-2: position T - 1 serves the prediction in the first layer.
    n_slots
        Number of parents of the predicted node; in a tree 1.
    description
        The law in one phrase, with every number that it depends on besides the graph: it stands in methods sentences, and identifies the task
        in the settings of a result.
    redraw
        Draws sequences of the task anew from a node on, so that a claimed edge can be tested against every other parent that the node
        could have, and against none; None where that law is not known.
    """

    graph: nx.DiGraph
    n_positions: int
    d_vocab: int

    @property
    @abstractmethod
    def description(self) -> str:
        """The law in one phrase (see above)."""
        ...

    @property
    @abstractmethod
    def redraw(self) -> Redraw | None:
        """The function that redraws sequences from a node on, or None."""
        ...

    @abstractmethod
    def sample(self, batch_size: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Batch:
        """Draw ``batch_size`` sequences on the generator's device."""
        ...

    @abstractmethod
    def references(self) -> Mapping[str, Predictor]:
        """The task's own reference predictors by name, from the least informed to the best."""
        ...

    @property
    def is_tree(self) -> bool:
        """Whether no node has several parents."""
        return max((degree for _, degree in self.graph.in_degree), default=0) <= 1

    @property
    def children(self) -> range:
        """The nodes whose parents are asked for."""
        return range(self.n_positions - 1)

    @property
    def n_slots(self) -> int:
        """Number of parents of the predicted node."""
        return 1 if self.is_tree else int(self.graph.in_degree(self.n_positions))


def check_task(task: Any) -> Task:
    """The task, if it is one.

    Raises
    ------
    CausalProbeError
        If members are missing (they are named), or the graph's number of nodes doesn't match the task's form.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> check_task(tasks.InContextMarkov(graphs.chain(3), d_vocab=3)).n_positions
    4
    """
    if not isinstance(task, Task):
        members = (name for name in (*Task.__annotations__, *vars(Task)) if not name.startswith("_"))
        lacking = [name for name in members if not hasattr(task, name)]
        raise CausalProbeError(
            f"{type(task).__name__} is no task: it has no {', '.join(lacking)}. See causal_probe.tasks.Task for what a task is."
        )
    nodes = task.n_positions + (-1 if task.is_tree else 1)
    if set(task.graph) != set(range(nodes)):
        raise CausalProbeError(
            f"A task of {task.n_positions} positions {'in which no node has' if task.is_tree else 'in which some node has'} several parents "
            f"has a graph over the nodes 0 to {nodes - 1}; this one's has the {len(task.graph)} nodes {sorted(task.graph)[:3]}, ..."
        )
    return task


@checked
def cross_entropy(
    prediction: Float[Tensor, "batch d_vocab"], target: Float[Tensor, "batch d_vocab"]
) -> Float[Tensor, " batch"]:
    """-sum_s target(s) log prediction(s), in nats, one per sequence; >= the target's entropy, log d_vocab for uniform.

    Examples
    --------
    >>> import torch
    >>> cross_entropy(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    tensor([0.6931])
    """
    losses: Tensor = -torch.special.xlogy(target, prediction).sum(-1)
    return losses


@checked
def reference_losses(task: Task, batch: Batch) -> dict[str, float]:
    """Mean cross-entropy on ``batch`` of each of the task's own reference predictors, in nats.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(7), d_vocab=3, concentration=0.1)
    >>> losses = reference_losses(task, task.sample(512, tasks.generator(0, "reference")))
    >>> losses["known-graph"] < losses["in-context unigram"] < losses["uniform"]
    True
    """
    target = batch.target.double()
    return {
        name: float(cross_entropy(predict(batch).double(), target).mean())
        for name, predict in task.references().items()
    }


@runtime_checkable
class Samples(Protocol[Drawn]):
    """A source of batches: a task, or any object with this method."""

    def sample(self, batch_size: int, generator: torch.Generator) -> Drawn:
        """Draw a batch."""


@checked
def sample_batches(
    task: Samples[Drawn], n_sequences: Count, generator: torch.Generator, *, batch_size: Count = AT_ONCE
) -> Iterator[Drawn]:
    """``n_sequences`` fresh sequences in batches of ``batch_size``, the last of which may be smaller.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=3)
    >>> [len(batch) for batch in sample_batches(task, 2500, tasks.generator(0, "fresh"))]
    [1024, 1024, 452]
    """
    for start in range(0, n_sequences, batch_size):
        yield task.sample(min(batch_size, n_sequences - start), generator)


def join_batches(batches: Iterable[Batch]) -> Batch:
    """All sequences and targets as one batch, without their tables.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=3)
    >>> len(join_batches(tasks.sample_batches(task, 2500, tasks.generator(0, "fresh"))))
    2500
    """
    tokens, target = zip(*((batch.tokens, batch.target) for batch in batches), strict=True)
    return Batch(torch.cat(tokens), torch.cat(target), {})
