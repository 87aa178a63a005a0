"""Exact information between the positions of a tree task, and the gradient that the theory predicts from it.

Given the transition matrix pi of a sequence, with stationary distribution mu, every node of the tree has the law mu, and two
nodes i and j whose last common ancestor lies a steps above i and b steps above j have the joint law ::

    J(s', s) = P(s_i = s', s_j = s) = sum_c mu(c) pi^a(s' | c) pi^b(s | c)

(mu(s') mu(s) in different trees). From it, exactly::

    I_chi2(i; j) = sum J^2 / (mu mu) - 1                            chi-square mutual information
    I(i; j)      = sum J log(J / (mu mu))                           Shannon's, in nats
    g_ij         = sum pi(s' | s) / mu(s') J(s', s) - 1             what the gradient carries

The expectation of g over pi is, to first order in beta and for long sequences, minus the gradient of the reduced transformer's loss
with respect to layer 1's pattern, times S T / beta, at A1 = 0, A2 = beta I. (Derived from Nichani, Damian & Lee
2024, arXiv 2402.14735, section 4; measured in ``demos/3_one_gradient_one_graph.ipynb``.)

At the parent, g is I_chi2. Off the edges it is not, but it is an inner product of (pi / mu - 1) and (J / mu mu - 1), so

    |g_ij| <= sqrt(I_chi2(edge) I_chi2(i; j)) <= I_chi2(edge)

by Cauchy and Schwarz, and by the data-processing inequality: no earlier position has a larger one than the parent.
"""

from __future__ import annotations

import dataclasses

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.graphs.check import parent_lists
from causal_probe.tasks.dirichlet import dirichlet
from causal_probe.tasks.markov import InContextMarkov
from causal_probe.tasks.stationary import stationary_distribution

__all__ = ["Information", "information", "joint_law", "predicted_information"]

#: Transition matrices whose powers are held at once.
CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Information:
    """Information between all pairs of nodes, averaged over transition matrices.

    Attributes
    ----------
    g : NDArray, [node, node]
        g_ij as the module defines it, row i the child. 0 between different trees; the chi-square information at the parent.
        On the diagonal it is E tr pi - 1.
    chi2, shannon : NDArray, [node, node]
        Mutual information; symmetric, >= 0. chi2 <= d_vocab - 1, and on the diagonal it is that; Shannon's is in nats.
    bound : NDArray, [node, node]
        E sqrt(I_chi2(edge) I_chi2(i; j)) >= abs(g_ij).
    stderr : dict, or None
        The standard error of each of the four over the matrices, by its name. None where there is one matrix, for which
        everything is exact.
    draws
        Number of transition matrices.
    edge_chi2 : float
        E I_chi2(edge), the same for every edge: what g is at a parent, whether the graph has an edge or not.
    """

    g: NDArray[np.float64]
    chi2: NDArray[np.float64]
    shannon: NDArray[np.float64]
    bound: NDArray[np.float64]
    stderr: dict[str, NDArray[np.float64]] | None
    draws: int
    edge_chi2: float


def information(graph: nx.DiGraph, transition: Float[Tensor, "batch state state"]) -> Information:
    """Exact information between all pairs of nodes, given transition matrices; the mean over them.

    Parameters
    ----------
    graph
        A tree or forest, edges parent -> child.
    transition
        ``transition[n, s, t]``: the probability of t after s.

    Raises
    ------
    CausalProbeError
        If some node has several parents, or there is no matrix.

    Examples
    --------
    Two states that are kept with probability 0.9 are a channel of correlation 0.8, and the chi-square information is its square:

    >>> import torch
    >>> from causal_probe import graphs
    >>> found = information(graphs.chain(3), torch.tensor([[[0.9, 0.1], [0.1, 0.9]]], dtype=torch.float64))
    >>> found.chi2.round(4)[2].tolist()   # to the grandparent, the parent, itself
    [0.4096, 0.64, 1.0]
    >>> found.g.round(4)[2].tolist()      # at the grandparent 0.8 * 0.64: larger than its information
    [0.512, 0.64, 0.8]
    """
    if len(transition) == 0:
        raise CausalProbeError("Information was asked for without a transition matrix. Give at least one.")
    up, down = _steps(graph)
    pairs, where = np.unique(np.stack([up, down], -1).reshape(-1, 2), axis=0, return_inverse=True)
    sums = torch.zeros(2, 4, len(pairs), dtype=torch.float64)
    edge = 0.0
    for chunk in torch.split(transition.double().cpu(), CHUNK):
        mu = stationary_distribution(chunk)
        edge_chi2 = _chi2(_joint(mu, _powers(chunk, 1), 1, 0), mu)
        edge += float(edge_chi2.sum())
        powers = _powers(chunk, int(pairs.max()))
        for column, (a, b) in enumerate(pairs.tolist()):
            if a < 0:  # different trees: independent
                continue
            joint = _joint(mu, powers, a, b)
            chi2 = _chi2(joint, mu)
            g = (_ratio(joint, mu[:, :, None]) * chunk.mT).sum((1, 2)) - 1
            independent = mu[:, :, None] * mu[:, None]
            ratio = _ratio(joint, independent)
            shannon = torch.special.xlogy(torch.where(ratio > 0, joint, 0), ratio).sum((1, 2)).clamp(min=0)
            values = torch.stack([g, chi2, shannon, (edge_chi2 * chi2).sqrt()])
            sums[0, :, column] += values.sum(1)
            sums[1, :, column] += values.square().sum(1)
    n = len(transition)
    mean = sums[0] / n
    names = ("g", "chi2", "shannon", "bound")
    shape = (4, len(up), len(up))
    means = dict(zip(names, mean[:, where.ravel()].reshape(shape).numpy(), strict=True))
    stderr = None
    if n > 1:
        variance = ((sums[1] / n - mean**2).clamp(min=0) / (n - 1)).sqrt()
        stderr = dict(zip(names, variance[:, where.ravel()].reshape(shape).numpy(), strict=True))
    return Information(**means, stderr=stderr, draws=n, edge_chi2=edge / n)


def predicted_information(task: InContextMarkov, *, draws: int = 4096, generator: torch.Generator) -> Information:
    """The expectation over the task's transition matrices, by drawing ``draws`` of them; each is then worked out exactly.

    Raises
    ------
    CausalProbeError
        If this is no tree task, or there are fewer than two draws.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=2, concentration=1.0)
    >>> found = predicted_information(task, draws=64, generator=tasks.generator(0, "tables"))
    >>> found.chi2.shape
    (3, 3)
    """
    if not task.is_tree:
        raise CausalProbeError("Exact information is known for tree tasks; here nodes have several parents.")
    if draws < 2:
        raise CausalProbeError(f"An expectation over {draws} transition matrices has no error; draw at least 2.")
    pi = dirichlet(task.concentration, (draws, task.d_vocab, task.d_vocab), generator=generator, dtype=torch.float64)
    return information(task.graph, pi)


def joint_law(
    graph: nx.DiGraph, transition: Float[Tensor, "batch state state"], i: int, j: int
) -> Float[Tensor, "batch state state"]:
    """P(s_i = s', s_j = s) as ``[batch, s', s]``, given the transition matrices.

    Examples
    --------
    >>> import torch
    >>> from causal_probe.graphs import chain
    >>> joint_law(chain(3), torch.tensor([[[0.9, 0.1], [0.3, 0.7]]]), 1, 0)
    tensor([[[0.6750, 0.0750],
             [0.0750, 0.1750]]], dtype=torch.float64)
    """
    up, down = _steps(graph)
    mu = stationary_distribution(transition.double())
    a, b = int(up[i, j]), int(down[i, j])
    if a < 0:
        return mu[:, :, None] * mu[:, None]
    return _joint(mu, _powers(transition.double(), max(a, b)), a, b)


def _steps(graph: nx.DiGraph) -> tuple[Int[np.ndarray, "node node"], Int[np.ndarray, "node node"]]:
    """How many steps i and j lie below their last common ancestor; -1 where they have none."""
    parents = parent_lists(graph)
    if max(map(len, parents)) > 1:
        raise CausalProbeError("Exact information is known where no node has several parents; here some have.")
    n = len(parents)
    up, down = np.full((2, n, n), -1)
    for i, its in enumerate(parents):
        if its:  # as its parent, one step further
            known = up[its[0], :i] >= 0
            up[i, :i][known] = up[its[0], :i][known] + 1
            down[i, :i][known] = down[its[0], :i][known]
            up[:i, i], down[:i, i] = down[i, :i], up[i, :i]
        up[i, i] = down[i, i] = 0
    return up, down


def _powers(transition: Tensor, largest: int) -> list[Tensor]:
    powers = [torch.eye(transition.shape[-1], dtype=transition.dtype).expand_as(transition)]
    for _ in range(largest):
        powers.append(powers[-1] @ transition)
    return powers


def _joint(mu: Tensor, powers: list[Tensor], a: int, b: int) -> Tensor:
    return powers[a].mT @ (mu[:, :, None] * powers[b])


def _chi2(joint: Tensor, mu: Tensor) -> Tensor:
    root = mu.sqrt()
    return (_ratio(_ratio(joint, root[:, :, None]), root[:, None]).square().sum((1, 2)) - 1).clamp(min=0)


def _ratio(joint: Tensor, law: Tensor) -> Tensor:
    """The quotient, 0 where a state is so rare that its probability is 0 in floating point: it adds nothing there."""
    return torch.where(law > 0, joint / law, 0)
