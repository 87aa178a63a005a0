"""Staged training where nodes have several parents: which head is to look for which parent?

The node to be predicted comes one past the last token, so its parents are among the tokens that the model sees. If the model knew
one of them, at position q, it could learn the graph as in a tree: a head that copies the parent in the same slot makes layer 1's
comparison of the copy with the token at q useful. So each head of layer 0 is given a query position of its own, and thereby a
slot; that is what breaks the symmetry between heads, which otherwise all learn the slot of the last token.

Which positions these are is not given. To first order in the scale beta of the comparison, minus the gradient of the loss with
respect to the score of key j at child i in layer 0 is, up to a positive factor of row i,

    E[c, i, j] = E (r_i - mean r) ([s_j = s_c] - mean over j' <= i of [s_j' = s_c]),

with c the position that copies are compared with and r_i = target(s_i) - softmax(frequencies)(s_i) what is left to explain at i. It
is a product of two tables, so all c cost one matrix product. At the predicted node's own parents it is about twice as large as
elsewhere (a sum over children of each child's largest entry), and row i then leads at the parent in c's slot.

With the slots given out, stage 1 writes the graph as in a tree, or finds it written: it may come from elsewhere, as from the mixed
derivative that shows all parents of a child at once (:func:`causal_probe.first_gradient.slots`). Stage 2 moves everything else, the
token blocks of layer 0 included: logits that are linear in a frequency are far from a smoothed count where few nodes match, and states
in layer 0's scores help the model to tell so. The graph's block stays: the loss alone would have some rows say other things than the graph
(a row whose parent is a query position may as well look twice at its other parent), and ends higher for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.tasks import Task, sample_batches
from causal_probe.training.stages import Stage, check_two_layers, staged

__all__ = ["find_queries", "give_slots", "query_evidence", "staged_slots"]

#: Sequences on which the query positions are decided.
SEQUENCES = 2**14
#: The score that makes the last row of layer 0 look at a query position: one-hot to six digits beside scores of 0.
LOOK = 20.0


@torch.no_grad()
def query_evidence(
    task: Task, generator: torch.Generator, *, n_sequences: int = SEQUENCES
) -> Float[Tensor, "query child parent"]:
    """E[c, child, parent] of the module's docstring, averaged over fresh sequences; 0 where the parent comes after the child."""
    n = task.n_positions
    total = torch.zeros(n, n, n, dtype=torch.float64, device=generator.device)
    for batch in sample_batches(task, n_sequences, generator):
        frequencies = one_hot(batch.tokens, task.d_vocab).to(batch.target.dtype).mean(1)
        left = (batch.target - frequencies.softmax(-1)).gather(1, batch.tokens)
        left = left - left.mean(1, keepdim=True)
        same = (batch.tokens[:, :, None] == batch.tokens[:, None, :]).to(left.dtype)
        total += (left.mT @ same.flatten(1)).reshape(n, n, n).transpose(0, 1).double()
    past = torch.ones(n, n, dtype=torch.float64, device=total.device).tril()
    mean = (total * past).sum(-1, keepdim=True) / past.sum(-1, keepdim=True)
    return (total - mean) * past / n_sequences


def find_queries(evidence: Float[Tensor, "query child parent"], n_heads: int) -> tuple[int, ...]:
    """The ``n_heads`` query positions with the most evidence, ascending: the sum over children of the largest entry on an earlier node.

    Child and parent are other positions than the query, which matches itself whatever the graph. On 18 graphs of two and three parents
    (T = 12 to 32, S = 3 and 5, concentration 0.1, 16,384 sequences) these were the predicted node's own parents on 15; the others had one
    wrong.
    """
    n = len(evidence)
    other = ~torch.eye(n, dtype=torch.bool, device=evidence.device)
    counted = torch.ones_like(evidence, dtype=torch.bool).tril(-1) & other[:, None, :] & other[:, :, None]
    strength = evidence.masked_fill(~counted, 0).amax(-1).clamp(min=0).sum(-1)
    return tuple(sorted(int(position) for position in strength.topk(min(n_heads, n)).indices))


def give_slots(
    model: DisentangledTransformer,
    task: Task,
    *,
    generator: torch.Generator,
    beta: float = 1.0,
    graph: nx.DiGraph | None = None,
) -> tuple[str, ...]:
    """Set what staged training starts from where nodes have several parents; return it in words.

    As :func:`~causal_probe.training.give_matcher`, but every head of layer 0 is compared with the token at a query position of
    its own, which is found on fresh sequences (:func:`query_evidence`); the heads are in the order of these positions, as slots
    are in the order of parents. With fewer heads than parents, the positions with the most evidence are taken.

    Parameters
    ----------
    graph
        A graph over the nodes 0 to T that was found elsewhere, in which T has as many parents as layer 0 has heads. T's parents are the query
        positions then, and each head's rows look at the parents in its slot, where a node has as many; the last row, which serves the query, does not.

    Raises
    ------
    CausalProbeError
        If the model does not have two layers, or the graph is not over such nodes.
    """
    check_two_layers(model)
    last = task.n_positions - 1
    eye = torch.eye(model.d_vocab, dtype=model.W_U.dtype, device=model.W_U.device)
    if graph is None:
        queries = find_queries(query_evidence(task, generator), model.heads[0])
    else:
        queries = _write_graph(model, task, graph)
    given = []
    for head, position in enumerate(queries):
        copy = f"L0H{head}.token"
        # What the last position holds of the token at the query position: its own token, or this head's copy.
        query = "token" if position == last else copy
        if position != last:
            row = model.block(0, head, query="position", key="position")[last]
            row.zero_()
            row[position] = LOOK
        model.block(1, 0, query=query, key=copy).copy_(beta * eye)
        given.append(f"L1H0 compares ({query}, {copy}): {beta:g} I, for the token at position {position} (found)")
    model.output_block("L1H0.token").copy_(eye)
    return (*given, "W_U reads L1H0.token: I")


def _write_graph(model: DisentangledTransformer, task: Task, graph: nx.DiGraph) -> tuple[int, ...]:
    """Let each head look at the parents in its slot; return those of the predicted node."""
    if set(graph) != set(range(task.n_positions + 1)) or graph.in_degree(task.n_positions) != model.heads[0]:
        raise CausalProbeError(
            f"A graph over the nodes 0 to {task.n_positions} was expected, the last of which has {model.heads[0]} parents, one for each head of "
            f"layer 0; {graph} was given."
        )
    for child in task.children:  # the last row serves the query, too, and is learnt
        if len(parents := sorted(graph.predecessors(child))) == model.heads[0]:
            for head, parent in enumerate(parents):
                model.block(0, head, query="position", key="position")[child, parent] = LOOK
    return tuple(sorted(graph.predecessors(task.n_positions)))


def staged_slots(
    *, n_positions: int, graph_batch_size: int = 8192, steps: int = 24_000, **options: Any
) -> tuple[Stage, ...]:
    """The stages that follow :func:`give_slots`: the graph, then all else (parameters as in :func:`~causal_probe.training.staged`).

    Examples
    --------
    >>> [(stage.name, stage.moves) for stage in staged_slots(n_positions=8)]
    [('the graph', ('A0.position',)), ('the rest', ('A0.tokens', 'A1', 'W_U'))]
    """
    graph, rest = staged(n_positions=n_positions, graph_batch_size=graph_batch_size, steps=steps, **options)
    return graph, replace(rest, moves=("A0.tokens", "A1", "W_U"), weight_decay=1e-4)
