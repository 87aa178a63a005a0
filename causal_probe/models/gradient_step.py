r"""Hand-set weights that make linear self-attention a known algorithm on the examples in its context.

The stream is (x, y): d_x entries, then d_out. Rows are tokens, products are ``h @ W`` as in TransformerLens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.models.linear import LinearTransformer

__all__ = ["gradient_steps", "mesa_step"]


@checked
def gradient_steps(
    d_x: int,
    n_examples: int,
    *,
    eta: Sequence[float],
    gamma: Sequence[float] | None = None,
    W0: Float[Tensor, "d_out d_x"] | None = None,
    d_out: int = 1,
    dtype: torch.dtype = torch.float32,
) -> LinearTransformer:
    r"""A linear transformer that runs gradient descent, or GD++, on the examples: one layer for each step.

    Parameters
    ----------
    d_x, n_examples, d_out
        Of the task's joint tokens.
    eta
        Step sizes on :math:`\frac12 \sum_j |W x_j - y_j|^2`, one for each layer: eta / N in the paper's terms.
    gamma
        Curvature corrections of GD++, one for each layer.
    W0
        Where descent starts; zero if None. The query must then carry -W0 x, as the task's tokens with the same W0 do.
    dtype
        Of the weights.

    Raises
    ------
    CausalProbeError
        If there is no step, a step is not finite, or the shapes don't go together.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import tasks
    >>> batch = tasks.LinearRegression(3, 5).sample(2, torch.Generator().manual_seed(0))
    >>> prediction = gradient_steps(3, 5, eta=[0.5]).predict(batch.tokens)
    >>> one_step = tasks.predict_descent(batch.x, batch.y, batch.x_query, eta=[0.5])
    >>> torch.allclose(prediction, one_step, atol=1e-6)
    True
    """
    gamma = [0.0] * len(eta) if gamma is None else gamma
    if not eta or len(eta) != len(gamma) or not torch.tensor([*eta, *gamma]).isfinite().all():
        raise CausalProbeError(f"Steps are one or more finite numbers eta, with as many gamma; got {eta} and {gamma}.")
    if W0 is not None and tuple(W0.shape) != (d_out, d_x):
        raise CausalProbeError(f"W0 must have the shape {[d_out, d_x]}; its is {list(W0.shape)}.")
    model = LinearTransformer(d_x + d_out, n_examples + 1, len(eta), d_out=d_out, dtype=dtype)
    eye = torch.eye(d_x + d_out, dtype=dtype)
    x, y = eye[:, :d_x], eye[:, d_x:]  # [d_token, d_x] and [d_token, d_out]: what reads x, and what reads y
    # W_Q = W_K read x alone:                      score_ij = x_i . x_j
    # W_V W_O writes, for the key (x_j, y_j),      eta (W0 x_j - y_j) into y,  -gamma x_j into x
    # so that                                      y_i <- y_i - eta sum_j (y_j - W0 x_j) x_j . x_i = y_i - (dW) x_i
    # with dW = -eta grad L(W0). The query began with -W0 x_q and holds -(W0 + dW) x_q: minus the new prediction. An example
    # holds y_i - dW x_i, whose residual at W0 is its residual at W0 + dW: the next layer repeats the step from there, also with
    # W0 in its own W_V. (For x_i <- x_i - gamma S x_i this needs W0 = 0, or else y_i - W0 x_i is no residual any more.)
    if W0 is not None and any(gamma) and bool(W0.any()):
        raise CausalProbeError("GD++ changes x, and a start W0 other than zero then has no meaning. Leave one out.")
    start = torch.zeros(d_out, d_x, dtype=dtype) if W0 is None else W0.to(dtype)
    with torch.no_grad():
        for block, step, curvature in zip(model.blocks, eta, gamma, strict=True):
            attention = block.attn
            attention.W_Q[0].copy_(x @ x.mT)
            attention.W_K[0].copy_(x @ x.mT)
            attention.W_V[0].copy_(eye)
            attention.W_O[0].copy_(step * (x @ start.mT - y) @ y.mT - curvature * x @ x.mT)
    return model


@checked
def mesa_step(
    d_x: int, n_positions: int, *, a: float = 1.0, b: float = 1.0, real: bool = False, dtype: torch.dtype | None = None
) -> LinearTransformer:
    r"""The mesa-optimizer of Zheng et al. 2024: at every position, one step of in-context least squares on the pairs seen so far.

    On tokens e_t = (x_t, x_{t-1}) the first d_x entries of the output at position t are

    .. math:: \hat y_t = \frac{ab}{t-1} \sum_{j<t} x_{j+1} x_j^* x_t,

    one gradient step of size ab from W = 0 on :math:`\frac{1}{2(t-1)} \sum_{j<t} |W x_j - x_{j+1}|^2`, applied to x_t. The paper's
    W_KQ is W_Q here and its W_PV is W_V, transposed; W_K and W_O are the identity and don't require gradients, so that training moves
    what the paper's layer has.

    Parameters
    ----------
    d_x
        Dimensions of the process.
    n_positions
        T - 1, the number of tokens.
    a, b
        The paper's a and b; their product is the step.
    real
        The same function on real tokens (real part, imaginary part of x_t, then of x_{t-1}), with real weights. It takes
        two heads: the real and the imaginary part of the inner product.
    dtype
        Of the weights; by default complex64, with ``real`` float32.

    Raises
    ------
    CausalProbeError
        If ``dtype`` and ``real`` don't go together.

    Examples
    --------
    >>> import torch
    >>> model = mesa_step(2, 5, a=1.0, b=0.5, real=True)
    >>> len(model.blocks)
    1
    """
    dtype = (torch.float32 if real else torch.complex64) if dtype is None else dtype
    if dtype.is_complex == real:
        raise CausalProbeError(f"A {'real' if real else 'complex'} mesa-optimizer can't have weights of dtype {dtype}.")
    width = 2 * d_x if real else d_x
    model = LinearTransformer(
        2 * width, n_positions, 1, 1 + real, d_out=width, mask="causal", per_pair=True, residual=False, dtype=dtype
    )
    eye = torch.eye(2 * width, dtype=dtype)
    now, before = eye[:, :width], eye[:, width:]
    # The key e_j = (x_j, x_{j-1}) is matched by its x_{j-1} with the query's x_t, and its x_j is what is copied:
    #   W_Q = a [now -> before],  W_K = I,  W_V = b [now -> now],  W_O = I
    # The key e_1 holds x_0 = 0 and adds nothing; the layer divides by the t - 1 others.
    # Real form, z = u + iv as (u, v), J (u, v) = (-v, u): for s = k^* q,  s z = Re(s) z + Im(s) J z  and
    #   Re(k^* q) = k . q,   Im(k^* q) = (J k) . q = k . (J' q),   k the key's x_{j-1}, q the query's x_t.
    # As rows, J z is z @ turn and J' z is z @ turn'.
    turn = torch.zeros(width, width, dtype=dtype)
    if real:
        turn[:d_x, d_x:] = torch.eye(d_x, dtype=dtype)
        turn[d_x:, :d_x] = -torch.eye(d_x, dtype=dtype)
    with torch.no_grad():
        attention = model.blocks[0].attn
        for head, by in enumerate([torch.eye(width, dtype=dtype), turn][: 1 + real]):
            attention.W_Q[head].copy_(a * now @ by.mT @ before.mT)
            attention.W_K[head].copy_(eye)
            attention.W_V[head].copy_(b * now @ by @ now.mT)
            attention.W_O[head].copy_(eye)
    for fixed in (attention.W_K, attention.W_O):
        fixed.requires_grad_(False)
    return model
