"""Dirichlet rows from an explicit generator, at any concentration.

``torch.distributions`` takes no generator, and a small concentration underflows: at a concentration of 1e-3 every gamma variate of a
row is exactly 0 in float32. So the variates are drawn as *logarithms*, by the identity

    Gamma(a)  =  Gamma(a + 1) * U^(1/a),        log Gamma(a)  =  log Gamma(a + 1) + log(U) / a,

and a row is the softmax of its logarithms. Gamma(a + 1) is drawn by the rejection method of Marsaglia & Tsang (2000, *A
simple method for generating gamma variables*), vectorised: torch's own sampler draws one variate after the other and
would cost more than all the rest of a training step.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError

__all__ = ["CONCENTRATIONS", "check_concentration", "dirichlet", "log_gamma_variates"]

#: The smallest and largest concentration. Beyond them float32 has no room for the logarithms, and rows are corners of the
#: simplex, or uniform, to the last digit.
CONCENTRATIONS = (1e-30, 1e30)


def check_concentration(concentration: float) -> float:
    """The concentration, if it is one of :data:`CONCENTRATIONS`; else a :class:`CausalProbeError`."""
    low, high = CONCENTRATIONS
    if not low <= concentration <= high:
        raise CausalProbeError(f"concentration must be from {low:g} to {high:g}, not {concentration!r}.")
    return float(concentration)


def dirichlet(
    concentration: float, shape: tuple[int, ...], *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "..."]:
    """Independent rows from the symmetric Dirichlet distribution.

    Parameters
    ----------
    concentration
        Of every entry, in :data:`CONCENTRATIONS`. Small values give rows near a corner of the simplex.
    shape
        Shape of the result; the last axis is the simplex and sums to one.
    generator
        The source of randomness; the result lies on its device.

    Returns
    -------
    Tensor of ``shape``, entries in [0, 1].

    Examples
    --------
    >>> import torch
    >>> dirichlet(0.5, (2, 3), generator=torch.Generator().manual_seed(0)).sum(-1)
    tensor([1.0000, 1.0000])
    """
    rows = log_gamma_variates(concentration, shape, generator=generator, dtype=dtype)
    # The softmax in three steps: on a CPU, torch's own is six times slower on rows of so few entries.
    rows = rows.sub_(rows.amax(-1, keepdim=True)).exp_()
    return rows.div_(rows.sum(-1, keepdim=True))


def log_gamma_variates(
    concentration: float, shape: tuple[int, ...], *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "..."]:
    """Logarithms of independent Gamma(``concentration``, 1) variates, finite for every one in :data:`CONCENTRATIONS`."""
    # Marsaglia & Tsang for shape a = concentration + 1 > 1: d (1 + c x)^3 with x normal, accepted with probability above 0.95.
    d = concentration + 1 - 1 / 3
    c = 1 / math.sqrt(9 * d)
    drawn = torch.empty(math.prod(shape), dtype=dtype, device=generator.device)
    pending = None  # None: all of them; then the indices of the rejected ones
    while pending is None or len(pending):
        n = len(drawn) if pending is None else len(pending)
        x = torch.randn(n, generator=generator, dtype=dtype, device=generator.device)
        u = torch.rand(n, generator=generator, dtype=dtype, device=generator.device)
        log_v = 3 * torch.log1p((c * x).clamp_(min=-1))  # -inf where 1 + c x <= 0: rejected below
        # expm1, for at a large concentration v is so near 1 that 1 - v would be rounding alone.
        accepted = torch.log(u) < 0.5 * x * x + d * (log_v - torch.expm1(log_v))
        if pending is None:
            drawn = log_v
            pending = (~accepted).nonzero()[:, 0]
        else:
            drawn[pending[accepted]] = log_v[accepted]
            pending = pending[~accepted]
    # 1 - rand lies in (0, 1], so its logarithm is finite.
    u = 1 - torch.rand(drawn.shape, generator=generator, dtype=dtype, device=generator.device)
    return (math.log(d) + drawn + torch.log(u) / concentration).reshape(shape)
