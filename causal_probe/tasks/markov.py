"""The paper's in-context task: tokens drawn along a causal graph, with a fresh transition matrix in every sequence.

A model that sees many sequences can't memorise the transitions; it can learn the *graph*, and estimate the transitions in
context from all (parent, child) pairs that the graph names. Two forms (Nichani, Damian & Lee 2024), told apart by the graph:

**Tree task** (every node has at most one parent). The graph has T - 1 nodes, the context. In each sequence::

    pi     ~  rows iid Dirichlet(concentration, ..., concentration)               [d_vocab, d_vocab]
    s_i    ~  mu_pi, the stationary distribution of pi            where node i is a root
    s_i    ~  pi(. | s_parent(i))                                 otherwise
    query  ~  uniform, independent of all else                    the last of the T tokens
    target =  pi(. | query)

**k-parent task** (some node has two parents or more). The graph has T + 1 nodes: T tokens and the node to be predicted.
For each in-degree k that occurs there is one table of d_vocab^k rows, iid Dirichlet; roots are uniform; the target is node
T's row given its own parents. A context is indexed with parents ascending, the smallest the most significant digit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import networkx as nx
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.graphs import check_graph
from causal_probe.graphs.check import parent_lists
from causal_probe.tasks.dirichlet import CONCENTRATIONS, dirichlet
from causal_probe.tasks.predictors import best_one_parent, in_context_unigram, known_graph, uniform
from causal_probe.tasks.randomness import check_batch_size
from causal_probe.tasks.stationary import stationary_distribution
from causal_probe.tasks.task import Batch, Predictor, Redraw, Redrawn, Task

__all__ = ["InContextMarkov", "Targets"]

Targets = Literal["soft", "hard"]

#: 2 GiB in float32: the largest table of one sequence. With k parents it has d_vocab^(k + 1) entries.
MAX_TABLE = 2**29


@dataclass(frozen=True)
class _Draw:
    """Nodes that can be drawn at once: all their parents are known, and they share an in-degree."""

    nodes: list[int]
    parents: list[list[int]]  # by slot, then by node


@checked
class InContextMarkov(Task):
    """The in-context Markov task over a causal graph.

    Parameters
    ----------
    graph
        Edges parent -> child over nodes 0..n-1, each parent before its child. At most one parent per node: a tree task over
        T = n + 1 tokens. Otherwise: a k-parent task over T = n - 1 tokens whose node n - 1 is to be predicted.
    d_vocab
        Number of states, >= 2.
    concentration
        Of the Dirichlet law of the transition rows, from 1e-30 to 1e30.

    Raises
    ------
    CausalProbeError
        If an argument is out of range, the graph is not valid, the node to be predicted has no parent, or a table of
        transitions would not fit into memory.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs
    >>> task = InContextMarkov(graphs.chain(19), d_vocab=3, concentration=0.1)
    >>> batch = task.sample(4, torch.Generator().manual_seed(0))
    >>> batch.tokens.shape, batch.target.shape
    (torch.Size([4, 20]), torch.Size([4, 3]))
    """

    def __init__(self, graph: nx.DiGraph, d_vocab: int, concentration: float = 0.1) -> None:
        check_graph(graph)
        if isinstance(d_vocab, bool) or not isinstance(d_vocab, int) or d_vocab < 2:
            raise CausalProbeError(f"The vocabulary must hold at least 2 states; d_vocab is {d_vocab!r}.")
        if not CONCENTRATIONS[0] <= concentration <= CONCENTRATIONS[1]:
            raise CausalProbeError(
                f"The Dirichlet concentration must be positive and finite, from {CONCENTRATIONS[0]:g} to {CONCENTRATIONS[1]:g}; "
                f"it is {concentration!r}."
            )
        self.graph: nx.DiGraph = nx.freeze(graph.copy())
        self.d_vocab = d_vocab
        self.concentration = float(concentration)
        self.parents: tuple[tuple[int, ...], ...] = parent_lists(graph)
        n = len(self.parents)
        #: Number of tokens that the model sees, T.
        self.n_positions: int = n + 1 if self.is_tree else n - 1
        if not self.is_tree and not self.parents[-1]:
            raise CausalProbeError(
                f"Some node has several parents, so node {n - 1} is the one to be predicted, and it has no parent: nothing "
                "can be predicted. Give it parents."
            )
        #: The in-degrees for which there is a table; a tree has its one table even if every node is a root.
        self._degrees: list[int] = [1] if self.is_tree else sorted({len(p) for p in self.parents if p})
        if d_vocab ** (self._degrees[-1] + 1) > MAX_TABLE:
            raise CausalProbeError(
                f"The transition table of {d_vocab} states and {self._degrees[-1]} parent(s) has {d_vocab}^"
                f"{self._degrees[-1] + 1} entries in every sequence, more than fit into memory. Take fewer states or parents."
            )
        self._plan = _plan(self.parents[: self.n_positions])

    def __repr__(self) -> str:
        edges = self.graph.number_of_edges()
        law = f"d_vocab={self.d_vocab}, concentration={self.concentration:g}"
        return f"InContextMarkov({self.n_positions} positions, {edges} edges, {law})"

    @property
    def description(self) -> str:
        """The law in one phrase."""
        return (
            f"in-context Markov task over a known graph ({self.d_vocab} states, {self.n_positions} positions, "
            f"Dirichlet concentration {self.concentration:g})"
        )

    def references(self) -> dict[str, Predictor]:
        """The exact predictors of :mod:`causal_probe.tasks.predictors`; the one-parent figure is the best slot's."""
        return {
            "uniform": lambda batch: uniform(self, batch.tokens),
            "in-context unigram": lambda batch: in_context_unigram(self, batch.tokens),
            "one-parent": lambda batch: best_one_parent(self, batch),
            "known-graph": lambda batch: known_graph(self, batch.tokens),
        }

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        targets: Targets = "soft",
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        """Draw ``batch_size`` sequences, each with transitions of its own.

        Parameters
        ----------
        generator
            The source of all randomness; the batch lies on its device. The same state gives the same batch.
        targets
            ``"soft"``: the target is the next token's distribution. ``"hard"``: one draw from it, one-hot.

        Raises
        ------
        CausalProbeError
            If ``batch_size`` is below 1 or ``targets`` is unknown.
        """
        check_batch_size(batch_size, generator)
        if targets not in ("soft", "hard"):
            raise CausalProbeError(f"targets must be 'soft' or 'hard', not {targets!r}.")
        tables = {
            k: dirichlet(
                self.concentration, (batch_size, self.d_vocab**k, self.d_vocab), generator=generator, dtype=dtype
            )
            for k in self._degrees
        }
        tokens = self.sample_tokens(tables, generator)
        if self.is_tree:
            context = tokens[:, -1]
        else:
            context = self._context([tokens[:, p] for p in self.parents[-1]])
        target = tables[self.n_slots][torch.arange(batch_size, device=generator.device), context]
        if targets == "hard":
            drawn = _draw(_cumulative(target), generator)
            target = torch.nn.functional.one_hot(drawn, self.d_vocab).to(dtype)
        return Batch(tokens, target, tables)

    def sample_tokens(
        self, tables: Mapping[int, Float[Tensor, "batch context d_vocab"]], generator: torch.Generator
    ) -> Int[Tensor, "batch pos"]:
        """Draw one sequence for each given set of transition tables.

        Parameters
        ----------
        tables
            As in :class:`Batch`, one for each in-degree of the task, with rows that sum to one.
        generator
            As in :meth:`sample`.

        Raises
        ------
        CausalProbeError
            If a table is missing or has another shape.
        """
        batch_size = max((len(table) for table in tables.values()), default=0)
        expected = {k: (batch_size, self.d_vocab**k, self.d_vocab) for k in self._degrees}
        found = {k: tuple(table.shape) for k, table in tables.items()}
        if found != expected:
            raise CausalProbeError(
                f"The tables by in-degree must have the shapes {expected} [batch, context, d_vocab]; theirs are {found}."
            )
        device = generator.device
        cumulative = {k: _cumulative(table).flatten(0, 1) for k, table in tables.items()}
        row = torch.arange(batch_size, device=device)
        # [pos, batch]: a node's tokens are contiguous
        tokens = torch.empty(self.n_positions, batch_size, dtype=torch.long, device=device)
        for draw in self._plan:
            k = len(draw.parents)
            if k:
                context = self._context([tokens[slot] for slot in draw.parents])
                rows = cumulative[k][row * self.d_vocab**k + context]
            elif self.is_tree:
                rows = _cumulative(stationary_distribution(tables[1])).expand(len(draw.nodes), -1, -1)
            else:
                even = torch.full((self.d_vocab,), 1 / self.d_vocab, dtype=tables[max(tables)].dtype, device=device)
                rows = even.cumsum(-1).expand(len(draw.nodes), batch_size, -1)
            tokens[draw.nodes] = _draw(rows, generator)
        if self.is_tree:
            tokens[-1] = torch.randint(self.d_vocab, (batch_size,), generator=generator, device=device)
        return tokens.T.contiguous()

    @property
    def redraw(self) -> Redraw | None:
        """(batch, node, edges, generator) -> the same sequences with each state that one node might have had (:class:`Redrawn`).

        All later nodes are drawn anew along ``edges``, parent -> child, as roots where they have no parent there. So whatever ``edges`` holds:
        if the node is the child of k, then given all earlier nodes its state has the law that stands for k, and the sequence
        with its own state is one draw from that law. What a probe measures on it has the mean of what it measures on all states, weighted by that law.

        The batch holds sequences of this task with their tables. None in a k-parent task: what a partly known set of parents implies
        has no simple law.

        Raises
        ------
        CausalProbeError
            When it is called: if there is no such node, a later node has several parents, or its parent does not come before it.
        """
        return self._redraw if self.is_tree else None

    def _redraw(self, batch: Batch, node: int, edges: nx.DiGraph, generator: torch.Generator) -> Redrawn:
        n_nodes = self.n_positions - 1
        if not 0 <= node < n_nodes:
            raise CausalProbeError(f"There is no node {node}; the nodes are 0 to {n_nodes - 1}.")
        pi = batch.tables[1]
        row = torch.arange(len(batch), device=generator.device)
        mu = stationary_distribution(pi).to(pi.dtype)
        root, cumulative = _cumulative(mu), _cumulative(pi)
        chance = torch.rand((n_nodes, len(batch)), generator=generator, dtype=pi.dtype, device=generator.device)
        parents = {child: list(edges.predecessors(child)) for child in range(node + 1, n_nodes) if child in edges}
        if wrong := {child: its for child, its in parents.items() if its and (len(its) > 1 or its[0] >= child)}:
            child, its = next(iter(wrong.items()))
            raise CausalProbeError(
                f"Node {child} can't be drawn along the edges from {sorted(its)}: a node has one parent at most, which comes before it."
            )

        def draw(rows: Int[Tensor, " row"]) -> Batch:
            u = chance[:, rows]
            found = batch.tokens[rows].T.repeat(self.d_vocab, 1, 1)  # [state, pos, row]
            found[:, node] = torch.arange(self.d_vocab, device=rows.device)[:, None]
            for level in _levels(parents, node, n_nodes):
                if level.parents:
                    after = _reached(
                        u[level.nodes][..., None], cumulative[rows]
                    )  # by the parent's state, [node, row, state]
                    of_parents = found[:, level.parents[0]][..., None]
                    found[:, level.nodes] = after.expand(self.d_vocab, -1, -1, -1).gather(-1, of_parents)[..., 0]
                else:
                    found[:, level.nodes] = _reached(u[level.nodes], root[rows])
            return replace(
                batch.of(rows.repeat(self.d_vocab)), tokens=found.transpose(1, 2).reshape(-1, self.n_positions)
            )

        laws = torch.cat([mu[:, None], pi[row[:, None], batch.tokens[:, :node]]], 1)
        asked = batch.tokens[:, :node] == batch.tokens[:, -1:]
        return Redrawn(laws, batch.tokens[:, node], asked, draw)

    def _context(self, parents: list[Tensor]) -> Tensor:
        """The row of a table that the parents' tokens name: the first parent is the most significant digit."""
        context = parents[0]
        for parent in parents[1:]:
            context = context * self.d_vocab + parent
        return context


def _cumulative(probabilities: Float[Tensor, "*rows d_vocab"]) -> Float[Tensor, "*rows d_vocab"]:
    """Cumulative probabilities whose last entry is exactly one, so that no rounding makes an impossible state possible."""
    total = probabilities.cumsum(-1)
    return total / total[..., -1:]


def _draw(cumulative: Float[Tensor, "*rows d_vocab"], generator: torch.Generator) -> Int[Tensor, "*rows"]:
    """One state per row of cumulative probabilities: how many of them a uniform number in [0, 1) reaches."""
    u = torch.rand(cumulative.shape[:-1], generator=generator, dtype=cumulative.dtype, device=generator.device)
    return _reached(u, cumulative)


def _reached(u: Float[Tensor, "*#rows"], cumulative: Float[Tensor, "*#rows d_vocab"]) -> Int[Tensor, "*_out"]:
    """How many of the cumulative probabilities a number in [0, 1) reaches."""
    first, *others = cumulative[..., :-1].unbind(-1)
    reached = (u >= first).long()
    for bound in others:  # a sum over an axis this short is several times as slow
        reached += u >= bound
    return reached


def _levels(parents: Mapping[int, list[int]], node: int, n_nodes: int) -> Iterator[_Draw]:
    """The nodes after one of them, those together that can be drawn at once: roots first, then by their distance from what is known."""
    distance: dict[int, int] = {}
    for later in range(node + 1, n_nodes):
        its = parents.get(later)
        distance[later] = 1 + distance.get(its[0], 0) if its else 0
    for at in range(1 + max(distance.values(), default=-1)):
        nodes = [later for later, its in distance.items() if its == at]
        if nodes:
            yield _Draw(nodes, [[parents[later][0] for later in nodes]] if at else [])


def _plan(parents: tuple[tuple[int, ...], ...]) -> tuple[_Draw, ...]:
    """Group the nodes by depth and in-degree, so that a whole group is drawn at once; ordered by depth."""
    depth: list[int] = []
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for node, its in enumerate(parents):
        depth.append(1 + max((depth[p] for p in its), default=-1))
        groups[depth[node], len(its)].append(node)
    return tuple(
        _Draw(nodes, [[parents[node][slot] for node in nodes] for slot in range(k)])
        for (_, k), nodes in sorted(groups.items())
    )
