"""What does a layer copy, of continuous tokens: the share of its output at a position that each input position determines.

The measure of von Oswald et al. 2022: the norm of the derivative of the residual stream behind a layer, at
position i, in the input at position j. Here it is the derivative of the *attention's output* alone, since the residual stream adds
the position's own input whatever the layer does: ``sensitivity[i, j]`` is the mean over sequences of the Frobenius norm of
d attn_out_i / d token_j. A layer that copies its left neighbour has all of it at j = i - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import describe, keep, require_hooks
from causal_probe.results import Result, Table

__all__ = ["CopySensitivity", "copy_sensitivity"]


@dataclass(frozen=True, eq=False, repr=False)
class CopySensitivity(Result):
    """The result of :func:`copy_sensitivity`.

    Attributes
    ----------
    sensitivity
        [output position, input position], mean over sequences.
    shares
        Each sequence's own, each row divided by its sum: [sequence, output position, input position]; rows that are zero stay zero.
    layer
        Which layer.
    """

    KIND = "copy sensitivity"
    WORKS = ("vonoswald2023",)

    sensitivity: Float[np.ndarray, "pos pos"]
    shares: Float[np.ndarray, "sequence pos pos"]
    layer: int

    def share(self, offset: int, positions: Sequence[int] | None = None) -> tuple[float | None, float | None]:
        """The mean share that lies ``offset`` positions after the output's (-1: the left neighbour), and its standard error.

        Parameters
        ----------
        positions
            Output positions that count; by default all that have such an input.

        Raises
        ------
        CausalProbeError
            If no position has such an input.
        """
        n = self.shares.shape[1]
        rows = [i for i in (range(n) if positions is None else positions) if 0 <= i + offset < n]
        if not rows:
            raise CausalProbeError(f"No position has an input {offset} positions away among {n}.")
        each = self.shares[:, rows, [i + offset for i in rows]].mean(1)
        return float(each.mean()), float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else None

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            "What a layer copies was measured by the norm of its attention output's derivative in each input token (after von Oswald et "
            "al., 2023)."
        )

    def table(self) -> Table:
        """The shares of both neighbours and of the position itself."""
        named = (("left neighbour", -1), ("itself", 0), ("right neighbour", 1))
        return Table(
            f"CopySensitivity of layer {self.layer}, {len(self.shares)} sequences: share of an output's sensitivity",
            ("input", "share", "stderr"),
            [(name, *self.share(offset)) for name, offset in named if abs(offset) < self.shares.shape[1]],
        )


@probe
def copy_sensitivity(model: Any, inputs: Float[Tensor, "batch pos d_token"], *, layer: int = 0) -> CopySensitivity:
    """The derivative of a layer's attention output at each position in the input at each position.

    Parameters
    ----------
    model
        Any hooked model whose forward reads vectors, such as :class:`~causal_probe.models.LinearTransformer`, with hook points
        ``blocks.{layer}.hook_attn_out``.
    inputs
        Vectors [batch, pos, d_token].
    layer
        Counted from 0.

    Returns
    -------
    CopySensitivity
        Norms of derivatives, in units of the output per unit of the input, [pos, pos], and each position's share of its row, in [0, 1]; by
        chance the shares are even.

    Raises
    ------
    CausalProbeError
        If the hook point is missing or never fires, or there are no sequences.

    References
    ----------
    von Oswald et al., "Transformers Learn In-Context by Gradient Descent", ICML 2023 (arXiv 2212.07677).

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import gradient_steps
    >>> copy_sensitivity(gradient_steps(2, 3, eta=[0.1]), torch.randn(2, 4, 3)).shares.shape
    (2, 4, 4)
    """
    name = f"blocks.{layer}.hook_attn_out"
    require_hooks(model, [name])
    if inputs.ndim != 3 or not inputs.is_floating_point() or not len(inputs):
        raise CausalProbeError(
            f"Inputs are one or more sequences of vectors [batch, pos, d_token]; these are {list(inputs.shape)}."
        )
    leaf = inputs.detach().clone().requires_grad_()
    seen: dict[str, Tensor] = {}
    with torch.enable_grad(), model.hooks(fwd_hooks=[(name, keep(seen, name))]):
        model(leaf)
    if not seen:
        raise CausalProbeError(f"{name} did not fire.")
    out = seen[name]
    n, width = out.shape[1:]
    squares = torch.zeros(len(inputs), n, n, dtype=torch.float64)
    for position in range(n):
        for entry in range(width):
            # Sequences don't see each other, so one backward pass of their sum is all of their derivatives.
            (gradient,) = torch.autograd.grad(out[:, position, entry].sum(), leaf, retain_graph=True, allow_unused=True)
            if gradient is not None:
                squares[:, position] += gradient.double().square().sum(-1)
    norms = squares.sqrt().numpy()
    if not np.isfinite(norms).all():
        raise CausalProbeError(
            f"A derivative of {name} is no number. Check the inputs and the model's weights for NaN and infinities."
        )
    totals = norms.sum(-1, keepdims=True)
    shares = np.divide(norms, totals, out=np.zeros_like(norms), where=totals > 0)
    return CopySensitivity(norms.mean(0), shares, layer, provenance=describe(model))
