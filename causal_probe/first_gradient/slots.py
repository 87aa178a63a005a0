"""Several parents from one gradient: one reduced model for each position that the last layer may ask about.

With the last token as the only query, one gradient shows the parents of one slot at most. So the comparison in layer 1 is made with
*every* position h in turn: evidence ``[query h, child, parent]``. Where h is a parent of the predicted node T, in slot a, the gradient is
that of the a-th parent of every child; elsewhere it is a weaker echo, or an artefact of tokens that are drawn alike.

Which positions are T's parents is decided by what they are good for. On sequences that the gradient has not seen, a set of
queries predicts as an induction head of that order would: it counts the tokens of all positions whose leading earlier
positions carry the queries' tokens, one per query (Krichevsky & Trofimov's half added to every count). Sets grow by one query as long
as the best larger set lowers the loss, and loses by having any of its queries' tokens taken from another sequence (paired one-sided
tests, corrected for all sets that were looked at). The size of the last set is the number of parents k. The search is cut off where the
mixed derivative below, of T^(k + 1) entries, would have more than 2^27: after 4 queries up to T = 42, 3 up to
T = 107, 2 up to T = 512. The result says if it was; the predicted node may then have more parents, and which nodes are roots is not
decided.

A first gradient sees each parent of a child through the average over the others, and a relative of it may lead. So the parents are then
read together from the k-th mixed derivative at the same point, with respect to the patterns of k heads, one per query: to leading order
in 1 / T it is the mean of u_i m_j m'_j' ..., and over the share of sequences in which j, j', ... all match, the mean of u_i where they do.
The children's parents are the distinct positions that maximise it.

Where the tables of transitions are known, "this node is a root" is tested on the same unseen sequences, by the product of bets on these
parents of :mod:`causal_probe.tasks.root_test`; the gradient of T's loss says nothing about nodes with another number of parents than T,
whose transitions are of another table. Nodes with one are looked for by bets on each single earlier node, too; a node with any other
number is not tested for its parents, and appears as a root.

What that does not say: *which* nodes are the parents is a choice, the largest entry or the best bet, and not a test. No other earlier
node is tested against it, as :func:`gradient_graph` does, and a node that depends on them by way of others wins bets, too. The level of the test holds for queries
that are given; they were chosen on the same unseen sequences, for which nothing is corrected. The queries, the parents of node T, are
themselves a choice, each step of it tested.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe import graphs
from causal_probe.arguments import Count, checked
from causal_probe.errors import CausalProbeError
from causal_probe.first_gradient.graph import LEVEL, check_alike, check_scale_and_level, own_tokens
from causal_probe.first_gradient.queries import QueryChoice, Together, confirm_nodes, largest_distinct
from causal_probe.first_gradient.stream import GradientStream
from causal_probe.graphs import GraphComparison
from causal_probe.hooks.batches import apart
from causal_probe.models.reduced import first_gradient
from causal_probe.results import BINARY, Result, Table
from causal_probe.tasks import Batch

__all__ = ["GradientSlots", "gradient_slots"]

#: Sequences that are kept away from the gradient, for the choice of queries and the test of nodes.
HELD_OUT = 8192
#: Most entries of the held-out tables and one-hot states of all positions: a few copies of 2 GiB.
MAX_KEPT = 2**29
#: Sequences from which the first gradients are taken, and queries chosen.
EXPLORED = 2**16
#: Of these, how many the mixed derivatives are taken from by which sets of queries are ranked.
RANKED = 2**14


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GradientSlots(Result):
    """A graph with several parents per node, read from one gradient per query.

    Attributes
    ----------
    evidence : NDArray, [query, child, parent]
        Minus the mean gradient of the loss with respect to layer 0's pattern, with the token at ``query`` replacing the last
        one, times T / beta, over the share of sequences in which ``parent`` carries that token. In a tree task with the last token as
        the query that share is 1 / S, and this is :attr:`GradientGraph.evidence`; a query in the middle is matched by
        itself always, and by its relatives more often than by others, which alone would make their entries larger.
    stderr : NDArray, [query, child, parent], or None
        Its standard error.
    queries : tuple[int, ...]
        The positions that carry signal, ascending: the parents of node T. Empty if none lowers the loss. With :attr:`cut_off`, some of the
        parents.
    gains : tuple[float, ...]
        Gain of each step of the choice, in nats on held-out sequences, beginning with the best single query over the
        in-context unigram.
    joint : NDArray, [child, parent, parent, ...]
        The mixed derivative, one parent axis per query: the mean over sequences in which each parent carries its query's token, times
        T / beta.
    leading : NDArray, [slot, child]
        Where ``joint`` is largest over distinct earlier positions; -1 for nodes that have not as many earlier ones.
    first : NDArray, [slot, child]
        The earlier position with the largest ``evidence`` under each of ``queries``: what the first gradients alone say.
    parents : tuple, by node 0..T
        The parents that were chosen, ascending: where tables are known, of the nodes for which "it is a root" is given up, otherwise of all
        that have enough earlier ones. Node T's are ``queries``. Nothing says that no other earlier nodes are the parents. A node
        whose number of parents is neither node T's nor one is not tested for them, and appears as a root.
    log_e_values : NDArray, by node 0..T-1, or None
        Evidence against "this node is a root", in nats: the largest over all that was bet on, the leading parents and each single
        earlier node. None where tables are not known.
    n_sequences, held_out
        How many the gradient saw, and how many it did not.
    cut_off : bool
        Whether the search ended because larger sets of queries need too large a mixed derivative (T^(k + 1) entries for k queries, 2^27 at
        most), while the last one tried still gained. Node T may then have more parents than ``queries``, and other nodes, which are
        read for as many, more than ``parents``, or parents where none is named.
    """

    KIND = "gradient slots"
    WORKS = ("nichani2024",)
    DERIVED = ("decided", "edges")

    evidence: Float[np.ndarray, "_query _child _parent"] = dataclasses.field(metadata=BINARY)
    stderr: Float[np.ndarray, "_query _child _parent"] | None = dataclasses.field(metadata=BINARY)
    queries: tuple[int, ...]
    gains: tuple[float, ...]
    joint: Float[np.ndarray, "_child *_parents"] = dataclasses.field(metadata=BINARY)
    leading: Int[np.ndarray, "_slot _child"]
    first: Int[np.ndarray, "_slot _child"]
    parents: tuple[tuple[int, ...], ...]
    log_e_values: Float[np.ndarray, " _node"] | None
    n_sequences: int
    held_out: int
    cut_off: bool = False

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Of :attr:`graph`, as (parent, child)."""
        return tuple(self.graph.edges)

    @property
    def decided(self) -> bool:
        """Whether "it is a root" was tested: tables are known, and the search for queries was not cut off."""
        return self.log_e_values is not None and not self.cut_off

    @property
    def graph(self) -> nx.DiGraph:
        """The edges parent -> child over the nodes 0..T."""
        return graphs.from_parents(self.parents)

    def compare(self, truth: nx.DiGraph) -> GraphComparison:
        """:func:`causal_probe.graphs.compare` with the truth, over all nodes up to T."""
        return graphs.compare(self.graph, truth)

    def swaps(self, truth: nx.DiGraph) -> tuple[int, ...]:
        """The nodes whose parents are right, with the slots exchanged: query a names another slot's parent (slot 0 is the smallest)."""
        found = []
        for node, its in enumerate(self.parents[:-1]):
            true = sorted(truth.predecessors(node))
            if len(its) == len(self.queries) > 1 and list(its) == true and self.leading[:, node].tolist() != true:
                found.append(node)
        return tuple(found)

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            "Parents were read from one gradient of the reduced transformer of Nichani et al. (2024) per query position, over "
            f"{self.n_sequences:,} sequences; the queries were chosen by forward selection on {self.held_out:,} others"
            f"{f', cut off at {len(self.queries)}' if self.cut_off else ''}, each step by paired tests. {self._decision()} ({self.measured_with})."
        )

    def _decision(self) -> str:
        """The test, in a sentence without its full stop."""
        if self.log_e_values is None:
            return "Whether a node has parents was not decided"
        return (
            "That a node is a root was tested on the same held-out sequences, by products of bets on the parents (e-values; Ville's inequality; "
            f"family-wise level {self.settings['level']:g} for given queries); which nodes are the parents is the largest evidence, not a test"
        )

    def _title(self) -> str:
        return (
            f"Gradient slots over {len(self.parents)} nodes: queries {list(self.queries)}{' (cut off, there may be more)' if self.cut_off else ''}, "
            f"{self.graph.number_of_edges()} edges "
            f"({self.n_sequences:,} sequences, {self.held_out:,} held out{'' if self.decided else '; roots are not decided'})"
        )

    def table(self) -> Table:
        """The parents of every node."""
        log_e = self.log_e_values
        rows = [
            (node, ", ".join(map(str, its)), None if log_e is None or node >= len(log_e) else float(log_e[node]))
            for node, its in enumerate(self.parents)
        ]
        return Table(self._title(), ("node", "parents", "nats against a root"), rows)


@checked
def gradient_slots(
    batches: Any,
    *,
    d_vocab: Count | None = None,
    beta: float = 1.0,
    level: float = LEVEL,
    held_out: int = HELD_OUT,
    explored: int = EXPLORED,
) -> GradientSlots:
    """Read a graph of several parents from one gradient per query position.

    Parameters
    ----------
    batches
        As in :func:`gradient_graph`: batches of a k-parent task, or your
        own tokens [batch, T + 1]. The first ``held_out`` sequences are kept away from the gradient.
    d_vocab, beta
        As in :func:`gradient_graph`.
    level
        Where tables are known: probability that any root is taken for a child, for queries that are given (they are chosen on the same
        held-out sequences). It is no bound on wrong parents: which earlier nodes are the parents of a child is a choice, not a
        test. Nodes whose number of parents is neither the predicted node's nor one are not tested for them, and appear as roots. Also
        the level of each step in the choice of queries.
    held_out
        Number of sequences on which queries are chosen and nodes are tested.
    explored
        Number of sequences from which the first gradients are taken; the mixed derivative is taken from these and all further ones.

    Raises
    ------
    CausalProbeError
        If there are fewer than two sequences beside the held-out ones, they differ in length or vocabulary or are too short (T < 2: no
        two positions to ask at), tokens are not states, batches with known transitions and without or with other tables are mixed, a
        task's nodes have one parent at most (see :func:`gradient_graph`), what is held out would not fit into memory, or an argument is out of range.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.from_parents([None, 0, (0, 1), (1, 2), (2, 3)]), d_vocab=3, concentration=0.1)
    >>> found = gradient_slots([task.sample(2048, tasks.generator(0, "sequences"))], held_out=512)
    >>> len(found.parents)
    5
    """
    for name, value in (("held_out", held_out), ("explored", explored)):
        if value < 2:
            raise CausalProbeError(f"{name} must be at least 2; it is {value}.")
    check_scale_and_level(beta, level)
    study = _Study(beta=beta, level=level, held_out=held_out, explored=explored)
    for given in apart(batches):
        study.add(*_unpack(given, d_vocab if study.d_vocab is None else study.d_vocab))
    return study.result()


class _Study:
    """First the held-out sequences, then those of the first gradients, then those of the mixed derivative, which are the former too."""

    def __init__(self, *, beta: float, level: float, held_out: int, explored: int) -> None:
        self.beta, self.level, self.held_out, self.explored = beta, level, held_out, explored
        self.d_vocab: int | None = None
        self.degrees: list[int] = []
        self.n = 0
        self.seen = 0
        self.kept: list[tuple[Tensor, Tensor, dict[int, Tensor]]] = []
        self.n_kept = 0
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.stream: GradientStream
        self.queries: tuple[int, ...] | None = None

    def add(self, tokens: Tensor, target: Tensor, tables: dict[int, Tensor]) -> None:
        if self.d_vocab is None:
            self.d_vocab, self.n, self.degrees = target.shape[1], tokens.shape[1], sorted(tables)
            if self.n < 2:
                raise CausalProbeError(
                    f"Sequences of {self.n} position{'s' * (self.n != 1)} can't show several parents: T must be at least 2. Give tokens "
                    "[batch, T + 1], or batches of a task."
                )
            each = max(self.n * self.d_vocab, sum(table[0].numel() for table in tables.values()))
            if self.held_out * each > MAX_KEPT:
                raise CausalProbeError(
                    f"{self.held_out:,} held-out sequences over {self.d_vocab:,} states have {self.held_out * each:,} entries to be kept, more than "
                    f"{MAX_KEPT:,}. Take fewer states, or give batches to gradient_slots with a smaller held_out"
                    f"{f' (at most {MAX_KEPT // each:,})' if each <= MAX_KEPT // 2 else ''}."
                )
            self.stream = GradientStream(self.n, self.n, scale=self.n / self.beta)
            self.matched = torch.zeros(self.n, self.n, dtype=torch.float64)
        check_alike(tokens, target, bool(tables), n_positions=self.n, d_vocab=self.d_vocab, known=bool(self.degrees))
        if sorted(tables) != self.degrees:
            raise CausalProbeError(
                f"All batches must have tables for the same numbers of parents; there are batches with tables for {self.degrees} and for "
                f"{sorted(tables)}. Give batches of one task."
            )
        aside = min(self.held_out - self.n_kept, len(tokens))
        if aside:
            self.kept.append((tokens[:aside], target[:aside], {k: table[:aside] for k, table in tables.items()}))
            self.n_kept += aside
        tokens, target = tokens[aside:], target[aside:]
        if not len(tokens):
            return
        self.seen += len(tokens)
        if self.queries is not None:
            self.joint.add(tokens, target)
            return
        for piece in self.stream.pieces(len(tokens)):
            factors = [
                first_gradient(tokens[piece], target[piece], beta=self.beta, query=query) for query in range(self.n)
            ]
            m = torch.stack([m for _, m in factors])
            self.stream.add(torch.stack([u for u, _ in factors]), m)
            self.matched += m.sum(1)
        self.waiting.append((tokens, target))
        if self.stream.seen >= self.explored:
            self._choose()

    def _choose(self) -> None:
        # A position that never carries the query's token has an entry of 0.
        self.share = (self.matched / self.stream.seen).clamp(min=1 / self.stream.seen)[:, None]
        self.evidence = self.stream.mean / self.share
        self.first = self.stream.leading_of(self.evidence)
        self.tokens = torch.cat([tokens for tokens, _, _ in self.kept])
        self.target = torch.cat([target for _, target, _ in self.kept])
        some, their_target = (torch.cat([its[i] for its in self.waiting])[:RANKED] for i in (0, 1))

        def lead_together(queries: tuple[int, ...]) -> Tensor:
            together = Together(self.n, queries)
            together.add(some, their_target)
            return largest_distinct(together.mean())

        choice = QueryChoice(self.tokens, self.target, self.first)
        self.queries, self.gains, self.cut_off = choice.run(lead_together, level=self.level)
        self.joint = Together(self.n, self.queries)
        for tokens, target in self.waiting:
            self.joint.add(tokens, target)
        self.waiting.clear()

    def result(self) -> GradientSlots:
        if self.d_vocab is None:
            raise CausalProbeError("There are no sequences. Give batches of a task, or tokens [batch, T + 1].")
        if self.seen < 2:
            raise CausalProbeError(
                f"{self.n_kept} sequences were held out, and fewer than 2 are left for the gradient. Give more, or hold out fewer."
            )
        if self.queries is None:
            self._choose()
        assert self.queries is not None
        n = self.n
        joint = self.joint.mean()
        led = largest_distinct(joint)
        parents = [tuple(sorted(int(j) for j in led[:, node] if j >= 0)) for node in range(n)]
        tables = {k: torch.cat([its[2][k] for its in self.kept]) for k in self.kept[0][2]}
        log_e = None
        if tables:
            parents, log_e = confirm_nodes(self.tokens, tables, parents, level=self.level)
        stderr = self.stream.stderr()
        return GradientSlots(
            evidence=self.evidence.numpy(),
            stderr=None if stderr is None else (stderr / self.share).numpy(),
            queries=self.queries,
            gains=self.gains,
            joint=joint.numpy(),
            leading=led.numpy(),
            first=self.first[list(self.queries)].numpy(),
            parents=(*parents, self.queries),
            log_e_values=log_e,
            n_sequences=self.seen,
            held_out=self.n_kept,
            settings={
                "n_positions": n,
                "d_vocab": self.d_vocab,
                "beta": self.beta,
                "level": self.level,
                "explored": self.explored,
                "transitions": "known" if tables else "unknown",
            },
            cut_off=self.cut_off,
        )


def _unpack(given: Any, d_vocab: int | None) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    if isinstance(given, Batch):
        if max(given.tables, default=0) < 2:
            raise CausalProbeError(
                "No node of this task has several parents: use gradient_graph, which also tells roots apart."
            )
        return given.tokens.cpu(), given.target.cpu().float(), {k: table.cpu() for k, table in given.tables.items()}
    tokens, target = own_tokens(given, d_vocab)
    return tokens, target, {}
