"""Where a transformer attends on the sequences whose graph was found: one that is trained on them, or one's own."""

from __future__ import annotations

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from causal_probe.discovery.sequences.counts import ROOT
from causal_probe.discovery.sequences.result import Beside, SequenceGraph
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.opening import open_model
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import head_graphs
from causal_probe.tasks import Batch, Task, generator
from causal_probe.tasks.predictors import in_context_unigram, uniform
from causal_probe.tasks.task import Predictor, Redraw
from causal_probe.training import fit, give_matcher, staged

__all__ = ["OwnSequences", "model_beside", "trained_beside"]

#: Sequences on which attention is read.
READ = 2048


class OwnSequences(Task):
    """A user's sequences as a task: all columns but one, then that column's parent's token as the query; the target is the column's token.

    Parameters
    ----------
    tokens
        Numbered from 0, [n_sequences, n_columns].
    edge
        An edge whose child has no children.
    """

    def __init__(self, tokens: NDArray[np.intp], edge: tuple[int, int]) -> None:
        parent, child = edge
        self.columns = [column for column in range(tokens.shape[1]) if column != child]
        self.graph = nx.empty_graph(len(self.columns), create_using=nx.DiGraph)
        self.n_positions, self.d_vocab = tokens.shape[1], max(2, int(tokens.max()) + 1)
        self._tokens = torch.from_numpy(tokens[:, [*self.columns, parent]])
        self._target = torch.from_numpy(tokens[:, child])

    @property
    def description(self) -> str:
        """The law in one phrase."""
        return f"own sequences ({len(self._tokens)} of {self.n_positions} columns, {self.d_vocab} states)"

    @property
    def redraw(self) -> Redraw | None:
        """Their law is not known."""
        return None

    def sample(self, batch_size: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Batch:
        """Draw ``batch_size`` of the sequences, with replacement."""
        rows = torch.randint(len(self._tokens), (batch_size,), generator=generator, device=generator.device).cpu()
        tokens = self._tokens[rows].to(generator.device)
        return Batch(tokens, one_hot(self._target[rows], self.d_vocab).to(generator.device, dtype), {})

    def references(self) -> dict[str, Predictor]:
        """Uniform and in-context unigram."""
        return {
            "uniform": lambda batch: uniform(self, batch.tokens),
            "in-context unigram": lambda batch: in_context_unigram(self, batch.tokens),
        }


def trained_beside(tokens: NDArray[np.int64], found: SequenceGraph, *, seed: int) -> Beside:
    """Train the disentangled transformer (in stages) on the sequences, and read which earlier column each column attends to.

    A column whose parent was claimed and which has no children is held out: its parent's token is the query, its own the target.

    Raises
    ------
    CausalProbeError
        If no such edge was claimed: then the target and its parent are unknown.
    """
    leaves = [(parent, child) for parent, child in found.edges if child not in found.candidates]
    if not leaves:
        raise CausalProbeError(
            "A transformer was to be trained on these sequences, and no edge to a column without children was claimed, so nothing says what is to be "
            "predicted from what. Leave out `train`, or give more sequences."
        )
    numbered = np.unique(tokens, return_inverse=True)[1].reshape(tokens.shape)
    task = OwnSequences(numbered, leaves[-1])
    model = DisentangledTransformer(task.d_vocab, task.n_positions, (1, 1))
    give_matcher(model)
    fit(model, task, staged(n_positions=task.n_positions), generator=generator(seed, "training"))
    pattern = head_graphs(model, task.sample(READ, generator(seed, "attention")).tokens).values[0][0]
    parents = [ROOT] * tokens.shape[1]
    for row, column in enumerate(task.columns):
        if row:
            parents[column] = task.columns[int(np.argmax(pattern[row, :row]))]
    return _beside("disentangled transformer, trained on these sequences", parents, found, held_out=leaves[-1][1])


def model_beside(source: str, tokens: NDArray[np.int64], found: SequenceGraph) -> Beside:
    """The head of a model whose attention leads to most claimed parents: from the child itself, or from the token before it, which predicts it.

    Raises
    ------
    CausalProbeError
        If the model can't be loaded, or doesn't take these tokens.
    """
    model, _ = open_model(source)
    shown: Tensor = torch.from_numpy(tokens[:READ])
    if int(shown.min()) < 0 or int(shown.max()) >= model.cfg.d_vocab:
        raise CausalProbeError(
            f"The tokens go from {int(shown.min())} to {int(shown.max())}, and the model knows those from 0 to {model.cfg.d_vocab - 1}. Give tokens as "
            "the model numbers them."
        )
    evidence = head_graphs(model, shown, sink="keep")
    read = []
    for layer, heads in evidence.values.items():
        for head, pattern in enumerate(heads):
            for shift, where in ((0, "read at the child"), (1, "read at the token before the child")):
                parents = [ROOT, *(int(np.argmax(pattern[c - shift, : max(1, c)])) for c in range(1, tokens.shape[1]))]
                read.append(_beside(f"L{layer}H{head} of {source}, {where}", parents, found))
    return max(read, key=lambda each: each.agrees)


def _beside(name: str, parents: list[int], found: SequenceGraph, *, held_out: int | None = None) -> Beside:
    asked = [(parent, child) for parent, child in found.edges if child != held_out]
    return Beside(name, tuple(parents), sum(parents[child] == parent for parent, child in asked), len(asked))
