"""A circuit of nodes: the heads and MLPs that a behaviour needs, and how far two such circuits have heads in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from scipy import stats

from causal_probe.arguments import checked
from causal_probe.circuits.known import Edge
from causal_probe.errors import CausalProbeError
from causal_probe.options.circuit import CircuitOptions
from causal_probe.probes.qk_stream import head_of, layer_of
from causal_probe.results import Result, Table

__all__ = ["NodeCircuit", "Overlap", "Sweep"]


class Sweep(NamedTuple):
    """One pass over all nodes.

    Attributes
    ----------
    direction
        ``"backward"``, from the last layer to the first, or ``"forward"``.
    nodes
        How many are left after it.
    kept
        The share of the metric that they keep, on the prompts of the search.
    """

    direction: str
    nodes: int
    kept: float


class Overlap(NamedTuple):
    """Heads that two circuits have in common.

    Attributes
    ----------
    shared
        Their names.
    jaccard
        Their number over that of the heads in either; None if there are none.
    expected
        The mean number of shared heads if the heads of one circuit were drawn at random, as many in each layer as it has.
    p
        P(as many shared heads or more) under that draw, exact (hypergeometric in each layer). H0: which heads of a layer one circuit has tells nothing of the
        other's. What heads of any circuit have in common (heads that write much, say) speaks against H0, too: compare with a circuit of another behaviour.
    """

    shared: tuple[str, ...]
    jaccard: float | None
    expected: float
    p: float


@dataclass(frozen=True, eq=False, repr=False)
class NodeCircuit(Result):
    """The result of :func:`~causal_probe.circuits.prune_nodes`.

    Attributes
    ----------
    nodes
        The heads and MLPs that are left, ``L0H1``, ``L1.mlp``, from the first layer to the last.
    candidates
        The number of all.
    clean, baseline
        The metric without any change, and with every node ablated: means over the prompts of the report.
    kept, kept_stderr
        The share of the clean metric that the circuit alone keeps on the prompts of the report, and its standard error over them; 1 for the whole model.
    random_kept
        The same of random circuits with as many heads in each layer and as many MLPs, by circuit.
    sweeps
        The passes of the search, on prompts of its own.
    edges
        Edges (source, receiver) between what is left, if they were asked for; else None.
    edges_kept, edges_kept_stderr
        The share that these edges alone keep, on the prompts of the report.
    """

    KIND = "node circuit"
    RESULT: ClassVar[str] = "circuit.json"
    WORKS = ("lan2024",)
    DERIVED = ("random_mean",)

    nodes: tuple[str, ...]
    candidates: int
    clean: float
    baseline: float
    kept: float
    kept_stderr: float
    random_kept: tuple[float, ...]
    sweeps: tuple[Sweep, ...]
    edges: tuple[Edge, ...] | None = None
    edges_kept: float | None = None
    edges_kept_stderr: float | None = None

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no value."""
        return (
            dict.fromkeys(("edges", "edges_kept", "edges_kept_stderr"), "edges were not asked for")
            if self.edges is None
            else {}
        )

    @property
    def heads(self) -> tuple[str, ...]:
        """Those of the nodes that are heads."""
        return tuple(name for name in self.nodes if head_of(name) is not None)

    @property
    def random_mean(self) -> float | None:
        """Mean of ``random_kept``; None where no circuit was drawn."""
        return float(np.mean(self.random_kept)) if self.random_kept else None

    @checked
    def overlap(self, other: NodeCircuit) -> Overlap:
        """Heads that this circuit and another one of the same model have in common, beside chance.

        Parameters
        ----------
        other
            A circuit of a model with as many heads in every layer.

        Raises
        ------
        CausalProbeError
            If the models differ in their heads.
        """
        by_layer = list(self.settings["heads"])
        if by_layer != list(other.settings["heads"]):
            raise CausalProbeError(
                "The circuits are of models with different heads, so they have none in common. Compare circuits of one model."
            )
        mine, others = set(self.heads), set(other.heads)
        shared = tuple(name for name in self.heads if name in others)
        law = np.ones(1)
        for layer, count in enumerate(by_layer):
            a, b = (_in_layer(names, layer) for names in (self.heads, other.heads))
            law = np.convolve(law, stats.hypergeom(count, a, b).pmf(np.arange(min(a, b) + 1)))
        return Overlap(
            shared,
            len(shared) / len(mine | others) if mine | others else None,
            float(law @ np.arange(len(law))),
            min(1.0, float(law[len(shared) :].sum())),
        )

    @property
    def call(self) -> str:
        """The Python that gives this result, of the study; of a call of the function, what it is in general."""
        if "task" not in self.settings:
            return "from causal_probe import circuits\n\ncircuits.prune_nodes(model, prompts)"
        return CircuitOptions.call(
            "model_circuit", self.settings, repr(str(self.settings.get("model", self.provenance["model"])))
        )

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        n = self.settings["split"]
        return (
            f"Of {self.candidates} heads and MLPs of {self.provenance['model']}, one after another was ablated for good ({self.settings['contrast']}) if {self.settings['keep']:.0%} of "
            f"the metric ({self.settings['metric']}) of {n[0]} prompts was left, from the last layer to the first and back, until nothing changed; {len(self.nodes)} are left, and their share is "
            f"reported on {n[1]} other prompts, beside {len(self.random_kept)} random circuits with as many heads in each layer ({self.measured_with})."
        )

    def table(self) -> Table:
        """One row per layer that has a node left."""
        layers = sorted({layer_of(name) for name in self.nodes})
        rows: list[tuple[int, str, bool]] = [
            (
                layer,
                " ".join(name for name in self.nodes if layer_of(name) == layer and head_of(name)),
                f"L{layer}.mlp" in self.nodes,
            )
            for layer in layers
        ]
        notes = [
            f"{self.settings['metric']}: clean {self.clean:.3g}, every node ablated ({self.settings['contrast']}) {self.baseline:.3g}",
            f"these {len(self.nodes)} nodes alone keep {self.kept:.2f} ± {self.kept_stderr:.2f} of it on other prompts"
            + (
                f" (random circuits {self.random_mean:.2f}, at most {max(self.random_kept):.2f})"
                if self.random_kept
                else ""
            ),
        ]
        if self.edges is not None:
            notes.append(
                f"{len(self.edges)} edges between them keep {self.edges_kept:.2f} ± {self.edges_kept_stderr:.2f}"
            )
        return Table(
            f"NodeCircuit of {self.provenance['model']}: {len(self.nodes)} of {self.candidates} nodes",
            ("layer", "heads", "mlp"),
            rows,
            notes,
        )


def _in_layer(names: Sequence[str], layer: int) -> int:
    return sum(layer_of(name) == layer for name in names)
