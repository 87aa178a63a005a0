"""The lemma, measured: is the gradient the information that the theory says?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.models import first_gradient
from causal_probe.tasks import InContextMarkov, generator, predicted_information

__all__ = ["measure_lemma"]

#: The lemma is to first order in beta.
BETA = 1e-2
#: Entries of a batch of tokens.
AT_ONCE = 2**20


def measure_lemma(
    task: InContextMarkov, *, sequences: int = 4096, draws: int = 2**14, seed: int = 0, beta: float = BETA
) -> pd.DataFrame:
    """The measured gradient beside the predicted g_ij and the exact information, for every pair of a child and an earlier node.

    Parameters
    ----------
    task
        A tree task. The lemma is about sequences so long that the states of *one* sequence occur in the shares of its stationary
        distribution. A star has one root, on which all else depends: its sequences never get there, however long, and the lemma fails.
        So do chains whose rows are nearly deterministic (alpha well below 1), or only at a very large T.
    sequences
        How many the gradient is averaged over.
    draws
        How many transition matrices the prediction is averaged over; they are not those of the sequences.
    seed
        Of both.
    beta
        Scale of the comparison; small, for the lemma is to first order.

    Returns
    -------
    pandas.DataFrame
        One row per pair: ``child``, ``parent``, ``edge`` (whether it is one), ``measured`` and ``measured_stderr``
        (as :attr:`GradientGraph.evidence`; the error is over sequences), ``predicted`` and ``predicted_stderr`` (g), ``z`` (their difference over the error of both),
        ``ratio`` (None where g is exactly 0, between different trees), ``chi2``, ``shannon``, ``bound`` (see :class:`causal_probe.tasks.Information`), and
        ``over_bound``: by how many standard errors the size of the measured value exceeds the bound, negative where it does not.

    Raises
    ------
    CausalProbeError
        If this is no tree task, or there are too few sequences for a standard error.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=2, alpha=1.0)
    >>> len(measure_lemma(task, sequences=64, draws=64))
    3
    """
    if sequences < 2:
        raise CausalProbeError(f"{sequences} sequences give no standard error. Take at least 2.")
    predicted = predicted_information(task, draws=draws, generator=generator(seed, "prediction"))
    predicted_error = predicted.stderr or {}  # always there: at least two matrices are drawn
    source = generator(seed, "gradient")
    n = task.n_positions
    sums, squares = torch.zeros(2, n, n, dtype=torch.float64)
    at_once = max(1, AT_ONCE // n)
    for start in range(0, sequences, at_once):
        batch = task.sample(min(at_once, sequences - start), source)
        u, m = first_gradient(batch.tokens, batch.target, beta=beta)
        sums += u.mT @ m
        squares += u.square().mT @ m  # m is 0 or 1
    mean = sums / sequences
    variance = (squares / sequences - mean.square()) / (sequences - 1)
    scale = task.d_vocab * n / beta
    child, parent = np.tril_indices(n - 1, -1)
    at = (child, parent)
    measured, error = (scale * mean).numpy()[at], (scale * variance.clamp(min=0).sqrt()).numpy()[at]
    g, g_error, bound = predicted.g[at], predicted_error["g"][at], predicted.bound[at]
    both = np.hypot(error, g_error)
    bound_error = np.hypot(error, predicted_error["bound"][at])
    return pd.DataFrame(
        {
            "child": child,
            "parent": parent,
            "edge": [task.graph.has_edge(p, c) for c, p in zip(child.tolist(), parent.tolist(), strict=True)],
            "measured": measured,
            "measured_stderr": error,
            "predicted": g,
            "predicted_stderr": g_error,
            "z": (measured - g) / both,
            "ratio": [m / p if p else None for m, p in zip(measured.tolist(), g.tolist(), strict=True)],
            "chi2": predicted.chi2[at],
            "shannon": predicted.shannon[at],
            "bound": bound,
            "over_bound": (np.abs(measured) - bound) / bound_error,
        }
    )
