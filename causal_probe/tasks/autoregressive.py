r"""Rotations seen step by step: x_{t+1} = W x_t with a W that is new in every sequence (Zheng et al. 2024, arXiv 2405.16845).

In each sequence W = diag(exp(i theta_1), ..., exp(i theta_d)) with theta uniform, and x_1 is drawn from the start's law. Tokens are
e_t = (x_t, x_{t-1}) with x_0 = 0, for t = 1 .. T-1, and the target at t is x_{t+1}.

**The trained layer.** One linear layer predicts yhat_t = W_PV G_t W_KQ e_t with G_t = sum_{j<=t} e_j e_j^* / (t - 1). Begun at a I and b I in
the blocks that matter, its population loss over t = 2 .. T-1 is, for starts whose coordinates have symmetric laws (normal,
sparse), a function of the product p = ab alone along gradient flow: with the moments of the moduli of x_1's entries
k1 = E x_j^4, k2 = E x_j^6, k3 = sum_{r != j} E x_j^2 x_r^4, ::

    loss(p) = sum_t d/2 [ p^2 (k2 + k3 / (t-1)) - 2 p k1 + E x_j^2 ]
    p*      = k1 / (k2 + k3 / (T-2) sum_{t=2}^{T-1} 1 / (t-1))

since E Re<M_t, x_{t+1}> = d k1 and E|M_t|^2 = d (k2 + k3 / (t-1)) for M_t = sum_{j<t} x_{j+1} x_j^* x_t / (t-1): all other terms carry a
phase with mean zero. (Derived for this package.)

**When it recovers W.** As train and test length grow, the layer's estimate of W is p diag(|x_1|^2) W with p = k1 / k2: it is W on the
coordinates that x_1 has if and only if every |x_1j| is 0 or sqrt(k2 / k1), the *moment condition*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Complex, Float
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.tasks.randomness import check_batch_size, out_of_range

__all__ = ["AutoregressiveBatch", "AutoregressiveProcess", "Flow", "Start"]

Start = Literal["normal", "sparse", "ones"]


@dataclass(frozen=True, eq=False)
class AutoregressiveBatch:
    """Sequences, as tokens and targets.

    Attributes
    ----------
    tokens
        (x_t, x_{t-1}), t = 1 .. T-1: [batch, T-1, 2 d]; in real form 4 d: real and imaginary parts of x_t, then of x_{t-1}.
    target
        x_{t+1}: [batch, T-1, d], in real form 2 d. The first is not to be predicted: no pair has been seen.
    x
        x_1 .. x_T, complex: [batch, T, d].
    eigenvalues
        The diagonal of W, [batch, d].
    """

    tokens: Complex[Tensor, "batch pos d_token"] | Float[Tensor, "batch pos d_token"]
    target: Complex[Tensor, "batch pos d_out"] | Float[Tensor, "batch pos d_out"]
    x: Complex[Tensor, "batch length d_x"]
    eigenvalues: Complex[Tensor, "batch d_x"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Flow:
    """Gradient flow of a and b on the population loss.

    Attributes
    ----------
    time
        In units of the loss averaged over t and over the d coordinates.
    a, b
        At each time.
    """

    time: Float[np.ndarray, " step"]
    a: Float[np.ndarray, " step"]
    b: Float[np.ndarray, " step"]

    @property
    def product(self) -> NDArray[np.float64]:
        """The product ab at each time."""
        return np.asarray(self.a * self.b)


@checked
class AutoregressiveProcess:
    """x_{t+1} = W x_t, with a new unitary diagonal W in every sequence.

    Parameters
    ----------
    d_x
        Dimensions.
    length
        T, the number of states; >= 3.
    start
        ``"normal"``: x_1 has independent real normal entries with standard deviation ``scale``. ``"sparse"``: x_1 is
        +-scale in one coordinate, drawn anew, and 0 elsewhere. ``"ones"``: every entry is ``scale``.
    scale
        > 0.
    real
        Tokens and targets in real form.

    Raises
    ------
    CausalProbeError
        If an argument is out of range.

    Examples
    --------
    >>> import torch
    >>> process = AutoregressiveProcess(5, 30, start="normal", scale=1.0)
    >>> process.sample(2, torch.Generator().manual_seed(0)).tokens.shape
    torch.Size([2, 29, 10])
    >>> [round(AutoregressiveProcess(5, 30, scale=scale).limit, 4) for scale in (0.5, 1.0, 2.0)]
    [0.7193, 0.1798, 0.045]
    """

    def __init__(
        self, d_x: int = 5, length: int = 100, *, start: Start = "normal", scale: float = 1.0, real: bool = False
    ) -> None:
        problems = out_of_range({"d_x": (d_x, 1), "length": (length, 3)}, {"scale": scale})
        if start not in get_args(Start):
            problems.append(f"start must be normal, sparse or ones, not {start!r}")
        if problems:
            raise CausalProbeError("There is no such process: " + "; ".join(problems) + ".")
        self.d_x, self.length, self.scale, self.real = d_x, length, float(scale), real
        self.start: Start = start

    def __repr__(self) -> str:
        form = ", real form" if self.real else ""
        return f"AutoregressiveProcess(d_x={self.d_x}, length={self.length}, start={self.start} {self.scale:g}{form})"

    @property
    def n_positions(self) -> int:
        """Number of tokens, T - 1."""
        return self.length - 1

    @property
    def moments(self) -> tuple[float, float, float]:
        """(k1, k2, k3): E x_j^4, E x_j^6, sum over r != j of E x_j^2 x_r^4; means over j."""
        c, others = self.scale, self.d_x - 1
        if self.start == "normal":
            return 3 * c**4, 15 * c**6, 3 * others * c**6
        if self.start == "sparse":
            return c**4 / self.d_x, c**6 / self.d_x, 0.0
        return c**4, c**6, others * c**6

    @property
    def limit(self) -> float:
        """The product p* = ab that minimises the population loss of the diagonal layer, at this length (the module's text)."""
        k1, k2, k3 = self.moments
        return k1 / (k2 + k3 * float(np.mean(1 / np.arange(1, self.length - 1))))

    @property
    def satisfies_moment_condition(self) -> bool:
        """Whether every entry of x_1 has modulus 0 or sqrt(k2 / k1), so that a long-trained layer recovers W."""
        return self.start != "normal"  # +-c and 0, and sqrt(k2 / k1) = c

    def flow(self, a: float, b: float, *, time: float | None = None, points: int = 200) -> Flow:
        """Exact population gradient flow of the diagonal layer from (a, b): a' = -b l'(ab), b' = -a l'(ab).

        l is the loss in the module's text, averaged over t and over coordinates. For ``"ones"`` the layer doesn't stay diagonal, and
        this is the flow that is held to the diagonal (the authors' clipped gradient).

        Parameters
        ----------
        a, b
            Where it starts; not both 0.
        time
            How long; by default until ab has been within 1e-6 of its limit for a long time.

        Raises
        ------
        CausalProbeError
            If it starts at the saddle (0, 0), where nothing moves, or has the sign that leads into the saddle (a = -b).
        """
        if a == -b:
            raise CausalProbeError(
                f"The flow from a = {a:g}, b = {b:g} ends at the saddle at zero, and learns nothing."
            )
        k1 = self.moments[0]
        k = k1 / self.limit

        def derivative(_: float, ab: NDArray[np.float64]) -> list[float]:
            slope = ab[0] * ab[1] * k - k1
            return [-ab[1] * slope, -ab[0] * slope]

        # a + b grows at the rate k1 near the saddle, and the limit is approached at 2 k1 or faster.
        end = (20 + 4 * abs(math.log(abs(a + b)))) / k1 if time is None else time
        at = np.linspace(0, end, points)
        found = solve_ivp(derivative, (0, end), [a, b], t_eval=at, method="LSODA", rtol=1e-10, atol=1e-12)
        return Flow(found.t, found.y[0], found.y[1])

    def sample(self, batch_size: int, generator: torch.Generator) -> AutoregressiveBatch:
        """Draw ``batch_size`` sequences, each with a W of its own, in single precision.

        Raises
        ------
        CausalProbeError
            If ``batch_size`` is below 1.
        """
        check_batch_size(batch_size, generator)
        d, device = self.d_x, generator.device
        theta = 2 * math.pi * torch.rand(batch_size, d, generator=generator, device=device, dtype=torch.float64)
        if self.start == "normal":
            first = torch.randn(batch_size, d, generator=generator, device=device)
        elif self.start == "ones":
            first = torch.ones(batch_size, d, device=device)
        else:
            where = torch.randint(d, (batch_size,), generator=generator, device=device)
            sign = 2 * torch.randint(2, (batch_size,), generator=generator, device=device) - 1
            first = torch.zeros(batch_size, d, device=device)
            first[torch.arange(batch_size, device=device), where] = sign.float()
        angle = theta[:, None] * torch.arange(self.length, device=device)[:, None]
        x = (self.scale * first[:, None] * torch.polar(torch.ones_like(angle), angle)).to(torch.complex64)
        before = torch.nn.functional.pad(torch.view_as_real(x[:, :-2]), (0, 0, 0, 0, 1, 0))
        parts = [x[:, :-1], torch.view_as_complex(before.contiguous()), x[:, 1:]]
        if self.real:
            now, previous, target = (torch.cat([part.real, part.imag], -1) for part in parts)
        else:
            now, previous, target = parts
        eigenvalues = torch.polar(torch.ones_like(theta), theta).to(torch.complex64)
        return AutoregressiveBatch(torch.cat([now, previous], -1), target.clone(), x, eigenvalues)
