"""From attention to the correlations of tokens: self-attention read as a structural equation model.

If token i's output is z_i = sum_j A_ij v_j, with the v_j independent and of equal variance, then cov(z) = A A^T. So A plays the part
of (I - G)^-1, with G the direct effects between tokens, and latent causes allowed. The paper takes n = d_model as the number of
samples that the correlations count as having come from.

References
----------
.. [1] R. Y. Rohekar, Y. Gurwicz, S. Nisimov. Causal interpretation of self-attention in pre-trained Transformers. NeurIPS 2023,
   sections 4.1-4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.results import BINARY

__all__ = ["Correlation", "attention_correlation", "output_correlation"]

#: Rows of a pattern must sum to one within this; half precision does.
ROW_SUM = 1e-2


@dataclass(frozen=True, eq=False)
class Correlation:
    """The correlations of tokens, or of groups of them.

    Attributes
    ----------
    matrix
        [node, node], float64, symmetric, ones on the diagonal.
    groups
        Which positions each node stands for.
    tolerance
        The share of variance that can't be told from zero: 10 n eps, with n the number of positions and eps that of the dtype in
        which the pattern was computed.
    condition
        Condition number of the matrix, its largest over its smallest eigenvalue. None where the smallest is below n eps of
        float64: then the matrix is singular as far as the arithmetic can tell.
    rank
        Number of eigenvalues above ``tolerance`` times the largest. From tests that condition on as many nodes nothing can be
        expected.
    """

    matrix: Float[np.ndarray, "node node"] = field(metadata=BINARY)
    groups: tuple[tuple[int, ...], ...]
    tolerance: float
    condition: float | None
    rank: int


def attention_correlation(
    pattern: Any, *, groups: Sequence[Sequence[int]] | None = None, residual: float = 0.0
) -> Correlation:
    """The correlations C_ij / sqrt(C_ii C_jj) of tokens, with C = A A^T for an attention pattern A.

    As (I - G)^-1 with its ones on the diagonal, a structural model gives every token a part of its own. A head's pattern need not: a
    token that attends to another alone is, by A A^T, a copy of that one, and correlated with whatever attends to it too, but with the
    token itself only as far as *it* attends to itself. In a transformer the part of its own comes from the residual stream, past the
    head. ``residual`` counts it.

    Parameters
    ----------
    pattern
        [query, key]: one head's attention on one input; rows sum to one.
    groups
        The nodes, as groups of positions: a group's variable is the mean of its tokens' (tokens merged into a word), and a position
        in no group is marginalised, that is, it may act as a latent cause. By default each position is a node.
    residual
        In [0, 1): the share r of a token's own value, (1 - r) A + r I in the place of A. Zero, the default, is the paper's reading;
        one half is how attention rollout [2]_ counts the residual stream. Not in the paper.

    Raises
    ------
    CausalProbeError
        If the pattern is not a square array of probabilities, or the groups overlap, are empty, or name no position; or
        ``residual`` is out of range.

    References
    ----------
    .. [2] S. Abnar, W. Zuidema. Quantifying attention flow in transformers. ACL 2020.

    Examples
    --------
    >>> found = attention_correlation(np.array([[1.0, 0.0], [0.5, 0.5]]))
    >>> found.matrix.round(4).tolist()
    [[1.0, 0.7071], [0.7071, 1.0]]
    >>> round(found.condition, 3)
    5.828
    """
    array, eps = _as_array(pattern, "pattern")
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise CausalProbeError(f"A pattern is a square array [query, key]; found the shape {list(array.shape)}.")
    if not np.isfinite(array).all() or array.min() < -1e-6:
        raise CausalProbeError("A pattern holds probabilities; this one holds NaN, an infinity or negative numbers.")
    off = np.abs(array.sum(axis=1) - 1)
    if off.max() > ROW_SUM:
        raise CausalProbeError(
            f"The rows of a pattern sum to one; row {int(off.argmax())} sums to {array.sum(axis=1)[off.argmax()]:.4g}. Give the "
            "pattern after the softmax, whole and without padding."
        )
    if not 0 <= residual < 1:
        raise CausalProbeError(f"residual is {residual!r}. It is a share: at least 0, which is none, and below 1.")
    array = (1 - residual) * array + residual * np.eye(len(array))
    return _correlation(array @ array.T, groups, eps)


def output_correlation(outputs: Any, *, groups: Sequence[Sequence[int]] | None = None) -> Correlation:
    """The correlations of tokens by what a head gives them: C = Z Z^T, not centred, with Z [pos, d_head] the head's outputs.

    With values that are independent and of equal variance this is an estimate of A A^T from d_head samples; where they are not, it
    says what the head made of the tokens rather than where it looked. Its rank is at most d_head.

    Raises
    ------
    CausalProbeError
        If the outputs are not finite numbers [pos, d_head], an output is zero, or the groups don't fit.
    """
    array, eps = _as_array(outputs, "outputs")
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise CausalProbeError(
            f"A head's outputs are finite numbers [pos, d_head]; found the shape {list(array.shape)}."
        )
    return _correlation(array @ array.T, groups, eps)


def _as_array(values: Any, what: str) -> tuple[Float[np.ndarray, "..."], float]:
    """In float64, with the eps of the dtype that it had."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        eps = torch.finfo(values.dtype).eps if values.is_floating_point() else np.finfo(np.float64).eps
        return values.double().numpy(), float(eps)
    try:
        array = np.asarray(values)
        eps = np.finfo(array.dtype).eps if array.dtype.kind == "f" else np.finfo(np.float64).eps
        return array.astype(np.float64), float(eps)
    except (TypeError, ValueError) as error:
        raise CausalProbeError(f"The {what} can't be read as an array of numbers: {error}") from error


def _correlation(
    covariance: Float[np.ndarray, "pos pos"], groups: Sequence[Sequence[int]] | None, eps: float
) -> Correlation:
    n = len(covariance)
    nodes = _check_groups(groups, n)
    weights = np.zeros((len(nodes), n))
    for node, positions in enumerate(nodes):
        weights[node, list(positions)] = 1 / len(positions)
    grouped = weights @ covariance @ weights.T
    scale = np.sqrt(np.diagonal(grouped))
    if scale.min() <= 1e-12 * max(scale.max(), 1e-300):
        raise CausalProbeError(f"Node {int(scale.argmin())} has no variance, so it has no correlation with anything.")
    matrix = grouped / scale / scale[:, None]
    matrix = np.clip((matrix + matrix.T) / 2, -1, 1)
    np.fill_diagonal(matrix, 1)
    eigenvalues = np.linalg.eigvalsh(matrix)
    singular = eigenvalues[0] <= n * np.finfo(np.float64).eps
    tolerance = 10 * n * eps
    return Correlation(
        matrix,
        nodes,
        tolerance,
        None if singular else float(eigenvalues[-1] / eigenvalues[0]),
        int((eigenvalues > tolerance * eigenvalues[-1]).sum()),
    )


def _check_groups(groups: Sequence[Sequence[int]] | None, n: int) -> tuple[tuple[int, ...], ...]:
    if groups is None:
        return tuple((position,) for position in range(n))
    nodes = tuple(tuple(int(position) for position in group) for group in groups)
    named = [position for node in nodes for position in node]
    if not nodes or not all(nodes) or len(set(named)) < len(named) or not set(named) <= set(range(n)):
        raise CausalProbeError(
            f"Nodes are groups of the positions 0..{n - 1}, none empty and none shared; found {[list(node) for node in nodes]}."
        )
    return nodes
