"""Phases of a training: at each moment, of which reference predictors are the model's predictions a mixture?

A model q(. | x) of next tokens is compared with known predictors p_k(. | x), such as retrieval or inference from unigrams or bigrams (Park et al., ICLR 2025), a single
lag, or exact model averaging. At each moment of a training the weights w on the simplex are those of the least divergence

    D(w) = mean over sequences and rows of KL(q || sum_k w_k p_k),    in nats per token,

which is convex in w. D at its least is the *residual*: what no mixture of the references explains. Weights alone don't say that the model is such a mixture; a small
residual does. Of references that predict alike the weights are not determined, and their standard errors are large.

The minimum is certified: with g_k = mean of sum_s q(s) p_k(s) / sum_j w_j p_j(s), D(w) exceeds the least value by at most max_k g_k - 1 (the Frank-Wolfe gap). Weights
are taken from scipy's SLSQP, then moved by EM (w_k <- w_k g_k) until that is below a tolerance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.mechanisms.dynamics import Dynamics, dynamics
from causal_probe.results import Result, Table
from causal_probe.tasks.graph_mixture import LabelledBatch, NextTokens
from causal_probe.viz.curves import Curve, curves

__all__ = ["Phases", "WatchPhases", "fit_mixture"]

#: Nats by which the divergence may exceed the least one, and the steps of EM that are taken for it at most.
GAP, STEPS = 1e-5, 2_000
#: Mixed into each reference, as a share of even probability, so that no divergence is infinite.
EVEN = 1e-6
#: Groups of sequences, each left out once, for the weights' standard errors.
GROUPS = 8


def fit_mixture(
    predictions: Float[np.ndarray, "case state"],
    references: Float[np.ndarray, "reference _case _state"],
    *,
    start: Float[np.ndarray, " _start"] | None = None,
) -> tuple[Float[np.ndarray, " reference"], Float[np.ndarray, " case"]]:
    """The convex mixture of reference predictors of the least mean KL(predictions || mixture).

    Parameters
    ----------
    predictions
        The model's probabilities in each case; each row sums to 1.
    references
        The same of each reference. A millionth of even probability is mixed in.
    start
        Weights to begin with.

    Returns
    -------
    tuple
        The weights, which sum to 1, and the divergence of each case in nats. The mean divergence exceeds the least one by at most 1e-5.

    Raises
    ------
    CausalProbeError
        If the shapes don't fit together, or something is no probability or no weight.

    Examples
    --------
    >>> coin, sure = np.full((2, 2), 0.5), np.eye(2)
    >>> weights, divergence = fit_mixture(0.3 * sure + 0.7 * coin, np.stack([coin, sure]))
    >>> weights.round(3).tolist(), bool(divergence.mean() < 1e-6)
    ([0.7, 0.3], True)
    """
    q, p = np.asarray(predictions, float), np.asarray(references, float)
    if q.ndim != 2 or p.ndim != 3 or p.shape[1:] != q.shape or not p.size:
        raise CausalProbeError(
            f"Predictions are [case, state], references [reference, case, state]; found {list(q.shape)} and {list(p.shape)}."
        )
    for name, its in (("predictions", q), ("references", p)):
        if not (its >= 0).all() or not np.allclose(its.sum(-1), 1, atol=1e-4):
            raise CausalProbeError(f"The {name} are not all probabilities that sum to 1 over the states.")
    if start is not None and (len(start) != len(p) or not (np.isfinite(start) & (start >= 0)).all()):
        raise CausalProbeError(
            f"`start` must be {len(p)} weights that are finite and not negative; found {np.asarray(start).tolist()}."
        )
    p = (1 - EVEN) * p + EVEN / p.shape[-1]
    n, flat, mass = len(q), p.reshape(len(p), -1), q.ravel()

    def gains(w: Float[np.ndarray, " reference"]) -> Float[np.ndarray, " reference"]:
        found: Float[np.ndarray, " reference"] = flat @ (mass / (w @ flat)) / n
        return found

    def cross_entropy(w: Float[np.ndarray, " reference"]) -> tuple[float, Float[np.ndarray, " reference"]]:
        w = np.maximum(w, 0)  # SLSQP may step a rounding error out of bounds
        return float(-(mass * np.log(w @ flat + 1e-300)).sum() / n), -gains(w + 1e-300)

    w = np.full(len(p), 1 / len(p)) if start is None else (start + 1e-3) / (start + 1e-3).sum()
    if len(p) > 1:
        sums_to_one = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(len(w))}
        found = minimize(cross_entropy, w, jac=True, method="SLSQP", bounds=[(0, 1)] * len(p), constraints=sums_to_one, options={"ftol": 1e-10})  # fmt: skip
        if np.isfinite(found.x).all() and cross_entropy(found.x)[0] <= cross_entropy(w)[0]:
            w = found.x.clip(0)
            w = (w + 1e-9) / (w + 1e-9).sum()  # EM can't leave a zero
    for _ in range(STEPS):
        g = gains(w)
        if g.max() - 1 <= GAP:
            break
        w = w * g
        w = w / w.sum()
    mixed = np.tensordot(w, p, 1)
    return w, (q * (np.log(np.maximum(q, 1e-300)) - np.log(mixed))).sum(-1)


class WatchPhases:
    """Fits a model's predictions along a training run: a callback ``(step, model)``, as :func:`causal_probe.training.fit` takes it.

    Parameters
    ----------
    references
        By name, the probabilities that a known predictor gives in each case, [sequence, row, state].
    predict
        From a model to its own probabilities in the same cases.

    Raises
    ------
    CausalProbeError
        If there are fewer than two references, they differ in shape, or there are fewer sequences than sixteen.

    Examples
    --------
    >>> from causal_probe import models, tasks
    >>> task = tasks.MarkovMixture(2, n_positions=12, d_vocab=3)
    >>> watch = WatchPhases.of_task(task, task.sample(32, tasks.generator(0, "phases")))
    >>> for step in range(4):
    ...     watch(step, models.DisentangledTransformer(3, 12))  # untrained: even odds
    >>> watch.phases().leading
    (('uniform', 0, 3),)
    """

    def __init__(
        self, references: Mapping[str, Float[Tensor, "sequence row state"]], predict: Callable[[Any], Tensor]
    ) -> None:
        shapes = {tuple(its.shape) for its in references.values()}
        if len(references) < 2 or len(shapes) != 1 or len(shape := next(iter(shapes))) != 3 or shape[0] < 2 * GROUPS:
            raise CausalProbeError(
                f"A mixture is of two references or more, [sequence, row, state] alike, of {2 * GROUPS} sequences at least; found {len(references)} "
                f"of the shapes {', '.join(map(str, sorted(shapes))) or 'none'}."
            )
        self.names, self.predict = tuple(references), predict
        self.references = torch.stack([*references.values()]).double().cpu().numpy()
        self._steps: list[int] = []
        self._found: list[tuple[np.ndarray, ...]] = []

    @classmethod
    def of_task(
        cls, task: Any, batch: LabelledBatch, *, names: Sequence[str] | None = None, first: int = 1
    ) -> WatchPhases:
        """Watch the predictions of next tokens by a model with logits [batch, pos, state].

        Parameters
        ----------
        task
            A :class:`~causal_probe.tasks.GraphMixture` or :class:`~causal_probe.tasks.MarkovMixture`, or another with ``references()``.
        batch
            Sequences of the task, on which the model was not trained.
        names
            Which of the task's references; all by default.
        first
            The first token whose prediction counts.

        Raises
        ------
        CausalProbeError
            If a name is none of the task's references, or ``first`` is out of range.
        """
        there: Mapping[str, NextTokens] = task.references()
        if unknown := [name for name in names or () if name not in there]:
            raise CausalProbeError(f"There is no reference {unknown[0]!r}. References: {', '.join(there)}.")
        if not 1 <= first < batch.tokens.shape[1]:
            raise CausalProbeError(
                f"`first` is {first!r}. It must be a whole number from 1 to {batch.tokens.shape[1] - 1}."
            )

        def predict(model: Any) -> Tensor:
            found: Tensor = model(batch.tokens)[:, first - 1 : -1].double().softmax(-1)
            return found

        return cls({name: there[name](batch)[:, first:] for name in names or there}, predict)

    @torch.no_grad()
    def __call__(self, step: int, model: Any) -> None:
        """Fit the model after ``step`` steps, which are more at every call."""
        if self._steps and step <= self._steps[-1]:
            raise CausalProbeError(
                f"Step {step} was to be watched after step {self._steps[-1]}. Watch each training with a WatchPhases of its own."
            )
        q = self.predict(model).double().cpu().numpy()
        n, states = len(q), q.shape[-1]
        if q.shape != self.references.shape[1:]:
            raise CausalProbeError(
                f"The model predicts [sequence, row, state] of {list(q.shape)}, the references of {list(self.references.shape[1:])}."
            )

        def fitted(chosen: np.ndarray, start: Any = None) -> tuple[np.ndarray, np.ndarray]:
            return fit_mixture(q[chosen].reshape(-1, states), self.references[:, chosen].reshape(len(self.names), -1, states), start=start)  # fmt: skip

        every = np.arange(n)
        weights, divergence = fitted(every, self._found[-1][0] if self._found else None)
        left_out = np.stack([fitted(every[every % GROUPS != group], weights)[0] for group in range(GROUPS)])
        errors = np.sqrt((GROUPS - 1) / GROUPS * ((left_out - left_out.mean(0)) ** 2).sum(0))
        by_sequence = divergence.reshape(n, -1).mean(1)
        alone = [
            float((q * (np.log(np.maximum(q, 1e-300)) - np.log((1 - EVEN) * p + EVEN / states))).sum(-1).mean())
            for p in self.references
        ]
        self._steps.append(int(step))
        self._found.append((weights, errors, np.array([by_sequence.mean(), by_sequence.std(ddof=1) / math.sqrt(n)]), np.array(alone)))  # fmt: skip

    def phases(self) -> Phases:
        """The weights and the residual over the moments that were watched.

        Raises
        ------
        CausalProbeError
            If there were fewer than four.
        """
        if len(self._steps) < 4:
            raise CausalProbeError(f"Phases need four moments or more; {len(self._steps)} were watched.")
        weights, errors, residual, alone = (np.stack(each) for each in zip(*self._found, strict=True))
        return Phases(
            steps=tuple(self._steps),
            names=self.names,
            weights=weights,
            stderr=errors,
            residual=residual[:, 0],
            residual_stderr=residual[:, 1],
            divergence=alone,
            settings={"n_sequences": self.references.shape[1], "rows": self.references.shape[2]},
            provenance={"model": "a training run"},
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Phases(Result):
    """At each moment of a training, the convex mixture of reference predictors that is closest to the model.

    Attributes
    ----------
    steps
        Number of training steps made at each moment.
    names
        The references.
    weights, stderr
        [moment, reference]: the weights, each in [0, 1] with the sum 1, and their standard errors over sequences (jackknife of eight groups).
    residual, residual_stderr
        [moment]: KL(model || mixture) in nats per token, 0 if the model is such a mixture, and its standard error over sequences.
    divergence
        [moment, reference]: KL(model || this reference alone), nats per token; at most ``log(states / 1e-6)``.
    """

    KIND = "phases"
    WORKS = ("park2025",)
    DERIVED = ("leading",)

    steps: tuple[int, ...]
    names: tuple[str, ...]
    weights: Float[np.ndarray, "moment reference"]
    stderr: Float[np.ndarray, "moment reference"]
    residual: Float[np.ndarray, " moment"]
    residual_stderr: Float[np.ndarray, " moment"]
    divergence: Float[np.ndarray, "moment reference"]

    @property
    def leading(self) -> tuple[tuple[str, int, int], ...]:
        """The phases: stretches of moments in which one reference has the largest weight: its name, the first and the last step."""
        found: list[tuple[str, int, int]] = []
        for step, best in zip(self.steps, self.weights.argmax(1), strict=True):
            if found and found[-1][0] == self.names[best]:
                found[-1] = (found[-1][0], found[-1][1], step)
            else:
                found.append((self.names[best], step, step))
        return tuple(found)

    @property
    def nearest(self) -> tuple[str, ...]:
        """At each moment the one reference of the least divergence."""
        return tuple(self.names[best] for best in self.divergence.argmin(1))

    def dynamics(self) -> Dynamics:
        """The change-point of each weight and of the residual. A weight that rises and falls has two changes, of which this is the larger."""
        return dynamics(self.steps, {**dict(zip(self.names, self.weights.T, strict=True)), "residual": self.residual})

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"At {len(self.steps)} moments of a training run the model's predictions on {self.settings['n_sequences']} sequences were fitted by the convex mixture of "
            f"{len(self.names)} reference predictors ({', '.join(self.names)}) of the least KL(model || mixture), with jackknife standard errors over sequences "
            f"({self.measured_with})."
        )

    def table(self) -> Table:
        """One row per phase: the reference that leads, its weight at the end of the phase, and the residual there."""
        rows = []
        for name, first, last in self.leading:
            at, column = self.steps.index(last), self.names.index(name)
            rows.append((name, first, last, *(float(each[at, column]) for each in (self.weights, self.stderr)), float(self.residual[at]), float(self.residual_stderr[at])))  # fmt: skip
        return Table(
            f"Phases of a training: {len(self.names)} reference predictors at {len(self.steps)} moments",
            ("leads", "from step", "to step", "weight", "stderr", "residual", "residual_stderr"),
            rows,
            ("weight and residual (KL in nats per token) at the last step of the phase",),
        )

    def figure(self, *, title: str | None = None) -> Figure:
        """The five largest weights over the steps, and the residual beside them."""
        most = sorted(range(len(self.names)), key=lambda i: -self.weights[:, i].max())[:5]
        weights = {
            self.names[i]: Curve(self.steps, self.weights[:, i], self.stderr[:, i].tolist()) for i in sorted(most)
        }
        residual = {"residual": Curve(self.steps, self.residual, self.residual_stderr.tolist())}
        return curves({"weights of the mixture": weights, "what no mixture explains": residual}, x_name="training step", y_name=["weight", "KL, nats per token"], title=title)  # fmt: skip
