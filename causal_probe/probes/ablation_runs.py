"""Which sets of heads are ablated to answer whether they are used, and what comes of it, sequence by sequence."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from causal_probe.hooks import attention_hook
from causal_probe.probes.ablation import Experiment, Head, Laboratory
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
        """The sets that are ablated on all sequences: each flagged head, each template's heads, and these less one."""
        sets = [frozenset([head]) for head in self.heads]
        for its in self.flagged.values():
            sets += [frozenset(its), *(frozenset(its) - {head} for head in its)]
        return [each for each in dict.fromkeys(sets) if each]

    @property
    def to_rank(self) -> list[frozenset[Head]]:
        """The sets that the others are compared with, on some sequences: each unflagged head, and random sets of them."""
        sets = [frozenset([head]) for head in self.unflagged]
        return list(dict.fromkeys([*sets, *(each for its in self.random.values() for each in its)]))


def _random_sets(heads: Sequence[Head], size: int, count: int, generator: np.random.Generator) -> list[frozenset[Head]]:
    """``count`` different sets of ``size`` of the heads; all that there are, if fewer."""
    if math.comb(len(heads), size) <= count:
        return [frozenset(each) for each in combinations(heads, size)]
    sets: dict[frozenset[Head], None] = {}
    while len(sets) < count:
        sets[frozenset(heads[i] for i in generator.choice(len(heads), size, replace=False))] = None
    return list(sets)


@dataclass(frozen=True, eq=False)
class AblationRuns:
    """The raw numbers, sequence by sequence.

    Attributes
    ----------
    mean
        By set of heads that are ablated by their means; sets that only serve to rank are measured on the first sequences.
    zero, resample, direct
        By flagged head: losses, losses, and direct effects.
    falls
        By flagged head that is ablated, flagged head further up, and template of that: by how much its score falls.
    n_sequences, ranked
        Number of sequences, and how many of them serve to rank.
    """

    mean: Mapping[frozenset[Head], Float[np.ndarray, " sequence"]]
    zero: Mapping[Head, Float[np.ndarray, " sequence"]]
    resample: Mapping[Head, Float[np.ndarray, " sequence"]]
    direct: Mapping[Head, Float[np.ndarray, " sequence"]]
    falls: Mapping[tuple[Head, Head, str], Float[np.ndarray, " sequence"]]
    n_sequences: int
    ranked: int

    def rise(self, heads: Iterable[Head], *, ranked: bool = False) -> Float[np.ndarray, " sequence"]:
        """Rise of the loss when these heads are ablated by their means; ``ranked``: on the sequences that serve to rank."""
        losses = self.mean[frozenset(heads)]
        rise = losses - self.mean[frozenset()][: len(losses)]
        return np.asarray(rise[: self.ranked] if ranked else rise)

    def exceeds(self, heads: Iterable[Head], others: Iterable[Iterable[Head]]) -> float | None:
        """Share of other sets of heads whose ablation hurts less, on the same sequences; None without others."""
        theirs = [self.rise(other, ranked=True).mean() for other in others]
        return float(np.mean(self.rise(heads, ranked=True).mean() > np.array(theirs))) if theirs else None


def run_ablations(
    laboratory: Laboratory,
    batches: Sequence[Any],
    plan: Plan,
    templates: Sequence[Template],
    *,
    ranked_on: int,
    progress: bool,
) -> AblationRuns:
    """Ablate every set of a plan on the batches, those that only serve to rank on so many sequences at least."""
    found: dict[tuple[str, Any], list[Tensor]] = defaultdict(list)
    n_sequences = ranked = 0
    on_all, to_rank = plan.on_all, plan.to_rank
    n_ranking = int(np.searchsorted(np.cumsum([size(batch) for batch in batches]), ranked_on)) + 1
    total = len(batches) * (len(on_all) + 3 * len(plan.heads)) + min(n_ranking, len(batches)) * len(to_rank)
    with tqdm(total=total, desc="ablations", disable=not progress) as bar:
        for index, batch in enumerate(batches):
            reading = _Reading(templates, plan, getattr(batch, "tokens", batch))
            experiment = Experiment(laboratory, batch, frozenset(layer for layer, _ in plan.heads), direct=True)
            found["mean", frozenset()].append(experiment.observe(reading.hooks()).loss)
            before = reading.take()
            for heads in on_all:
                source = next(iter(heads)) if len(heads) == 1 else None
                hooks = [] if source is None else reading.hooks(above=source[0])
                found["mean", heads].append(experiment.mean(heads, hooks).loss)
                for (target, template), after in reading.take().items():
                    found["falls", (source, target, template)].append(before[target, template] - after)
                bar.update()
            for head in plan.heads:
                found["zero", head].append(experiment.zero(head).loss)
                found["resample", head].append(experiment.resample(head).loss)
                if (direct := experiment.direct_effect(head)) is not None:
                    found["direct", head].append(direct)
                bar.update(3)
            n_sequences += size(batch)
            if index < n_ranking:
                ranked = n_sequences
                for heads in to_rank:
                    found["mean", heads].append(experiment.mean(heads).loss)
                    bar.update()
    joined: dict[str, dict[Any, Float[np.ndarray, " sequence"]]] = defaultdict(dict)
    for (kind, what), values in found.items():
        joined[kind][what] = torch.cat(values).detach().cpu().double().numpy()
    kinds = ("mean", "zero", "resample", "direct", "falls")
    return AblationRuns(**{kind: joined[kind] for kind in kinds}, n_sequences=n_sequences, ranked=ranked)


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
