"""Which algorithm does a model run on the examples that it sees in context, and after how many layers?

The metrics are those of von Oswald et al. 2022, each a mean over sequences, between a model and an algorithm that both
predict y_q from the examples and x_q:

- **sensitivity cosine**: of d prediction / d x_q of both (all outputs flattened); 1 for equal directions, 0 is chance for unrelated;
- **sensitivity distance**: Euclidean norm of the difference of the two;
- **prediction distance**: Euclidean norm of the difference of the predictions.

A model is read after each of its layers as it is read after the last. Any callable from tokens to predictions will do as a model,
such as :func:`causal_probe.hooks.on_residual_stream` makes from a TransformerLens model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from causal_probe.arguments import Count, checked
from causal_probe.errors import CausalProbeError
from causal_probe.models import LinearTransformer, gradient_steps
from causal_probe.results import BINARY, Result, Table
from causal_probe.tasks import LinearRegression, SineRegression, generator, one_step_optimum, predict_descent
from causal_probe.tasks.least_squares import Descent, fit_descent, least_squares
from causal_probe.tasks.regression import RegressionBatch
from causal_probe.training.minimise import check_shapes

__all__ = [
    "Algorithm",
    "AlgorithmAlignment",
    "DescentAlignment",
    "descent_alignment",
    "feature_descent",
    "interpolate",
    "reference_algorithms",
]

MICRO_BATCH = 2_048


@dataclass(frozen=True, eq=False)
class Algorithm:
    """A predictor to compare a model with.

    Attributes
    ----------
    name
        For tables.
    predict
        From examples x [batch, example, d_x], y [batch, example, d_out] and a query [batch, d_x] to [batch, d_out], differentiable.
    descent
        Its steps, if it is gradient descent on raw x.
    """

    name: str
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]
    descent: Descent | None = None


class AlgorithmAlignment(NamedTuple):
    """One algorithm beside the model, read after one layer; each number with its standard error over sequences.

    ``layer`` counts from 0; ``cosine`` is None where a sensitivity is zero on every sequence.
    """

    layer: int
    algorithm: str
    cosine: float | None
    cosine_error: float | None
    sensitivity_distance: float
    sensitivity_distance_error: float | None
    prediction_distance: float
    prediction_distance_error: float | None
    model_loss: float
    algorithm_loss: float
    excess: float
    excess_error: float | None


@dataclass(frozen=True, eq=False, repr=False)
class DescentAlignment(Result):
    """The result of :func:`descent_alignment`.

    Attributes
    ----------
    algorithms
        Their names, in the order of the arrays' second axis.
    cosine, sensitivity_distance, prediction_distance
        [layer, algorithm, sequence]; a cosine with a zero sensitivity is NaN here, and left out of means.
    model_loss, algorithm_loss
        Half squared errors, [layer, sequence] and [algorithm, sequence].
    """

    KIND = "descent alignment"
    WORKS = ("vonoswald2023",)
    DERIVED = ("means",)

    algorithms: tuple[str, ...]
    cosine: Float[np.ndarray, "layer algorithm sequence"] = field(metadata=BINARY)
    sensitivity_distance: Float[np.ndarray, "layer algorithm sequence"] = field(metadata=BINARY)
    prediction_distance: Float[np.ndarray, "layer algorithm sequence"] = field(metadata=BINARY)
    model_loss: Float[np.ndarray, "layer sequence"] = field(metadata=BINARY)
    algorithm_loss: Float[np.ndarray, "algorithm sequence"] = field(metadata=BINARY)

    def __iter__(self) -> Iterator[AlgorithmAlignment]:
        for layer in range(len(self.model_loss)):
            for index, algorithm in enumerate(self.algorithms):
                excess = self.model_loss[layer] - self.algorithm_loss[index]
                yield AlgorithmAlignment(
                    layer,
                    algorithm,
                    *_mean(self.cosine[layer, index]),
                    *_sure(self.sensitivity_distance[layer, index]),
                    *_sure(self.prediction_distance[layer, index]),
                    float(self.model_loss[layer].mean()),
                    float(self.algorithm_loss[index].mean()),
                    *_sure(excess),
                )

    @property
    def means(self) -> tuple[AlgorithmAlignment, ...]:
        """Means over sequences: one row for each layer and algorithm."""
        return tuple(self)

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no cosine."""
        none = any(row.cosine is None for row in self)
        return {"means.cosine": "a sensitivity is zero on every sequence"} if none else {}

    def __getitem__(self, key: tuple[int, str]) -> AlgorithmAlignment:
        """By layer (negative: from the last) and the algorithm's name."""
        layer, name = key
        layer %= len(self.model_loss)
        found = [line for line in self if (line.layer, line.algorithm) == (layer, name)]
        if not found:
            raise CausalProbeError(f"There is no algorithm {name!r}; there are {', '.join(self.algorithms)}.")
        return found[0]

    def best(self, layer: int = -1) -> AlgorithmAlignment:
        """The algorithm whose predictions are nearest to the model's after a layer."""
        layer %= len(self.model_loss)
        return min((line for line in self if line.layer == layer), key=lambda line: line.prediction_distance)

    def closer(self, one: str, other: str, *, layer: int = -1) -> tuple[float, float | None]:
        """How much nearer the model's predictions are to ``one`` than to ``other``: the mean paired difference, and its error."""
        names = self.algorithms
        if unknown := [name for name in (one, other) if name not in names]:
            raise CausalProbeError(f"There is no algorithm {', '.join(unknown)}; there are {', '.join(names)}.")
        distances = self.prediction_distance[layer]
        return _sure(distances[names.index(other)] - distances[names.index(one)])

    def to_pandas(self) -> pd.DataFrame:
        """One row for each layer and algorithm."""
        return pd.DataFrame(list(self))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The model was compared with {', '.join(self.algorithms)} on {self.settings['n_sequences']} fresh in-context regression tasks by the "
            "cosine and distance of the sensitivities to the query and by the distance of the predictions (von Oswald et al., 2023; "
            f"{self.measured_with})."
        )

    def table(self) -> Table:
        """The means, and the nearest algorithm."""
        shown = (
            "layer",
            "algorithm",
            "cosine",
            "sensitivity_distance",
            "prediction_distance",
            "model_loss",
            "algorithm_loss",
        )
        return Table(
            f"DescentAlignment on {self.settings['task']}, {self.settings['n_sequences']} sequences",
            shown,
            [[getattr(row, name) for name in shown] for row in self],
            (f"nearest after the last layer: {self.best().algorithm}",),
        )  # fmt: skip


@checked
def descent_alignment(
    model: LinearTransformer | Callable[[Tensor], Tensor],
    task: LinearRegression | SineRegression,
    *,
    algorithms: Sequence[Algorithm] | None = None,
    n_sequences: int = 10_000,
    seed: int = 0,
) -> DescentAlignment:
    """Compare a model with algorithms on fresh tasks.

    Parameters
    ----------
    model
        A :class:`~causal_probe.models.LinearTransformer`, which is read after each of its layers; or any differentiable function
        from tokens [batch, pos, d_token] to predictions [batch, d_out], read as it is.
    task
        Where the sequences come from.
    algorithms
        The algorithms to compare with; by default :func:`reference_algorithms` for as many steps as the model has layers (1 for a function).
    n_sequences
        How many, at least 2.
    seed
        Of the sequences.

    Raises
    ------
    CausalProbeError
        If the model does not fit the task, or an argument is out of range.

    Examples
    --------
    >>> from causal_probe import models, tasks
    >>> task = tasks.LinearRegression(d_x=2, n_examples=4)
    >>> found = descent_alignment(models.gradient_steps(2, 4, eta=[0.1]), task, n_sequences=64)
    >>> found.algorithms, found.cosine.shape
    (('GD, 1 step', 'least squares'), (1, 2, 64))
    """
    if n_sequences < 2:
        raise CausalProbeError(f"At least 2 sequences are needed for a standard error, not {n_sequences}.")
    if isinstance(model, LinearTransformer):
        check_shapes(model, task)
        read, dtype, steps = _after_each_layer(model), model.cfg.dtype, len(model.kinds)
    else:
        function = model
        read, dtype, steps = (lambda tokens: [function(tokens)]), torch.float32, 1
    if algorithms is None:
        if not isinstance(task, LinearRegression):
            raise CausalProbeError(
                "The algorithms for a task that is not linear must be given, such as feature_descent(model, task)."
            )
        algorithms = reference_algorithms(task, steps)
    if not algorithms:
        raise CausalProbeError(
            "There is no algorithm to compare with. Name one or more, or give None for all that the task has."
        )
    source = generator(seed, "descent alignment")
    pieces: dict[str, list[NDArray[np.float64]]] = {}
    for start in range(0, n_sequences, MICRO_BATCH):
        batch = task.sample(min(MICRO_BATCH, n_sequences - start), source, dtype=dtype)
        for name, values in _compare(read, algorithms, task, batch).items():
            pieces.setdefault(name, []).append(values)
    joined = {name: np.concatenate(values, -1) for name, values in pieces.items()}
    names = tuple(algorithm.name for algorithm in algorithms)
    settings = {"task": repr(task), "n_sequences": n_sequences, "seed": seed, "algorithms": list(names)}
    about = {"dtype": str(dtype).removeprefix("torch."), "device": "cpu"}
    return DescentAlignment(names, **joined, settings=settings, provenance=about)


@checked
def reference_algorithms(task: LinearRegression, steps: Count = 1, *, shared: bool = False) -> tuple[Algorithm, ...]:
    """GD with 1 to ``steps`` steps, GD++ with 2 to ``steps``, each with the steps that fit the task best, and least squares.

    Parameters
    ----------
    shared
        The steps of one algorithm are all of one size.

    Examples
    --------
    >>> from causal_probe import tasks
    >>> [algorithm.name for algorithm in reference_algorithms(tasks.LinearRegression(d_x=2, n_examples=4))]
    ['GD, 1 step', 'least squares']
    """
    descents = [one_step_optimum(task) if not task.noise else fit_descent(task, 1)]
    for n in range(2, steps + 1):
        descents += [fit_descent(task, n, curvature=curvature, shared=shared) for curvature in (False, True)]
    solve = Algorithm("least squares", lambda x, y, x_query: least_squares(x, y, x_query, minimum_norm=True))
    return (*(algorithm_of(descent, task) for descent in descents), solve)


def algorithm_of(descent: Descent, task: LinearRegression) -> Algorithm:
    """Given steps of descent, as something to compare with."""

    def predict(x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
        return predict_descent(x, y, x_query, eta=descent.eta, gamma=descent.gamma, W0=task.W0)

    return Algorithm(descent.name, predict, descent)


@checked
def feature_descent(
    features: Callable[[Tensor], Tensor] | None,
    task: LinearRegression | SineRegression,
    *,
    name: str,
    n_sequences: int = 20_000,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Algorithm:
    """One step of gradient descent on features of x, from zero, with the step that fits the task best.

    The prediction is linear in the step, so that the best is E[p t] / E[p^2], for p the prediction at step 1 and t the target.

    Parameters
    ----------
    features
        From [..., d_x] to [..., d_features]; None: x itself.
    name
        For tables.
    n_sequences, seed
        The data that the step is fitted on.
    dtype
        Of the inputs that ``features`` takes.
    """
    apply: Callable[[Tensor], Tensor] = (lambda x: x) if features is None else features

    def at(step: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda x, y, x_query: predict_descent(apply(x), y, apply(x_query), eta=[step])

    with torch.no_grad():
        batch = task.sample(n_sequences, generator(seed, "feature descent"), dtype=dtype)
        p = at(1.0)(batch.x, batch.y, batch.x_query)
        step = float((p * batch.target).sum() / p.square().sum())
    return Algorithm(name, at(step), Descent((step,), (0.0,)))


def interpolate(
    model: LinearTransformer, eta: Sequence[float], gamma: Sequence[float] | None = None
) -> LinearTransformer:
    """The model halfway between a trained one and gradient descent: the mean of their products W_Q W_K' and W_V W_O.

    A factor may move from one product to the other, so the trained ones are first rescaled: W_Q W_K' to a mean diagonal of 1 on
    x (the authors' rule).

    Raises
    ------
    CausalProbeError
        If the model has several heads, a softmax, or an MLP, or not one layer for each step.

    Examples
    --------
    >>> from causal_probe import models
    >>> type(interpolate(models.gradient_steps(2, 4, eta=[0.1]), [0.2])).__name__
    'LinearTransformer'
    """
    if len(model.W_Q[0]) != 1 or any(model.kinds) or model.features is not None or len(model.kinds) != len(eta):
        raise CausalProbeError(
            "Interpolated are linear models of one head, without an MLP, with one layer for each step."
        )
    target = gradient_steps(
        model.d_x, model.n_positions - 1, eta=eta, gamma=gamma, d_out=model.d_out, dtype=model.cfg.dtype
    )
    middle = gradient_steps(
        model.d_x, model.n_positions - 1, eta=eta, gamma=gamma, d_out=model.d_out, dtype=model.cfg.dtype
    )
    with torch.no_grad():
        for block, own, other in zip(middle.blocks, model.blocks, target.blocks, strict=True):
            QK = [(of.attn.W_Q @ of.attn.W_K.mH)[0] for of in (own, other)]
            OV = [(of.attn.W_V @ of.attn.W_O)[0] for of in (own, other)]
            scale = QK[0][: model.d_x, : model.d_x].diagonal().mean()
            if not bool(scale.abs() > 0):
                raise CausalProbeError("The trained W_Q W_K' has a mean diagonal of 0 on x, and can't be rescaled.")
            eye = torch.eye(len(QK[0])).to(QK[0])
            for name, value in (
                ("W_Q", (QK[0] / scale + QK[1]) / 2), ("W_K", eye), ("W_V", (OV[0] * scale + OV[1]) / 2), ("W_O", eye),
            ):  # fmt: skip
                getattr(block.attn, name)[0].copy_(value)
    return middle


# ------------------------------------------------------------------------------------------------------------- measuring


def _after_each_layer(model: LinearTransformer) -> Callable[[Tensor], list[Tensor]]:
    def read(tokens: Tensor) -> list[Tensor]:
        stream, answers = model.embed(tokens), []
        for block in model.blocks:
            stream = block(stream)
            answers.append(model.read(stream))
        return answers

    return read


def _compare(
    read: Callable[[Tensor], list[Tensor]],
    algorithms: Sequence[Algorithm],
    task: LinearRegression | SineRegression,
    batch: RegressionBatch,
) -> dict[str, NDArray[np.float64]]:
    def by_model(x_query: Tensor) -> list[Tensor]:
        return read(task.tokens(batch.x, batch.y, x_query))

    found = _with_sensitivities(by_model, batch.x_query)

    def by(algorithm: Algorithm) -> Callable[[Tensor], list[Tensor]]:
        return lambda x_query: [algorithm.predict(batch.x, batch.y, x_query)]

    theirs = [_with_sensitivities(by(algorithm), batch.x_query)[0] for algorithm in algorithms]
    grid = [[(ours, other) for other in theirs] for ours in found]
    measures: dict[str, Callable[[Any, Any], Tensor]] = {
        "cosine": lambda a, b: _cosine(a[1], b[1]),
        "sensitivity_distance": lambda a, b: (a[1] - b[1]).norm(dim=-1),
        "prediction_distance": lambda a, b: (a[0] - b[0]).norm(dim=-1),
    }
    values = {
        name: np.stack([[measure(*pair).double().numpy() for pair in row] for row in grid])
        for name, measure in measures.items()
    }

    def loss(prediction: Tensor) -> NDArray[np.float64]:
        return np.asarray(0.5 * (prediction - batch.target).square().sum(-1).double().numpy())

    values["model_loss"] = np.stack([loss(ours[0]) for ours in found])
    values["algorithm_loss"] = np.stack([loss(other[0]) for other in theirs])
    return values


def _with_sensitivities(
    predict: Callable[[Tensor], list[Tensor]], x_query: Float[Tensor, "batch d_x"]
) -> list[tuple[Tensor, Tensor]]:
    """Predictions [batch, d_out] and their Jacobians in x_query, flattened to [batch, d_out * d_x]."""
    leaf = x_query.detach().clone().requires_grad_()
    with torch.enable_grad():
        predictions = predict(leaf)
        found = []
        for prediction in predictions:
            rows = [
                torch.autograd.grad(column.sum(), leaf, retain_graph=True, allow_unused=True)[0]
                for column in prediction.unbind(-1)
            ]
            jacobian = torch.cat([torch.zeros_like(leaf) if row is None else row for row in rows], -1)
            found.append((prediction.detach(), jacobian))
    return found


def _cosine(a: Float[Tensor, "batch d"], b: Float[Tensor, "batch d"]) -> Float[Tensor, " batch"]:
    cosine: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))  # NaN where one is zero
    return cosine


def _mean(values: NDArray[np.float64]) -> tuple[float | None, float | None]:
    values = values[np.isfinite(values)]
    return (None, None) if not len(values) else _sure(values)


def _sure(values: NDArray[np.float64]) -> tuple[float, float | None]:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error
