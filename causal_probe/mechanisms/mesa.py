"""Is an autoregressively trained linear layer a mesa-optimizer: a step of least squares on the pairs that it has seen?

Of a layer on the process of Zheng et al. 2024, begun at a I and b I in two blocks: does the product ab go where the theory says; do
W_KQ and W_PV keep the predicted form; does it recover W; does the data's law satisfy the moment condition under which it can?
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from causal_probe.arguments import Count, Moderate, Seed, checked
from causal_probe.errors import CausalProbeError
from causal_probe.models import LinearTransformer, mesa_step
from causal_probe.results import UNSAVED, Result, Table
from causal_probe.tasks import AutoregressiveProcess, generator, sample_batches
from causal_probe.tasks.autoregressive import AutoregressiveBatch
from causal_probe.training import minimise
from causal_probe.training.stages import Stage

__all__ = ["MesaOptimizer", "MesaTraining", "mesa_optimizer", "mesa_recovery", "train_mesa"]

MICRO_BATCH = 512
#: Farther than this from the best single gradient step (share of the prediction's root mean square), a layer is not called one.
NOT_VANILLA = 0.05


@dataclass(frozen=True, eq=False, repr=False)
class MesaOptimizer(Result):
    """The result of :func:`mesa_optimizer`; errors are standard errors over sequences.

    Attributes
    ----------
    a, b
        Mean diagonals (real part) of the blocks of W_KQ and W_PV that the theory names.
    limit
        The theory's prediction of ab: exact for normal and sparse starts.
    off_kq, off_pv
        Share of each matrix's Frobenius norm off the predicted form, a multiple of the identity in one block. Of W_PV the rows that
        are read, those of the prediction.
    off_diagonal
        Mean off-diagonal entry (real part) of the named blocks of W_KQ and of W_PV, each over the mean diagonal entry. All are 0
        in the predicted form.
    step_distance, step_distance_error
        Root mean square of the layer's predictions minus those of the best single gradient step, over the root mean square of
        its predictions: 0 if the layer is one step of gradient descent.
    best_step
        That step.
    error, error_error
        Of the recovered W on the coordinates that x_1 has: root mean square Frobenius norm of the difference over that of W.
    prediction_error
        Root mean square of the last prediction minus x_T, over that of x_T.
    loss
        Half squared error, summed over coordinates and averaged over t = 2 .. T-1.
    satisfies_moment_condition
        Whether the start's law lets a layer of the predicted form recover W as sequences grow; at a finite length only sparse starts do.
    """

    KIND = "mesa-optimizer"
    WORKS = ("zheng2024",)
    DERIVED = ("product", "is_gradient_step", "verdict")

    a: float
    b: float
    limit: float
    off_kq: float
    off_pv: float
    off_diagonal: tuple[float, float]
    step_distance: float
    step_distance_error: float
    best_step: float
    error: float
    error_error: float
    prediction_error: float
    loss: float
    satisfies_moment_condition: bool

    @property
    def product(self) -> float:
        """The product ab."""
        return self.a * self.b

    @property
    def is_gradient_step(self) -> bool:
        """Whether the layer's predictions are those of one gradient step, to within 5%, beyond error."""
        return self.step_distance + 2 * self.step_distance_error < NOT_VANILLA

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.is_gradient_step:
            return f"not vanilla gradient descent: its predictions lie {self.step_distance:.1%} from those of the best single step"
        recovers = "and recovers W" if self.error < 0.01 else f"and misses W by {self.error:.1%}"
        return f"one gradient step of size {self.best_step:.4g} on in-context least squares, {recovers}"

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"A linear attention layer was compared with one step of in-context least squares on {self.settings['process']} "
            f"(Zheng et al., 2024; {self.measured_with})."
        )

    def table(self) -> Table:
        """The measurements with their standard errors."""
        return Table(
            f"MesaOptimizer on {self.settings['process']}: {self.verdict}",
            ("quantity", "value", "stderr"),
            (
                ("a", self.a, None),
                ("b", self.b, None),
                ("ab", self.product, None),
                ("predicted limit of ab", self.limit, None),
                ("share of W_KQ off the form", self.off_kq, None),
                ("share of W_PV off the form", self.off_pv, None),
                ("best single step", self.best_step, None),
                ("distance to the best single step", self.step_distance, self.step_distance_error),
                ("error of the recovered W", self.error, self.error_error),
                ("error of the last prediction", self.prediction_error, None),
                ("loss", self.loss, None),
            ),
            (
                f"moment condition, for sequences without end: {'satisfied' if self.satisfies_moment_condition else 'violated'}",
            ),
        )


@dataclass(frozen=True, eq=False, repr=False)
class MesaTraining(Result):
    """A trained layer, and a and b on the way.

    Attributes
    ----------
    step, a, b
        At some steps of training, the last among them.
    model
        The layer. It is in no file.
    """

    KIND = "mesa training"
    WORKS = ("zheng2024",)
    DERIVED = ("product",)

    step: tuple[int, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    model: LinearTransformer = field(default=cast(Any, None), metadata=UNSAVED)

    @property
    def product(self) -> tuple[float, ...]:
        """The product ab at each step."""
        return tuple(a * b for a, b in zip(self.a, self.b, strict=True))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"A linear attention layer was trained by gradient descent on fresh sequences of {self.settings['process']}, from a multiple of the identity in "
            f"each of two blocks (Zheng et al., 2024; {self.measured_with})."
        )

    def table(self) -> Table:
        """a, b and ab on the way."""
        return Table(
            f"MesaTraining on {self.settings['process']}, {self.step[-1]:,} steps of {self.settings['batch_size']:,} sequences",
            ("step", "a", "b", "ab"),
            list(zip(self.step, self.a, self.b, self.product, strict=True)),
        )


@checked
def train_mesa(
    process: AutoregressiveProcess,
    *,
    a: float = 0.1,
    b: float = 0.1,
    steps: int = 400,
    batch_size: int = 512,
    rate: float = 0.15,
    seed: int = 0,
    progress: bool = False,
) -> MesaTraining:
    """Train the whole of W_KQ and W_PV by gradient descent on fresh sequences, from a I and b I in their blocks.

    Parameters
    ----------
    rate
        The learning rate in units of 1 / k1, k1 the fourth moment of the start's entries: the curvature at the limit is 2 k1. It stays for
        half of the steps, then falls to zero.

    Raises
    ------
    CausalProbeError
        If the process is in real form, or training diverges.

    Examples
    --------
    >>> from causal_probe import tasks
    >>> train_mesa(tasks.AutoregressiveProcess(2, 8, start="sparse"), steps=2, batch_size=8).step[-1]
    2
    """
    if process.real:
        raise CausalProbeError(
            "The process is in real form, and the layer is trained in complex form. Leave real=True out."
        )
    model = mesa_step(process.d_x, process.n_positions, a=a, b=b)
    source = generator(seed, "mesa training")
    k1 = process.moments[0]
    seen: list[tuple[int, float, float]] = []

    def loss(n: int) -> Tensor:
        batch = process.sample(n, source)
        return _squares(model(batch.tokens), batch)[:, 1:].mean()

    def watch(step: int) -> None:
        if step % 10 == 0 or step == steps:
            seen.append((step, *_ab(model, process)))

    stages = [
        Stage("constant rate", steps // 2, batch_size, "sgd", rate / k1, moves=("all",)),
        Stage("falling rate", steps - steps // 2, batch_size, "sgd", rate / k1, moves=("all",), schedule="cosine"),
    ]
    minimise(model, loss, stages, callback=watch, progress=progress)
    step, at_a, at_b = zip(*seen, strict=True)
    settings = {
        "process": repr(process),
        "a": a,
        "b": b,
        "steps": steps,
        "batch_size": batch_size,
        "rate": rate,
        "seed": seed,
    }
    return MesaTraining(step, at_a, at_b, model, settings=settings, provenance=_place(model))


@checked
@torch.no_grad()
def mesa_optimizer(
    model: LinearTransformer, process: AutoregressiveProcess, *, n_sequences: int = 4_096, seed: int = 0
) -> MesaOptimizer:
    """Compare a layer with the mesa-optimizer of the theory.

    Parameters
    ----------
    model
        One complex linear layer of one head, as :func:`causal_probe.models.mesa_step` builds it, whose weights may be anything.
    process
        In complex form.
    n_sequences
        How many fresh sequences, at least 2.
    seed
        Of the sequences.

    Raises
    ------
    CausalProbeError
        If the model is another one or does not fit the process.

    Examples
    --------
    >>> from causal_probe import models, tasks
    >>> process = tasks.AutoregressiveProcess(2, 8, start="sparse")
    >>> mesa_optimizer(models.mesa_step(2, 8, a=process.limit), process, n_sequences=64).is_gradient_step
    True
    """
    if n_sequences < 2:
        raise CausalProbeError(f"At least 2 sequences are needed for a standard error, not {n_sequences}.")
    d = process.d_x
    fits = model.d_token == 2 * d and model.n_positions >= process.n_positions and model.mask == "causal"
    if process.real or not fits or len(model.kinds) != 1 or len(model.W_Q[0]) != 1 or not model.cfg.dtype.is_complex:
        raise CausalProbeError(
            f"A mesa-optimizer on {process} is one complex linear layer of one head on causal tokens of width {2 * d}, with at least "
            f"{process.n_positions} positions; the model is {model.extra_repr()}, of {model.n_positions} positions."
        )
    a, b = _ab(model, process)
    KQ, PV = _matrices(model, d)
    source = generator(seed, "mesa probing")
    sums: list[Tensor] = []
    for batch in sample_batches(process, n_sequences, source, batch_size=MICRO_BATCH):
        output = model(batch.tokens)[..., :d]
        step = mesa_step(d, process.n_positions)(batch.tokens)[..., :d]  # the prediction of a step of size 1
        x, W = batch.x, torch.diag_embed(batch.eigenvalues)
        active = (x[:, 0].abs() > 0).to(W.dtype)
        tokens = batch.tokens
        G = tokens.mT @ tokens.conj() / max(1, process.n_positions - 1)
        found = PV @ G @ KQ[:, :d]  # what the layer applies to x_t after the last pair
        sums.append(
            torch.stack(
                [
                    *_inner(output[:, 1:], step[:, 1:]),
                    ((found - W) * active[:, None]).abs().square().sum((-2, -1)),
                    (W * active[:, None]).abs().square().sum((-2, -1)),
                    (output[:, -1] - batch.target[:, -1]).abs().square().sum(-1),
                    batch.target[:, -1].abs().square().sum(-1),
                    _squares(model(batch.tokens), batch)[:, 1:].mean(-1),
                ]
            ).double()
        )
    own, both, steps_, missed, whole, last, size, loss = torch.cat(sums, 1).numpy()
    best = float(both.mean() / steps_.mean())
    distance, distance_error = _ratio(own - 2 * best * both + best**2 * steps_, own)
    error, error_error = _ratio(missed, whole)
    return MesaOptimizer(
        a=a,
        b=b,
        limit=process.limit,
        off_kq=_off(KQ, torch.eye(d).to(KQ), slice(d, None), slice(0, d)),
        off_pv=_off(PV, torch.eye(d).to(PV), slice(0, d), slice(0, d)),
        off_diagonal=(_off_diagonal(KQ[d:, :d]), _off_diagonal(PV[:, :d])),
        step_distance=distance,
        step_distance_error=distance_error,
        best_step=best,
        error=error,
        error_error=error_error,
        prediction_error=math.sqrt(float(last.mean() / size.mean())),
        loss=float(loss.mean()),
        satisfies_moment_condition=process.satisfies_moment_condition,
        settings={"process": repr(process), "n_sequences": n_sequences, "seed": seed},
        provenance=_place(model),
    )


@checked
@torch.no_grad()
def mesa_recovery(
    process: AutoregressiveProcess, *, product: Moderate | None = None, n_sequences: Count = 2_048, seed: Seed = 0
) -> tuple[float, float]:
    """The error of the W that the diagonal layer recovers from whole sequences, and its standard error.

    The same quantity as :attr:`MesaOptimizer.error`, at any length without running the layer: in the predicted form the estimate is
    ab / (T - 2) sum_{j=1}^{T-2} x_{j+1} x_j^*.

    Parameters
    ----------
    product
        ab; by default the limit.

    Examples
    --------
    >>> from causal_probe import tasks
    >>> error, stderr = mesa_recovery(tasks.AutoregressiveProcess(2, 8, start="sparse"), n_sequences=16)
    >>> round(error, 3)
    0.0
    """
    product = process.limit if product is None else product
    source, d, parts = generator(seed, "mesa recovery"), process.d_x, []
    size = max(1, min(n_sequences, 2**22 // (process.length * d)))
    for x_batch in sample_batches(process, n_sequences, source, batch_size=size):
        x, W = x_batch.x, torch.diag_embed(x_batch.eigenvalues)
        found = product * x[:, 1:-1].mT @ x[:, :-2].conj() / (process.length - 2)
        active = (x[:, 0].abs() > 0).to(W.dtype)[:, None]
        parts.append(torch.stack([((m * active).abs() ** 2).sum((-2, -1)) for m in (found - W, W)]).double())
    missed, whole = torch.cat(parts, 1).numpy()
    return _ratio(missed, whole)


def _matrices(model: LinearTransformer, d: int) -> tuple[Complex[Tensor, "token token"], Complex[Tensor, "d token"]]:
    """The paper's W_KQ and W_PV: yhat = W_PV G W_KQ e for columns e."""
    attention = model.blocks[0].attn
    KQ = (attention.W_Q[0] @ attention.W_K[0].mH).mT
    PV = (attention.W_V[0] @ attention.W_O[0]).mT[:d]
    return KQ.detach(), PV.detach()


def _place(model: LinearTransformer) -> dict[str, str]:
    return {"dtype": str(model.cfg.dtype).removeprefix("torch."), "device": str(model.W_Q[0].device)}


def _ab(model: LinearTransformer, process: AutoregressiveProcess) -> tuple[float, float]:
    d = process.d_x
    KQ, PV = _matrices(model, d)
    return float(KQ[d:, :d].diagonal().mean().real), float(PV[:, :d].diagonal().mean().real)


def _off(matrix: Tensor, eye: Tensor, rows: slice, columns: slice) -> float:
    form = torch.zeros_like(matrix)
    form[rows, columns] = eye * matrix[rows, columns].diagonal().mean()
    norm = float(matrix.norm())
    return float((matrix - form).norm()) / norm if norm else 0.0


def _off_diagonal(block: Complex[Tensor, "d d"]) -> float:
    d = len(block)
    if d == 1:
        return 0.0
    off = (block.sum() - block.diagonal().sum()).real / (d * (d - 1))
    return float(off / block.diagonal().mean().real)


def _squares(output: Tensor, batch: AutoregressiveBatch) -> Float[Tensor, "batch pos"]:
    return 0.5 * (output[..., : batch.target.shape[-1]] - batch.target).abs().square().sum(-1)


def _inner(output: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|output|^2, Re<output, step>, |step|^2 of each sequence."""
    pairs = ((output, output), (output, step), (step, step))
    own, both, steps = ((p * q.conj()).real.sum((-2, -1)) for p, q in pairs)
    return own, both, steps


def _ratio(part: np.ndarray[Any, np.dtype[Any]], whole: np.ndarray[Any, np.dtype[Any]]) -> tuple[float, float]:
    """The square root of a ratio of means, and its standard error by the delta method."""
    ratio = max(0.0, float(part.mean() / whole.mean()))
    spread = float((part - ratio * whole).std(ddof=1)) / (float(whole.mean()) * math.sqrt(len(part)))
    root = math.sqrt(ratio)
    return root, min(spread / (2 * root), math.sqrt(spread)) if root > 0 else math.sqrt(spread)
