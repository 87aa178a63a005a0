"""Learning, watched: when is each edge found, when does each head take its final form, in which order?

A probe along a training run gives a series of measurements at checkpoints: for each true edge the attention on the parent, for a head
its score, the loss. Each is described by one **change-point**: the split of the series into two parts of constant mean with the
smallest sum of squares (the least-squares, or Gaussian maximum-likelihood, estimate for one change in mean; Hinkley, Biometrika 57,
1970). It is the first checkpoint at which the series is nearer to its last value than to its first.

The interval holds every split whose sum of squares is not much larger than the smallest: S(k) <= S(best) (1 + c / (n - 2)), with
c = -2 log(1 - sqrt(0.95)) = 7.35 the quantile of the likelihood ratio of a split, whose law is (1 - exp(-c / 2))^2 where the change is
small beside the noise (Hansen, Econometrica 68, 2000, section 3); where it is large the interval is conservative. A learning
curve is no step with independent noise: a gradual change gives a wide interval, and that is what it is for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import head_graphs
from causal_probe.results import Result, Table
from causal_probe.tasks import InContextMarkov
from causal_probe.tasks.predictors import matching
from causal_probe.viz.curves import Curve, curves
from causal_probe.viz.palette import MUTED

__all__ = ["ChangePoint", "Dynamics", "Watch", "change_point"]

#: So many series have names and colours in a picture.
NAMED = 5


@dataclasses.dataclass(frozen=True)
class ChangePoint:
    """One change in the mean of a series.

    Attributes
    ----------
    step
        The first checkpoint after the change.
    low, high
        The interval: the first and the last checkpoint at which the part after the change may begin.
    before, after
        Means of the two parts.
    explained
        Share of the series' sum of squares that the split takes away, in [0, 1]. A straight line has about 0.75.
    """

    step: int
    low: int
    high: int
    before: float
    after: float
    explained: float


def change_point(steps: Sequence[int], values: Sequence[float], *, coverage: float = 0.95) -> ChangePoint | None:
    """The one change in mean of a series, and its interval (see the module's docstring); None if all values are equal.

    Raises
    ------
    CausalProbeError
        If there are fewer than four values, the lengths differ, steps don't ascend, or a value is not finite.

    Examples
    --------
    >>> change_point([0, 10, 20, 30, 40, 50], [0.0, 0.1, 0.0, 0.9, 1.0, 0.9])
    ChangePoint(step=30, low=30, high=30, before=0.0333..., after=0.9333..., explained=0.98...)
    """
    series = np.asarray(values, dtype=np.float64)
    n = len(series)
    if n < 4 or n != len(steps) or (np.diff(steps) <= 0).any() or not np.isfinite(series).all():
        raise CausalProbeError(
            f"A change-point needs four finite values or more at ascending steps; there are {n} values at {len(steps)} steps."
        )
    if np.ptp(series) == 0:
        return None
    splits = range(1, n)
    squares = np.array([_squares(series[:k]) + _squares(series[k:]) for k in splits])
    best = int(squares.argmin())
    limit = squares[best] * (1 - 2 * np.log(1 - np.sqrt(coverage)) / (n - 2))
    near = np.flatnonzero(squares <= limit * (1 + 1e-12))
    return ChangePoint(
        step=int(steps[splits[best]]),
        low=int(steps[splits[int(near[0])]]),
        high=int(steps[splits[int(near[-1])]]),
        before=float(series[: splits[best]].mean()),
        after=float(series[splits[best] :].mean()),
        explained=float(1 - squares[best] / _squares(series)),
    )


def _squares(part: Float[np.ndarray, " _n"]) -> float:
    return float(((part - part.mean()) ** 2).sum())


@checked
class Watch:
    """Measures a model along a training run: a probe for :func:`causal_probe.training.fit`.

    At each call it records, on the same tokens: the layer-0 attention of each true edge (mean over sequences, in the head where it is
    largest at the end), the mean over edges (``"layer 0: parents"``), and the share of layer 1's last row on nodes whose parents
    match (``"layer 1: matches"``; chance is the share of such nodes).

    Parameters
    ----------
    task
        Whose graph is the truth.
    tokens
        Sequences [batch, pos] of the task.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, models, tasks, training
    >>> task = tasks.InContextMarkov(graphs.chain(5), d_vocab=3)
    >>> watch = Watch(task, task.sample(128, torch.Generator().manual_seed(0)).tokens)
    >>> model = models.DisentangledTransformer(3, 6)
    >>> _ = training.give_matcher(model)
    >>> stages = training.staged(n_positions=6, graph_batch_size=256, steps=20, batch_size=64)
    >>> generator = torch.Generator().manual_seed(0)
    >>> _ = training.fit(model, task, stages, generator=generator, probe=watch, probe_every=2)
    >>> found = watch.dynamics()
    >>> found.changes["layer 0: parents"].step < 20
    True
    """

    def __init__(self, task: InContextMarkov, tokens: Tensor) -> None:
        self.task = task
        self.tokens = tokens
        self.edges = [(parent, child) for parent, child in sorted(task.graph.edges) if child in task.children]
        if not self.edges:
            raise CausalProbeError("There is no edge to be watched: every node of the task's graph is a root.")
        # Which nodes the known-graph predictor counts: all their parents carry the states of the predicted node's own.
        nodes, matches, _ = matching(task, tokens, range(task.n_slots))
        self._match = torch.zeros_like(tokens, dtype=torch.bool)
        self._match[:, list(nodes)] = matches
        self._steps: list[int] = []
        self._attention: list[Float[np.ndarray, "head edge"]] = []
        self._matching: list[float] = []

    def __call__(self, step: int, model: DisentangledTransformer) -> None:
        """Measure the model after ``step`` steps."""
        heads = head_graphs(model, self.tokens)
        parents, children = np.array(self.edges).T
        patterns: list[Tensor] = []

        def keep(pattern: Tensor, hook: Any) -> None:
            patterns.append(pattern[:, :, -1].detach())

        model.run_with_hooks(self.tokens, fwd_hooks=[(f"blocks.{len(model.heads) - 1}.attn.hook_pattern", keep)])
        self._steps.append(step)
        self._attention.append(heads.values[0][:, children, parents])
        self._matching.append(float((patterns[0] * self._match[:, None]).sum(-1).mean(0).max()))

    def dynamics(self) -> Dynamics:
        """The series and their change-points.

        Raises
        ------
        CausalProbeError
            If there were fewer than four calls.
        """
        attention = np.stack(self._attention)  # [time, head, edge]
        head = attention[-1].argmax(0)
        chosen = attention[:, head, np.arange(len(self.edges))]
        series = {"layer 0: parents": chosen.mean(1), "layer 1: matches": np.array(self._matching)}
        series |= {f"edge {parent} -> {child}": chosen[:, i] for i, (parent, child) in enumerate(self.edges)}
        return dynamics(self._steps, series)


def dynamics(steps: Sequence[int], series: Mapping[str, Sequence[float] | Float[np.ndarray, " time"]]) -> Dynamics:
    """The change-point of each of several series over the same steps (see :func:`change_point`)."""
    values = {name: np.asarray(its, dtype=np.float64) for name, its in series.items()}
    return Dynamics(
        steps=tuple(steps),
        series=values,
        changes={name: change_point(steps, its.tolist()) for name, its in values.items()},
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dynamics(Result):
    """Series along a training run, and the change-point of each.

    Attributes
    ----------
    steps
        Number of training steps made at each measurement.
    series
        By name, one value per measurement.
    changes
        By name: a :class:`ChangePoint`, or None for a series that never moves.
    """

    KIND = "dynamics"
    WORKS = ("nichani2024",)
    DERIVED = ("order",)

    steps: tuple[int, ...]
    series: Mapping[str, Float[np.ndarray, " time"]]
    changes: Mapping[str, ChangePoint | None]

    @property
    def order(self) -> tuple[str, ...]:
        """The series that change, the earliest first."""
        found = [(change.step, name) for name, change in self.changes.items() if change is not None]
        return tuple(name for _, name in sorted(found, key=lambda pair: pair[0]))

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no change-point."""
        return {f"changes.{name}": "all values are equal" for name, change in self.changes.items() if change is None}

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Series measured at {len(self.steps)} checkpoints of a training run were each described by one change in mean, by least squares, "
            "with the 95% likelihood-ratio interval of the split (Hinkley, 1970; Hansen, 2000; independent errors assumed; "
            f"{self.measured_with})."
        )

    def table(self) -> Table:
        """One row per series, the earliest change first; those that never change come last, without numbers."""
        names = tuple(field.name for field in dataclasses.fields(ChangePoint))
        nothing = (None,) * len(names)
        still = [name for name, change in self.changes.items() if change is None]
        rows = [
            (name, *(nothing if (change := self.changes[name]) is None else dataclasses.astuple(change)))
            for name in (*self.order, *still)
        ]
        title = f"Change-points of {len(self.series)} series at {len(self.steps)} checkpoints"
        return Table(title, ("series", *names), rows)

    def figure(self, *, title: str | None = None, value: str = "mean attention") -> Figure:
        """The series over the training steps: those that change most, with their change-points, and the others in grey.

        Of a watched training, edges are among the others. ``value`` is what the series are, for the axis.
        """

        def change(name: str) -> float:
            found = self.changes[name]
            return 0 if found is None else abs(found.after - found.before)

        plain = [name for name in self.series if not name.startswith("edge ")] or list(self.series)
        most = sorted(plain, key=change, reverse=True)[:NAMED]
        named = {name: Curve(self.steps, self.series[name]) for name in plain if name in most}
        figure = curves({"": named}, x_name="training step", y_name=value, title=title)
        axes = figure.axes[0]
        for name, its in self.series.items():
            found = self.changes[name]
            if name not in named:
                axes.plot(self.steps, its, color=MUTED, linewidth=0.7, alpha=0.5, zorder=1)
            elif found is not None:
                axes.axvspan(found.low, found.high, color=MUTED, alpha=0.2, linewidth=0, gid="interval")
                axes.axvline(found.step, color=MUTED, linestyle="dashed", linewidth=1.0, gid="change")
        return figure
