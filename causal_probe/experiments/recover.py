"""Recover a known causal graph, end to end: sample the task, train the model, probe it, compare with the truth."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.saving import kept
from causal_probe.first_gradient.start import give_gradient_graph
from causal_probe.graphs import GraphComparison, choose_graph
from causal_probe.graphs.check import parent_lists
from causal_probe.models import DisentangledTransformer, choose_device, save
from causal_probe.options import RecoverOptions, takes
from causal_probe.options.base import GIVEN
from causal_probe.probes import EdgeEffects, Evidence, HeadMatch, edge_effects, head_graphs, match_heads
from causal_probe.results import (
    Citation,
    cite,
    escape,
    to_jsonable,
    versions,
    write_arrays,
)
from causal_probe.tasks import Batch, InContextMarkov, Task, generator, join_batches, reference_losses, sample_batches
from causal_probe.tasks.task import check_task
from causal_probe.training import evaluate, fit, give_matcher, joint, staged, task_loss
from causal_probe.training.checkpoint import Checkpoint
from causal_probe.training.loop import History
from causal_probe.training.slots import staged_slots
from causal_probe.training.stages import Stage

__all__ = ["CHECKPOINT_FILE", "Recovery", "recover", "tested_edges"]

#: Sequences whose mean attention names the candidate parents, and those on which the candidates are then tested.
ATTENTION_SEQUENCES = 4096
PROBE_SEQUENCES = 2**15
EVALUATION_SEQUENCES = 2**15
#: While training, the mean attention of so many sequences is looked at every so many steps, and after so many looks at ever wider
#: intervals: a look costs several steps, and where some parent never leads all of a long run would be looked at.
WATCHING_SEQUENCES = 1024
WATCH_EVERY: Mapping[str, int] = {"staged": 1, "joint": 16}
WATCH_CLOSELY = 64
#: Sequences per forward pass when watching.
MICRO_BATCH = 1024
#: What an interrupted run leaves in its folder, and how many steps it can lose.
CHECKPOINT_FILE = "training.checkpoint.safetensors"
CHECKPOINT_EVERY = 50
#: What can be chosen about the training; what is left out is the training's own default.
OPTIONS = ("optimizer", "learning_rate", "steps", "batch_size")
#: Family-wise level at which an edge is confirmed.
LEVEL = 1e-3


@dataclasses.dataclass(frozen=True, repr=False)
class Recovery:
    """What :func:`recover` found, and all that it was found with.

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
    timings
        Seconds; of a run that went on from a checkpoint, those since then.
    threads
        CPU threads that the training ran with: sums differ in the last digits between one number and another.
    """

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
    head_graphs: Evidence
    effects: tuple[EdgeEffects, ...]
    match: HeadMatch | None
    last_row: tuple[Mapping[str, Any], ...] | None
    model: DisentangledTransformer
    task: Task
    history: History
    given: tuple[str, ...]
    settings: Mapping[str, Any]
    timings: Mapping[str, float]
    threads: int

    @property
    def exact(self) -> bool:
        """Whether every edge and every root is right."""
        return self.comparison.exact

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        if not isinstance(self.task, InContextMarkov):
            law = dict.fromkeys(("n_positions", "d_vocab", "concentration"))
            call = RecoverOptions.call("recover", {**self.settings, **law}, graph="task")
            return call.replace("experiments.recover(", f"# task: {self.task!r}\nexperiments.recover(")
        given = f"graphs.from_parents({[list(parents) for parents in parent_lists(self.truth)]})"
        shown = {"graph": given} if self.settings["graph"] == GIVEN else {}
        return RecoverOptions.call("recover", self.settings, **shown)

    @property
    def metrics(self) -> dict[str, Any]:
        """All numbers of the comparison by name; None where undefined, with the reason under ``undefined``."""
        found = self.comparison
        undefined = dict(found.undefined)
        if self.mean_parent_attention is None:
            undefined |= dict.fromkeys(("mean_parent_attention", "argmax_parent_accuracy"), "there is no true edge")
        return {
            "precision": found.precision,
            "recall": found.recall,
            "f1": found.f1,
            "shd": found.shd,
            "missing": found.missing,
            "extra": found.extra,
            "reversed": found.reversed,
            "parent_accuracy": found.parent_accuracy,
            "root_accuracy": found.root_accuracy,
            "mean_parent_attention": self.mean_parent_attention,
            "argmax_parent_accuracy": self.argmax_parent_accuracy,
            "auroc": found.auroc,
            "average_precision": found.average_precision,
            "undefined": undefined,
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of ``result.json``, in plain JSON types."""
        return dict(
            to_jsonable(
                {
                    "kind": "recovery",
                    "format": 1,
                    "exact": self.exact,
                    "truth": {"nodes": len(self.truth), "edges": list(self.truth.edges)},
                    "recovered": {
                        "nodes": len(self.recovered),
                        "edges": list(self.recovered.edges),
                        "evidence": [effects.to_dict() for effects in self.effects],
                    },
                    "metrics": self.metrics,
                    "loss": self.loss,
                    "reference_losses": self.reference_losses,
                    "seconds": self.timings["total"],
                    "timings": self.timings,
                    "threads": self.threads,
                    "sequences": self.history.n_sequences,
                    "probe_sequences": self.settings["probe_sequences"],
                    "steps": len(self.history.step),
                    "steps_to_all_parents": self.steps_to_all_parents,
                    "given": self.given,
                    "heads": self.match.to_dict() if self.match is not None else None,
                    "last_row": self.last_row,
                    "history": {"step": self.history.step, "stage": self.history.stage, "loss": self.history.loss},
                    "settings": self.settings,
                    "versions": versions(),
                }
            )
        )

    def write_data(self, folder: Path) -> None:
        """Write ``graph.json`` (the truth) and ``recovered.json``, both node-link, ``attention.safetensors`` (layer 0's mean attention
        and its standard error) and ``model/`` beside the JSON.
        """
        arrays = {"layer0.mean": self.head_graphs.values[0]}
        if self.head_graphs.stderr is not None:
            arrays["layer0.stderr"] = self.head_graphs.stderr[0]
        graphs.write_graph(self.truth, folder / "graph.json")
        graphs.write_graph(self.recovered, folder / "recovered.json")
        save(self.model, folder / "model")
        write_arrays(folder / "attention.safetensors", arrays)

    def cite(self) -> Citation:
        """The papers behind this result, and one sentence for a methods section."""
        s = self.settings
        # In a tree only the comparison is given; where nodes have several parents, training may begin with a graph that gradients show.
        begun = "" if self.task.is_tree or not self.given else f"before training: {'; '.join(self.given)}; "
        methods = (
            f"A disentangled transformer (Nichani et al., 2024; heads per layer {list(self.model.heads)}) was trained "
            f"({s['training']}, {self.history.n_sequences} sequences) on the {self.task.description}; "
            f"{begun}candidate parents are the largest mean attention weights of layer 1, and an edge is confirmed when routing the "
            "child's attention wholly to the candidate lowers the loss below that of uniform attention over its past"
            f"{', by more than with the child redrawn as a root' if self.task.redraw_as_root else ''} (paired one-sided tests over "
            f"{s['probe_sequences']} sequences, family-wise level {s['level']:g}); causal-probe "
            f"{versions().get('causal-probe', '')}, seed {s['seed']}."
        )
        return cite("nichani2024", methods=methods)

    def __repr__(self) -> str:
        return "\n".join([self._title(), *(f"  {name:<31} {value}" for name, value in self._rows())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
            for name, value in self._rows()
        )
        return f"<table><caption>{escape(self._title())}</caption><tbody>{rows}</tbody></table>"

    def _title(self) -> str:
        return f"Recovery of {self.settings['graph']}: {'exact' if self.exact else f'SHD {self.comparison.shd}'}"

    def _rows(self) -> list[tuple[str, str]]:
        found = self.comparison
        true_edges = sum(self.truth.in_degree(node) for node in found.children)
        roots = sum(not self.truth.in_degree(node) for node in found.children)
        return [
            ("edges right", f"{found.true_positives} of {true_edges}"),
            ("edges missing, extra, reversed", f"{len(found.missing)}, {len(found.extra)}, {len(found.reversed)}"),
            ("roots right", f"{round((found.root_accuracy or 0) * roots)} of {roots}"),
            ("mean attention on true parent", _show(self.mean_parent_attention)),
            ("true parents that lead", _show(self.argmax_parent_accuracy)),
            (
                "steps until all of them led",
                "never" if self.steps_to_all_parents is None else str(self.steps_to_all_parents),
            ),
            ("loss (nats)", f"{self.loss:.4f}"),
            *((f"  {name}", f"{loss:.4f}") for name, loss in self.reference_losses.items()),
            ("training sequences", f"{self.history.n_sequences:,}"),
            ("given before training", "; ".join(self.given) or "nothing"),
        ]


def _show(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


@takes(RecoverOptions)
def recover(o: RecoverOptions) -> Recovery:
    """Train a disentangled transformer on a task of known graph, read the graph out of it, and compare.

    Staged training is :func:`causal_probe.training.staged`; joint training starts from zero with nothing given. While the model trains, a
    checkpoint is kept in the folder ``out``: after an interruption, a kill included, the same call goes on from it and ends with the same
    weights to the last bit (same machine; the number of threads is taken up again). It is gone when the result is there. A result of the
    same settings is made anew and replaced as a whole; a result or a checkpoint of other settings is refused, or replaced with
    ``overwrite``.

    Raises
    ------
    CausalProbeError
        For any argument that can't be worked with; nothing is written then.

    Examples
    --------
    >>> found = recover("chain", n_positions=5, steps=20, batch_size=64, probe_sequences=512)
    >>> sorted(found.truth.edges)
    [(0, 1), (1, 2), (2, 3)]
    """
    started = time.perf_counter()
    seed = o.seed
    place = choose_device(o.device)
    task = _task(o)
    truth = task.graph
    model = DisentangledTransformer(task.d_vocab, task.n_positions, o.heads, device=place)
    stages = _stages(o, task, model)
    probe_sequences = o.probe_sequences or PROBE_SEQUENCES * max(1, task.n_positions // 16)
    settings = o.settings(
        task=task.description,
        n_positions=task.n_positions,
        d_vocab=task.d_vocab,
        concentration=getattr(task, "concentration", None),
        root_probability=o.root_probability if o.graph == "forest" else None,
        probe_sequences=probe_sequences,
        device=str(place),
        edges=list(truth.edges),
        stages=[dataclasses.asdict(stage) for stage in stages],
        attention_sequences=ATTENTION_SEQUENCES,
        evaluation_sequences=EVALUATION_SEQUENCES,
        level=LEVEL,
        dtype=str(model.W_U.dtype).removeprefix("torch."),
    )

    checkpoint = (
        None
        if o.out is None
        else Checkpoint(Path(o.out) / CHECKPOINT_FILE, settings, every=CHECKPOINT_EVERY, overwrite=o.overwrite)
    )
    with kept(o, settings, unfinished=CHECKPOINT_FILE) as save_result:
        given = _initialise(model, task, o.training, seed=seed)
        watching = sample_batches(task, WATCHING_SEQUENCES, generator(seed, "watching", device=place))
        watch = _Watch(
            task, watching, every=WATCH_EVERY[o.training], notes={} if checkpoint is None else checkpoint.notes
        )
        history = fit(
            model,
            task,
            stages,
            generator=generator(seed, "training", device=place),
            callback=watch,
            checkpoint=checkpoint,
            progress=o.progress,
        )
        trained = time.perf_counter()

        attention = head_graphs(
            model,
            [b.tokens for b in sample_batches(task, ATTENTION_SEQUENCES, generator(seed, "attention", device=place))],
        )
        probing = list(sample_batches(task, probe_sequences, generator(seed, "probing", device=place)))
        effects = () if len(task.children) < 2 else tested_edges(model, task, probing, attention, seed=seed)
        recovered = _union(effects, len(truth))
        nodes = nx.freeze(truth.subgraph(task.children))
        has_edges = nodes.number_of_edges() > 0
        match = match_heads(attention, nodes) if has_edges else None
        held_out = list(sample_batches(task, EVALUATION_SEQUENCES, generator(seed, "evaluation", device=place)))
        loss = evaluate(model, held_out)
        ended = time.perf_counter()
        result = Recovery(
            truth=truth,
            recovered=recovered,
            comparison=graphs.compare(recovered, truth, weights=_evidence(effects, len(truth)), children=task.children),
            mean_parent_attention=None if match is None else match.mean_parent_attention,
            argmax_parent_accuracy=_argmax_accuracy(attention, nodes) if has_edges else None,
            steps_to_all_parents=watch.first,
            loss=loss,
            reference_losses=reference_losses(task, join_batches(held_out)),
            head_graphs=attention,
            effects=effects,
            match=match,
            last_row=None if task.is_tree else _last_row(attention, task),
            model=model,
            task=task,
            history=history,
            given=given,
            settings=settings,
            timings={"training": trained - started, "probing": ended - trained, "total": ended - started},
            threads=watch.threads,
        )
        save_result(result)
    return result


def tested_edges(
    model: DisentangledTransformer, task: Task, batches: Sequence[Batch], attention: Evidence, *, seed: int
) -> tuple[EdgeEffects, ...]:
    """Test, for each head of layer 0, the edges of the earlier nodes that its mean attention prefers, on fresh batches of the task."""
    redraw = task.redraw_as_root
    device = batches[0].tokens.device
    return tuple(
        edge_effects(
            model,
            batches,
            lambda model, batch: task_loss(model.predict(batch.tokens), batch.target),
            layer=0,
            head=head,
            candidates=attention.graph(0, head, claim=0, nodes=len(task.children)),
            level=LEVEL / model.heads[0],
            redraw=None if redraw is None else partial(redraw, generator=generator(seed, "redrawing", device=device)),
        )
        for head in range(model.heads[0])
    )


def _task(o: RecoverOptions) -> Task:
    """The task that is asked about; of a graph or its name, the in-context Markov task over it."""
    if isinstance(o.graph, str | os.PathLike | nx.DiGraph):
        truth = choose_graph(o.graph, n_positions=o.n_positions, root_probability=o.root_probability, seed=o.seed)
        return InContextMarkov(truth, o.d_vocab, o.concentration)
    if (o.n_positions, o.d_vocab, o.concentration, o.root_probability) != (None, 3, 0.1, 0.5):
        raise CausalProbeError(
            f"{check_task(o.graph)!r} has its own graph and law. Leave `n_positions`, `d_vocab`, `concentration` and `root_probability` out, "
            "or pass its graph alone."
        )
    return check_task(o.graph)


def _stages(o: RecoverOptions, task: Task, model: DisentangledTransformer) -> tuple[Stage, ...]:
    chosen: dict[str, Any] = {name: value for name in OPTIONS if (value := getattr(o, name)) is not None}
    if o.training == "joint":
        return joint(n_layers=len(model.heads), **chosen)
    return (staged if task.is_tree else staged_slots)(n_positions=task.n_positions, **chosen)


def _initialise(model: DisentangledTransformer, task: Task, training: str, *, seed: int) -> tuple[str, ...]:
    """Set what the model starts from; say what was given."""
    if training == "staged":
        if task.is_tree:
            return give_matcher(model)
        return give_gradient_graph(model, task, seed=seed)
    if max(model.heads) > 1:
        # Heads of one layer that start equal stay equal. The authors' noise.
        device = model.W_U.device
        noise = generator(seed, "weights", device=device)
        with torch.no_grad():
            for A in model.A:
                A.copy_(1e-4 * torch.randn(A.shape, generator=noise, dtype=A.dtype, device=device))
    return ()


class _Watch:
    """At some steps of training, asks whether every true parent has the largest mean attention in its child's past.

    What it found is kept in ``notes``, which a checkpoint carries.
    """

    def __init__(self, task: Task, batches: Iterable[Batch], *, every: int, notes: MutableMapping[str, Any]) -> None:
        self.truth = nx.freeze(task.graph.subgraph(task.children))
        self.tokens = torch.cat([batch.tokens for batch in batches])
        self.every = every
        self.notes = notes
        self.threads = torch.get_num_threads()

    @property
    def first(self) -> int | None:
        """The first step at which it was so."""
        return self.notes.get("first")

    def __call__(self, step: int, model: DisentangledTransformer) -> None:
        self.threads = torch.get_num_threads()  # fit takes up those of a checkpoint
        if self.first is not None or step % watch_interval(step, self.every) or not self.truth.number_of_edges():
            return
        if _argmax_accuracy(head_graphs(model, self.tokens, batch_size=MICRO_BATCH), self.truth) == 1:
            self.notes["first"] = step


def watch_interval(step: int, every: int) -> int:
    """``every`` for the first ``WATCH_CLOSELY`` looks; then twice as much whenever the number of steps has doubled.

    >>> [watch_interval(step, 16) for step in (0, 1024, 2047, 2048, 5000)]
    [16, 16, 16, 32, 64]
    """
    return every << max(0, (step // (WATCH_CLOSELY * every)).bit_length() - 1)


def _argmax_accuracy(attention: Evidence, truth: nx.DiGraph) -> float:
    """Share of the true edges whose parent leads its child's past in the head that is matched to the parent's slot.

    Edges of a slot that no head is left for count as wrong.
    """
    leading = [
        {child: parent for child, parent, *_ in attention.parents(0, head, nodes=len(truth))}
        for head in range(len(attention.values[0]))
    ]
    heads = match_heads(attention, truth).heads
    right = [
        head is not None and leading[head][child] == parent
        for child in truth
        for head, parent in zip(heads, sorted(truth.predecessors(child)), strict=False)
    ]
    return float(np.mean(right))


def _last_row(attention: Evidence, task: Task) -> tuple[dict[str, Any], ...]:
    """What the last row of each head holds. As a key it stands for node T - 1, as a query for node T: it can't be right for both."""
    last = task.n_positions - 1
    roles = {"as_node": last, "as_query": last + 1}
    rows = {role: tuple(sorted(task.graph.predecessors(node))) for role, node in roles.items()}
    return tuple(
        {
            "head": f"L0H{head}",
            **{
                role: {"parents": its, "attention": [float(row[parent]) for parent in its]}
                for role, its in rows.items()
            },
        }
        for head, row in enumerate(attention.values[0][:, last])
    )


def _union(effects: Sequence[EdgeEffects], nodes: int) -> nx.DiGraph:
    """The edges that some head confirmed, each with the evidence of the head in which it gains most."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(nodes))
    for head, its in enumerate(effects):
        for parent, child, evidence in its.graph(nodes).edges(data=True):
            if graph.get_edge_data(parent, child, {"gain": -np.inf})["gain"] < evidence["gain"]:
                graph.add_edge(parent, child, head=f"L0H{head}", **evidence)
    return graph


def _evidence(effects: Sequence[EdgeEffects], nodes: int) -> NDArray[np.float64]:
    """[child, parent]: the largest deciding statistic of any head; 0, which is chance, where nothing was tested."""
    return np.max([its.weights(nodes) for its in effects], axis=0) if effects else np.zeros((nodes, nodes))
