r"""The step of gradient descent that the weights of linear self-attention imply, and how far they are from implying one.

In token coordinates, d_x entries of x and then d_out of y, a head is the pair QK = W_Q W_K' and OV = W_V W_O, and layer by
layer all that linear attention does is the sum over heads of QK (x) OV. One step of gradient descent (von Oswald et al. 2022)
is the form

    QK ~ [[I, 0], [0, 0]]        OV ~ [[-gamma I, 0], [eta W0', -eta I]]

up to a factor that may move from one to the other (gamma is the curvature correction of GD++; 0 for plain descent). Implied are

    eta            = - sum_heads  (mean diagonal of QK's x-x block) (mean diagonal of OV's y-y block)
    gamma          = - sum_heads  (mean diagonal of QK's x-x block) (mean diagonal of OV's x-x block)
    preconditioner = - sum_heads  (QK's x-x block) (mean diagonal of OV's y-y block) / eta          the identity for plain descent

and the distance to the form is what is left of the weights' Frobenius norm, as a share of it, when their projection onto the form
is taken away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import Count, checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.results import Result, Table

__all__ = ["ImpliedStep", "ImpliedSteps", "implied_step"]


@dataclass(frozen=True, eq=False)
class ImpliedStep:
    """The step that one layer's weights imply; shares are of the Frobenius norm, in [0, 1], and None for weights that are zero.

    Attributes
    ----------
    layer
        Counted from 0.
    eta
        Step size on the sum of squares: eta / N in the paper's terms.
    gamma
        Curvature correction. In the last layer nothing reads it.
    preconditioner
        [d_x, d_x]; None if ``eta`` is 0.
    off_qk, off_ov
        For every head, the share of QK and of OV off the form.
    off_ov_read
        The same of those columns of OV that something reads: in the last layer y's alone. Training never moves the others.
    off_form
        The share of the whole layer, the sum over heads of QK (x) OV, off the form; in the last layer of what is read.
    """

    layer: int
    eta: float
    gamma: float
    preconditioner: Float[Tensor, "d_x d_x"] | None
    off_qk: tuple[float | None, ...]
    off_ov: tuple[float | None, ...]
    off_ov_read: tuple[float | None, ...]
    off_form: float | None


@dataclass(frozen=True, eq=False, repr=False)
class ImpliedSteps(Result):
    """The implied step of every layer.

    Attributes
    ----------
    layers
        One for each layer, from the first.
    """

    KIND = "implied steps"
    WORKS = ("vonoswald2023",)
    DERIVED = ("eta", "gamma")

    layers: tuple[ImpliedStep, ...]

    @property
    def eta(self) -> tuple[float, ...]:
        """Of every layer."""
        return tuple(layer.eta for layer in self.layers)

    @property
    def gamma(self) -> tuple[float, ...]:
        """Of every layer."""
        return tuple(layer.gamma for layer in self.layers)

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            "The gradient step that a linear attention layer's weights imply was read from W_Q W_K' and W_V W_O as their projection onto "
            "the construction of von Oswald et al. (2023)."
        )

    def table(self) -> Table:
        """One row for each layer; of the heads the largest share."""
        shares = ("off_qk", "off_ov", "off_ov_read")
        return Table(
            f"ImpliedSteps of {self.provenance['model']}: {len(self.layers)} layer(s)",
            ("layer", "eta", "gamma", *shares, "off_form"),
            [
                (
                    layer.layer,
                    layer.eta,
                    layer.gamma,
                    *(
                        max((share for share in getattr(layer, name) if share is not None), default=None)
                        for name in shares
                    ),
                    layer.off_form,
                )
                for layer in self.layers
            ],
        )


@checked
def implied_step(
    model: Any,
    *,
    d_x: Count | None = None,
    d_out: Count | None = None,
    W0: Float[Tensor, "d_out d_x"] | None = None,
    read_in: Float[Tensor, "d_token d_model"] | None = None,
) -> ImpliedSteps:
    """The step of gradient descent that each layer's weights imply. No data is needed.

    Parameters
    ----------
    model
        Anything with TransformerLens' ``W_Q``, ``W_K``, ``W_V`` [layer, head, d_model, d_head] and ``W_O``. Biases, norms and a softmax
        are not looked at; with a softmax the form is that of its linear term.
    d_x, d_out
        How many of a token's entries are x and y. By default the model's own attributes.
    W0
        The start of descent that belongs to the form; zero if None.
    read_in
        Rows: where each entry of a token lies in the residual stream, orthonormal. By default the first d_x + d_out entries.

    Raises
    ------
    CausalProbeError
        If the model has no such weights, or sizes don't go together.

    References
    ----------
    von Oswald et al., "Transformers Learn In-Context by Gradient Descent", ICML 2023 (arXiv 2212.07677).

    Examples
    --------
    >>> from causal_probe.models import gradient_steps
    >>> [step] = implied_step(gradient_steps(3, 5, eta=[0.5])).layers
    >>> round(step.eta, 3), round(step.off_form, 3)
    (0.5, 0.0)
    """
    weights: dict[str, Any] = {name: getattr(model, name, None) for name in ("W_Q", "W_K", "W_V", "W_O")}
    if missing := [name for name, value in weights.items() if not isinstance(value, Tensor) or value.ndim != 4]:
        raise CausalProbeError(
            f"A {type(model).__name__} has no weights {', '.join(missing)} [layer, head, ., .], from which a step could be read."
        )
    d_x = getattr(model, "d_x", None) if d_x is None else d_x
    d_out = getattr(model, "d_out", None) if d_out is None else d_out
    if not d_x or not d_out:
        raise CausalProbeError("Say how many of a token's entries are x and y: d_x and d_out, each at least 1.")
    if strange := [name for name, its in weights.items() if not its.isfinite().all()]:
        raise CausalProbeError(
            f"The weights {', '.join(strange)} hold NaN or infinities, and no step follows from them."
        )
    d_model = weights["W_Q"].shape[2]
    if d_x + d_out > d_model:
        raise CausalProbeError(f"Tokens of {d_x} + {d_out} entries don't fit into a stream of width {d_model}.")
    E = torch.eye(d_x + d_out, d_model).to(weights["W_Q"]) if read_in is None else read_in.to(weights["W_Q"])
    if E.shape != (d_x + d_out, d_model):
        raise CausalProbeError(
            f"Tokens of {d_x} + {d_out} entries in a stream of width {d_model} need a read_in of shape {[d_x + d_out, d_model]}; its "
            f"is {list(E.shape)}."
        )
    if W0 is not None and W0.shape != (d_out, d_x):
        raise CausalProbeError(f"W0 must be [d_out, d_x], {[d_out, d_x]}; its shape is {list(W0.shape)}.")
    n_layers = len(weights["W_Q"])
    with torch.no_grad():
        QK = (E @ weights["W_Q"] @ weights["W_K"].mH @ E.mT).to(torch.promote_types(E.dtype, torch.float64))
        OV = (E @ weights["W_V"] @ weights["W_O"] @ E.mT).to(QK.dtype)
        layers = tuple(
            _step(layer, QK[layer], OV[layer], d_x, None if W0 is None else W0.to(QK), last=layer == n_layers - 1)
            for layer in range(n_layers)
        )
    named = describe(model) if isinstance(model, HookedModel) else {"model": type(model).__name__}
    return ImpliedSteps(layers, provenance=named)


def _step(layer: int, QK: Tensor, OV: Tensor, d_x: int, W0: Tensor | None, *, last: bool) -> ImpliedStep:
    d_out = QK.shape[-1] - d_x
    x, y = slice(0, d_x), slice(d_x, None)
    alpha = QK[:, x, x].diagonal(dim1=-2, dim2=-1).mean(-1).real  # [head]
    in_y = _form_y(OV[0], d_x, W0)
    square = float((in_y.abs() ** 2).sum())
    beta = -(OV * in_y.conj()).sum((-2, -1)).real / square
    kappa = -OV[:, x, x].diagonal(dim1=-2, dim2=-1).mean(-1).real
    eta, gamma = float((alpha * beta).sum()), float((alpha * kappa).sum())
    in_qk = torch.zeros_like(QK[0])
    in_qk[x, x] = torch.eye(d_x).to(QK)
    in_x = torch.zeros_like(OV[0])
    in_x[x, x] = torch.eye(d_x).to(OV)
    left_qk = QK - alpha[:, None, None] * in_qk
    left_ov = OV + beta[:, None, None] * in_y + kappa[:, None, None] * in_x
    read = torch.ones(d_x + d_out, dtype=torch.bool)
    read[x] = not last
    # <QK_g (x) OV_g, QK_h (x) OV_h> = <QK_g, QK_h> <OV_g, OV_h>: no tensor of fourth order is ever built.
    inner = torch.einsum("gij,hij->gh", QK, QK.conj()) * torch.einsum(
        "gij,hij->gh", OV[..., read], OV[..., read].conj()
    )
    whole = float(inner.sum().real)
    in_form = d_x * (eta**2 * square + (0.0 if last else gamma**2 * d_x))
    weighted = -(QK[:, x, x] * OV[:, y, y].diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]).sum(0)
    return ImpliedStep(
        layer,
        eta,
        gamma,
        (weighted / eta).real.clone() if eta else None,
        _shares(left_qk, QK),
        _shares(left_ov, OV),
        _shares(left_ov[..., read], OV[..., read]),
        math.sqrt(max(0.0, 1 - in_form / whole)) if whole > 0 else None,
    )


def _form_y(like: Tensor, d_x: int, W0: Tensor | None) -> Tensor:
    """The effect of OV on y per unit of -eta: the identity from y, and -W0' from x."""
    form = torch.zeros_like(like)
    form[d_x:, d_x:] = torch.eye(len(like) - d_x).to(like)
    if W0 is not None:
        form[:d_x, d_x:] = -W0.mT
    return form


def _shares(left: Tensor, whole: Tensor) -> tuple[float | None, ...]:
    pairs = zip(left.flatten(1).norm(dim=1).tolist(), whole.flatten(1).norm(dim=1).tolist(), strict=True)
    return tuple(rest / norm if norm else None for rest, norm in pairs)
