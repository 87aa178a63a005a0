"""A circuit that was found: every tested edge with its effect, its test, and what the circuit is worth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import networkx as nx
import pandas as pd

from causal_probe.arguments import checked
from causal_probe.circuits.known import KnownCircuit
from causal_probe.errors import CausalProbeError
from causal_probe.options.circuit import CircuitOptions
from causal_probe.results import Result, Table

__all__ = ["Agreement", "Attention", "Circuit", "CircuitEdge", "Gate", "Size", "members_of"]


class CircuitEdge(NamedTuple):
    """One tested edge.

    Attributes
    ----------
    source, receiver
        ``L0H1``, ``L1.mlp``, ``embed``; ``L1H0.q``, ``L1.mlp``, ``logits``. Keys and values that heads share have the name of the first of them.
    status
        ``"confirmed"``: the effect is above delta; ``"negative"``: below -delta; ``"negligible"``: its interval lies within them; else ``"undecided"``.
    effect, stderr
        By how much the metric falls when this edge alone is ablated: mean over the prompts of the test, and its standard error.
    low, high
        The interval of the effect, of coverage 1 - 2 level.
    p
        Of "the effect is at most delta", one-sided t-test over prompts, corrected over the tested edges.
    again, again_stderr
        The effect and its standard error on the prompts of the report, of the circuit's edges.
    screened
        The first-order estimate on the prompts of the screen.
    sampled
        Whether it was drawn at random from those that the screen left out.
    """

    source: str
    receiver: str
    status: str
    effect: float
    stderr: float
    low: float
    high: float
    p: float
    again: float | None
    again_stderr: float | None
    screened: float
    sampled: bool


class Gate(NamedTuple):
    """Two edges whose effects together are not the sum of their effects alone.

    Attributes
    ----------
    kind
        ``"or"``: neither is confirmed alone, both together have an effect, and more than the sum of theirs; ``"and"``: of two confirmed edges into one receiver, taking away one takes away what
        the other does.
    first, second
        The edges, ``"L0H0 -> L1H0.v"``.
    effect, stderr
        Together, on the prompts of the test.
    p
        Of "together at most delta" and "together more than the sum by at most delta", the larger (or); of "the sum more than together by at most delta" (and).
        Corrected over the tested pairs.
    """

    kind: str
    first: str
    second: str
    effect: float
    stderr: float
    p: float


class Size(NamedTuple):
    """The circuit of the n first edges, confirmed ones by effect, then those of gates, on the prompts of the report.

    Attributes
    ----------
    edges
        Their number n.
    kept, kept_stderr
        The share of the metric's difference (clean less baseline) that is left when all *other* edges are ablated; 1 for the whole model, 0 for none.
    lost, lost_stderr
        The share that is lost when these alone are ablated.
    random_kept, random_lost
        The same of as many edges drawn at random, a mean over draws.
    """

    edges: int
    kept: float
    kept_stderr: float
    lost: float
    lost_stderr: float
    random_kept: float
    random_lost: float


class Attention(NamedTuple):
    """How much a head of a circuit of one prompt reads from a position where the circuit writes its keys or values.

    Attributes
    ----------
    head
        ``L18H6``.
    query, key
        Positions, from 0.
    share
        The attention there, 0 to 1, in the unchanged run.
    """

    head: str
    query: int
    key: int
    share: float


class Agreement(NamedTuple):
    """The edges of a circuit that was found beside a truth.

    Attributes
    ----------
    precision, recall
        Shares of found edges that are true, and of true edges that are found; None where there are none.
    missing, extra
        True edges that are not found; found edges that are not true.
    """

    precision: float | None
    recall: float | None
    missing: tuple[tuple[str, str], ...]
    extra: tuple[tuple[str, str], ...]


def members_of(confirmed: Sequence[tuple[str, str]], gates: Iterable[Gate]) -> list[tuple[str, str]]:
    """Confirmed edges, and then those of "or" gates.

    >>> members_of([("embed", "logits")], [Gate("or", "L0H0 -> L0.mlp", "L0H1 -> L0.mlp", 1.0, 0.1, 0.0)])
    [('embed', 'logits'), ('L0H0', 'L0.mlp'), ('L0H1', 'L0.mlp')]
    """
    paired = [tuple(edge.split(" -> ")) for gate in gates if gate.kind == "or" for edge in (gate.first, gate.second)]
    return [*dict.fromkeys([*confirmed, *((source, receiver) for source, receiver in paired)])]


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Result):
    """The result of :func:`~causal_probe.circuits.find_circuit`.

    Attributes
    ----------
    edges
        The tested edges, the largest effect first.
    clean, baseline
        The metric without any change, and with every edge ablated: means over the prompts of the report.
    delta
        The smallest effect of interest, in units of the metric.
    level, contrast, metric
        As asked for.
    candidates
        The number of all edges.
    missed
        Of the edges that the screen left out: how many were tested, how many of these were confirmed, and the 95% interval of the share. None where all were tested.
    detectable
        The effect that would be found with probability 0.8 at the smallest level of the correction, by an edge of median standard error.
    sizes
        The circuit kept alone and taken away alone.
    gates
        Pairs of edges that stand in for each other, or need each other.
    text, attention
        Of one prompt: its tokens, and from where the circuit's heads read. Its sources and receivers have positions: ``L16H0@5``. Else empty.
    """

    KIND = "circuit"
    RESULT: ClassVar[str] = "circuit.json"
    WORKS = ("elhage2021",)
    DERIVED = ("kept", "lost")

    edges: tuple[CircuitEdge, ...]
    clean: float
    baseline: float
    delta: float
    level: float
    contrast: str
    metric: str
    candidates: int
    missed: tuple[int, int, float, float] | None
    detectable: float
    sizes: tuple[Size, ...]
    gates: tuple[Gate, ...]
    text: tuple[str, ...] = ()
    attention: tuple[Attention, ...] = ()

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no value."""
        found = {} if self.sizes else dict.fromkeys(("kept", "lost"), "no edge was confirmed")
        return {
            **found,
            "again": "only the circuit's edges are measured again",
            **({"missed": "all edges were tested"} if self.missed is None else {}),
        }

    @property
    def confirmed(self) -> list[tuple[str, str]]:
        """The confirmed edges (source, receiver), the largest effect first."""
        return [(edge.source, edge.receiver) for edge in self.edges if edge.status == "confirmed"]

    @property
    def members(self) -> list[tuple[str, str]]:
        """The circuit's edges: the confirmed ones, and those of "or" gates, which are confirmed in pairs."""
        return members_of(self.confirmed, self.gates)

    @property
    def kept(self) -> float | None:
        """The share of the metric's difference that the circuit's edges (:attr:`members`) alone keep; None where there is none."""
        return self.sizes[-1].kept if self.sizes else None

    @property
    def lost(self) -> float | None:
        """The share that is lost without the circuit's edges; None where there is none."""
        return self.sizes[-1].lost if self.sizes else None

    @property
    def graph(self) -> nx.DiGraph:
        """The circuit's edges (:attr:`members`), source -> receiver, with the fields of :class:`CircuitEdge`."""
        graph, members = nx.DiGraph(), set(self.members)
        for edge in self.edges:
            if (edge.source, edge.receiver) in members:
                graph.add_edge(edge.source, edge.receiver, **edge._asdict())
        return graph

    @property
    def by_component(self) -> nx.DiGraph:
        """The circuit between components: a head's queries, keys and values are one node with its output; ``effect`` is the largest of an edge's ways.

        Of one prompt, a node is a component at a position, and edges between positions have ``attention``.
        """
        graph = nx.DiGraph()
        for source, receiver, edge in self.graph.edges(data=True):
            target = re.sub(r"\.[qkv]\b", "", receiver)
            known = graph.get_edge_data(source, target, {"effect": -math.inf})
            graph.add_edge(source, target, effect=max(known["effect"], edge["effect"]))
        for head, query, key, share in self.attention:
            graph.add_edge(f"{head}@{key}", f"{head}@{query}", attention=share)
        return graph

    @checked
    def compare(self, truth: Any) -> Agreement:
        """The circuit's edges (:attr:`members`) beside a known circuit.

        Parameters
        ----------
        truth
            A :class:`~causal_probe.circuits.KnownCircuit`, of which the edges of this contrast count; or a graph, source -> receiver.

        Raises
        ------
        CausalProbeError
            If it is neither.
        """
        if isinstance(truth, KnownCircuit):
            true = set(truth.edges(self.contrast))
        elif isinstance(truth, nx.DiGraph):
            true = set(truth.edges)
        else:
            raise CausalProbeError(
                f"The truth is a KnownCircuit or a networkx.DiGraph, source -> receiver; it is a {type(truth).__name__}."
            )
        found = set(self.members)
        both = len(found & true)
        return Agreement(
            both / len(found) if found else None,
            both / len(true) if true else None,
            tuple(sorted(true - found)),
            tuple(sorted(found - true)),
        )

    @property
    def call(self) -> str:
        """The Python that gives this result, of the study; of a call of the function, what it is in general."""
        if "prompts_text" in self.settings and "task" not in self.settings:
            asked = ", ".join(repr(self.settings[f"prompts_{name}"]) for name in ("text", "right", "wrong"))
            return f"from causal_probe import circuits\n\ncircuits.prompt_circuit(model, {asked})"
        if "task" not in self.settings:
            return "from causal_probe import circuits\n\ncircuits.find_circuit(model, prompts)"
        named = self.settings.get("model", self.provenance["model"])
        return CircuitOptions.call("model_circuit", self.settings, repr(str(named)))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        n = self.settings["split"]
        correction = {"fdr": "Benjamini and Hochberg", "family-wise": "Holm"}[self.settings["correction"]]
        what, of = ("baselines", f"; one prompt, {len(self.text)} tokens") if self.text else ("prompts", "")
        return (
            f"Of {self.candidates} edges of {self.provenance['model']}{of}, {len(self.edges)} were tested on {n[1]} {what}, after a screen on {n[0]}: the source's part of the "
            f"receiver's input was replaced ({self.contrast}) and all behind computed anew. H0: the metric ({self.metric}) falls by at most {self.delta:.3g}; one-sided "
            f"t-tests over {what}, corrected over the tested edges ({correction}, level {self.level:g}). Effects are reported on {n[2]} further {what} ({self.measured_with})."
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per tested edge, the columns those of :class:`CircuitEdge`."""
        return pd.DataFrame(self.edges, columns=list(CircuitEdge._fields))

    def table(self) -> Table:
        """One row per tested edge; below, what the circuit is worth, what the screen may have missed, and gates."""
        counts = {
            status: sum(edge.status == status for edge in self.edges)
            for status in ("confirmed", "negative", "negligible", "undecided")
        }
        notes = [
            f"{self.metric}: clean {self.clean:.3g}, every edge ablated ({self.contrast}) {self.baseline:.3g}; delta {self.delta:.2g}",
            ", ".join(f"{count} {status}" for status, count in counts.items())
            + f"; effects of {self.detectable:.2g} are found with probability 0.8",
        ]
        if self.sizes:
            last = self.sizes[-1]
            notes.append(
                f"these {last.edges} edges alone keep {last.kept:.2f} of the difference (random ones {last.random_kept:.2f}), without them {last.lost:.2f} is lost (random {last.random_lost:.2f})"
            )
        if self.missed is not None:
            tested, confirmed, low, high = self.missed
            notes.append(
                f"of {tested} edges drawn from those left out by the screen, {confirmed} are confirmed: {low:.1%} to {high:.1%} of them (95%)"
            )
        if unread := self.settings.get("attention_not_read"):
            notes.append(f"queries, keys and values of layers {', '.join(unread)} can't be put in and are no receivers")
        if unread := self.settings.get("mlps_not_read"):
            notes.append(f"{', '.join(unread)}: no receivers, as their input can't be edited alone")
        notes += [f"{gate.kind}: {gate.first} and {gate.second}, together {gate.effect:.3g}" for gate in self.gates[:5]]
        columns = ("source", "receiver", "status", "effect", "stderr", "p", "again")
        rows = [[getattr(edge, name) for name in columns] for edge in self.edges]
        return Table(
            f"Circuit of {self.provenance['model']}: {len(self.edges)} of {self.candidates} edges tested",
            columns,
            rows,
            notes,
        )
