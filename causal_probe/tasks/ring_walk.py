"""A walk on a ring, along a causal graph: the smallest task of another law than :class:`~causal_probe.tasks.InContextMarkov`.

In each sequence, over S states in a ring and a tree or forest of T - 1 nodes::

    p      ~  uniform in (0, 1)                                    the probability of a step up, one for the whole sequence
    s_i    ~  uniform                                              where node i is a root: the walk's stationary law
    s_i    =  s_parent(i) + 1 with probability p, else - 1         (mod S)
    query  ~  uniform, independent of all else                     the last of the T tokens
    target =  p at query + 1, 1 - p at query - 1

All edges of the graph tell about one number, p, so a predictor that knows the graph and the law predicts with (1 + ups) / (2 + ups + downs) of all of
them (Laplace's rule, the exact posterior mean), far better than by counting what followed the query's state.
"""

from __future__ import annotations

import networkx as nx
import torch
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.tasks.markov import InContextMarkov
from causal_probe.tasks.predictors import in_context_unigram, uniform
from causal_probe.tasks.randomness import check_batch_size
from causal_probe.tasks.task import Batch, Predictor, Redraw, Task

__all__ = ["RingWalk"]


@checked
class RingWalk(Task):
    """Steps of +1 or -1 on a ring of states, with a probability that is new in every sequence, along each edge of a graph.

    Parameters
    ----------
    graph
        Edges parent -> child over nodes 0..n-1, at most one parent for each; T = n + 1.
    d_vocab
        Number of states S, >= 3: in a ring of 2, up and down are the same.

    Raises
    ------
    CausalProbeError
        If a node has several parents, the graph is not valid, or there are too few states.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = RingWalk(graphs.chain(7), d_vocab=5)
    >>> batch = task.sample(512, tasks.generator(0, "ring"))
    >>> {name: round(loss, 2) for name, loss in tasks.reference_losses(task, batch).items()}
    {'uniform': 1.61, 'in-context unigram': 1.67, 'known-graph': 0.55}
    """

    def __init__(self, graph: nx.DiGraph, d_vocab: int = 5) -> None:
        walk = InContextMarkov(graph, d_vocab)  # draws sequences, given their transitions
        if not walk.is_tree or d_vocab < 3:
            raise CausalProbeError(
                f"A walk on a ring has 3 states or more, and follows a graph in which no node has several parents; d_vocab is {d_vocab}"
                f"{'' if walk.is_tree else ', and some node has several'}."
            )
        self._walk, self.graph, self.n_positions, self.d_vocab = walk, walk.graph, walk.n_positions, d_vocab

    def __repr__(self) -> str:
        return f"RingWalk({self.n_positions} positions, {self.graph.number_of_edges()} edges, d_vocab={self.d_vocab})"

    @property
    def description(self) -> str:
        """The law in one phrase."""
        return f"ring-walk task over a known graph ({self.d_vocab} states, {self.n_positions} positions)"

    @property
    def redraw(self) -> Redraw | None:
        """See :attr:`InContextMarkov.redraw <causal_probe.tasks.InContextMarkov.redraw>`."""
        return self._walk.redraw

    def sample(self, batch_size: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Batch:
        """Draw ``batch_size`` sequences on the generator's device, each with a p of its own.

        Raises
        ------
        CausalProbeError
            If ``batch_size`` is below 1.
        """
        check_batch_size(batch_size, generator)
        p = torch.rand(batch_size, generator=generator, dtype=dtype, device=generator.device)
        pi = self._steps(torch.eye(self.d_vocab, dtype=dtype, device=p.device), p[:, None, None])
        tokens = self._walk.sample_tokens({1: pi}, generator)
        return Batch(tokens, pi[torch.arange(batch_size, device=p.device), tokens[:, -1]], {1: pi})

    def references(self) -> dict[str, Predictor]:
        """Uniform, in-context unigram, and the posterior mean given the graph and the law."""
        return {
            "uniform": lambda batch: uniform(self, batch.tokens),
            "in-context unigram": lambda batch: in_context_unigram(self, batch.tokens),
            "known-graph": self._known_graph,
        }

    def _known_graph(self, batch: Batch) -> Tensor:
        parents, children = (
            (list(ends) for ends in zip(*self.graph.edges, strict=True)) if self.graph.edges else ([], [])
        )
        ups = ((batch.tokens[:, children] - batch.tokens[:, parents]) % self.d_vocab == 1).sum(1, keepdim=True)
        p = (1 + ups) / (2 + len(children))
        return self._steps(torch.nn.functional.one_hot(batch.tokens[:, -1], self.d_vocab).to(p.dtype), p)

    @staticmethod
    def _steps(here: Tensor, p: Tensor) -> Tensor:
        """The law of the next state, where ``here`` is one-hot over the last axis."""
        return p * here.roll(1, -1) + (1 - p) * here.roll(-1, -1)
