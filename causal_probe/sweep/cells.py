"""The probes of a sweep, each a plain function from options and a seed to rows and numbers."""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from threadpoolctl import threadpool_limits

from causal_probe import probes
from causal_probe.arguments import Help
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.opening import open_model
from causal_probe.experiments.recover import recover as recover_graph
from causal_probe.experiments.scan_sequences import sequence_length
from causal_probe.first_gradient.graph import gradient_graph
from causal_probe.graphs import choose_graph
from causal_probe.hooks import corpus as open_corpus
from causal_probe.hooks.check import HookedModel
from causal_probe.hooks.corpus import Corpus
from causal_probe.options import Options, takes
from causal_probe.options.common import DEVICE, MODEL, LoadingOptions, SeedOption, SequenceOptions, ShardOption
from causal_probe.options.recover import RecoverOptions, TaskOptions, TrainingOptions
from causal_probe.options.scan import TemplatesOption
from causal_probe.probes.head_scores import HeadScores
from causal_probe.probes.template_choice import choose_templates
from causal_probe.sweep.plan import Cell
from causal_probe.sweep.store import encode
from causal_probe.tasks import InContextMarkov, generator, sample_batches

__all__ = ["PROBES", "Done", "Outcome", "run_cell"]


class Outcome(NamedTuple):
    """A probe's result at a point.

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


@dataclass(frozen=True)
class GraphSeed(Options):
    """The columns that a cell adds about its graph."""

    _: KW_ONLY
    graph_seed: Annotated[
        int, Help("Draws the graph of a family that is drawn; seed draws everything else.", least=0)
    ] = 0


@dataclass(frozen=True)
class RecoverCell(TaskOptions, TrainingOptions, GraphSeed):
    """Options of the probe ``recover``."""

    _: KW_ONLY
    device: Annotated[str, DEVICE] = "cpu"


@takes(RecoverCell)
def recover(o: RecoverCell) -> Outcome:
    """:func:`causal_probe.experiments.recover`: one row for each candidate edge of each head of layer 0."""
    truth = choose_graph(o.graph, n_positions=o.n_positions, root_probability=o.root_probability, seed=o.graph_seed)
    found = recover_graph(**o.shared(RecoverOptions, graph=truth, n_positions=None))
    rows = [
        {
            "layer": 0,
            "head": head,
            "attention": found.head_graphs.values[0][head, int(row["child"]), int(row["parent"])],
            **{name: row[name] for name in ("child", "parent", "gain", "stderr", "margin", "margin_stderr", "p_value")},
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


@dataclass(frozen=True)
class GradientCell(TaskOptions, GraphSeed):
    """Options of the probe ``gradient``."""

    _: KW_ONLY
    n_sequences: Annotated[int, Help("How many sequences the gradient is taken over.", least=2)] = 4096


@takes(GradientCell)
def gradient(o: GradientCell) -> Outcome:
    """:func:`causal_probe.first_gradient.graph` on a task: one row for each node after node 0, with its candidate parent."""
    truth = choose_graph(o.graph, n_positions=o.n_positions, root_probability=o.root_probability, seed=o.graph_seed)
    task = InContextMarkov(truth, o.d_vocab, o.concentration)
    found = gradient_graph(sample_batches(task, o.n_sequences, generator(o.seed, "gradient")))
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
    metrics = {**_compared(found.compare(truth)), "sequences": found.n_sequences}
    return Outcome(rows, metrics, {"model": "reduced-transformer", "dtype": "float32", "device": "cpu"})


def _compared(comparison: Any) -> dict[str, Any]:
    names = ("precision", "recall", "f1", "shd", "parent_accuracy", "root_accuracy", "auroc", "average_precision")
    return {"exact": comparison.exact, **{name: getattr(comparison, name) for name in names}}


# ------------------------------------------------------------------------------------------------------------- pretrained models


@dataclass(frozen=True, kw_only=True)
class ModelCell(SequenceOptions, SeedOption, LoadingOptions):
    """The base of the cells of models."""

    model: Annotated[str, Help(MODEL.text)]
    revision: Annotated[str | None, Help("Of a model on the hub.", none="its main one")] = None
    step: Annotated[
        int | None, Help("At which training step a checkpoint was taken.", none="what its name says", least=0)
    ] = None
    device: Annotated[str, DEVICE] = "cpu"
    device_map: Annotated[
        Any, Help("As transformers takes it: how a model is spread over devices.", none="one device")
    ] = None

    def open(self) -> tuple[HookedModel, Corpus | None]:
        """The model and, if the cell is about one, its corpus."""
        hooked, _ = open_model(
            self.model, revision=self.revision, dtype=self.dtype, device=self.device, device_map=self.device_map
        )
        if self.corpus is None:
            return hooked, None
        text = open_corpus(
            hooked,
            self.corpus,
            length=sequence_length(hooked, self.length),
            bos=self.bos,
            separator=self.separator,
            field=self.field,
            shard=getattr(self, "shard", "0/1"),
        )
        return hooked, text

    @property
    def made(self) -> dict[str, Any]:
        """How sequences are made, where there is no corpus."""
        return {"n_sequences": self.n_sequences, "period": self.period, "bos": self.bos, "seed": self.seed}

    @property
    def at_step(self) -> int | None:
        """At which training step the checkpoint was taken."""
        return step_of(self.revision or self.model) if self.step is None else self.step


@dataclass(frozen=True, kw_only=True)
class ScanCell(ModelCell, TemplatesOption, ShardOption):
    """Options of the probe ``scan``."""


@takes(ScanCell)
def scan(o: ScanCell) -> Outcome:
    """:func:`causal_probe.probes.scan` of a model or a checkpoint: one row for each head and template.

    With a ``corpus``, of its text, or one shard of it; :meth:`Sweep.merged` puts shards together.
    """
    hooked, text = o.open()
    wanted = None if o.templates is None else choose_templates(o.templates)
    made = o.made if text is None else {}
    found = probes.scan(hooked, text, templates=wanted, batch_size=o.batch_size, **made)
    called = {one[:3] for one in found.called()}
    rows = [
        {
            **one._asdict(),
            **_spread(found, *one[:3]),
            "measured_rows": one.rows,
            "found": one[:3] in called,
            "step": o.at_step,
        }
        for one in found
    ]
    metrics = {"heads": sum(found.heads), "called": len(called)}
    return Outcome(rows, metrics | _counts(found.settings["tokens"][0]), found.provenance)


def _spread(scores: HeadScores, layer: int, head: int, template: str) -> dict[str, float]:
    """The numbers that merging needs beside a score and its standard error; empty if it needs none."""
    found = scores.sums[template].covariance[layer]
    return {} if found is None else {"chance_variance": found[0], "covariance": float(found[1][head])}


def _counts(read: Mapping[str, Any]) -> dict[str, Any]:
    """Of a corpus: what was read, as metrics of the cell."""
    names = ("documents", "sequences", "tokens", "left_over")
    return {name: read[name] for name in names} if read["kind"] == "corpus" else {}


@dataclass(frozen=True, kw_only=True)
class HeadGraphsCell(ModelCell):
    """Options of the probe ``head_graphs``.

    There is no shard: candidates of parts do not add up to that of the whole. :meth:`~causal_probe.probes.Evidence.save` keeps what does.
    """

    sink: Annotated[
        Literal["exclude", "root", "keep"] | None,
        Help("What is done with the first token's attention, as in head_graphs.", none="what the model's tokens need"),
    ] = None


@takes(HeadGraphsCell)
def head_graphs(o: HeadGraphsCell) -> Outcome:
    """:func:`causal_probe.probes.head_graphs` on repeated tokens or a corpus: a row for each head's node, with its candidate parent."""
    hooked, text = o.open()
    tokens: Any = probes.repeated_tokens(hooked, **o.made).tokens if text is None else text
    found = probes.head_graphs(hooked, tokens, sink=o.sink, batch_size=o.batch_size)
    rows = [
        {
            "layer": row.layer,
            "head": row.head,
            "child": row.child,
            "parent": row.parent,
            "attention": row.value,
            "stderr": row.stderr,
            "found": row.claimed,
            "n_sequences": found.n_sequences,
            "step": o.at_step,
        }
        for row in found.to_pandas().itertuples()
    ]
    read = found.provenance.get("corpus", {"kind": "made"})
    return Outcome(rows, {"heads": sum(found.heads.values())} | _counts(read), found.provenance)


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
