"""Data in which the transitions are new in each sequence, and nothing besides is fixed.

The rows of a sequence's matrix are independent draws from one Dirichlet law, the same for every row: the mean transition doesn't depend on where it
starts. Roots are drawn from the matrix's stationary law, children from their parent's row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from causal_probe.discovery.sequences.codes import Codes, code
from causal_probe.discovery.sequences.counts import ROOT

__all__ = ["dirichlet", "new_in_each_sequence", "stationary", "walk"]

#: Parameters of a Dirichlet law below this give the same draws, up to rounding.
LEAST = 1e-3
#: Weight of even rows, so that every matrix has one stationary law.
EVEN = 1e-9


def dirichlet(parameters: NDArray[np.float64], n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draws [n, *parameters.shape]; by logarithms, because small parameters underflow."""
    logs = (
        np.log(rng.gamma(parameters + 1, size=(n, *parameters.shape)))
        + np.log(rng.random((n, *parameters.shape))) / parameters
    )
    drawn = np.exp(logs - logs.max(-1, keepdims=True))
    return np.asarray(drawn / drawn.sum(-1, keepdims=True))


def stationary(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Stationary laws [n, state] of transition matrices [n, state, next]."""
    size = matrices.shape[-1]
    system = np.swapaxes(matrices, -1, -2) - np.eye(size)
    system[..., -1, :] = 1
    right = np.zeros((*matrices.shape[:-1], 1))
    right[..., -1, 0] = 1
    law = np.linalg.solve(system, right)[..., 0].clip(0)
    return np.asarray(law / law.sum(-1, keepdims=True))


def walk(parents: Sequence[int], matrices: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.intp]:
    """Tokens [n, column] along a forest: roots from the stationary law, children from their parent's row."""
    rows, size = np.arange(len(matrices)), matrices.shape[-1]
    steps, first = matrices.cumsum(-1), stationary(matrices).cumsum(-1)
    tokens = np.zeros((len(matrices), len(parents)), np.intp)
    for child, parent in enumerate(parents):
        law = first if parent == ROOT else steps[rows, tokens[:, parent]]
        tokens[:, child] = (rng.random((len(matrices), 1)) * law[:, -1:] >= law).sum(1).clip(0, size - 1)
    return tokens


def new_in_each_sequence(
    parents: Sequence[int], parameters: NDArray[np.float64], n: int, rng: np.random.Generator
) -> Codes:
    """Coded tokens along a forest, all rows of all matrices from Dirichlet(``parameters``)."""
    size = len(parameters)
    matrices = dirichlet(np.tile(parameters.clip(LEAST), (size, 1)), n, rng)
    return code(walk(parents, (1 - EVEN) * matrices + EVEN / size, rng), max_memory=2**40)
