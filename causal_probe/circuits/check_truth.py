"""Whether a known circuit is what it is said to be: true edges have an effect, all others together have none.

Plain hooks on a standard stream, and nothing of the probes that are judged by these circuits. An edge is ablated at its receiver: the source's part of
that input alone is taken away, as it is in the run at hand, and another put in its place; everything behind is computed anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import Count, Seed, Size, checked
from causal_probe.circuits.known import CONTRASTS, Edge, KnownCircuit, sources_of
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import describe, require_hooks, undisturbed
from causal_probe.results import Result, Table

__all__ = ["Runs", "TruthCheck", "ablate", "check_truth", "parts_of"]

#: What gives the parts that are put in the place of a source's: made where they are used, so that thousands of edges fit into memory.
Donor: TypeAlias = Callable[[], Float[Tensor, "batch pos d_model"]]


#: Of its effect without those that stand in for it, what an edge has alone at most.
LITTLE = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class TruthCheck(Result):
    """What ablating edges does to a known circuit's metric.

    Attributes
    ----------
    name, contrast
        Of the circuit; by what the parts are replaced.
    effects
        By true edge ``"source -> receiver"``, the largest change of the metric on any sequence, of one that stands in for others with those
        ablated beside it.
    alone
        The same of edges that stand in for each other, each ablated alone: what an OR gate hides.
    outside
        By edge that has no effect under this contrast by the truth but is in it under another, or is constant, its largest change.
    others
        The largest change when all edges are ablated together that are not in the truth of this contrast (nor, under "zero", constant).
    baseline
        The largest change when every edge is ablated.
    clean
        The mean of the metric without any change.
    without_effect
        The true edges whose largest change is at most ``tolerance`` times the baseline.
    """

    KIND: ClassVar[str] = "truth-check"

    name: str
    contrast: str
    effects: dict[str, float]
    alone: dict[str, float]
    outside: dict[str, float]
    others: float
    baseline: float
    clean: float
    without_effect: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every true edge has an effect, all others together have none, and edges that stand in for each other have little alone.

        Little is a tenth: with norms, what an edge of an OR gate changes may still change the norm's scale.
        """
        stand_in = all(effect <= LITTLE * self.effects[edge] for edge, effect in self.alone.items())
        return not self.without_effect and stand_in and self.others <= self.settings["tolerance"] * self.baseline

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Each edge of {self.name} was ablated alone (contrast: {self.contrast}) on {self.settings['n_sequences']} sequences, and all others together; "
            f"an effect is a change of the metric by more than {self.settings['tolerance']:g} of the change when every edge is ablated."
        )

    def table(self) -> Table:
        """One row per true edge."""
        rows = [(edge, effect, self.alone.get(edge)) for edge, effect in self.effects.items()]
        return Table(
            f"{self.name}, {self.contrast}: {'holds' if self.holds else 'does not hold'}",
            ("edge", "effect", "alone"),
            rows,
            [f"all other edges together {self.others:.3g}; every edge {self.baseline:.3g}"],
        )


@checked
def check_truth(
    circuit: KnownCircuit,
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    contrast: str = "resample",
    n_sequences: Count = 64,
    tolerance: Size = 1e-5,
    draws: Count = 2,
    seed: Seed = 0,
) -> TruthCheck:
    """Ablate every true edge of a circuit alone, and all others together.

    Parameters
    ----------
    tokens
        On which sequences, all that there are for instance; None: ``n_sequences`` are drawn.
    contrast
        One of ``"resample"``, ``"mean"``, ``"mean-by-position"``, ``"zero"`` (:class:`~causal_probe.circuits.KnownCircuit`).
    n_sequences
        How many sequences are drawn.
    tolerance
        The share of the change when every edge is ablated up to which a change is none: rounding.
    draws
        How often parts are drawn anew, for ``"resample"``.
    seed
        Of the sequences and the draws.

    Raises
    ------
    CausalProbeError
        If there is no such contrast, or the model is no standard transformer with inputs of its own for queries, keys, values and MLPs.

    Examples
    --------
    >>> from causal_probe.circuits import known_circuit
    >>> found = check_truth(known_circuit("value-composition"))
    >>> found.holds, len(found.effects)
    (True, 7)
    """
    if tokens is not None and len(tokens) < 2:
        raise CausalProbeError("Parts are taken from other sequences: give two or more.")
    if contrast not in CONTRASTS:
        raise CausalProbeError(f"Unknown contrast {contrast!r}; choose from {', '.join(CONTRASTS)}.")
    model = circuit.model
    generator = torch.Generator().manual_seed(seed)
    tokens = circuit.sample(n_sequences, generator) if tokens is None else tokens
    with undisturbed(model):
        run = Runs(circuit, tokens, contrast, generator, draws if contrast == "resample" else 1)
        truth = circuit.edges(contrast)
        partners: dict[Edge, tuple[Edge, ...]] = {
            edge: circuit.truth.edges[edge].get("redundant_with", ()) for edge in truth
        }
        effects = {_shown(edge): run.change([edge, *partners[edge]]) for edge in truth}
        alone = {_shown(edge): run.change([edge]) for edge in truth if partners[edge]}
        known = [*circuit.truth.edges, *circuit.constant]
        outside = {_shown(edge): run.change([edge]) for edge in known if edge not in truth}
        everything = circuit.candidates()
        # What is the same everywhere is missed where it becomes zero.
        aside = {*truth, *(circuit.constant if contrast == "zero" else ())}
        others = run.change([edge for edge in everything if edge not in aside])
        baseline = run.change(everything)
    return TruthCheck(
        circuit.name,
        contrast,
        effects,
        alone,
        outside,
        others,
        baseline,
        run.clean,
        tuple(edge for edge, effect in effects.items() if effect <= tolerance * baseline),
        settings={"n_sequences": len(tokens), "tolerance": tolerance, "draws": draws, "seed": seed},
        provenance=describe(model),
    )


def _shown(edge: Edge) -> str:
    return f"{edge[0]} -> {edge[1]}"


class Runs:
    """The model on some tokens, clean and with edges ablated."""

    def __init__(
        self, circuit: KnownCircuit, tokens: Int[Tensor, "batch pos"], contrast: str, generator: torch.Generator, draws: int
    ) -> None:  # fmt: skip
        self.model, self.metric, self.tokens = circuit.model, circuit.metric, tokens
        self.contrast, self.generator = contrast, generator
        self.parts = parts_of(self.model, tokens)
        #: By draw and edge, in which order the parts of other sequences and positions are taken.
        self.donors: list[dict[Edge, Donor]] = [{} for _ in range(draws)]
        self.before = self.metric(self.model(tokens), tokens)
        self.clean = float(self.before.mean())

    def change(self, edges: Collection[Edge]) -> float:
        """The largest change of the metric on any sequence and draw."""
        if not edges:
            return 0.0
        largest = 0.0
        for drawn in self.donors:
            for edge in edges:
                if edge not in drawn:
                    drawn[edge] = self._donor(self.parts[edge[0]])
            after = ablate(self.model, self.tokens, {edge: drawn[edge] for edge in edges}, self.metric)
            largest = max(largest, float((after - self.before).abs().max()))
        return largest

    def _donor(self, part: Float[Tensor, "batch pos d_model"]) -> Donor:
        """What gives the parts of a source that replace its own; of other sequences and positions, only their order is kept."""
        if self.contrast == "zero":
            return lambda: torch.zeros_like(part)
        if self.contrast == "mean-by-position":
            return lambda: part.mean(0, keepdim=True).expand_as(part)
        later = part[:, 1:]
        if self.contrast == "mean":
            return lambda: torch.cat([part[:, :1], later.mean((0, 1)).expand_as(later)], 1)
        # Each goes to the place of another one: a random order, taken round in a circle.
        n = later.shape[0] * later.shape[1]
        order = torch.randperm(n, generator=self.generator)
        taken = torch.empty_like(order)
        taken[order] = order.roll(1)
        return lambda: torch.cat([part[:, :1], later.flatten(0, 1)[taken.to(part.device)].reshape(later.shape)], 1)


# ----------------------------------------------------------------------------------------------------------------- plain hooks


def parts_of(model: Any, tokens: Int[Tensor, "batch pos"]) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    """What each source writes."""
    found: dict[str, Tensor] = {}
    model.run_with_hooks(tokens, fwd_hooks=_watching(model, sources_of(model), found))
    return found


def _watching(model: Any, sources: Iterable[str], found: dict[str, Tensor]) -> list[tuple[str, Callable[..., None]]]:
    """Hooks that note what sources write, in ``found``."""
    of_heads: dict[int, list[int]] = defaultdict(list)
    hooks: list[tuple[str, Callable[..., None]]] = []

    def note(source: str) -> Callable[..., None]:
        def look(value: Tensor, hook: Any) -> None:
            found[source] = value

        return look

    def note_heads(layer: int) -> Callable[..., None]:
        def look(z: Tensor, hook: Any) -> None:
            W_O = model.blocks[layer].attn.W_O
            for head in of_heads[layer]:
                found[f"L{layer}H{head}"] = z[:, :, head] @ W_O[head]

        return look

    for source in sources:
        if source in ("embed", "pos_embed"):
            hooks.append((f"hook_{source}", note(source)))
        elif source.endswith(".mlp"):
            hooks.append((f"blocks.{source[1:-4]}.hook_mlp_out", note(source)))
        else:
            layer, _, head = source[1:].partition("H")
            of_heads[int(layer)].append(int(head))
    return hooks + [(f"blocks.{layer}.attn.hook_z", note_heads(layer)) for layer in of_heads]


def ablate(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    donors: Mapping[Edge, Donor],
    metric: Callable[[Tensor, Tensor], Tensor],
) -> Float[Tensor, " batch"]:
    """The metric when some edges are ablated at once.

    Parameters
    ----------
    donors
        By edge, what gives the parts [batch, pos, d_model] that the receiver gets in the place of what the source writes in this run.
    """
    now: dict[str, Tensor] = {}
    by_receiver: dict[str, dict[str, Donor]] = defaultdict(dict)
    for (source, receiver), donor in donors.items():
        by_receiver[receiver][source] = donor

    def replace(parts: Mapping[str, Donor], head: int | None) -> Callable[..., Tensor]:
        def edit(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            at = value if head is None else value[:, :, head]
            for source, donor in parts.items():
                at += donor() - now[source]
            return value

        return edit

    hooks: list[tuple[str, Callable[..., Any]]] = [*_watching(model, {source for source, _ in donors}, now)]
    for receiver, parts in by_receiver.items():
        if receiver == "logits":
            hooks.append((f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", replace(parts, None)))
        elif receiver.endswith(".mlp"):
            hooks.append((f"blocks.{receiver[1:-4]}.hook_mlp_in", replace(parts, None)))
        else:
            place, _, side = receiver.partition(".")
            layer, _, head = place[1:].partition("H")
            hooks.append((f"blocks.{layer}.hook_{side}_input", replace(parts, int(head))))
    require_hooks(model, [name for name, _ in hooks])
    return metric(model.run_with_hooks(tokens, fwd_hooks=hooks), tokens)
