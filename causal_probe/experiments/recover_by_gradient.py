"""``causal-probe recover --method gradient`` and ``--data``: the graph from gradients, compared and written as training's is."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.saving import kept
from causal_probe.first_gradient.batches import AT_ONCE, SEQUENCES_OF_SEVERAL, batches_of, table_entries
from causal_probe.first_gradient.graph import gradient_graph
from causal_probe.first_gradient.result import GradientGraph
from causal_probe.first_gradient.slots import GradientSlots, gradient_slots
from causal_probe.graphs import GraphComparison, choose_graph
from causal_probe.graphs.check import parent_lists
from causal_probe.models import DisentangledTransformer, save
from causal_probe.models.disentangled import count_weights
from causal_probe.options import GradientOptions, TokensOptions, takes
from causal_probe.options.base import GIVEN
from causal_probe.results import (
    Citation,
    escape,
    to_jsonable,
    versions,
    write_arrays,
)
from causal_probe.tasks import Batch, InContextMarkov, generator, join_batches, reference_losses
from causal_probe.training import evaluate

__all__ = ["GradientRecovery", "read_tokens", "recover_by_gradient", "recover_from_tokens"]

#: Sequences that the gradient of a tree is taken over.
SEQUENCES = 2**15
EVALUATION_SEQUENCES = 2**13
#: Entries of one sequence's tables: 256 MiB, and as said.
MAX_TABLES = 2**26
#: Entries of the evaluation sequences, one-hot, and of their tables. With many states there are fewer such sequences.
EVALUATED = 2**27
#: Weights of the model that is built and saved: 4 GiB.
MAX_MODEL = 2**30
#: Nodes that were not decided, of which the short table says what they may be.
SHOWN_UNDECIDED = 3
#: A row of layer 1 puts all but T e^-STRENGTH of its attention on the parent that was found.
STRENGTH = 20.0


@dataclasses.dataclass(frozen=True, repr=False)
class GradientRecovery:
    """A graph that was read from gradients, the truth where it is known, and a model that has the graph.

    Attributes
    ----------
    found : GradientGraph or GradientSlots
        With all evidence.
    truth, comparison
        The true graph, and how far the found one is from it; None for tokens of one's own.
    model
        A disentangled transformer whose layer 1 attends where the evidence leads, one head per parent, whose layer 2 compares, and
        whose logits are what it attends to. Nothing in it was trained.
    loss, reference_losses
        Its cross-entropy in nats on fresh sequences, and that of exact predictors; None for tokens of one's own.
    """

    RESULT: ClassVar[str] = "result.json"

    found: GradientGraph | GradientSlots
    truth: nx.DiGraph | None
    comparison: GraphComparison | None
    model: DisentangledTransformer
    loss: float | None
    reference_losses: Mapping[str, float] | None
    settings: Mapping[str, Any]
    seconds: float

    @property
    def recovered(self) -> nx.DiGraph:
        """The found graph."""
        return self.found.graph

    @property
    def exact(self) -> bool | None:
        """Whether every edge and every root is right, the parents of a predicted node too; None where the truth is not known."""
        return None if self.comparison is None else self.comparison.exact

    @property
    def why_undecided(self) -> str | None:
        """Why it is not decided which nodes have a parent at all; None if it is."""
        if self.found.decided:
            return None
        if self.found.log_e_values is None:
            return "the transitions are not known"
        return "the search for the predicted node's parents was cut off, there may be more"

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        if self.truth is None:
            return TokensOptions.call("recover_from_tokens", self.settings, repr(self.settings["data"]))
        given = f"graphs.from_parents({[list(parents) for parents in parent_lists(self.truth)]})"
        shown = {"graph": given} if self.settings["graph"] == GIVEN else {}
        return GradientOptions.call("recover_by_gradient", self.settings, **shown)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``result.json``, in plain JSON types."""
        return dict(
            to_jsonable(
                {
                    "kind": "gradient recovery",
                    "format": 1,
                    "exact": self.exact,
                    "truth": None
                    if self.truth is None
                    else {"nodes": len(self.truth), "edges": list(self.truth.edges)},
                    "recovered": {"nodes": len(self.recovered), "edges": list(self.recovered.edges)},
                    "metrics": None if self.comparison is None else self.comparison.to_dict(),
                    "found": self.found.to_dict(),
                    "loss": self.loss,
                    "reference_losses": self.reference_losses,
                    "undefined": {}
                    if self.truth is not None
                    else {"truth": "the graph behind one's own tokens is not known"},
                    "seconds": self.seconds,
                    "settings": self.settings,
                    "versions": versions(),
                }
            )
        )

    def write_data(self, folder: Path) -> None:
        """Write ``graph.json`` (the truth, where it is known), ``recovered.json``, ``attention.safetensors`` (layer 0's attention in the
        model, and the evidence with its standard error) and ``model/`` beside the JSON.
        """
        arrays = {"layer0.mean": attention(self.model), "evidence": self.found.evidence}
        if self.found.stderr is not None:
            arrays["evidence.stderr"] = self.found.stderr
        if self.truth is not None:
            graphs.write_graph(self.truth, folder / "graph.json")
        graphs.write_graph(self.recovered, folder / "recovered.json")
        save(self.model, folder / "model")
        write_arrays(folder / "attention.safetensors", arrays)

    def cite(self) -> Citation:
        """The paper, and one sentence for a methods section."""
        return self.found.cite()

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of what is shown in a short table."""
        shown = [
            ("edges found", str(self.recovered.number_of_edges())),
            ("sequences", f"{self.found.n_sequences:,}"),
        ]
        if isinstance(self.found, GradientGraph):
            shown += [
                ("status", self.found.status),
                *self._undecided(self.found),
                ("unchanged since sequence", f"{self.found.stable_after:,}"),
            ]
        else:
            queries = ", ".join(map(str, self.found.queries))
            if self.found.cut_off:
                queries = f"{queries or 'none was tried'} (cut off, there may be more)"
            shown.append(("query positions", queries or "none carries signal"))
        if self.why_undecided is not None:
            shown.append(("roots", f"not decided: {self.why_undecided}"))
        if self.comparison is not None:
            c = self.comparison
            shown.append(
                ("edges right", f"{c.true_positives} of {c.true_positives + len(c.missing) + len(c.reversed)}")
            )
            shown.append(("edges missing, extra, reversed", f"{len(c.missing)}, {len(c.extra)}, {len(c.reversed)}"))
        if self.loss is not None and self.reference_losses is not None:
            shown.append(("loss of the model, untrained (nats)", f"{self.loss:.4f}"))
            shown += [(f"  {name}", f"{loss:.4f}") for name, loss in self.reference_losses.items()]
        return [*shown, ("seconds", f"{self.seconds:.1f}")]

    def _undecided(self, found: GradientGraph) -> list[tuple[str, str]]:
        """How many nodes were not decided, and how much is left of what the first few may be; nothing if none was to be."""
        if found.left is None or not found.undecided:
            return []
        first = [
            f"{node}: {len(found.left[node])} of {node + 1} possibilities are left"
            for node in found.undecided[:SHOWN_UNDECIDED]
        ]
        more = ["..."] if len(found.undecided) > SHOWN_UNDECIDED else []
        return [("nodes not decided", f"{len(found.undecided)} ({'; '.join([*first, *more])})")]

    def __repr__(self) -> str:
        return "\n".join([self._title(), *(f"  {name:<35} {value}" for name, value in self.rows())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table><caption>{escape(self._title())}</caption><tbody>{rows}</tbody></table>"

    def _title(self) -> str:
        source = self.settings.get("data") or self.settings["graph"]
        if self.comparison is None:
            return f"Parents from one gradient over {source}"
        return f"Recovery of {source} by gradient: {'exact' if self.exact else f'SHD {self.comparison.shd}'}"


@takes(GradientOptions)
def recover_by_gradient(o: GradientOptions) -> GradientRecovery:
    """Read the graph of a task from gradients of an untrained model, and compare with the truth.

    Raises
    ------
    CausalProbeError
        For any argument that can't be worked with, also if there are so many states that one sequence's tables, or the model, would not
        fit into memory; nothing is written then.

    Examples
    --------
    >>> found = recover_by_gradient("chain", n_positions=8, n_sequences=2048)
    >>> sorted(found.recovered.edges)
    [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    """
    started = time.perf_counter()
    truth = choose_graph(o.graph, n_positions=o.n_positions, root_probability=o.root_probability, seed=o.seed)
    task = InContextMarkov(truth, o.d_vocab, o.concentration)
    n_sequences = o.n_sequences or (SEQUENCES if task.is_tree else SEQUENCES_OF_SEVERAL)
    _check_size(o.d_vocab, task.n_positions, task.n_slots)
    if table_entries(task) > MAX_TABLES:
        raise CausalProbeError(
            f"The tables of transitions of one sequence over {o.d_vocab:,} states have {table_entries(task):,} entries; {MAX_TABLES:,} are "
            "the most. Take fewer states."
        )
    evaluated = max(2, min(EVALUATION_SEQUENCES, EVALUATED // max(table_entries(task), task.n_positions * o.d_vocab)))
    settings = o.settings(
        method="gradient",
        n_positions=task.n_positions,
        root_probability=o.root_probability if o.graph == "forest" else None,
        n_sequences=n_sequences,
        edges=list(truth.edges),
        evaluation_sequences=evaluated,
    )
    with kept(o, settings) as save_result:
        drawn = batches_of(task, n_sequences, generator(o.seed, "gradient"))
        found = gradient_graph(drawn) if task.is_tree else gradient_slots(drawn)
        model = _model(found, o.d_vocab, task.n_positions)
        held_out = [Batch(b.tokens, b.target, {}) for b in batches_of(task, evaluated, generator(o.seed, "evaluation"))]
        result = GradientRecovery(
            found=found,
            truth=truth,
            comparison=found.compare(truth),
            model=model,
            loss=evaluate(model, held_out),
            reference_losses=reference_losses(task, join_batches(held_out)),
            settings=settings,
            seconds=time.perf_counter() - started,
        )
        save_result(result)
    return result


@takes(TokensOptions)
def recover_from_tokens(data: str | os.PathLike[str], o: TokensOptions) -> GradientRecovery:
    """Find each position's parent in token sequences of one's own; whether it has one is not decided.

    Raises
    ------
    CausalProbeError
        If the file holds no such tokens (see :func:`read_tokens`), or an argument can't be worked with, also if there are so many states
        that the model would not fit into memory; nothing is written then.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(5), d_vocab=3, concentration=0.1)
    >>> batch = task.sample(2048, tasks.generator(0, "tokens"), targets="hard")
    >>> tokens = torch.cat([batch.tokens, batch.target.argmax(-1, keepdim=True)], dim=1)
    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/tokens.npy", tokens.numpy())
    ...     recover_from_tokens(f"{folder}/tokens.npy").found.decided  # without the transitions nobody knows which nodes are roots
    False
    """
    started = time.perf_counter()
    tokens = read_tokens(data)
    n_positions = tokens.shape[1] - 1
    d_vocab = o.d_vocab or max(2, int(tokens.max()) + 1)
    _check_size(d_vocab, n_positions, 1)
    settings = o.settings(
        method="gradient", data=os.fspath(data), n_positions=n_positions, d_vocab=d_vocab, n_sequences=len(tokens)
    )
    with kept(o, settings) as save_result:
        found = gradient_graph(torch.split(tokens, max(1, AT_ONCE // max(tokens.shape[1], d_vocab))), d_vocab=d_vocab)
        result = GradientRecovery(
            found=found,
            truth=None,
            comparison=None,
            model=_model(found, d_vocab, n_positions),
            loss=None,
            reference_losses=None,
            settings=settings,
            seconds=time.perf_counter() - started,
        )
        save_result(result)
    return result


def read_tokens(path: str | os.PathLike[str]) -> Tensor:
    """Token sequences [sequence, T + 1] from a ``.npy`` file, checked.

    Raises
    ------
    CausalProbeError
        If the file can't be read, holds pickled objects (ragged rows, say: they are not loaded), or is no table of whole numbers
        of at least 0 with at least two sequences of at least four tokens.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise CausalProbeError(f"Can't read {os.fspath(path)}: {error.strerror or 'it is no .npy file'}.") from error
    except (ValueError, EOFError) as error:
        reason = (
            "it holds pickled objects, such as rows of different lengths, which are never loaded"
            if "allow_pickle" in str(error)
            else "it is no .npy file, or is cut short"
        )
        raise CausalProbeError(
            f"Can't use {os.fspath(path)}: {reason}. Save one table with numpy.save(path, tokens)."
        ) from error
    what = None
    if not isinstance(found, np.ndarray):
        what = "an archive of several arrays"
    elif found.dtype.kind not in "iu":
        what = f"numbers of the type {found.dtype}, which are no tokens"
    elif found.ndim != 2 or found.shape[0] < 2 or found.shape[1] < 4:
        what = f"an array of the shape {list(found.shape)}"
    elif int(found.min()) < 0:
        what = f"the token {int(found.min())}"
    elif int(found.max()) >= 2**31:
        what = f"the token {int(found.max())}"
    if what is not None:
        raise CausalProbeError(
            f"{os.fspath(path)} holds {what}. Give whole numbers from 0 on, [sequence, T + 1], at least 2 sequences of 4 tokens; the "
            "last of each is what came after the others."
        )
    return torch.from_numpy(found.astype(np.int64))


def attention(model: DisentangledTransformer) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Layer 1's attention in a model that attends by position, [head, child, parent]."""
    n = model.n_positions
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores = torch.stack([model.block(0, head, query="position", key="position") for head in range(model.heads[0])])
    return np.asarray(scores.double().masked_fill(future, float("-inf")).softmax(-1).numpy())


def _model(found: GradientGraph | GradientSlots, d_vocab: int, n_positions: int) -> DisentangledTransformer:
    """Weights that copy the leading parents in layer 1 and compare in layer 2, all others zero.

    Layer 2 compares the last token (one parent) with what each position copied, or (several) what the last row copied: the tokens of the
    predicted node's parents.
    """
    slots = (
        found.leading.tolist()
        if isinstance(found, GradientSlots)
        else [[-1 if p is None else p for p in found.candidates]]
    )
    model = DisentangledTransformer(d_vocab, n_positions, (max(1, len(slots)), 1))
    eye = torch.eye(d_vocab)
    for head, leading in enumerate(slots):
        block = model.block(0, head, query="position", key="position")
        for child, parent in enumerate(leading):
            if parent >= 0:
                block[child, parent] = STRENGTH
        asked = "token"
        if isinstance(found, GradientSlots):
            block[-1] = 0
            block[-1, found.queries[head]] = STRENGTH
            asked = f"L0H{head}.token"
        model.block(1, 0, query=asked, key=f"L0H{head}.token").copy_(eye)
    model.output_block("L1H0.token").copy_(eye)
    return model


def _check_size(d_vocab: int, n_positions: int, slots: int) -> None:
    """Refuse what the model of :func:`_model` would be too large for, before anything is computed."""
    weights = count_weights(d_vocab, n_positions, (slots, 1))
    if weights > MAX_MODEL:
        raise CausalProbeError(
            f"The model that has the graph would have {weights:,} weights for {d_vocab:,} states and {n_positions:,} positions; {MAX_MODEL:,} are the "
            "most. Take fewer states (of one's own tokens, number those that occur from 0 on), or call gradient_graph, which builds no model."
        )
