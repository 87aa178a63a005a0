"""Recover a known causal graph, end to end: sample the task, train the model, probe it, compare with the truth."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from causal_probe import graphs
from causal_probe.arguments import shown
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.recovery import CHECKPOINT_FILE, Recovery
from causal_probe.experiments.saving import Clock, kept
from causal_probe.first_gradient.start import give_gradient_graph
from causal_probe.graphs import choose_graph
from causal_probe.hooks.check import describe
from causal_probe.models import DisentangledTransformer, choose_device
from causal_probe.options import takes
from causal_probe.options.recover import RecoverOptions
from causal_probe.probes import edge_effects, head_graphs, match_heads
from causal_probe.probes.edge_tests import EdgeEffects
from causal_probe.probes.evidence import Evidence
from causal_probe.results import this_process
from causal_probe.tasks import Batch, InContextMarkov, Task, generator, reference_losses, sample_batches
from causal_probe.tasks.task import check_task, join_batches
from causal_probe.training import evaluate, fit, give_matcher, joint, staged, task_loss
from causal_probe.training.checkpoint import Checkpoint
from causal_probe.training.slots import staged_slots
from causal_probe.training.stages import Stage

__all__ = ["recover", "tested_edges"]

#: Sequences whose mean attention names the candidate parents, and those on which the candidates are then tested.
ATTENTION_SEQUENCES = 4096
PROBE_SEQUENCES = 2**15
EVALUATION_SEQUENCES = 2**15
#: Without a law to redraw from, every rival costs a run, and they are tested on this many sequences.
RIVAL_SEQUENCES = 4096
#: While training, the mean attention of so many sequences is looked at every so many steps, and after so many looks at ever wider
#: intervals: a look costs several steps, and where some parent never leads all of a long run would be looked at.
WATCHING_SEQUENCES = 1024
WATCH_EVERY: Mapping[str, int] = {"staged": 1, "joint": 16}
WATCH_CLOSELY = 64
#: Sequences per forward pass when watching.
MICRO_BATCH = 1024
#: How many steps an interrupted run can lose.
CHECKPOINT_EVERY = 50
#: Options of the training; those that aren't given keep the training's own default.
OPTIONS = ("optimizer", "learning_rate", "steps", "batch_size")
#: Family-wise level at which an edge is confirmed.
LEVEL = 1e-3


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
    clock = Clock()
    seed = o.seed
    place = choose_device(o.device)
    task = _task(o)
    truth = task.graph
    model = DisentangledTransformer(task.d_vocab, task.n_positions, o.heads, device=place)
    stages = _stages(o, task, model)
    probe_sequences = o.probe_sequences or PROBE_SEQUENCES * max(1, task.n_positions // 16)
    settings = o.settings(
        task=task.description,
        own_task=None if isinstance(task, InContextMarkov) else repr(task),
        redraws=task.redraw is not None,
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

    def drawn(what: str, n: int) -> list[Batch]:
        return list(sample_batches(task, n, generator(seed, what, device=place)))

    checkpoint = None
    if o.out is not None:
        path = Path(o.out) / CHECKPOINT_FILE
        checkpoint = Checkpoint(path, settings, every=CHECKPOINT_EVERY, overwrite=o.overwrite)
    with kept(o, settings, Recovery) as saved:
        given = _initialise(model, task, o.training, seed=seed)
        notes = {} if checkpoint is None else checkpoint.notes
        watch = _Watch(task, drawn("watching", WATCHING_SEQUENCES), every=WATCH_EVERY[o.training], notes=notes)
        history = fit(
            model,
            task,
            stages,
            generator=generator(seed, "training", device=place),
            callback=watch,
            checkpoint=checkpoint,
            progress=o.progress,
            compiled=o.compiled,
        )
        clock.spent_on("training")

        attention = head_graphs(model, [batch.tokens for batch in drawn("attention", ATTENTION_SEQUENCES)])
        probing = drawn("probing", probe_sequences)
        effects = () if len(task.children) < 2 else tested_edges(model, task, probing, attention, seed=seed)
        recovered = _union(effects, len(truth))
        weights = _evidence(effects, len(truth))
        nodes = nx.freeze(truth.subgraph(task.children))
        has_edges = nodes.number_of_edges() > 0
        match = match_heads(attention, nodes) if has_edges else None
        held_out = drawn("evaluation", EVALUATION_SEQUENCES)
        loss = evaluate(model, held_out)
        clock.spent_on("probing")
        return saved(
            Recovery(
                truth=truth,
                recovered=recovered,
                comparison=graphs.compare(recovered, truth, weights=weights, children=task.children),
                mean_parent_attention=None if match is None else match.mean_parent_attention,
                argmax_parent_accuracy=_argmax_accuracy(attention, nodes) if has_edges else None,
                steps_to_all_parents=watch.first,
                loss=loss,
                reference_losses=reference_losses(task, join_batches(held_out)),
                head_graphs=attention,
                effects=effects,
                match=match,
                last_row=None if task.is_tree else _last_row(attention, task),
                history=history,
                given=given,
                timings=clock.timings,
                model=model,
                task=task,
                settings=settings,
                provenance={**this_process(**describe(model)), "threads": watch.threads},
            )
        )


def tested_edges(
    model: DisentangledTransformer, task: Task, batches: Sequence[Batch], attention: Evidence, *, seed: int
) -> tuple[EdgeEffects, ...]:
    """Test, for each head of layer 0, the edges of the earlier nodes that its mean attention prefers, on fresh batches of the task."""
    redraw = task.redraw
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
            rival_sequences=RIVAL_SEQUENCES,
            losses_by_rows=partial(_losses_by_rows, head),
        )
        for head in range(model.heads[0])
    )


def _losses_by_rows(
    head: int, model: DisentangledTransformer, batch: Batch, queries: Tensor, rows: Tensor
) -> Float[Tensor, "row batch"]:
    return task_loss(model.predict_by_rows(batch.tokens, head=head, queries=queries, rows=rows), batch.target)


def _task(o: RecoverOptions) -> Task:
    """The task that is asked about; of a graph or its name, the in-context Markov task over it."""
    if isinstance(o.graph, str | os.PathLike | nx.DiGraph):
        truth = choose_graph(o.graph, n_positions=o.n_positions, root_probability=o.root_probability, seed=o.seed)
        return InContextMarkov(truth, o.d_vocab, o.concentration)
    if not hasattr(o.graph, "sample") or not hasattr(o.graph, "graph"):
        raise CausalProbeError(
            f"`graph` is {shown(o.graph)}. It must be the name of a family, a file, a networkx.DiGraph (networkx.from_numpy_array makes one of an "
            "adjacency matrix) or a task."
        )
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
    """Set the model's first weights; name those that were given."""
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

    Its findings are kept in ``notes``, which a checkpoint carries.
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
