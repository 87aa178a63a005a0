"""Disentangled transformers whose weights are set by hand, from a graph: models whose answer is known to every probe.

Two circuits solve the in-context task of :mod:`causal_probe.tasks`. Both count the children of all nodes whose parents carry
the states that were asked for, and differ in which layer holds the graph:

``"copy parents"``
    the construction of Nichani, Damian & Lee (2024). Every node first fetches its parents' states; the last position then
    attends to the nodes whose fetched states are its own.
``"step to children"``
    for trees. The last position first finds the nodes that carry its state; in layer 1 it then steps from them to their
    children. The graph stands in layer 1, transposed.

A third knows no graph, and is what training finds first where nothing is given:

``"read other states"``
    for trees. The last position attends to the nodes in other states, and predicts what it finds. Where transitions are nearly
    deterministic, a sequence that leaves a state goes to another one.

Two numbers are free, and :func:`fit_scales` finds them. What the model can't have: the best prediction is a *smoothed* count,
(c + n_s) / (S c + n) with c the concentration, and the logits of this model are linear in a *frequency*, n_s / n, whatever n was. So a gap to the
known-graph predictor stays, however well it is fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import cross_entropy

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.models.device import Device, Dtype
from causal_probe.models.disentangled import DisentangledTransformer
from causal_probe.models.fast import last_logits

__all__ = ["Circuit", "fit_scales", "hand_set"]

Circuit = Literal["copy parents", "step to children", "read other states"]
#: From the heads of each layer to an empty model of the task's shape.
Make = Callable[[list[int]], DisentangledTransformer]

#: exp(-128) is 0 in float32: a softmax over scores that lie half of this apart is one-hot to the last bit.
LARGE = 256.0


@checked
def hand_set(
    graph: nx.DiGraph,
    d_vocab: int,
    *,
    circuit: Circuit = "copy parents",
    match_scale: float = LARGE,
    output_scale: float = 1.0,
    graph_scale: float = LARGE,
    dtype: Dtype = torch.float32,
    device: Device = "cpu",
) -> DisentangledTransformer:
    """The two-layer model of a graph, with as many heads in layer 0 as a node has parents.

    Parameters
    ----------
    graph
        Edges parent -> child over nodes 0..n-1, each parent before its child. At most one parent per node: a model of n + 1
        positions, the last of which is the query. Otherwise one of n - 1 positions, which predicts node n - 1.
    d_vocab
        Number of states S.
    circuit
        ``"copy parents"`` (the default) or, for trees, one of the others: see the module's docstring.
    match_scale
        The score that a matching state adds in the comparison: an inverse temperature. In the limit of a large one layer 1
        attends uniformly to the nodes that match in all parents, if there are any. Smaller ones leave some attention to the
        other nodes, which is a prior. ``"step to children"``: the score of a child whose parent is the one node that carries
        the query's state; where n nodes carry it, each of their children has one n-th of it. ``"read other
        states"``: what an equal state takes off.
    output_scale
        The logit of a state is this times the share of layer 1's attention on nodes that carry it.
    graph_scale
        The score of an edge in layer 0 (``"copy parents"``), of a matching state there (``"step to children"``); nothing in
        ``"read other states"``.
    dtype, device
        Of the weights.

    Raises
    ------
    CausalProbeError
        If the graph is not one of positions, a circuit for trees is asked for where a node has several parents, or no model of this shape can be built.

    Examples
    --------
    >>> import networkx as nx
    >>> model = hand_set(nx.DiGraph([(0, 1), (0, 2), (1, 3)]), d_vocab=3)
    >>> _, cache = model.run_with_cache(torch.tensor([[2, 1, 1, 0, 1]]))
    >>> cache["pattern", 0][0, 0].argmax(-1).tolist()    # the parent; a root, and the query, look at themselves
    [0, 0, 0, 1, 4]
    >>> cache["pattern", 1][0, 0, -1].tolist()           # 3 is the only child of a node that carries a 1
    [0.0, 0.0, 0.0, 1.0, 0.0]
    """
    parents, wanted, is_tree = _read(graph)
    make = partial(DisentangledTransformer, d_vocab, len(parents), dtype=dtype, device=device)
    if circuit == "copy parents":
        return _copy_parents(make, parents, wanted, is_tree, match_scale, output_scale, graph_scale)
    if circuit not in get_args(Circuit):
        raise CausalProbeError(f"circuit must be one of {', '.join(get_args(Circuit))}, not {circuit!r}.")
    if not is_tree:
        raise CausalProbeError(
            f"The circuit {circuit!r} is for trees; in this graph nodes have several parents. Use 'copy parents'."
        )
    if circuit == "read other states":
        return _read_other_states(make, match_scale, output_scale)
    return _step_to_children(make, parents, match_scale, output_scale, graph_scale)


# The circuit "copy parents". T positions; q_1 < ... < q_k are the positions of the predicted node's own parents (in a tree: the
# last position alone), p_h(i) is the h-th parent of node i, g = graph_scale, b = match_scale, w = output_scale.
#
# Layer 0, head h reads positions alone:
#
#     A_0h[position i, position t_h(i)] = g,     t_h(i) = p_h(i)    where node i has an h-th parent
#                                                t_h(T-1) = q_h     at the last position, where q_h is another one
#                                                t_h(i) = i         otherwise: roots look at themselves
#
#     g -> infinity:  pattern_0h[i] = e_{t_h(i)},  so the part L0Hh.token of position i is the state of its h-th parent.
#
# A root row could be anything, because layer 1 never looks at a root; looking at themselves they show no edge.
#
# Layer 1 compares the copied states with those at q_1 ... q_k. The last position holds the state at q_h in L0Hh.token, or,
# where q_h is itself, in token:
#
#     A_1[Q_h, L0Hh.token] = b I,                Q_h = token if q_h = T-1 else L0Hh.token
#     A_1[position i, position j] = -(g + k b)   for every j that is not to be counted
#
#     score(T-1, j) = b #{h : s(t_h(j)) = s(q_h)}  - (g + k b) [j is not counted]
#
# so that a j that is not counted lies at least g below any that is. Counted are the nodes with k parents; the last position
# only if its rows in layer 0, which serve the query, show its own parents as well. In the limit of a large b the pattern is
# uniform on the counted nodes with the most matches: on those whose parents all match, if there are any.
#
# In a tree, where the query is no node, it is the place to rest when nothing matches: its own copy is its own state, which
# always matches, so A_1[position T-1, position T-1] = -b/2 gives it the score b/2, below every match and above the rest.
# (Without it the attention falls on nodes with the wrong parents, and what it reads there misleads.)
#
# W_U[L1H0.token] = w I:  logit(s) = w sum_j pattern_1[T-1, j] [s_j = s].
def _copy_parents(
    make: Make,
    parents: list[list[int]],
    wanted: list[int],
    is_tree: bool,
    match_scale: float,
    output_scale: float,
    graph_scale: float,
) -> DisentangledTransformer:
    last, k = len(parents) - 1, len(wanted)
    n_heads = max(k, *map(len, parents))
    model = make([n_heads, 1])
    looks_at = [[its[h] if h < len(its) else i for i, its in enumerate(parents)] for h in range(n_heads)]
    for h, position in enumerate(wanted):
        if position != last:
            looks_at[h][last] = position
    for h, keys in enumerate(looks_at):
        model.block(0, h, query="position", key="position")[range(last + 1), keys] = graph_scale
    for h, position in enumerate(wanted):
        query = "token" if position == last else f"L0H{h}.token"
        model.block(1, 0, query=query, key=f"L0H{h}.token").diagonal().fill_(match_scale)
    shown = [[looks_at[h][i] for h in range(k)] for i in range(last + 1)]
    left_out = [i for i, its in enumerate(parents) if len(its) != k or shown[i] != its]
    at = model.block(1, 0, query="position", key="position")
    at[:, left_out] = -(graph_scale + k * match_scale)
    if is_tree:
        at[last, last] = -match_scale / 2
    model.output_block("L1H0.token").diagonal().fill_(output_scale)
    return model


# The circuit "step to children", for a tree over the nodes 0..T-2 with the query at T-1.
#
# Layer 0 finds the nodes that carry the query's state, wherever they are:
#
#     A_0[token, token] = g I,     A_0[position T-1, position T-1] = -g/2      (below every match, above the rest)
#
#     g -> infinity:  pattern_0[T-1] = uniform on M = {m < T-1 : s_m = s_{T-1}};  on T-1 itself if there are none.
#
# The part L0H0.position of the last position is that pattern. Layer 1 multiplies it with the transposed graph:
#
#     A_1[L0H0.position m, position j] = b              where m is the parent of j
#     A_1[position i, position j]      = -(g + b)       where j is a root
#     A_1[position i, position T-1]    = b / 2T         a place to rest when nothing matches
#
#     score(T-1, j) = b [p(j) in M] / |M|  -  (g + b) [j is a root]
#
# The children of M get b / |M| > b / T: the more nodes carry the state, the less sure the attention is of their children, though
# there are more of them to count. Hence this circuit needs a larger b.
#
# W_U[L1H0.token] = w I, as before.
def _step_to_children(
    make: Make, parents: list[list[int]], match_scale: float, output_scale: float, graph_scale: float
) -> DisentangledTransformer:
    last = len(parents) - 1
    model = make([1, 1])
    model.block(0, 0, query="token", key="token").diagonal().fill_(graph_scale)
    model.block(0, 0, query="position", key="position")[last, last] = -graph_scale / 2
    step = model.block(1, 0, query="L0H0.position", key="position")
    for child, its in enumerate(parents):
        step[its, child] = match_scale
    at = model.block(1, 0, query="position", key="position")
    at[:, [i for i, its in enumerate(parents) if not its]] = -(graph_scale + match_scale)
    at[last, last] = match_scale / (2 * (last + 1))
    model.output_block("L1H0.token").diagonal().fill_(output_scale)
    return model


# The circuit "read other states", for any tree: one layer of it is used.
#
#     A_0[token, token] = -b I,    W_U[L0H0.token] = w I
#
#     score(T-1, j) = -b [s_j = s_{T-1}],    logit(s) = w sum_j pattern_0[T-1, j] [s_j = s]
#
# In the limit of a large b the last position reads how often each other state occurs; its own only if there is no other.
def _read_other_states(make: Make, match_scale: float, output_scale: float) -> DisentangledTransformer:
    model = make([1, 1])
    model.block(0, 0, query="token", key="token").diagonal().fill_(-match_scale)
    model.output_block("L0H0.token").diagonal().fill_(output_scale)
    return model


@checked
def fit_scales(
    graph: nx.DiGraph,
    tokens: Int[Tensor, "batch pos"],
    target: Float[Tensor, "batch d_vocab"],
    *,
    circuit: Circuit = "copy parents",
) -> tuple[float, float]:
    """The ``match_scale`` and ``output_scale`` with the lowest mean cross-entropy on given sequences.

    Both are fitted as logarithms, by scipy's L-BFGS-B on the gradient of the model itself, in float64.

    Parameters
    ----------
    graph, circuit
        As in :func:`hand_set`.
    tokens, target
        Sequences of the graph's task, and the distributions that follow them.

    Raises
    ------
    CausalProbeError
        If the graph is refused (see :func:`hand_set`), or the tokens don't fit it.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(7), d_vocab=3, concentration=0.1)
    >>> batch = task.sample(256, tasks.generator(0, "fit"))
    >>> match, output = fit_scales(graphs.chain(7), batch.tokens, batch.target)
    >>> match > 0, output > 0
    (True, True)
    """
    d_vocab = target.shape[1]

    def built(match_scale: float) -> DisentangledTransformer:
        return hand_set(graph, d_vocab, circuit=circuit, match_scale=match_scale, dtype=torch.float64)

    # All of A is linear in match_scale, so two models give it for any.
    model, other = built(0.0), built(1.0)
    tokens = model.to_tokens(tokens)
    if tokens.shape[1] != model.n_positions:
        raise CausalProbeError(
            f"The graph makes sequences of {model.n_positions} tokens; these have {tokens.shape[1]}."
        )
    weights = [(A.detach(), (B - A).detach()) for A, B in zip(model.A, other.A, strict=True)]
    soft = target.double()

    def loss_and_slope(logarithms: Float[np.ndarray, " 2"]) -> tuple[float, Float[np.ndarray, " 2"]]:
        at = torch.tensor(logarithms, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            match_scale, output_scale = at.exp()
            logits = last_logits(
                tokens,
                [fixed + match_scale * slope for fixed, slope in weights],
                output_scale * model.W_U.detach(),
                position_only=circuit == "copy parents",
            )
            loss = cross_entropy(logits, soft)
        (gradient,) = torch.autograd.grad(loss, at)
        return float(loss.detach()), gradient.numpy()

    found = minimize(loss_and_slope, x0=[1.0, 1.0], jac=True, method="L-BFGS-B", bounds=[(-7, 7)] * 2)
    match_scale, output_scale = (float(value) for value in torch.as_tensor(found.x).exp())
    return match_scale, output_scale


def _read(graph: nx.DiGraph) -> tuple[list[list[int]], list[int], bool]:
    """The parents of the node at each position (none: a root, or the query of a tree), those of the node to be predicted, and whether it is a tree."""
    n = len(graph)
    if not graph.is_directed() or set(graph) != set(range(n)) or any(p >= c for p, c in graph.edges) or n == 0:
        raise CausalProbeError(
            "A model is made of a directed graph over the nodes 0..n-1 in which each parent comes before its child."
        )
    parents = [sorted(graph.predecessors(node)) for node in range(n)]
    if max(map(len, parents)) <= 1:
        return [*parents, []], [n], True
    if not parents[-1]:
        raise CausalProbeError(
            f"Some node has several parents, so node {n - 1} is the one to be predicted, and it has no parent."
        )
    return parents[:-1], parents[-1], False
