"""A graph that was read from gradients, compared and written as training's is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import networkx as nx
import numpy as np
from jaxtyping import Float

from causal_probe.experiments.recovery import call_of_graph, edges_right, write_recovered
from causal_probe.first_gradient.result import GradientGraph
from causal_probe.first_gradient.slots import GradientSlots
from causal_probe.graphs import GraphComparison
from causal_probe.models import DisentangledTransformer
from causal_probe.options.recover import GradientOptions, TokensOptions
from causal_probe.results import BINARY, UNSAVED, Result, Table

__all__ = ["GradientRecovery"]

#: The number of undecided nodes whose remaining hypotheses the short table lists.
SHOWN_UNDECIDED = 3


@dataclass(frozen=True, eq=False, repr=False)
class GradientRecovery(Result):
    """A graph that was read from gradients, the truth where it is known, and a model that has the graph.

    Attributes
    ----------
    found : GradientGraph or GradientSlots
        With all evidence.
    attention
        Layer 0's attention in the model.
    seconds
        How long it took.
    truth, comparison
        The true graph, and the found graph's distance from it; None for a user's tokens.
    loss, reference_losses
        The model's cross-entropy in nats on fresh sequences, and that of exact predictors; None for a user's tokens.
    model
        A disentangled transformer whose layer 0 attends where the evidence leads, one head per parent, whose layer 1 compares, and
        whose logits are what it attends to. Nothing in it was trained. No file of results holds it: it lies in ``model/`` of the folder.
    """

    KIND = "gradient recovery"
    DERIVED = ("exact", "recovered", "why_undecided")
    RESULT: ClassVar[str] = "result.json"

    found: GradientGraph | GradientSlots
    attention: Float[np.ndarray, "head child parent"] = field(metadata=BINARY)
    seconds: float
    truth: nx.DiGraph | None = None
    comparison: GraphComparison | None = None
    loss: float | None = None
    reference_losses: Mapping[str, float] | None = None
    model: DisentangledTransformer | None = field(default=None, metadata=UNSAVED)

    @property
    def recovered(self) -> nx.DiGraph:
        """The found graph."""
        return self.found.graph

    @property
    def exact(self) -> bool | None:
        """Whether every edge and every root is right, the parents of a predicted node too; None where the truth is not known."""
        return None if self.comparison is None else self.comparison.exact

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is nothing to compare with."""
        return {} if self.truth is not None else {"truth": "the graph behind one's own tokens is not known"}

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
        return call_of_graph("recover_by_gradient", GradientOptions, self.settings, self.truth)

    @property
    def works(self) -> tuple[str, ...]:
        """Reasons for values that are None."""
        return self.found.works

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return self.found.methods

    def table(self) -> Table:
        """The graph, its distance from the truth, and the losses."""
        found = self.found
        what = "edges found" if found.decided else "candidate edges, which nothing tested"
        shown = [(what, str(self.recovered.number_of_edges())), ("sequences", f"{found.n_sequences:,}")]
        if isinstance(found, GradientGraph):
            shown += [
                ("status", found.status),
                *_undecided(found),
                ("unchanged since sequence", f"{found.stable_after:,}"),
            ]
        else:
            queries = ", ".join(map(str, found.queries))
            if found.cut_off:
                queries = f"{queries or 'none was tried'} (cut off, there may be more)"
            shown.append(("query positions", queries or "none carries signal"))
        if self.why_undecided is not None:
            shown.append(("roots", f"not decided: {self.why_undecided}"))
        if self.comparison is not None:
            shown += edges_right(self.comparison)
        if self.loss is not None and self.reference_losses is not None:
            shown.append(("loss of the model, untrained (nats)", f"{self.loss:.4f}"))
            shown += [(f"  {name}", f"{loss:.4f}") for name, loss in self.reference_losses.items()]
        source = self.settings.get("data") or self.settings["graph"]
        title = f"Parents from one gradient over {source}"
        if self.comparison is not None:
            title = f"Recovery of {source} by gradient: {'exact' if self.exact else f'SHD {self.comparison.shd}'}"
        return Table(title, ("what", "value"), [*shown, ("seconds", f"{self.seconds:.1f}")])

    def write_data(self, folder: Path) -> None:
        """Write ``graph.json`` (the truth, where it is known), ``recovered.json``, ``attention.safetensors`` (layer 0's attention in the
        model, and the evidence with its standard error) and ``model/`` beside the JSON.
        """
        arrays = {"layer0.mean": self.attention, "evidence": self.found.evidence}
        if self.found.stderr is not None:
            arrays["evidence.stderr"] = self.found.stderr
        write_recovered(folder, self.truth, self.recovered, self.model, arrays)


def _undecided(found: GradientGraph) -> list[tuple[str, str]]:
    """How many nodes were not decided, and how much is left of what the first few may be; nothing if none was to be."""
    if found.left is None or not found.undecided:
        return []
    first = [
        f"{node}: {len(found.left[node])} of {node + 1} possibilities are left"
        for node in found.undecided[:SHOWN_UNDECIDED]
    ]
    more = ["..."] if len(found.undecided) > SHOWN_UNDECIDED else []
    return [("nodes not decided", f"{len(found.undecided)} ({'; '.join([*first, *more])})")]
