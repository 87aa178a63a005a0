r"""Reference predictors for in-context linear regression: gradient descent with the best steps, ridge, least squares.

On examples (x_j, y_j) and a query, gradient descent on :math:`L(W) = \frac12 \sum_j |W x_j - y_j|^2` (a step ``eta`` here is the
paper's eta / N), and GD++ (von Oswald et al. 2022), which also changes the inputs it sees::

    y_j <- y_j - eta sum_i y_i x_i' x_j          the residual: y_j - W x_j after a step from W = 0
    x_j <- x_j - gamma sum_i x_i x_i' x_j        (I - gamma S) x_j,  S = sum_i x_i x_i'

all at once, for the examples and the query, whose y begins at 0 (at -W0 x_q) and ends at minus the prediction.

**Expected losses without labels.** With W ~ N(0, w^2 I), query covariance s^2 I and noise e, every predictor here is, before
its expectation, a function of the eigenvalues l of S alone. Let a(l) be the factor that x has picked up, r(l) that of y::

    r <- r (1 - eta l a^2),   a <- a (1 - gamma l a^2)          starting at 1
    loss = s^2/2 E tr[ w^2 r(S)^2 + e^2 (1 - r(S))^2 / S ]       half the squared error, per output

so that an average over S alone, without W and without the query, measures a loss with a far smaller error. For one step of
plain gradient descent without noise it is a parabola in eta, and ::

    eta* = E tr S / E tr S^2,    loss* = w^2 s^2 / 2 (d - (E tr S)^2 / E tr S^2)
    E tr S = N d s^2,   E tr S^2 = N E|x|^4 + N (N - 1) d s^4,   E|x|^4 = d m_4 + d (d - 1) s^4

with m_4 the fourth moment of an entry: 3 s^4 if normal, 9/5 s^4 if uniform. (Derived for this package.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.tasks.regression import LinearRegression

__all__ = ["Descent", "expected_loss", "fit_descent", "least_squares", "one_step_optimum", "predict_descent", "ridge"]

#: Draws of S over which steps are fitted and losses averaged. The standard error of a loss is then about 0.2%.
DRAWS = 20_000
#: Sequences on which the steps are fitted; the loss is then measured on others.
FITTED = 8_000
#: Seed of those draws, where no generator is given: steps fitted twice are the same.
SEED = 20221215


@dataclass(frozen=True)
class Descent:
    """Steps of gradient descent, and the expected loss of their predictions.

    Attributes
    ----------
    eta
        One step size for each step, eta / N in the paper's terms; with the gradient *summed* over examples.
    gamma
        One curvature correction for each step; zeros for plain gradient descent.
    loss
        Expected half squared error per sequence, or None where it was not computed.
    standard_error
        Of ``loss``, over draws of the inputs; None where ``loss`` is exact or None.
    """

    eta: tuple[float, ...]
    gamma: tuple[float, ...]
    loss: float | None = None
    standard_error: float | None = None

    @property
    def steps(self) -> int:
        """How many steps."""
        return len(self.eta)

    @property
    def name(self) -> str:
        """Such as ``"GD++, 2 steps"``."""
        kind = "GD++" if any(self.gamma) else "GD"
        return f"{kind}, {self.steps} step{'s' * (self.steps != 1)}"


# --------------------------------------------------------------------------------------------------------- predictors


@checked
def predict_descent(
    x: Float[Tensor, "batch example d_x"],
    y: Float[Tensor, "batch example d_out"],
    x_query: Float[Tensor, "batch d_x"],
    *,
    eta: Sequence[float],
    gamma: Sequence[float] | None = None,
    W0: Float[Tensor, "d_out d_x"] | None = None,
) -> Float[Tensor, "batch d_out"]:
    """The prediction of GD or GD++ for the query after ``len(eta)`` steps. Differentiable.

    Plain gradient descent is computed in weight space (W and its gradient), GD++ in the space of the examples, as in the
    module's text.

    Parameters
    ----------
    x, y, x_query
        Examples, and the query whose y is predicted.
    eta, gamma
        A step size for each step, eta / N in the paper's terms, and GD++'s curvature corrections; without them, plain gradient descent.
    W0
        Where W starts; zero by default.

    Raises
    ------
    CausalProbeError
        If shapes don't go together, or the prediction is not finite: the steps are too large and diverge.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(2)[None]
    >>> predict_descent(x, 3 * x[..., :1], torch.tensor([[1.0, 0.0]]), eta=[0.5])
    tensor([[1.5000]])
    """
    _check_shapes(x, y, x_query)
    if gamma is not None and len(gamma) != len(eta):
        raise CausalProbeError(f"There is one gamma for each step; there are {len(eta)} steps and {len(gamma)} gammas.")
    start = x.new_zeros(y.shape[-1], x.shape[-1]) if W0 is None else W0.to(x)
    if gamma is None or not any(gamma):
        W = start.expand(len(x), -1, -1)
        for step in eta:
            W = W - step * (W @ x.mT - y.mT) @ x
        prediction = (W @ x_query[..., None])[..., 0]
    else:
        residual, seen = y - x @ start.mT, x
        query, answer = x_query[:, None], (x_query @ start.mT)[:, None]
        for step, curvature in zip(eta, gamma, strict=True):
            gradient, S = residual.mT @ seen, seen.mT @ seen  # [batch, d_out, d_x], [batch, d_x, d_x]
            residual, answer = residual - step * seen @ gradient.mT, answer + step * query @ gradient.mT
            seen, query = seen - curvature * seen @ S, query - curvature * query @ S
        prediction = answer[:, 0]
    if not prediction.isfinite().all():
        raise CausalProbeError(
            f"Gradient descent with the steps {list(eta)} diverges on these examples: a prediction is not finite. A step must "
            "stay below two over the largest eigenvalue of the sum of x x'."
        )
    return prediction


def ridge(
    x: Float[Tensor, "batch example d_x"],
    y: Float[Tensor, "batch example d_out"],
    x_query: Float[Tensor, "batch d_x"],
    *,
    penalty: float,
) -> Float[Tensor, "batch d_out"]:
    """Ridge regression: ``y' X (X' X + penalty I)^-1 x_query``. With penalty (noise / w_scale)^2 it is the Bayes predictor.

    Raises
    ------
    CausalProbeError
        If the penalty is not positive, or shapes don't go together.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(2)[None]
    >>> ridge(x, 3 * x[..., :1], torch.tensor([[1.0, 0.0]]), penalty=1.0)
    tensor([[1.5000]])
    """
    _check_shapes(x, y, x_query)
    if not 0 < penalty < math.inf:
        raise CausalProbeError(f"The penalty of a ridge must be positive and finite, not {penalty}.")
    S = x.mT @ x + penalty * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.einsum("bno,bn->bo", y, (x @ torch.linalg.solve(S, x_query[..., None]))[..., 0])


def least_squares(
    x: Float[Tensor, "batch example d_x"],
    y: Float[Tensor, "batch example d_out"],
    x_query: Float[Tensor, "batch d_x"],
    *,
    minimum_norm: bool = False,
) -> Float[Tensor, "batch d_out"]:
    """Least squares; of all solutions the smallest, if ``minimum_norm``.

    Raises
    ------
    CausalProbeError
        If the examples don't span the dimensions (there are fewer of them, or they repeat each other), so that there are many
        solutions, and ``minimum_norm`` is false; or if shapes don't go together.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(2)[None]
    >>> least_squares(x, 3 * x[..., :1], torch.tensor([[1.0, 0.0]]))
    tensor([[3.]])
    """
    _check_shapes(x, y, x_query)
    n, d = x.shape[1:]
    if not minimum_norm:  # in float64, so that only exactly singular systems are refused
        rank = n if n < d else int(torch.linalg.matrix_rank(x.double()).min())
        if rank < d:
            raise CausalProbeError(
                f"Least squares with {n} examples in {d} dimensions has many solutions where they span {rank}. Ask for the smallest "
                "(minimum_norm=True), for a ridge, or for more examples."
            )
    W: Tensor = torch.linalg.pinv(x) @ y  # [batch, d_x, d_out]
    return (x_query[:, None] @ W)[:, 0]


def _check_shapes(x: Tensor, y: Tensor, x_query: Tensor) -> None:
    if len(x) != len(y) or x.shape[1] != y.shape[1] or x_query.shape != (len(x), x.shape[-1]) or 0 in x.shape:
        raise CausalProbeError(
            "Examples are x [batch, example, d_x] and y [batch, example, d_out] with a query [batch, d_x], none of them empty; "
            f"the shapes are {list(x.shape)}, {list(y.shape)} and {list(x_query.shape)}."
        )


# ----------------------------------------------------------------------------------------------------- expected losses


@checked
def one_step_optimum(task: LinearRegression) -> Descent:
    """The best single step of gradient descent from zero, and its exact loss (the module's text).

    >>> best = one_step_optimum(LinearRegression(10, 10))
    >>> f"{best.eta[0]:.4f} {best.loss:.4f}"
    '0.6061 0.2062'

    Raises
    ------
    CausalProbeError
        If the task is noisy; use :func:`fit_descent` then.
    """
    if task.noise:
        raise CausalProbeError("The closed form is for examples without noise. Use fit_descent(task, 1).")
    d, n, s2 = task.d_x, task.n_examples, task.input_variance
    m4 = (3 if task.input_law == "normal" else 9 / 5) * s2**2
    trace = n * d * s2
    square = n * (d * m4 + d * (d - 1) * s2**2) + n * (n - 1) * d * s2**2
    loss = task.d_out * task.w_scale**2 * s2 / 2 * (d - trace**2 / square)
    return Descent((trace / square,), (0.0,), loss)


def fit_descent(
    task: LinearRegression,
    steps: int,
    *,
    curvature: bool = False,
    shared: bool = False,
    generator: torch.Generator | None = None,
    draws: int = DRAWS,
) -> Descent:
    """The step sizes, and with ``curvature`` the gammas of GD++, that minimise the expected loss from W0 = 0.

    Parameters
    ----------
    shared
        One eta and one gamma for all steps, as a model whose layers share weights has.
    generator
        Of the draws of the inputs; None: one of a fixed seed.
    draws
        How many the loss is measured on; the steps are fitted on at most 8,000 others.

    Raises
    ------
    CausalProbeError
        If ``steps`` or ``draws`` is below 1.

    Examples
    --------
    >>> from causal_probe.tasks import LinearRegression
    >>> best = fit_descent(LinearRegression(d_x=2, n_examples=4), 1)
    >>> [round(step, 3) for step in best.eta], round(best.loss, 3)
    ([2.069], 0.026)
    """
    if steps < 1 or draws < 1:
        raise CausalProbeError(f"At least one step and one draw are needed; there are {steps} and {draws}.")
    generator = torch.Generator().manual_seed(SEED) if generator is None else generator
    eigenvalues = _eigenvalues(task, min(draws, FITTED), generator)
    n = 1 if shared else steps
    scale = float(eigenvalues.max())  # in units of 1 / largest eigenvalue: 1 is safe and slow, 2 diverges

    def objective(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        leaf = torch.tensor(parameters / scale, requires_grad=True)
        with torch.enable_grad():
            loss = _losses(task, eigenvalues, *unpack(leaf)).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        if not bool(loss.isfinite() & gradient.isfinite().all()):
            return 1e30, np.zeros(len(parameters))
        return float(loss.detach()), (gradient / scale).numpy()

    def unpack(leaf: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        eta = leaf[:n]
        gamma = leaf[n:] if curvature else torch.zeros(n, dtype=leaf.dtype)
        return [*eta] * (steps // n), [*gamma] * (steps // n)

    # The loss is a polynomial in the steps, not convex beyond one: start from a few places.
    starts = [
        np.concatenate([np.linspace(0.8, 1.2, n) * eta, np.full(n * curvature, gamma)])
        for eta, gamma in ((1.0, 0.1), (0.5, 0.02), (1.5, 0.3))
    ]
    found = [
        minimize(objective, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-10, "maxiter": 60})
        for start in starts
    ]
    best = min(found, key=lambda each: float(each.fun))
    eta, gamma = unpack(torch.from_numpy(best.x / scale))
    return expected_loss(task, [float(e) for e in eta], [float(g) for g in gamma], generator=generator, draws=draws)


def expected_loss(
    task: LinearRegression,
    eta: Sequence[float],
    gamma: Sequence[float] | None = None,
    *,
    generator: torch.Generator | None = None,
    draws: int = DRAWS,
) -> Descent:
    """The expected loss of given steps from W0 = 0, with its standard error over draws of the inputs.

    Raises
    ------
    CausalProbeError
        If the loss is not finite or beyond 1e12 times that of predicting zero: the steps diverge.

    Examples
    --------
    >>> from causal_probe.tasks import LinearRegression
    >>> round(expected_loss(LinearRegression(d_x=2, n_examples=4), [0.1]).loss, 3)
    0.078
    """
    gamma = tuple(gamma) if gamma is not None else (0.0,) * len(eta)
    generator = torch.Generator().manual_seed(SEED) if generator is None else generator
    values = _losses(task, _eigenvalues(task, draws, generator), tuple(eta), gamma)
    zero = task.d_out * task.d_x * task.input_variance * task.w_scale**2 / 2
    if not values.mean() < 1e12 * zero:
        raise CausalProbeError(f"Gradient descent with the steps {list(eta)} and gamma {list(gamma)} diverges.")
    error = float(values.std()) / math.sqrt(draws) if draws > 1 else None
    return Descent(tuple(eta), gamma, float(values.mean()), error)


def _eigenvalues(task: LinearRegression, draws: int, generator: torch.Generator) -> Float[Tensor, "draw d_x"]:
    """Eigenvalues of S."""
    x = task.sample_inputs(draws, generator, dtype=torch.float64)[:, :-1].cpu()
    eigenvalues: Tensor = torch.linalg.eigvalsh(x.mT @ x)
    return eigenvalues.clamp(min=0)


def _losses(
    task: LinearRegression, eigenvalues: Float[Tensor, "draw d_x"], eta: Sequence[Any], gamma: Sequence[Any]
) -> Float[Tensor, " draw"]:
    a = r = torch.ones_like(eigenvalues)
    for step, curvature in zip(eta, gamma, strict=True):
        seen = eigenvalues * a**2
        r, a = r * (1 - step * seen), a * (1 - curvature * seen)
    total = task.w_scale**2 * (r**2).sum(-1)
    if task.noise:
        total = total + task.noise**2 * ((1 - r) ** 2 / eigenvalues.clamp(min=1e-300)).sum(-1)  # -> 0 as l -> 0
    return task.d_out * task.input_variance / 2 * total
