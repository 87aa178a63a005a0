"""The result of recovering a known graph, with its settings and evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx

from causal_probe import graphs
from causal_probe.graphs import GraphComparison
from causal_probe.graphs.check import parent_lists
from causal_probe.models import DisentangledTransformer, save
from causal_probe.options.base import GIVEN
from causal_probe.options.recover import RecoverOptions, TaskOptions
from causal_probe.probes.edge_tests import EdgeEffects
from causal_probe.probes.evidence import Evidence
from causal_probe.probes.match import HeadMatch
from causal_probe.results import BINARY, UNSAVED, Result, Table, write_arrays
from causal_probe.tasks import Task
from causal_probe.training.loop import History

__all__ = ["CHECKPOINT_FILE", "Recovery", "call_of_graph", "edges_right", "write_recovered"]

#: The files that an interrupted run leaves in its folder.
CHECKPOINT_FILE = "training.checkpoint.safetensors"
#: What an edge is tested against besides, where sequences can be redrawn and where they can't.
RIVALS = {
    True: ", and with that routing the loss is lower for the child's token than for one drawn as a root's or along any other candidate edge",
    False: ", and routing it to any other earlier node does not lower it as much",
}


@dataclass(frozen=True, eq=False, repr=False)
class Recovery(Result):
    """The result of :func:`~causal_probe.experiments.recover`, and all that it was found with.

    Attributes
    ----------
    truth, recovered
        The true graph, and the confirmed edges with their evidence as edge attributes; edges parent -> child.
    comparison
        :func:`causal_probe.graphs.compare` of the two over the children 0..T-2; AUROC and average precision are on the
        statistic that decided each tested edge (:meth:`causal_probe.probes.EdgeEffects.weights`; 0, which is chance, for a pair
        that no head proposed).
    mean_parent_attention
        Mean, over the true non-root children, of the sequence-averaged layer-0 pattern from child to parent, in the head
        that is matched to the parent's slot; in [0, 1]. None without a true edge.
    argmax_parent_accuracy
        Share of the true (child, parent) pairs in which the parent has the largest mean attention in the child's past, in
        the matched head. None without a true edge.
    steps_to_all_parents
        How many training steps were made when all those argmaxes were right for the first time; None if they never were when they were
        looked at: after each of the first 64 steps of staged training and every 16 of the first 1,024 of joint training, then at
        intervals of at most a 64th of the steps made.
    loss, reference_losses
        Cross-entropy in nats of the trained model and of the exact predictors, on the same fresh sequences.
    head_graphs, effects, match
        Layer 0's mean attention; the edge effects, one per head; the assignment of heads to parent slots.
    last_row
        Several parents only: what row T - 1 of each head attends to (as a key it stands for node T - 1, as a query for T).
    history
        The loss of every training step.
    given
        The weights that were set before training.
    timings
        Seconds; of a run that went on from a checkpoint, those since then.
    model, task
        The trained model and its task. Files of results don't hold them; the model is in ``model/`` of the folder.
    """

    KIND = "recovery"
    WORKS = ("nichani2024",)
    DERIVED = ("exact", "undecided")
    RESULT: ClassVar[str] = "result.json"
    UNFINISHED: ClassVar[str] = CHECKPOINT_FILE

    truth: nx.DiGraph
    recovered: nx.DiGraph
    comparison: GraphComparison
    mean_parent_attention: float | None
    argmax_parent_accuracy: float | None
    steps_to_all_parents: int | None
    loss: float
    reference_losses: Mapping[str, float]
    head_graphs: Evidence = field(metadata=BINARY)
    effects: tuple[EdgeEffects, ...]
    match: HeadMatch | None
    last_row: tuple[Mapping[str, Any], ...] | None
    history: History
    given: tuple[str, ...]
    timings: Mapping[str, float]
    model: DisentangledTransformer | None = field(default=None, metadata=UNSAVED)
    task: Task | None = field(default=None, metadata=UNSAVED)

    @property
    def exact(self) -> bool:
        """Whether every edge and every root is right."""
        return self.comparison.exact

    @property
    def undecided(self) -> tuple[int, ...]:
        """The nodes for which no parent was confirmed, though some candidate gains at the level: not shown to be roots."""
        gaining = {child for effects in self.effects for _, child in effects.gaining}
        return tuple(sorted(child for child in gaining if not self.recovered.in_degree(child)))

    @property
    def undefined(self) -> dict[str, str]:
        """Reasons for values that are None, those of the comparison included."""
        lacking = () if self.mean_parent_attention is not None else ("mean_parent_attention", "argmax_parent_accuracy")
        return {**self.comparison.undefined, **dict.fromkeys(lacking, "there is no true edge")}

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        own = self.settings["own_task"]
        if own is None:
            return call_of_graph("recover", RecoverOptions, self.settings, self.truth)
        law = dict.fromkeys(("n_positions", "d_vocab", "concentration"))
        call = RecoverOptions.call("recover", {**self.settings, **law}, graph="task")
        return call.replace("experiments.recover(", f"# task: {own}\nexperiments.recover(")

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        s = self.settings
        # In a tree only the comparison is given; where nodes have several parents, training may begin with a graph that gradients show.
        begun = f"before training: {'; '.join(self.given)}; " if self.last_row is not None and self.given else ""
        return (
            f"A disentangled transformer (Nichani et al., 2024; heads per layer {list(s['heads'])}) was trained "
            f"({s['training']}, {self.history.n_sequences} sequences) on the {s['task']}; "
            f"{begun}candidate parents are the largest mean attention weights of layer 0, and an edge is confirmed when routing the "
            "child's attention wholly to the candidate lowers the loss below that of uniform attention over its past"
            f"{RIVALS[bool(s['redraws'])]} (paired one-sided tests over "
            f"{s['probe_sequences']} sequences, family-wise level {s['level']:g}; seed {s['seed']}; {self.measured_with})."
        )

    def table(self) -> Table:
        """The comparison with the true graph, and the losses."""
        found = self.comparison
        redundant = sum(int(effects.redundant.sum()) for effects in self.effects)
        roots = sum(not self.truth.in_degree(node) for node in found.children)
        steps = self.steps_to_all_parents
        return Table(
            f"Recovery of {self.settings['graph']}: {'exact' if self.exact else f'SHD {found.shd}'}",
            ("what", "value"),
            [
                *edges_right(found),
                ("roots without a confirmed parent", f"{round((found.root_accuracy or 0) * roots)} of {roots}"),
                (
                    "undecided nodes (a candidate gains, none is confirmed)",
                    ", ".join(map(str, self.undecided)) or "none",
                ),
                *[("edges confirmed that are redundant alone", str(redundant))] * (redundant > 0),
                ("mean attention on true parent", _show(self.mean_parent_attention)),
                ("true parents that lead", _show(self.argmax_parent_accuracy)),
                ("steps until all of them led", "never" if steps is None else str(steps)),
                ("loss (nats)", f"{self.loss:.4f}"),
                *((f"  {name}", f"{loss:.4f}") for name, loss in self.reference_losses.items()),
                ("training sequences", f"{self.history.n_sequences:,}"),
                ("given before training", "; ".join(self.given) or "nothing"),
            ],
        )

    def write_data(self, folder: Path) -> None:
        """Write ``graph.json`` (the truth) and ``recovered.json``, both node-link, ``attention.safetensors`` (layer 0's mean attention
        and its standard error) and ``model/`` beside the JSON.
        """
        arrays = {"layer0.mean": self.head_graphs.values[0]}
        if self.head_graphs.stderr is not None:
            arrays["layer0.stderr"] = self.head_graphs.stderr[0]
        write_recovered(folder, self.truth, self.recovered, self.model, arrays)


def _show(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


# ------------------------------------------------------------------------------------- what every recovered graph is told by


def call_of_graph(function: str, options: type[TaskOptions], settings: Mapping[str, Any], truth: nx.DiGraph) -> str:
    """The Python of a study of a known graph; one that was given is written out."""
    given = f"graphs.from_parents({[list(parents) for parents in parent_lists(truth)]})"
    return options.call(function, settings, **({"graph": given} if settings["graph"] == GIVEN else {}))


def edges_right(found: GraphComparison) -> list[tuple[str, str]]:
    """Two rows of a table: how many true edges were found, and how many were not."""
    true = found.true_positives + len(found.missing) + len(found.reversed)
    wrong = f"{len(found.missing)}, {len(found.extra)}, {len(found.reversed)}"
    return [("edges right", f"{found.true_positives} of {true}"), ("edges missing, extra, reversed", wrong)]


def write_recovered(
    folder: Path, truth: nx.DiGraph | None, recovered: nx.DiGraph, model: DisentangledTransformer | None, arrays: Any
) -> None:
    """Write ``graph.json`` (where the truth is known), ``recovered.json``, ``attention.safetensors`` and ``model/``, where there is one."""
    if truth is not None:
        graphs.write_graph(truth, folder / "graph.json")
    graphs.write_graph(recovered, folder / "recovered.json")
    if model is not None:
        save(model, folder / "model")
    write_arrays(folder / "attention.safetensors", arrays)
