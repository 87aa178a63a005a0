"""Exact predictors that a trained model is measured against, from the least informed to the best.

Each maps tokens to a distribution over the next token; :func:`cross_entropy` scores it against the target. Counts of
transitions are smoothed with the task's own alpha, the prior's pseudo-count; those of states with 1, as in Edelman et al. 2024.

================== =========================================================================================
uniform            knows nothing: 1 / d_vocab
in-context unigram knows how often each state occurs in the sequence, (1 + c) / (n + d_vocab)
one-parent         knows one parent slot of the graph (the best one), and counts children whose parent matches
known-graph        knows the graph: the posterior mean of the transition row, from all (parents, child) pairs
================== =========================================================================================

Every predictor raises :class:`~causal_probe.errors.CausalProbeError` for tokens that are not the task's.

Roots never count as children. (Code that marks a root's parent by -1 and indexes with it makes every root a child of the
last token.) In a tree the one-parent and the known-graph predictor are the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from causal_probe.errors import CausalProbeError
from causal_probe.tasks.markov import Batch, InContextMarkov

__all__ = ["cross_entropy", "in_context_unigram", "known_graph", "one_parent", "reference_losses", "uniform"]

Tokens = Int[Tensor, "batch pos"]
Prediction = Float[Tensor, "batch d_vocab"]


def uniform(task: InContextMarkov, tokens: Tokens) -> Prediction:
    """1 / d_vocab for every state.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> uniform(tasks.InContextMarkov(graphs.chain(3), d_vocab=4, alpha=1.0), torch.tensor([[0, 1, 2, 3]]))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    _check(task, tokens)
    return torch.full((len(tokens), task.d_vocab), 1 / task.d_vocab, device=tokens.device)


def in_context_unigram(task: InContextMarkov, tokens: Tokens) -> Prediction:
    """(1 + occurrences of the state) / (nodes + d_vocab), over the nodes that the model sees (the uniform query is not one).

    The definition of Edelman et al. 2024 (*The evolution of statistical induction heads*).

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=2, alpha=1.0)
    >>> in_context_unigram(task, torch.tensor([[0, 0, 1, 1]])).round(decimals=2)
    tensor([[0.6000, 0.4000]])
    """
    _check(task, tokens)
    nodes = tokens[:, :-1] if task.is_tree else tokens
    return _normalised(one_hot(nodes, task.d_vocab).sum(1), 1.0)


def known_graph(task: InContextMarkov, tokens: Tokens) -> Prediction:
    """Posterior mean of the transition row asked for: alpha + occurrences of the state under the same parents' states.

    In a tree it counts the children of nodes that carry the query's state; with k parents, the nodes with as many parents as
    the predicted one whose parents all carry the same states, slot by slot.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(4), d_vocab=2, alpha=1.0)
    >>> known_graph(task, torch.tensor([[0, 1, 0, 1, 0]])).round(decimals=2)
    tensor([[0.2500, 0.7500]])
    """
    return _count_matches(task, tokens, slots=range(task.n_slots))


def one_parent(task: InContextMarkov, tokens: Tokens, *, slot: int) -> Prediction:
    """Like :func:`known_graph`, knowing only the parents in ``slot`` (0 is the smallest parent).

    Raises
    ------
    CausalProbeError
        If the predicted node has no such parent slot.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(4), d_vocab=2, alpha=1.0)
    >>> one_parent(task, torch.tensor([[0, 1, 0, 1, 0]]), slot=0).round(decimals=2)
    tensor([[0.2500, 0.7500]])
    """
    if not 0 <= slot < task.n_slots:
        raise CausalProbeError(
            f"Parent slot {slot} was asked for; the predicted node has slots 0 to {task.n_slots - 1}."
        )
    return _count_matches(task, tokens, slots=[slot])


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


def reference_losses(task: InContextMarkov, batch: Batch) -> dict[str, float]:
    """Mean cross-entropy of every predictor on ``batch``, in nats; the one-parent figure is the best slot's.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(7), d_vocab=3, alpha=0.1)
    >>> losses = reference_losses(task, task.sample(512, tasks.generator(0, "reference")))
    >>> losses["known-graph"] < losses["in-context unigram"] < losses["uniform"]
    True
    """
    predictions = {
        "uniform": [uniform(task, batch.tokens)],
        "in-context unigram": [in_context_unigram(task, batch.tokens)],
        "one-parent": [one_parent(task, batch.tokens, slot=slot) for slot in range(task.n_slots)],
        "known-graph": [known_graph(task, batch.tokens)],
    }
    target = batch.target.double()
    return {
        name: min(float(cross_entropy(p.double(), target).mean()) for p in candidates)
        for name, candidates in predictions.items()
    }


def _count_matches(task: InContextMarkov, tokens: Tokens, slots: range | list[int]) -> Prediction:
    _check(task, tokens)
    # In a tree, the predicted token is a child of the query, whatever node the query stands for.
    wanted_parents = (task.n_positions - 1,) if task.is_tree else task.parents[-1]
    counted = [
        (node, its) for node, its in enumerate(task.parents[: task.n_positions]) if its and len(its) == task.n_slots
    ]
    if not counted:
        return uniform(task, tokens)
    matches = torch.ones(len(tokens), len(counted), dtype=torch.bool, device=tokens.device)
    for slot in slots:
        found = tokens[:, [its[slot] for _, its in counted]]
        matches &= found == tokens[:, wanted_parents[slot], None]
    children = one_hot(tokens[:, [node for node, _ in counted]], task.d_vocab)
    return _normalised((children * matches[..., None]).sum(1), task.alpha)


def _check(task: InContextMarkov, tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape[1] != task.n_positions:
        raise CausalProbeError(
            f"The task's sequences have {task.n_positions} tokens; the shape of these is {list(tokens.shape)}, not [batch, pos]."
        )
    outside = tokens[(tokens < 0) | (tokens >= task.d_vocab)]
    if len(outside):
        raise CausalProbeError(
            f"Token {int(outside[0])} is outside the vocabulary; states are 0 to {task.d_vocab - 1}."
        )


def _normalised(counts: Int[Tensor, "batch d_vocab"], alpha: float) -> Prediction:
    smoothed = counts.to(torch.get_default_dtype()) + alpha
    return smoothed / smoothed.sum(-1, keepdim=True)
