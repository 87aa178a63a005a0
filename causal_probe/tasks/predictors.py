"""Exact predictors that a trained model is measured against, from the least informed to the best.

Each maps tokens to a distribution over the next token; :func:`cross_entropy` scores it against the target. Counts of
transitions are smoothed with the task's own concentration, the prior's pseudo-count; those of states with 1, as in Edelman et al. 2024.

================== =========================================================================================
uniform            knows nothing: 1 / d_vocab
in-context unigram knows how often each state occurs in the sequence, (1 + c) / (n + d_vocab)
one-parent         knows one parent slot of the graph (the best one), and counts children whose parent matches
known-graph        knows the graph: the posterior mean of the transition row, from all (parents, child) pairs
================== =========================================================================================

Every predictor raises :class:`~causal_probe.errors.CausalProbeError` for tokens that are not the task's.

Roots never count as children. (Code that marks a root's parent by -1 and indexes with it makes every root a child of the
last token.) In a tree the one-parent and the known-graph predictor are the same.

Where nodes have several parents, knowing one slot tells more than counts that treat all children alike use: a node that shares the
predicted node's *other* parents had its child from the very same row whenever the known parents match. :func:`fit_one_parent` gives the
weights that make the most of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from causal_probe.errors import CausalProbeError
from causal_probe.tasks.task import Batch, Task, cross_entropy

__all__ = [
    "CountingTask",
    "best_one_parent",
    "fit_one_parent",
    "in_context_unigram",
    "known_graph",
    "one_parent",
    "uniform",
]

Tokens = Int[Tensor, "batch pos"]
Prediction = Float[Tensor, "batch d_vocab"]


@runtime_checkable
class CountingTask(Task, Protocol):
    """A task whose transitions are Dirichlet rows, so that counts of transitions are all that a sequence tells about them.

    Attributes
    ----------
    parents
        Of every node, ascending.
    concentration
        Of the Dirichlet rows.
    """

    parents: tuple[tuple[int, ...], ...]
    concentration: float


def uniform(task: Task, tokens: Tokens) -> Prediction:
    """1 / d_vocab for every state.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> uniform(tasks.InContextMarkov(graphs.chain(3), d_vocab=4, concentration=1.0), torch.tensor([[0, 1, 2, 3]]))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    _check(task, tokens)
    return torch.full((len(tokens), task.d_vocab), 1 / task.d_vocab, device=tokens.device)


def in_context_unigram(task: Task, tokens: Tokens) -> Prediction:
    """(1 + occurrences of the state) / (nodes + d_vocab), over the nodes that the model sees (the uniform query is not one).

    The definition of Edelman et al. 2024 (*The evolution of statistical induction heads*).

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=2, concentration=1.0)
    >>> in_context_unigram(task, torch.tensor([[0, 0, 1, 1]])).round(decimals=2)
    tensor([[0.6000, 0.4000]])
    """
    _check(task, tokens)
    nodes = tokens[:, :-1] if task.is_tree else tokens
    return _normalised(one_hot(nodes, task.d_vocab).sum(1), 1.0)


def known_graph(task: CountingTask, tokens: Tokens) -> Prediction:
    """Posterior mean of the transition row asked for: concentration + occurrences of the state under the same parents' states.

    In a tree it counts the children of nodes that carry the query's state; with k parents, the nodes with as many parents as
    the predicted one whose parents all carry the same states, slot by slot.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(4), d_vocab=2, concentration=1.0)
    >>> known_graph(task, torch.tensor([[0, 1, 0, 1, 0]])).round(decimals=2)
    tensor([[0.2500, 0.7500]])
    """
    return _count_matches(task, tokens, slots=range(task.n_slots))


def one_parent(
    task: CountingTask, tokens: Tokens, *, slot: int, weights: Float[Tensor, " _pos"] | None = None
) -> Prediction:
    """Like :func:`known_graph`, knowing only the parents in ``slot`` (0 is the smallest parent).

    Parameters
    ----------
    weights
        How much the child at each position counts where its parent matches, beside the pseudo-count; 1 by default.
        :func:`fit_one_parent` gives the best.

    Raises
    ------
    CausalProbeError
        If the predicted node has no such parent slot, or there is not a weight for every position.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(4), d_vocab=2, concentration=1.0)
    >>> one_parent(task, torch.tensor([[0, 1, 0, 1, 0]]), slot=0).round(decimals=2)
    tensor([[0.2500, 0.7500]])
    """
    _check_slot(task, slot)
    if weights is not None and weights.shape != (task.n_positions,):
        raise CausalProbeError(
            f"A weight for each of {task.n_positions} positions was expected; the shape of the weights is {list(weights.shape)}."
        )
    return _count_matches(task, tokens, slots=[slot], weights=weights)


def fit_one_parent(task: CountingTask, batch: Batch, *, slot: int) -> Float[Tensor, " pos"]:
    """The weights with which :func:`one_parent` has the least mean cross-entropy on ``batch``, by position; 0 where no child is counted.

    They are positive, fitted by L-BFGS on their logarithms from 1 / n_slots. Only their ratio to the concentration acts, so that stays as it
    is. There are as many as there are nodes with all parents, so a batch of some thousand sequences fits them to less than 0.01 nats
    of what others would; judge a fit on other sequences.

    Raises
    ------
    CausalProbeError
        If the predicted node has no such parent slot, or no node's child can be counted.

    Examples
    --------
    In a chain every child of a matching parent is drawn from the row that is asked for, and counts fully:

    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(4), d_vocab=2, concentration=1.0)
    >>> fit_one_parent(task, task.sample(4096, tasks.generator(0, "fit")), slot=0).round(decimals=0)
    tensor([0., 1., 1., 1., 0.])
    """
    _check_slot(task, slot)
    nodes, matches, children = matching(task, batch.tokens, [slot])
    if not nodes:
        raise CausalProbeError("No node has as many parents as the predicted one, so there is no child to be counted.")
    counted = (children * matches[..., None]).double()
    target = batch.target.double()
    logs = torch.full((len(nodes),), -math.log(task.n_slots), dtype=torch.float64, device=batch.tokens.device)
    logs.requires_grad_(True)
    optimizer = torch.optim.LBFGS([logs], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        with torch.enable_grad():
            smoothed = torch.einsum("bnv,n->bv", counted, logs.exp()) + task.concentration
            value = cross_entropy(smoothed / smoothed.sum(-1, keepdim=True), target).mean()
        (logs.grad,) = torch.autograd.grad(value, [logs])
        return float(value.detach())

    optimizer.step(loss)  # type: ignore[no-untyped-call]  # this one of torch's optimisers has no types
    weights = torch.zeros(task.n_positions, dtype=batch.target.dtype, device=batch.tokens.device)
    weights[list(nodes)] = logs.detach().exp().to(weights.dtype)
    return weights


def best_one_parent(task: CountingTask, batch: Batch) -> Prediction:
    """:func:`one_parent` in the slot that predicts ``batch`` best, without weights: what knowing one parent is worth."""
    target = batch.target.double()
    slots = (one_parent(task, batch.tokens, slot=slot) for slot in range(task.n_slots))
    return min(slots, key=lambda prediction: float(cross_entropy(prediction.double(), target).mean()))


def _count_matches(
    task: CountingTask, tokens: Tokens, slots: Sequence[int], weights: Float[Tensor, " pos"] | None = None
) -> Prediction:
    nodes, matches, children = matching(task, tokens, slots)
    if not nodes:
        return uniform(task, tokens)
    counted = children * matches[..., None]
    if weights is not None:
        counted = counted * weights[list(nodes), None]
    return _normalised(counted.sum(1), task.concentration)


def matching(
    task: CountingTask, tokens: Tokens, slots: Sequence[int]
) -> tuple[tuple[int, ...], Bool[Tensor, "batch node"], Int[Tensor, "batch node d_vocab"]]:
    """The nodes with as many parents as the predicted one, whether their parents in ``slots`` match its, and their states, one-hot."""
    _check(task, tokens)
    # In a tree, the predicted token is a child of the query, whatever node the query stands for.
    wanted_parents = (task.n_positions - 1,) if task.is_tree else task.parents[-1]
    counted = [
        (node, its) for node, its in enumerate(task.parents[: task.n_positions]) if its and len(its) == task.n_slots
    ]
    matches = torch.ones(len(tokens), len(counted), dtype=torch.bool, device=tokens.device)
    for slot in slots:
        found = tokens[:, [its[slot] for _, its in counted]]
        matches &= found == tokens[:, wanted_parents[slot], None]
    nodes = tuple(node for node, _ in counted)
    return nodes, matches, one_hot(tokens[:, nodes], task.d_vocab)


def _check_slot(task: CountingTask, slot: int) -> None:
    if not 0 <= slot < task.n_slots:
        raise CausalProbeError(
            f"Parent slot {slot} was asked for; the predicted node has slots 0 to {task.n_slots - 1}."
        )


def _check(task: Task, tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape[1] != task.n_positions:
        raise CausalProbeError(
            f"The task's sequences have {task.n_positions} tokens; the shape of these is {list(tokens.shape)}, not [batch, pos]."
        )
    outside = tokens[(tokens < 0) | (tokens >= task.d_vocab)]
    if len(outside):
        raise CausalProbeError(
            f"Token {int(outside[0])} is outside the vocabulary; states are 0 to {task.d_vocab - 1}."
        )


def _normalised(counts: Tensor, pseudo_count: float) -> Prediction:
    smoothed = counts.to(torch.get_default_dtype()) + pseudo_count
    return smoothed / smoothed.sum(-1, keepdim=True)
