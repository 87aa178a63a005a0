"""Sequences whose causal graph is new in every sequence, drawn from a known set.

In each sequence, over S states and T positions::

    g      ~  uniform over the graphs
    P         one matrix for all sequences ("fixed"), or rows iid Dirichlet(concentration) in every sequence ("fresh")
    s_i    ~  uniform                       where node i is a root of g
    s_i    ~  P(. | s_parent(i))            otherwise, with the parent in g

With lags for graphs (:meth:`GraphMixture.of_lags`) this is the selective-induction task of D'Angelo, Croce & Flammarion (2025): the first
``max(lags)`` tokens are roots under every lag, so that they tell nothing of the graph. Every token is to be predicted from those before it.
Roots are uniform, because only then is the evidence for a graph known in closed form with fresh transitions, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.graphs import check_graph
from causal_probe.graphs.check import parent_lists
from causal_probe.tasks.dirichlet import check_concentration, dirichlet
from causal_probe.tasks.randomness import check_batch_size, generator

__all__ = ["GraphMixture", "LabelledBatch", "NextTokens", "counted", "next_token_losses"]

#: From a batch to the predicted distribution of each token given those before it, [batch, pos, d_vocab].
NextTokens = Callable[["LabelledBatch"], Float[Tensor, "batch pos d_vocab"]]


@dataclass(frozen=True)
class LabelledBatch:
    """Sequences, and which of the task's laws each was drawn from.

    Attributes
    ----------
    tokens : Int[Tensor, "batch pos"]
        The sequences.
    labels : Int[Tensor, "batch"]
        For each the index of its graph (or chain) in the task.
    """

    tokens: Int[Tensor, "batch pos"]
    labels: Int[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.tokens)

    def splice(self, at: int) -> tuple[LabelledBatch, Int[Tensor, " batch"]]:
        """Give each sequence, from position ``at`` on, the tail of a sequence with another label; the batch keeps the prefixes' labels.

        Just behind the splice a head that has read the law out of the context still follows the prefix's; a head that looks at the last few
        tokens alone does not. The n-th sequence of a label takes the tail of the n-th of the next label, around in both.

        Parameters
        ----------
        at
            The first position of the tails, from 1 to T - 1.

        Returns
        -------
        tuple
            The batch, and the tails' labels.

        Raises
        ------
        CausalProbeError
            If ``at`` lies outside the sequences, or all have one label.

        Examples
        --------
        >>> batch, tails = LabelledBatch(torch.tensor([[0, 0, 0], [1, 1, 1]]), torch.tensor([0, 1])).splice(at=2)
        >>> batch.tokens.tolist(), batch.labels.tolist(), tails.tolist()
        ([[0, 0, 1], [1, 1, 0]], [0, 1], [1, 0])
        """
        tokens, labels = self.tokens, self.labels
        if isinstance(at, bool) or not isinstance(at, int) or not 1 <= at < tokens.shape[1]:
            raise CausalProbeError(f"`at` is {at!r}. It must be a whole number from 1 to {tokens.shape[1] - 1}.")
        there = sorted(set(labels.tolist()))
        if len(there) < 2:
            raise CausalProbeError(
                "Tails come from sequences with another label: give sequences of two labels or more."
            )
        source = torch.empty_like(labels)
        for label, following in zip(there, [*there[1:], there[0]], strict=True):
            its, others = (torch.nonzero(labels == each)[:, 0] for each in (label, following))
            source[its] = others[torch.arange(len(its), device=labels.device) % len(others)]
        return LabelledBatch(torch.cat([tokens[:, :at], tokens[source, at:]], 1), labels), labels[source]


@checked
class GraphMixture:
    """A graph drawn for each sequence.

    Parameters
    ----------
    graphs
        Two or more different forests, edges parent -> child over the same nodes 0..T-1, each parent before its child.
    d_vocab
        Number of states S, at least 2.
    transitions
        ``"fixed"``: one matrix for all sequences. ``"fresh"``: a new one in every sequence.
    concentration
        Of the Dirichlet law of the matrix's rows.
    seed
        Of the fixed matrix.

    Raises
    ------
    CausalProbeError
        If an argument is out of range, or the graphs are not such forests.

    Examples
    --------
    >>> from causal_probe import tasks
    >>> task = GraphMixture.of_lags((1, 2, 3), n_positions=32, d_vocab=5)
    >>> batch = task.sample(512, tasks.generator(0, "mixture"))
    >>> batch.tokens.shape, sorted(set(batch.labels.tolist()))
    (torch.Size([512, 32]), [0, 1, 2])
    >>> losses = task.reference_losses(batch)
    >>> losses["model averaging"] < losses["in-context bigram"] < losses["uniform"]
    True
    """

    def __init__(
        self,
        graphs: Sequence[nx.DiGraph],
        d_vocab: int,
        *,
        transitions: str = "fixed",
        concentration: float = 1.0,
        seed: int = 0,
    ) -> None:
        if transitions not in ("fixed", "fresh"):
            raise CausalProbeError(f"transitions must be 'fixed' or 'fresh', not {transitions!r}.")
        if isinstance(d_vocab, bool) or not isinstance(d_vocab, int) or d_vocab < 2:
            raise CausalProbeError(f"The vocabulary must hold at least 2 states; d_vocab is {d_vocab!r}.")
        for graph in graphs:
            check_graph(graph)
        parents = [parent_lists(graph) for graph in graphs]
        sizes, several = {len(its) for its in parents}, any(len(its) > 1 for each in parents for its in each)
        if len(set(parents)) != len(parents) or len(parents) < 2 or len(sizes) != 1 or several:
            raise CausalProbeError(
                f"A mixture is over two or more different graphs of the same nodes, with one parent at most for each node; found {len(parents)} "
                f"graphs ({len(set(parents))} different) over {', '.join(map(str, sorted(sizes))) or 'no'} nodes"
                f"{', with several parents for some node' if several else ''}."
            )
        self.graphs = tuple(nx.freeze(graph.copy()) for graph in graphs)
        self.d_vocab, self.transitions, self.concentration = d_vocab, transitions, check_concentration(concentration)
        self.n_positions = sizes.pop()
        #: By graph, each node's parent; -1 for roots.
        self.parents: Int[Tensor, "graph pos"] = torch.tensor(
            [[its[0] if its else -1 for its in each] for each in parents]
        )
        self.names = tuple(f"graph {i}" for i in range(len(graphs)))
        #: The fixed matrix, [d_vocab, d_vocab]; None for fresh transitions.
        self.matrix = (
            dirichlet(concentration, (d_vocab, d_vocab), generator=generator(seed, "transitions"), dtype=torch.float64)
            if transitions == "fixed"
            else None
        )

    @classmethod
    def of_lags(
        cls,
        lags: Sequence[int],
        n_positions: int,
        d_vocab: int,
        *,
        transitions: str = "fixed",
        concentration: float = 1.0,
        seed: int = 0,
    ) -> GraphMixture:
        """Each sequence has one lag k of ``lags``: the parent of token t is token t - k, from t = max(lags) on.

        Raises
        ------
        CausalProbeError
            If the lags are not two or more different whole numbers from 1 to ``n_positions`` - 1.
        """
        right = all(isinstance(lag, int) and not isinstance(lag, bool) and 1 <= lag < n_positions for lag in lags)
        if not right or len(set(lags)) != len(lags) or len(lags) < 2:
            raise CausalProbeError(
                f"Lags are two or more different whole numbers from 1 to {n_positions - 1}; found {list(lags)}."
            )
        graphs = []
        for lag in lags:
            graph = nx.empty_graph(n_positions, create_using=nx.DiGraph)
            graph.add_edges_from((t - lag, t) for t in range(max(lags), n_positions))
            graphs.append(graph)
        task = cls(graphs, d_vocab, transitions=transitions, concentration=concentration, seed=seed)
        task.names = tuple(f"lag {lag}" for lag in lags)
        return task

    def __repr__(self) -> str:
        return (
            f"GraphMixture({len(self.graphs)} graphs, {self.n_positions} positions, d_vocab={self.d_vocab}, "
            f"transitions={self.transitions!r}, concentration={self.concentration:g})"
        )

    def sample(self, batch_size: int, generator: torch.Generator) -> LabelledBatch:
        """Draw sequences, each with a graph of its own, on the generator's device.

        Raises
        ------
        CausalProbeError
            If ``batch_size`` is below 1.
        """
        check_batch_size(batch_size, generator)
        device, S = generator.device, self.d_vocab
        labels = torch.randint(len(self.graphs), (batch_size,), generator=generator, device=device)
        if self.matrix is None:
            matrix = dirichlet(self.concentration, (batch_size, S, S), generator=generator, dtype=torch.float64)
        else:
            matrix = self.matrix.to(device).expand(batch_size, S, S)
        above = matrix.cumsum(-1)
        above = above / above[..., -1:]  # the last is exactly 1
        parents = self.parents.to(device)[labels]
        row = torch.arange(batch_size, device=device)
        tokens = torch.empty(batch_size, self.n_positions, dtype=torch.long, device=device)
        even = torch.arange(1, S + 1, dtype=above.dtype, device=device) / S
        for t in range(self.n_positions):
            parent = parents[:, t]
            law = torch.where((parent < 0)[:, None], even, above[row, tokens[row, parent.clamp_min(0)] if t else 0])
            u = torch.rand(batch_size, 1, generator=generator, dtype=above.dtype, device=device)
            tokens[:, t] = (u >= law[:, :-1]).sum(-1)
        return LabelledBatch(tokens, labels)

    # ------------------------------------------------------------------------------------------------------- references

    def by_graph(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch graph pos d_vocab"]:
        """The distribution of each token given those before it, if the graph is known; with fresh transitions, these are integrated out.

        Of a fixed matrix P: P(. | parent). Of fresh ones: (n_xy + a) / (n_x + S a), with n the counts of (parent, child) along the graph so far
        and a the concentration (the Dirichlet law's posterior mean). Of a root: 1 / S.
        """
        n, S = len(tokens), self.d_vocab
        found = []
        for parents in self.parents.tolist():
            law = torch.full((n, self.n_positions, S), 1 / S, dtype=torch.float64, device=tokens.device)
            if self.matrix is not None:
                children = [t for t, parent in enumerate(parents) if parent >= 0]
                law[:, children] = self.matrix.to(tokens.device)[tokens[:, [parents[t] for t in children]]]
            else:
                law = counted(tokens, parents, S, self.concentration)
            found.append(law)
        return torch.stack(found, 1)

    def posterior(
        self, tokens: Int[Tensor, "batch pos"], laws: Float[Tensor, "batch graph pos d_vocab"] | None = None
    ) -> Float[Tensor, "batch graph pos"]:
        """The probability of each graph given the tokens *before* each position. It sums to one over the graphs."""
        laws = self.by_graph(tokens) if laws is None else laws
        return self._log_evidence(tokens, laws).softmax(1)

    def _log_evidence(self, tokens: Tensor, laws: Tensor) -> Float[Tensor, "batch graph pos"]:
        each = laws.gather(-1, tokens[:, None, :, None].expand(-1, laws.shape[1], -1, 1))[..., 0].log()
        return functional.pad(each.cumsum(-1)[..., :-1], (1, 0))

    def references(self) -> dict[str, NextTokens]:
        """Reference predictors by name: uniform, unigram, bigram, each graph alone, all alike, maximum likelihood and exact model averaging.

        *In-context unigram* and *bigram* count so far, with a pseudo-count of 1. *Even averaging* weighs the graphs alike, whatever was seen. *Maximum likelihood* follows the likeliest graph (several that
        are equally likely alike); *model averaging* weighs the graphs by their posterior, and no predictor has a lower expected loss.
        """
        S = self.d_vocab

        def averaged(batch: LabelledBatch, *, hard: bool) -> Tensor:
            laws = self.by_graph(batch.tokens)
            evidence = self._log_evidence(batch.tokens, laws)
            best = (evidence >= evidence.amax(1, keepdim=True) - 1e-9).double()
            weights = best / best.sum(1, keepdim=True) if hard else evidence.softmax(1)
            return (weights[..., None] * laws).sum(1)

        alone: dict[str, NextTokens] = {
            name: lambda batch, i=i: self.by_graph(batch.tokens)[:, i]  # type: ignore[misc]
            for i, name in enumerate(self.names)
        }
        return {
            "uniform": lambda batch: torch.full((*batch.tokens.shape, S), 1 / S, dtype=torch.float64),
            "in-context unigram": lambda batch: counted(batch.tokens, [-2] * self.n_positions, S, 1.0),
            "in-context bigram": lambda batch: counted(batch.tokens, range(-1, self.n_positions - 1), S, 1.0),
            **alone,
            "even averaging": lambda batch: self.by_graph(batch.tokens).mean(1),
            "maximum likelihood": lambda batch: averaged(batch, hard=True),
            "model averaging": lambda batch: averaged(batch, hard=False),
        }

    def reference_losses(self, batch: LabelledBatch) -> dict[str, float]:
        """Mean loss of each reference in nats per token, over all tokens that some graph gives a parent."""
        scored = (self.parents >= 0).any(0)
        return {
            name: float(next_token_losses(predict(batch), batch.tokens)[:, scored].mean())
            for name, predict in self.references().items()
        }


def counted(
    tokens: Int[Tensor, "batch pos"], parents: Sequence[int], d_vocab: int, concentration: float
) -> Float[Tensor, "batch pos d_vocab"]:
    """The distribution of each token given counts along a graph so far: (n_xy + a) / (n_x + S a) with x the parent's token.

    Parameters
    ----------
    parents
        By position: the parent, -1 for a root (uniform, and not counted), -2 for "all tokens so far", whatever came before.
    concentration
        The pseudo-count a of each state.

    Examples
    --------
    >>> import torch
    >>> counted(torch.tensor([[0, 1, 0, 1]]), [-1, 0, 1, 2], 2, 1.0)[0, 3]  # after 0 came 1, once
    tensor([0.3333, 0.6667], dtype=torch.float64)
    """
    n, row = len(tokens), torch.arange(len(tokens), device=tokens.device)
    counts = torch.full((n, d_vocab, d_vocab), float(concentration), dtype=torch.float64, device=tokens.device)
    law = torch.full((*tokens.shape, d_vocab), 1 / d_vocab, dtype=torch.float64, device=tokens.device)
    for t, parent in enumerate(parents):
        if parent != -1:
            source = torch.zeros_like(row) if parent == -2 else tokens[:, parent]
            here = counts[row, source]
            law[:, t] = here / here.sum(-1, keepdim=True)
            counts[row, source, tokens[:, t]] += 1
    return law


def next_token_losses(
    predictions: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """-log of the probability of each token, in nats."""
    losses: Tensor = -predictions.gather(-1, tokens[..., None])[..., 0].log()
    return losses
