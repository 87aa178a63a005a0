"""The lemma, measured: is the gradient the information that the theory says?

To first order in beta, for one sequence of T tokens with the frequencies f_s (the share of its positions that hold s), minus the
gradient with respect to layer 0's pattern, times S T / beta, has the expectation ::

    h_ij = E [ pi(s_i | s_j) / f(s_i) - sum over the states s that occur of pi(s | s_j) ]

(u_i m_j of :func:`causal_probe.models.reduced.first_gradient` with p even; the last token is uniform and independent of all others). This is
exact at every T and on every tree. The lemma's g_ij (:mod:`causal_probe.tasks.information`) has the stationary mu instead of f, and 1
instead of the sum. So the lemma asks that f be mu: that *one* sequence holds many independent draws. On the chain that is so for T
far above the mixing time of pi; in a forest of bounded trees, for many trees. On a star (one root, on which all other nodes depend) it
is never so: f tends to pi(. | s_0), and with it instead of mu every h_ij tends to 0, the edges' as well, as T grows. There the
gradient shows a graph only because T is finite.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from causal_probe.arguments import Scale, Seed, checked
from causal_probe.errors import CausalProbeError
from causal_probe.models.reduced import first_gradient
from causal_probe.tasks import Batch, InContextMarkov, generator, sample_batches
from causal_probe.tasks.information import predicted_information

__all__ = ["measure_lemma"]

#: The lemma is to first order in beta.
BETA = 1e-2
#: Entries of a batch of tokens.
AT_ONCE = 2**20


@checked
def measure_lemma(
    task: InContextMarkov, *, n_sequences: int = 4096, draws: int = 2**14, seed: Seed = 0, beta: Scale = BETA
) -> pd.DataFrame:
    """The measured gradient beside the predicted g_ij and the exact information, for every pair of a child and an earlier node.

    Parameters
    ----------
    task
        A tree task. The lemma is for sequences that hold many independent draws (see the module); what the gradient is at the T at hand is
        predicted as well.
    n_sequences
        How many the gradient is averaged over, and as many others the prediction at this T.
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
        ``ratio`` (None where g is exactly 0, between different trees), ``at_this_length``, ``at_this_length_stderr`` and
        ``z_at_this_length`` (h of the module, averaged over other sequences, and the measured value's distance from it),
        ``chi2``, ``shannon``, ``bound`` (see :class:`causal_probe.tasks.information.Information`), and
        ``over_bound``: by how many standard errors the size of the measured value exceeds the bound, negative where it does not.

    Raises
    ------
    CausalProbeError
        If this is no tree task, or there are too few sequences for a standard error.

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(3), d_vocab=2, concentration=1.0)
    >>> len(measure_lemma(task, n_sequences=64, draws=64))
    3
    """
    if n_sequences < 2:
        raise CausalProbeError(f"{n_sequences} sequences give no standard error. Take at least 2.")
    predicted = predicted_information(task, draws=draws, generator=generator(seed, "prediction"))
    predicted_error = predicted.stderr or {}  # always there: at least two matrices are drawn

    def gradient(batch: Batch) -> list[tuple[Tensor, Tensor]]:
        return [first_gradient(batch.tokens, batch.target, beta=beta)]

    scale = task.d_vocab * task.n_positions / beta
    mean, stderr = (scale * its for its in _mean(task, gradient, n_sequences, generator(seed, "gradient")))
    finite, finite_stderr = _mean(task, _finite, n_sequences, generator(seed, "at this length"))
    child, parent = np.tril_indices(task.n_positions - 1, -1)
    at = (child, parent)
    measured, error, h, h_error = (its.numpy()[at] for its in (mean, stderr, finite, finite_stderr))
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
            "at_this_length": h,
            "at_this_length_stderr": h_error,
            "z_at_this_length": (measured - h) / np.hypot(error, h_error),
            "chi2": predicted.chi2[at],
            "shannon": predicted.shannon[at],
            "bound": bound,
            "over_bound": (np.abs(measured) - bound) / bound_error,
        }
    )


def _finite(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """h_ij of the module for each sequence: a sum over the states s of (s_i's part) 1[s_j = s]."""
    tokens, pi = batch.tokens, batch.tables[1]
    states = one_hot(tokens, pi.shape[-1]).to(pi.dtype)
    share = states.mean(1)
    into = pi.mT.gather(1, tokens[..., None].expand_as(states))  # [batch, i, s]: pi(s_i | s)
    occurring = pi @ (share > 0).to(pi.dtype)[..., None]  # [batch, s, 1]
    parts = into / share.gather(1, tokens)[..., None] - occurring.mT
    return list(zip(parts.unbind(-1), states.unbind(-1), strict=True))


def _mean(
    task: InContextMarkov,
    products: Callable[[Batch], list[tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]]],
    n_sequences: int,
    source: torch.Generator,
) -> tuple[Float[Tensor, "pos pos"], Float[Tensor, "pos pos"]]:
    """Mean over fresh sequences of a sum of products u_i m_j, of which one is not 0 and its m is 1, and its standard error."""
    n = task.n_positions
    sums, squares = torch.zeros(2, n, n, dtype=torch.float64)
    at_once = max(1, AT_ONCE // n)
    for batch in sample_batches(task, n_sequences, source, batch_size=at_once):
        for u, m in products(batch):
            sums += u.mT @ m
            squares += u.square().mT @ m
    mean = sums / n_sequences
    return mean, ((squares / n_sequences - mean.square()) / (n_sequences - 1)).clamp(min=0).sqrt()
