"""What runs in a cell: the probes of a sweep, each a plain function from options and a seed to rows and numbers."""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from threadpoolctl import threadpool_limits

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.check_model import open_model
from causal_probe.experiments.graph_choice import choose_graph
from causal_probe.experiments.recover import Training
from causal_probe.experiments.recover import recover as recover_graph
from causal_probe.experiments.scan_sequences import of_a_corpus, sequence_length
from causal_probe.experiments.template_choice import choose_templates
from causal_probe.first_gradient.graph import gradient_graph
from causal_probe.hooks import Corpus, HookedModel
from causal_probe.hooks import corpus as open_corpus
from causal_probe.sweep.plan import Cell
from causal_probe.sweep.store import encode
from causal_probe.tasks import InContextMarkov, generator, sample_batches
from causal_probe.training.stages import Optimizer

__all__ = ["PROBES", "Done", "Outcome", "run_cell"]


class Outcome(NamedTuple):
    """What a probe found at a point.

    Attributes
    ----------
    rows
        One for each head or edge, with columns of :data:`~causal_probe.sweep.store.COLUMNS`; what a probe does not
        measure is left out.
    metrics
        Numbers about the cell as a whole.
    provenance
        ``model``, ``dtype`` and ``device``, where there are such.
    """

    rows: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Any]
    provenance: Mapping[str, Any] = {}


class Done(NamedTuple):
    """A cell that has run: ``content`` of its file, or the ``error`` in one line and its ``traceback``."""

    key: str
    content: bytes | None
    error: str | None = None
    traceback: str | None = None


#: The number of threads belongs to a process, so a process runs one cell at a time, whatever starts cells in it.
_ONE_AT_A_TIME = threading.Lock()


def run_cell(cell: Cell, function: Callable[..., Outcome]) -> Done:
    """Run a cell with its number of threads. An exception is part of the answer; an interruption goes on."""
    with _ONE_AT_A_TIME:
        before = torch.get_num_threads()
        torch.set_num_threads(cell.threads)
        try:
            with threadpool_limits(cell.threads):
                found = function(seed=cell.derived_seed, **cell.options)
            return Done(cell.key, encode(cell, found.rows, found.metrics, found.provenance))
        except Exception as error:  # whatever a cell raises, the others go on, and the error is kept
            text = " ".join(str(error).split())
            message = text if isinstance(error, CausalProbeError) else f"{type(error).__name__}: {text}"
            return Done(cell.key, None, message, traceback.format_exc())
        finally:
            torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------- tasks whose graph is known


def recover(
    *,
    seed: int,
    graph: str = "forest",
    graph_seed: int = 0,
    positions: int | None = None,
    vocab: int = 3,
    alpha: float = 0.1,
    root_probability: float = 0.5,
    heads: Sequence[int] = (1, 1),
    training: Training = "staged",
    optimizer: Optimizer | None = None,
    learning_rate: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    probe_sequences: int | None = None,
    device: str = "cpu",
) -> Outcome:
    """:func:`causal_probe.experiments.recover`: one row for each candidate edge of each head of layer 0.

    ``graph_seed`` draws the graph of a family that is drawn; ``seed`` everything else.
    """
    truth = choose_graph(graph, positions=positions, root_probability=root_probability, seed=graph_seed)
    found = recover_graph(
        truth,
        vocab=vocab,
        alpha=alpha,
        heads=tuple(heads),
        seed=seed,
        training=training,
        optimizer=optimizer,
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        probe_sequences=probe_sequences,
        device=device,
    )
    rows = [
        {
            "layer": 0,
            "head": head,
            "attention": found.head_graphs.values[0][head, int(row["child"]), int(row["parent"])],
            **{name: row[name] for name in ("child", "parent", "gain", "stderr", "excess", "excess_stderr", "p_value")},
            "found": row["confirmed"],
            "true": truth.has_edge(int(row["parent"]), int(row["child"])),
        }
        for head, effects in enumerate(found.effects)
        for row in effects.to_pandas().to_dict("records")
    ]
    metrics = {
        **_compared(found.comparison),
        "mean_parent_attention": found.mean_parent_attention,
        "argmax_parent_accuracy": found.argmax_parent_accuracy,
        "loss": found.loss,
        "known_graph_loss": found.reference_losses["known-graph"],
        "sequences": found.history.n_sequences,
    }
    where = {name: found.settings[name] for name in ("dtype", "device")}
    return Outcome(rows, metrics, {"model": "disentangled-transformer", **where})


def gradient(
    *,
    seed: int,
    graph: str = "forest",
    graph_seed: int = 0,
    positions: int | None = None,
    vocab: int = 3,
    alpha: float = 0.1,
    root_probability: float = 0.5,
    sequences: int = 4096,
) -> Outcome:
    """:func:`causal_probe.first_gradient.graph` on a task: one row for each node after node 0, with its candidate parent."""
    truth = choose_graph(graph, positions=positions, root_probability=root_probability, seed=graph_seed)
    task = InContextMarkov(truth, vocab, alpha)
    found = gradient_graph(sample_batches(task, sequences, generator(seed, "gradient")))
    rows = [
        {
            "child": row["child"],
            "parent": row["candidate"],
            "score": row["evidence"],
            "stderr": row["stderr"],
            "log_e_value": row["log_e_value"],
            "found": row["decision"] == "edge",
            "true": truth.has_edge(row["candidate"], row["child"]),
        }
        for row in found.to_pandas().to_dict("records")
    ]
    metrics = {**_compared(found.compare(truth)), "sequences": found.sequences}
    return Outcome(rows, metrics, {"model": "reduced-transformer", "dtype": "float32", "device": "cpu"})


def _compared(comparison: Any) -> dict[str, Any]:
    names = ("precision", "recall", "f1", "shd", "parent_accuracy", "root_accuracy", "auroc", "average_precision")
    return {"exact": comparison.exact, **{name: getattr(comparison, name) for name in names}}


# ------------------------------------------------------------------------------------------------------------- pretrained models


def scan(
    *,
    seed: int,
    model: str,
    revision: str | None = None,
    step: int | None = None,
    templates: str | Iterable[str] | None = None,
    sequences: int | None = None,
    period: int | None = None,
    bos: str = "auto",
    corpus: str | None = None,
    length: int | None = None,
    separator: str | None = None,
    field: str = "text",
    shard: str = "0/1",
    batch_size: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    device_map: Any = None,
) -> Outcome:
    """:func:`causal_probe.probes.scan` of a model or a checkpoint: one row for each head and template.

    ``step`` says at which training step a checkpoint was taken, if its name doesn't (:func:`step_of`). With a ``corpus``, of its text
    (:func:`causal_probe.hooks.corpus`), or one shard of it; :meth:`Sweep.merged` puts shards together.
    """
    hooked, _ = open_model(model, revision=revision, dtype=dtype, device=device, device_map=device_map)
    wanted = None if templates is None else choose_templates(templates)
    options: dict[str, Any] = {"n_sequences": sequences, "period": period, "bos": bos, "seed": seed}
    text = _text(hooked, corpus, length, separator, field, shard, options)
    made = options if text is None else {}
    found = probes.scan(hooked, text, templates=wanted, batch_size=batch_size, **made)
    called = {one[:3] for one in found.called()}
    rows = [
        {
            **one._asdict(),
            **_spread(found, *one[:3]),
            "measured_rows": one.rows,
            "found": one[:3] in called,
            "step": _step(model, revision, step),
        }
        for one in found
    ]
    metrics = {"heads": sum(found.heads), "called": len(called)}
    return Outcome(rows, metrics | _counts(found.settings["tokens"][0]), found.provenance)


def _spread(scores: probes.HeadScores, layer: int, head: int, template: str) -> dict[str, float]:
    """What merging needs beside a score and its standard error; empty where there is none."""
    found = scores.sums[template].covariance
    return {} if found is None else {"chance_variance": found[0], "covariance": float(found[1][layer][head])}


def _text(
    model: HookedModel,
    corpus: str | None,
    length: int | None,
    separator: str | None,
    field: str,
    shard: str,
    made: Mapping[str, Any],
) -> Corpus | None:
    """The text of a cell, if it is about one."""
    # Refuses what does not go together.
    of_a_corpus(corpus, length, separator, field, shard, sequences=made["n_sequences"], period=made["period"])
    if corpus is None:
        return None
    fits = sequence_length(model, length)
    return open_corpus(model, corpus, length=fits, bos=made["bos"], separator=separator, field=field, shard=shard)


def _counts(read: Mapping[str, Any]) -> dict[str, Any]:
    """Of a corpus: what was read, as metrics of the cell."""
    names = ("documents", "sequences", "tokens", "left_over")
    return {name: read[name] for name in names} if read["kind"] == "corpus" else {}


def head_graphs(
    *,
    seed: int,
    model: str,
    revision: str | None = None,
    step: int | None = None,
    sequences: int | None = None,
    period: int | None = None,
    bos: str = "auto",
    corpus: str | None = None,
    length: int | None = None,
    separator: str | None = None,
    field: str = "text",
    sink: Literal["exclude", "root", "keep"] | None = None,
    batch_size: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    device_map: Any = None,
) -> Outcome:
    """:func:`causal_probe.probes.head_graphs` on repeated tokens or a corpus: a row for each head's node, with its candidate parent.

    There is no shard: candidates of parts do not add up to that of the whole. :meth:`~causal_probe.probes.Evidence.save` keeps what
    does.
    """
    hooked, _ = open_model(model, revision=revision, dtype=dtype, device=device, device_map=device_map)
    options: dict[str, Any] = {"n_sequences": sequences, "period": period, "bos": bos}
    text = _text(hooked, corpus, length, separator, field, "0/1", options)
    batches: Any = probes.repeated_tokens(hooked, seed=seed, **options).tokens if text is None else text
    found = probes.head_graphs(hooked, batches, sink=sink, batch_size=batch_size)
    rows = [
        {
            "layer": row.layer,
            "head": row.head,
            "child": row.child,
            "parent": row.parent,
            "attention": row.value,
            "stderr": row.stderr,
            "found": row.claimed,
            "sequences": found.n_sequences,
            "step": _step(model, revision, step),
        }
        for row in found.to_pandas().itertuples()
    ]
    read = found.provenance.get("corpus", {"kind": "made"})
    return Outcome(rows, {"heads": sum(found.heads.values())} | _counts(read), found.provenance)


def _step(model: str, revision: str | None, step: int | None) -> int | None:
    return step_of(revision or model) if step is None else step


def step_of(name: str) -> int | None:
    """The training step in the name of a checkpoint: the number at its end, after a letter, ``-`` or ``_``.

    >>> step_of("runs/checkpoint-500"), step_of("step3000"), step_of("0001000"), step_of("pythia-70m")
    (500, 3000, 1000, None)
    """
    match = re.search(r"(?:^|[A-Za-z_-])(\d+)/?$", name.replace("\\", "/").rsplit("/", 1)[-1] or name)
    return int(match[1]) if match else None


#: The probes that there are.
PROBES: Mapping[str, Callable[..., Outcome]] = {
    "recover": recover,
    "gradient": gradient,
    "scan": scan,
    "head_graphs": head_graphs,
}
