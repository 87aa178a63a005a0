"""Which sets of heads are ablated to answer whether they are used, and what comes of it, sequence by sequence."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from causal_probe.hooks import attention_hook
from causal_probe.probes.ablation import Experiment, Head, Laboratory
from causal_probe.probes.baselines import BASELINES, Baseline
from causal_probe.probes.scoring import compile_targets
from causal_probe.probes.templates import Template

__all__ = ["AblationRuns", "Plan", "run_ablations"]


def size(batch: Any) -> int:
    """Number of sequences in a batch."""
    return len(getattr(batch, "tokens", batch))


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sets of heads are ablated. A set is ablated once, whatever it is needed for."""

    flagged: Mapping[str, list[Head]]
    heads: tuple[Head, ...]
    unflagged: tuple[Head, ...]
    random: Mapping[int, list[frozenset[Head]]]

    @classmethod
    def make(cls, heads: Sequence[Head], flagged: Mapping[str, list[Head]], random_sets: int, *, seed: int) -> Plan:
        """What is to be ablated, given all heads and, by template, the flagged ones."""
        suspects = {head for its in flagged.values() for head in its}
        unflagged = tuple(head for head in heads if head not in suspects)
        generator = np.random.default_rng(seed)
        sizes = {len(its) for its in flagged.values()}
        random = {size: _random_sets(unflagged, size, random_sets, generator) for size in sorted(sizes)}
        return cls(flagged, tuple(sorted(suspects)), unflagged, random)

    @property
    def on_all(self) -> list[frozenset[Head]]:
        """The sets that are ablated on all sequences: each flagged head, and each template's heads."""
        sets = [frozenset([head]) for head in self.heads] + [frozenset(its) for its in self.flagged.values()]
        return [each for each in dict.fromkeys(sets) if each]


def _random_sets(heads: Sequence[Head], size: int, count: int, generator: np.random.Generator) -> list[frozenset[Head]]:
    """``count`` different sets of ``size`` of the heads; all that there are, if fewer."""
    if math.comb(len(heads), size) <= count:
        return [frozenset(each) for each in combinations(heads, size)]
    sets: dict[frozenset[Head], None] = {}
    while len(sets) < count:
        sets[frozenset(heads[i] for i in generator.choice(len(heads), size, replace=False))] = None
    return list(sets)


@dataclass(eq=False)
class AblationRuns:
    """The raw numbers, sequence by sequence.

    Attributes
    ----------
    clean
        Losses of the model as it is.
    ablated
        By baseline and set of heads that are replaced by it: losses; of sets that only serve to rank on the first sequences.
    zero, direct
        By flagged head: losses, and direct effects; the first where it was asked for.
    falls
        By baseline, flagged head that is replaced by it, flagged head further up, and template of that: by how much its score falls.
    distance
        By baseline and flagged head: how far it is from what the head puts out, as a share of that.
    n_sequences, ranked
        Number of sequences, and how many of them serve to rank.
    """

    clean: Float[np.ndarray, " sequence"]
    ablated: dict[tuple[Baseline, frozenset[Head]], Float[np.ndarray, " sequence"]]
    zero: Mapping[Head, Float[np.ndarray, " sequence"]]
    direct: Mapping[Head, Float[np.ndarray, " sequence"]]
    falls: Mapping[tuple[Baseline, Head, Head, str], Float[np.ndarray, " sequence"]]
    distance: Mapping[tuple[Baseline, Head], Float[np.ndarray, " sequence"]]
    n_sequences: int
    ranked: int
    ranking: Sequence[Experiment] = field(repr=False)
    batches: Sequence[Any] = field(repr=False)
    _predicted: dict[tuple[Baseline, Head], float] = field(default_factory=dict, init=False, repr=False)

    def rise(
        self, baseline: Baseline, heads: Iterable[Head], *, ranked: bool = False
    ) -> Float[np.ndarray, " sequence"]:
        """Rise of the loss when these heads are replaced; ``ranked``: on the sequences that serve to rank."""
        heads = frozenset(heads)
        losses = self.ablated[baseline, heads] if heads else self.clean
        rise = losses - self.clean[: len(losses)]
        return np.asarray(rise[: self.ranked] if ranked else rise)

    def knows(self, baseline: Baseline, heads: Iterable[Head]) -> bool:
        """Whether these heads were replaced together."""
        return (baseline, frozenset(heads)) in self.ablated

    def rank(self, baseline: Baseline, sets: Iterable[frozenset[Head]], *, progress: bool = False) -> None:
        """Replace the heads of these sets as well, on the sequences that serve to rank."""
        new = [heads for heads in dict.fromkeys(sets) if (baseline, heads) not in self.ablated]
        for heads in tqdm(new, desc="heads to compare with", disable=not progress):
            losses = [experiment.ablate(heads, baseline).loss for experiment in self.ranking]
            self.ablated[baseline, heads] = _joined(losses)

    def ablate(self, sets: Iterable[tuple[Baseline, frozenset[Head]]], *, progress: bool = False) -> None:
        """Replace the heads of these sets by the baseline beside them, on all sequences."""
        new = [each for each in dict.fromkeys(sets) if each[1] and len(self.ablated.get(each, ())) < self.n_sequences]
        found: dict[Any, list[Tensor]] = defaultdict(list)
        first = 0
        for batch in tqdm(self.batches if new else (), desc="heads put back", disable=not progress):
            experiment = Experiment(self.ranking[0].laboratory, batch, first)
            experiment.observe()
            for baseline, heads in new:
                found[baseline, heads].append(experiment.ablate(heads, baseline).loss)
            first += size(batch)
        self.ablated |= {each: _joined(losses) for each, losses in found.items()}

    def predicted(self, baseline: Baseline) -> dict[Head, float]:
        """By head, the rise of the loss that the gradient predicts, on the sequences that serve to rank; all 0 where the model has no gradient."""
        if not self._predicted:
            try:
                found = [experiment.first_order() for experiment in self.ranking]
            except (
                RuntimeError
            ):  # no derivative, no gradient that reaches a head, or too little memory: more heads are drawn
                heads = self.ranking[0].laboratory.heads
                self._predicted = {(each, head): 0.0 for each in BASELINES for head in heads}
            else:
                self._predicted = {key: float(_joined([each[key] for each in found]).mean()) for key in found[0]}
        return {head: value for (each, head), value in self._predicted.items() if each == baseline}


def run_ablations(
    laboratory: Laboratory,
    batches: Sequence[Any],
    plan: Plan,
    templates: Sequence[Template],
    *,
    ranked_on: int,
    zero: bool,
    progress: bool,
) -> AblationRuns:
    """Ablate the sets of a plan that are ablated on all batches; others are left to :meth:`AblationRuns.ablate` and :meth:`~AblationRuns.rank`.

    ``zero``: each flagged head is replaced by zero as well.
    """
    found: dict[str, dict[Any, list[Tensor]]] = {
        kind: defaultdict(list) for kind in ("clean", "ablated", "zero", "direct", "falls", "distance")
    }
    n_sequences = ranked = 0
    ranking: list[Experiment] = []
    total = len(batches) * (len(BASELINES) * len(plan.on_all) + (1 + zero) * len(plan.heads))
    with tqdm(total=total, desc="ablations", disable=not progress) as bar:
        for batch in batches:
            reading = _Reading(templates, plan, getattr(batch, "tokens", batch))
            experiment = Experiment(laboratory, batch, n_sequences, watched=plan.heads, direct=True)
            found["clean"][()].append(experiment.observe(reading.hooks()).loss)
            before = reading.take()
            for baseline, heads in product(BASELINES, plan.on_all):
                source = next(iter(heads)) if len(heads) == 1 else None
                hooks = [] if source is None else reading.hooks(above=source[0])
                found["ablated"][baseline, heads].append(experiment.ablate(heads, baseline, hooks).loss)
                for (target, template), after in reading.take().items():
                    fall = before[target, template] - after
                    found["falls"][baseline, source, target, template].append(fall)
                bar.update()
            for head in plan.heads:
                if zero:
                    found["zero"][head].append(experiment.zero(head).loss)
                if (direct := experiment.direct_effect(head)) is not None:
                    found["direct"][head].append(direct)
                for baseline, distance in experiment.distance(head).items():
                    found["distance"][baseline, head].append(distance)
                bar.update(1 + zero)
            n_sequences += size(batch)
            if not ranking or ranked < ranked_on:
                ranking.append(experiment)
                ranked = n_sequences
    joined = {kind: {what: _joined(its) for what, its in each.items()} for kind, each in found.items()}
    return AblationRuns(
        joined.pop("clean")[()], **joined, n_sequences=n_sequences, ranked=ranked, ranking=ranking, batches=batches
    )


def _joined(values: Sequence[Tensor]) -> Float[np.ndarray, " sequence"]:
    return torch.cat(list(values)).detach().cpu().double().numpy()


class _Reading:
    """The scores of the flagged heads on one batch, read at the hooks of their patterns."""

    def __init__(self, templates: Sequence[Template], plan: Plan, tokens: Tensor) -> None:
        self._names = [template.name for template in templates]
        self._targets = compile_targets(templates, tokens)
        self._rows = torch.cat([targets.rows for targets in self._targets])  # [batch, template]
        self._wanted: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for name, heads in plan.flagged.items():
            for layer, head in heads:
                self._wanted[layer].append((head, name))
        self._found: dict[tuple[Head, str], Tensor] = {}

    def hooks(self, *, above: int = -1) -> list[tuple[str, Callable[..., None]]]:
        """Recorders for the layers above one."""
        layers = [layer for layer in self._wanted if layer > above]
        return [(attention_hook(layer, "pattern"), partial(self._record, layer)) for layer in layers]

    def take(self) -> dict[tuple[Head, str], Tensor]:
        """What was read since it was last taken: scores [batch] by head and template."""
        found, self._found = self._found, {}
        return found

    def _record(self, layer: int, pattern: Float[Tensor, "batch head query key"], hook: Any) -> None:
        heads = sorted({head for head, _ in self._wanted[layer]})
        parts = torch.split(pattern[:, heads], [len(targets.pairs) for targets in self._targets])
        sums = torch.cat([targets.attention(part) for targets, part in zip(self._targets, parts, strict=True)])
        for head, name in self._wanted[layer]:
            column = self._names.index(name)
            rows = self._rows[:, column].clamp(min=1).to(sums)  # a sequence without a row has score 0, before and after
            self._found[(layer, head), name] = sums[:, heads.index(head), column] / rows
