"""The picture of a result: what ``result.plot()`` draws. Each kind registers one function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from causal_probe import viz
from causal_probe.circuits import Circuit
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.compared_evidence import EvidenceTable
from causal_probe.experiments.discover_in_text import TextDiscovery
from causal_probe.experiments.gradient_recovery import GradientRecovery
from causal_probe.experiments.judged_methods import JudgedMethods
from causal_probe.experiments.leaderboard import Leaderboard
from causal_probe.experiments.model_scan import ModelScan
from causal_probe.experiments.recovery import Recovery
from causal_probe.experiments.show_called import show_called
from causal_probe.mechanisms.dynamics import Dynamics
from causal_probe.mechanisms.phases import Phases
from causal_probe.papers.base import Reproduction
from causal_probe.probes.discovered_graphs import Discovery
from causal_probe.probes.evidence import Evidence
from causal_probe.probes.graph_selectivity import GraphSelectivity
from causal_probe.probes.head_scores import HeadScores
from causal_probe.probes.qk_attributions import QKAttributions
from causal_probe.probes.upstream_heads import Upstream
from causal_probe.probes.verification import Verification
from causal_probe.viz.over_text import over_text
from causal_probe.viz.widget import Widget

__all__ = ["plot"]


@functools.singledispatch
def plot(result: Any, *what: Any, **options: Any) -> Any:
    """The picture of a result: :meth:`causal_probe.results.Result.plot`, which says what each kind takes.

    Raises
    ------
    CausalProbeError
        If results of this kind have no picture, or none of this name.

    Examples
    --------
    >>> from causal_probe import models, probes
    >>> scores = probes.scan(models.DisentangledTransformer(d_vocab=12, n_positions=24), templates="induction", n_sequences=4)
    >>> scores.plot("induction").axes[0].get_ylabel()
    'layer'
    """
    kinds = sorted(kind.__name__ for kind in plot.registry if kind is not object)
    raise CausalProbeError(
        f"There is no picture of a {type(result).__name__}. There are pictures of {', '.join(kinds)}."
    )


def _one_of(what: str | None, known: Sequence[str]) -> str:
    """The picture's name, by default the first."""
    if what is None and known:
        return known[0]
    if what is None or what not in known:
        raise CausalProbeError(f"There is no picture {what!r} here; there is {', '.join(known) or 'none'}.")
    return what


@plot.register
def _(
    result: HeadScores, template: str | None = None, *, value: str = "excess", model: Any = None, **options: Any
) -> Figure | Widget:
    if model is not None:
        return show_called(result, model, template=template, **options)
    names = [name for name in result.names if name not in result.undefined] or result.names
    maps = {
        name: [layer.tolist() for layer in result.heatmap(name, value=value)]
        for name in ([template] if template else names)
    }
    return viz.heads(maps, **{"score_name": value, "limit": 1.0 if value in ("excess", "score") else None, **options})


@plot.register
def _(result: ModelScan, template: str | None = None, **options: Any) -> Any:
    return plot(result.scores, template, **options)


def _effects(result: Verification) -> list[list[float | None]]:
    """By layer, the rise of the loss when each head alone is ablated by its mean; None for one that was not ablated."""
    effects = {**result.unflagged, **{found[:2]: found.effect.value for found in result.verdicts}}
    counts: dict[int, int] = dict(result.settings.get("heads", ()))
    for layer, head in [] if counts else effects:  # a result of an earlier version: all heads were ablated
        counts[layer] = max(counts.get(layer, 0), head + 1)
    return [[effects.get((layer, head)) for head in range(counts.get(layer, 0))] for layer in range(1 + max(counts))]


@plot.register
def _(result: Verification, what: str | None = None, **options: Any) -> Figure:
    if not result.verdicts:
        raise CausalProbeError("No head was flagged, so none was ablated: there is nothing to draw.")
    if _one_of(what, ("effects", "dependence")) == "dependence":
        return viz.graph(result.dependence, **options)
    return viz.heads(_effects(result), **{"score_name": "rise of the loss (nats)", **options})


@plot.register
def _(result: Upstream, **options: Any) -> Figure:
    return viz.graph(result.graph, **{"title": f"What makes {result.head} attend: {result.edges}", **options})


@plot.register
def _(result: Circuit, **options: Any) -> Figure:
    if not result.members:
        raise CausalProbeError("No edge was confirmed, so there is no circuit to draw.")
    if result.text:
        effects = [(edge.source, edge.receiver, edge.effect) for edge in result.edges]
        members = [each for each in effects if each[:2] in set(result.members)]
        right = result.settings.get("prompts_right")
        title = f"What carries the {result.metric}" + (f" of {right[0]!r}" if right else "")
        return over_text(result.text, members, result.attention, **{"title": title, **options})
    return viz.graph(
        result.by_component, **{"title": f"What carries the {result.metric} ({result.contrast})", **options}
    )


@plot.register
def _(result: QKAttributions, k: int = 12, **options: Any) -> Figure:
    about = {"value_name": "contribution to the score", "row_name": "in the query", "column_name": "in the key"}
    title = f"L{result.layer}H{result.head}: {result.edges}"
    return viz.table_map(result.heatmap(k), **{**about, "title": title, **options})


@plot.register
def _(result: Evidence, layer: Any = None, head: Any = None, *, truth: Any = None, claim: Any = None, **options: Any) -> Figure:  # fmt: skip
    if layer is not None:
        nodes = None if truth is None else [node for node in truth if node < result.n_positions]
        found = result.graph(layer, head, claim=claim, nodes=nodes)
        return viz.graph(*([found] if truth is None else [truth, found]), **options)
    named = {f"L{at}H{each}": values[each] for at, values in result.values.items() for each in range(values.shape[-3])}
    if result.labels or len(named) > 16:
        raise CausalProbeError(
            f"At most 16 heads of one group are drawn at once; here are {len(named)} in {len(result.labels) or 1}. Name one, such as plot('L0H1')."
        )
    return viz.blocks(named, **{"value_name": result.quantity.name, **options})


@plot.register
def _(result: Discovery, head: int | str | None = None, **options: Any) -> Figure:
    found = result.graphs[0] if head is None else result.of(head)
    return viz.mixed(found.graph, result.nodes, **{"title": found.name, **options})


@plot.register
def _(result: TextDiscovery, head: int | str | None = None, **options: Any) -> Any:
    return plot(result.discovery, head, **options)


@plot.register
def _(result: Recovery, what: str | None = None, **options: Any) -> Figure:
    if _one_of(what, ("graph", *["training"] * bool(result.history.step))) == "training":
        steps = result.history
        history = {"step": steps.step, "loss": steps.loss, "stage": steps.stage}
        return viz.training(history, result.reference_losses, **options)
    asked = range(result.comparison.children[-1] + 1)
    return viz.graph(*(graph.subgraph(asked) for graph in (result.truth, result.recovered)), **options)


@plot.register
def _(result: GradientRecovery, **options: Any) -> Figure:
    graphs = [result.recovered] if result.truth is None else [result.truth, result.recovered]
    return viz.graph(*graphs, **options)


@plot.register
def _(result: Leaderboard, value: str = "excess", **options: Any) -> Figure:
    return viz.table_map(result.by_graph(value), **{"value_name": value, **options})


@plot.register
def _(result: EvidenceTable, **options: Any) -> Figure:
    return viz.table_map(result.by_graph(), **{"value_name": "F1 of the skeleton", "limit": 1.0, **options})


@plot.register
def _(result: JudgedMethods, what: str | None = None, **options: Any) -> Figure:
    name = _one_of(what, ["circuits", "edges"])
    return viz.table_map(
        result.grid(name),
        **{"value_name": "AUROC", "row_name": "method", "column_name": name, "limit": 1.0, **options},
    )


@plot.register
def _(result: Phases, **options: Any) -> Figure:
    return result.figure(**options)


@plot.register
def _(result: Dynamics, **options: Any) -> Figure:
    return result.figure(**options)


@plot.register
def _(result: GraphSelectivity, layer: Any = None, head: Any = None, **options: Any) -> Figure:
    followed, named = result.of(layer, head), {}
    if len(result.names) > 5:
        raise CausalProbeError(
            f"At most five graphs are drawn side by side; here are {len(result.names)}. Ask for fewer graphs, with the sequences of these."
        )
    mean = np.average(followed, axis=0, weights=result.counts)
    for name, its in [*zip(result.names, followed, strict=True), ("all", mean)]:
        heading = "all sequences" if name == "all" else f"sequences of {name}"
        named[heading] = {
            f"parent in {other}": viz.Curve(result.rows, row) for other, row in zip(result.names, its, strict=True)
        }
    return viz.curves(named, **{"x_name": "row", "y_name": "mean attention", **options})


@plot.register
def _(result: Reproduction, name: str | None = None) -> Figure:
    return result.figures[_one_of(name, [*result.figures])]
