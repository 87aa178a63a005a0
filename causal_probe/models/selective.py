"""A transformer set by hand that selects its causal structure: it finds the lag of each sequence in context, and follows it.

The task is that of :meth:`causal_probe.tasks.GraphMixture.of_lags`: one fixed matrix P, and in every sequence a lag k of a known set K with
s_t ~ P(. | s_(t-k)). D'Angelo, Croce & Flammarion (2025) give three layers with relative positions. Here positions are absolute and one-hot, and values are
linear, so the layers share the work otherwise; t, s and j are positions, and the largest lag is m:

    layer 0, M heads       Head r serves the positions s = r (mod M). There it attends to s - k, k in K, with the score log P(x_s | x_(s-k)): its
                           pattern p_k(s) is the likelihood of each lag from this transition alone. Elsewhere it rests on position 0. As the lags differ
                           modulo M, head r's weight on j >= 1 belongs to one lag, and to one position s = j + k.
    layer 1, head k        Query t attends to t + 1 - k with a fixed score, and to all transitions s so far with the score -c p_k(s): the share of
                           t + 1 - k is 1 / (1 + e^(cb) mean_s e^(-c p_k(s))), the larger, the better lag k explains the sequence. The transition into
                           t + 1 - k itself is not counted, so that it can't speak for itself.
    layer 2, one head      Query t attends to the t + 1 - k of the largest share: the parent of token t + 1 under the lag that was found.
    output                 log P(. | token at that parent)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.models.device import Device, Dtype
from causal_probe.models.disentangled import DisentangledTransformer

__all__ = ["selective_induction"]

#: exp(-128) is 0 in float32; log-probabilities stay within a quarter of this.
LARGE = 512.0
#: How sharply evidence speaks against a lag (c), and the mean likelihood at which a lag's share is about one half (b).
EVIDENCE, EVEN = 2.0, 0.5
#: Of the choice between lags: shares that differ by a thousandth give odds of e^20.
CHOICE = 2e4


@checked
def selective_induction(
    lags: Sequence[int],
    matrix: Float[Tensor, "state next"],
    n_positions: int,
    *,
    dtype: Dtype = torch.float32,
    device: Device = "cpu",
) -> DisentangledTransformer:
    """The three-layer model that selects among lags: its last head attends to the parent of the *next* token.

    Its loss is near that of the likeliest lag (``"maximum likelihood"`` among the task's references), not of model averaging: it chooses. What it compares
    is the mean of exp(-2 p_k(s)), not of log p_k(s), so it errs more often than maximum likelihood on short contexts.

    Parameters
    ----------
    lags
        Two or more different lags k >= 1; the largest is below ``n_positions`` - 1.
    matrix
        The fixed transitions P, [d_vocab, d_vocab], rows from state to next state; each sums to 1.
    n_positions
        Length T of the longest sequence.
    dtype, device
        Of the weights.

    Raises
    ------
    CausalProbeError
        If the lags or the matrix are not such.

    References
    ----------
    D'Angelo, Croce & Flammarion, "Selective induction heads: how transformers select causal structures in context", ICLR 2025 (section 4 has their construction).

    Examples
    --------
    >>> from causal_probe import probes, tasks
    >>> task = tasks.GraphMixture.of_lags((1, 2), n_positions=32, d_vocab=4)
    >>> model = selective_induction((1, 2), task.matrix, n_positions=32)
    >>> batch = task.sample(64, tasks.generator(0, "selective"))
    >>> found = probes.graph_selectivity(model, batch.tokens, batch.labels, task.graphs, shift=1, burn_in=24)
    >>> found.selectivity[2][0] > 0.9
    True
    """
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    lags = _checked(lags, matrix, n_positions)
    largest = max(lags)
    # The least M modulo which the lags differ.
    groups = next(m for m in range(1, largest + 1) if len({lag % m for lag in lags}) == len(lags))
    model = DisentangledTransformer(len(matrix), n_positions, [groups, len(lags), 1], dtype=dtype, device=device)
    log = matrix.log().clamp_min(-LARGE / 4)
    first = largest + 1  # the first transition that counts: one position earlier, a lag's parent may be position 0
    for r in range(groups):
        model.block(0, r, query="token", key="token").copy_(log.T)
        at = model.block(0, r, query="position", key="position")
        for s in range(n_positions):
            at[s, [s - lag for lag in lags] if s % groups == r and s >= first else [0]] = LARGE
    for n, lag in enumerate(lags):
        at = model.block(1, n, query="position", key="position")
        for t in range(first, n_positions):
            parent = t + 1 - lag
            counted = [s for s in range(first, t + 1) if s != parent]
            at[t, :first] = -LARGE
            at[t, parent] = math.log(max(len(counted), 1)) - EVIDENCE * EVEN
            for s in counted:
                model.block(1, n, query="position", key=f"L0H{s % groups}.position")[t, s - lag] = -EVIDENCE
        model.block(2, 0, query=f"L1H{n}.position", key="position").diagonal().fill_(CHOICE)
    at = model.block(2, 0, query="position", key="position")
    for t in range(n_positions):
        at[t, [t + 1 - lag for lag in lags if lag <= t + 1]] = 2 * CHOICE
    model.output_block("L2H0.token").copy_(log)
    return model


def _checked(lags: Sequence[int], matrix: Tensor, n_positions: int) -> list[int]:
    right = all(isinstance(lag, int) and not isinstance(lag, bool) and 1 <= lag < n_positions - 1 for lag in lags)
    if not right or len(set(lags)) != len(lags) or len(lags) < 2:
        raise CausalProbeError(
            f"Lags are two or more different whole numbers from 1 to {n_positions - 2}; found {list(lags)}."
        )
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] >= 2
    if (
        not square
        or not bool((matrix >= 0).all())
        or not torch.allclose(matrix.sum(-1), torch.ones(()).double(), atol=1e-6)
    ):
        raise CausalProbeError(
            f"`matrix` holds transition probabilities [state, next state], each row with the sum 1; found the shape {list(matrix.shape)}"
            f"{f' with row sums from {matrix.sum(-1).min():.4g} to {matrix.sum(-1).max():.4g}' if square else ''}."
        )
    return sorted(lags)
