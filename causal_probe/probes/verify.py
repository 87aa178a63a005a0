"""Does the model use what a head attends to? A causal check of the heads that a scan has flagged.

Attention is no evidence of use, and one ablation is none either: later layers repair, and heads stand in for one another. So
each flagged head is asked four questions, and what it is called follows from the answers (:class:`Rule`):

(a) Does it attend where the template says, surely, by more than chance?
(b) Does ablating it alone hurt, and more than ablating nearly all heads that were not flagged, in all layers?
(c) Does its own output raise the target's logit, when nothing after it may react?
(d) Does ablating all flagged heads together hurt, more than ablating random sets of as many unflagged heads; and does putting
    this one head back, while the others stay ablated, help?

=================  ==============================
verdict            answers
=================  ==============================
**causal**         a and b
**redundant**      a, c and d, not b
**attends only**   a, and neither of the above
=================  ==============================

The effects are measured on sequences of their own, not on those on which the heads were flagged.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import HookedModel, attention_hook, describe, each_batch, undisturbed
from causal_probe.hooks.record import micro_batches
from causal_probe.probes.ablation import Experiment, Head, Laboratory, Measure, Measured, next_token
from causal_probe.probes.head_scores import CALLED, HeadScores
from causal_probe.probes.p_values import holm, t_interval, t_p_value
from causal_probe.probes.scoring import compile_targets
from causal_probe.probes.sequences import repeated_tokens
from causal_probe.probes.templates import Template
from causal_probe.results import Citation, cite, escape, to_jsonable, versions

__all__ = ["Estimate", "HeadVerdict", "JointEffect", "Measured", "Rule", "Verification", "next_token", "verify"]

#: What a head can be replaced by. The mean decides: a zero may lie far from anything the model has seen, and another sequence's
#: output adds its own content.
KINDS = ("mean", "zero", "resample")


@dataclass(frozen=True)
class Rule:
    """Every constant of the verdicts.

    Attributes
    ----------
    level
        All tests are one-sided t-tests over sequences, paired where two runs are compared. A p-value counts if it is at most
        this after Holm's correction over everything that the same question was asked of: (a) all heads and verified templates;
        (b), (c) the flagged heads; (d) the templates for the joint effect, the flagged heads and their templates for putting
        one back; for dependence all pairs of flagged heads.
    minimum_excess
        (a): the excess is above this. (The same that a scan calls a head by.)
    minimum_effect
        (b), (c), (d): the rise of the loss in nats, or the target's logit, is above this: what is smaller is of no consequence,
        however sure.
    rank
        (b): the effect is larger than that of this share of all unflagged heads of all layers, on the same sequences. Where
        there are none, this is not asked.
    joint_rank
        (d): the joint effect is larger than that of this share of the random sets. Where there are none, this is not asked.
    minimum_fall
        Dependence: ablating one head lowers the other's score by more than this.
    """

    level: float = 0.01
    minimum_excess: float = CALLED
    minimum_effect: float = 0.01
    rank: float = 0.95
    joint_rank: float = 0.99
    minimum_fall: float = 0.05


class Estimate(NamedTuple):
    """A mean over sequences, its standard error, and the p-value of its being above the rule's minimum, after correction."""

    value: float
    stderr: float
    p_value: float


class HeadVerdict(NamedTuple):
    """What was found of one flagged head and template. Effects are rises of the loss in nats; what is undefined is None.

    Attributes
    ----------
    layer, head
        Counted from 0.
    template
        What the head was flagged for.
    verdict
        ``"causal"``, ``"redundant"`` or ``"attends only"``.
    excess
        (a) Attention on the targets above chance, from the scan.
    interval
        Its 95% confidence interval.
    effect
        (b) Rise of the loss when the head's output is replaced by its mean at each position.
    exceeds
        Share of the unflagged heads of all layers whose effect is smaller, on the sequences on which these were ablated. None
        without unflagged heads.
    zero_effect, resample_effect
        The same rise when the output is replaced by zero, and by that in another sequence.
    direct_effect
        (c) By how much the head's output itself, over its mean, raises the target's logit (less the vocabulary's mean logit),
        everything after it held as it was. None where that can't be measured; see :attr:`Verification.undefined`.
    restored
        (d) Fall of the loss when, of all heads flagged for the template, only this one is left in.
    """

    layer: int
    head: int
    template: str
    verdict: str
    excess: Estimate
    interval: tuple[float, float]
    effect: Estimate
    exceeds: float | None
    zero_effect: Estimate
    resample_effect: Estimate
    direct_effect: Estimate | None
    restored: Estimate

    @property
    def name(self) -> str:
        """Such as ``"L18H6"``."""
        return _name((self.layer, self.head))


@dataclass(frozen=True, eq=False)
class JointEffect:
    """(d) All heads flagged for a template ablated together, by their means.

    Attributes
    ----------
    template, heads
        The template and its flagged heads.
    effect
        Rise of the loss in nats.
    random
        Mean rise for each random set of as many unflagged heads of all layers, on the sequences on which these were ablated.
    exceeds
        Share of the random sets whose effect is smaller, on the same sequences; None without any.
    """

    template: str
    heads: tuple[Head, ...]
    effect: Estimate
    random: Float[np.ndarray, " set"]
    exceeds: float | None


@dataclass(frozen=True, eq=False, repr=False)
class Verification:
    """What :func:`verify` found.

    Attributes
    ----------
    verdicts
        One for each flagged head and template, by template in the order of the scan, largest excess first.
    joint
        By template, the joint effect of its flagged heads.
    unflagged
        By head that was not flagged, the mean rise of the loss when it is ablated by its mean, in nats.
    dependence
        A directed graph of the flagged heads, named ``"L18H6"``, with ``layer``, ``head`` and ``verdicts`` (by template). An edge
        u -> v with ``fall``, ``stderr``, ``p_value``, ``template``: ablating u lowers the score of v, by more than the rule's
        minimum; of several templates that with the largest fall.
    loss
        The loss of the model as it is, sequence by sequence, in nats.
    rule
        The constants of the verdicts.
    undefined
        Reasons for what is None.
    settings
        Sequences, and the number of forward passes that it took.
    provenance
        The model's name, dtype and device, and the versions of the packages.
    """

    verdicts: tuple[HeadVerdict, ...]
    joint: Mapping[str, JointEffect]
    unflagged: Mapping[Head, float]
    dependence: nx.DiGraph
    loss: Float[np.ndarray, " sequence"]
    rule: Rule
    undefined: Mapping[str, str]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def of(self, layer: int, head: int, template: str) -> HeadVerdict | None:
        """The verdict on one head and template; None if it was not flagged."""
        return next((found for found in self.verdicts if found[:3] == (layer, head, template)), None)

    def called(self, verdict: str) -> tuple[HeadVerdict, ...]:
        """The heads with this verdict.

        Raises
        ------
        CausalProbeError
            If there is no such verdict.
        """
        if verdict not in VERDICTS:
            raise CausalProbeError(f"There is no verdict {verdict!r}; there is {', '.join(VERDICTS)}.")
        return tuple(found for found in self.verdicts if found.verdict == verdict)

    def to_pandas(self) -> pd.DataFrame:
        """One row per verdict; an estimate takes three columns, ``x``, ``x_stderr``, ``x_p_value``. What is undefined is NaN."""
        columns = ["layer", "head", "template", "verdict", "exceeds", "low", "high"]
        columns += [name + suffix for name in ESTIMATES for suffix in ("", "_stderr", "_p_value")]
        table = pd.DataFrame([_flat(found) for found in self.verdicts], columns=columns)
        return table.astype(dict.fromkeys(columns[4:], float))

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain JSON types: ``heads``, ``joint``, ``unflagged``, ``dependence``, ``rule``, ``settings``, ``versions``."""
        heads = []
        for found in self.verdicts:
            fields = found._asdict()
            estimates = {name: None if fields[name] is None else fields[name]._asdict() for name in ESTIMATES}
            heads.append({**fields, **estimates})
        joint = [
            {
                "template": found.template,
                "heads": [list(head) for head in found.heads],
                "effect": found.effect._asdict(),
                "random": found.random,
                "exceeds": found.exceeds,
            }
            for found in self.joint.values()
        ]
        rest = {key: value for key, value in self.provenance.items() if key != "versions"}
        return dict(
            to_jsonable(
                {
                    **rest,
                    "heads": heads,
                    "joint": joint,
                    "unflagged": [
                        {"layer": layer, "head": head, "effect": value}
                        for (layer, head), value in self.unflagged.items()
                    ],
                    "dependence": self.dependence,
                    "loss": float(self.loss.mean()) if len(self.loss) else None,
                    "rule": asdict(self.rule),
                    "undefined": self.undefined,
                    "settings": self.settings,
                    "versions": self.provenance["versions"],
                }
            )
        )

    def cite(self) -> Citation:
        """The paper that the check follows, and one sentence for a methods section."""
        rule, number_of = self.rule, self.provenance["versions"]
        return cite(
            "olsson2022",
            methods=(
                f"A head of {self.provenance['model']} was flagged if its excess attention on a template's targets was above "
                f"{rule.minimum_excess:g}, and called causal if mean ablation raised the loss by more than {rule.minimum_effect:g} "
                f"nats and more than for {rule.rank:.0%} of the unflagged heads of all layers; redundant if instead its own output "
                "raised the target's logit, leaving it alone in lowered the loss, and joint ablation of the flagged heads hurt more "
                f"than {rule.joint_rank:.0%} of random sets of as many heads (paired one-sided t-tests over {len(self.loss)} "
                f"sequences, Holm-corrected, level {rule.level:g}; causal-probe {number_of.get('causal-probe', 'from source')}, "
                f"TransformerLens {number_of['transformer-lens']}, {self.provenance['dtype']} on {self.provenance['device']})."
            ),
        )

    def __repr__(self) -> str:
        lines = [self._title()]
        if self.verdicts:
            header = "  head    template         verdict       excess  effect          exceeds  direct  restored"
            lines += [header, *(f"  {self._row(found)}" for found in self.verdicts)]
        return "\n".join([*lines, *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        shown = ["layer", "head", "template", "verdict", "excess", "low", "high", "effect", "effect_stderr", "exceeds"]
        table = self.to_pandas()[[*shown, "direct_effect", "restored"]]
        notes = "".join(f"<p>{escape(note)}</p>" for note in self._notes())
        return (
            f"<p>{escape(self._title())}</p>"
            f"{table.to_html(index=False, float_format='{:.3f}'.format, na_rep='', border=0)}{notes}"
        )

    def _title(self) -> str:
        title = f"Verification of {self.provenance['model']}: {len(self.verdicts)} flagged"
        if not self.verdicts:
            return f"{title}, nothing to verify"
        return f"{title}, loss {self.loss.mean():.3f} on {len(self.loss)} sequences, {len(self.unflagged)} heads not flagged"

    def _row(self, found: HeadVerdict) -> str:
        exceeds = "-" if found.exceeds is None else f"{found.exceeds:.1%}"
        direct = "-" if found.direct_effect is None else f"{found.direct_effect.value:.2f}"
        effect = f"{found.effect.value:.3f} ± {found.effect.stderr:.3f}"
        return (
            f"{found.name:<7} {found.template:<16} {found.verdict:<13} {found.excess.value:>6.3f}  {effect:<15} {exceeds:>7}  "
            f"{direct:>6}  {found.restored.value:>8.3f}"
        )

    def _notes(self) -> list[str]:
        notes = []
        for found in self.joint.values():
            beyond = (
                "" if found.exceeds is None else f", more than {found.exceeds:.0%} of {len(found.random)} random sets"
            )
            plural = "s" if len(found.heads) > 1 else ""
            notes.append(
                f"{found.template}: {len(found.heads)} head{plural} together {found.effect.value:.3f} ± {found.effect.stderr:.3f}{beyond}"
            )
        return notes + [f"{what}: {why}" for what, why in self.undefined.items()]


VERDICTS = ("causal", "redundant", "attends only")
ESTIMATES = ("excess", "effect", "zero_effect", "resample_effect", "direct_effect", "restored")


def verify(
    scores: HeadScores,
    model: HookedModel,
    tokens: Any = None,
    *,
    templates: Iterable[str] | None = None,
    measure: Measure | None = None,
    reference: Any = None,
    rule: Rule = Rule(),
    sequences: int = 8,
    period: int | None = None,
    ranked_on: int = 2,
    random_sets: int = 100,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Verification:
    """Ask of each head that a scan has flagged whether the model uses it: causal, redundant, or attends only.

    The questions, and how the verdict follows from them, are at the head of this module; the constants are those of
    :class:`Rule`.

    *Mean ablation* replaces what a head reads out of the stream (``hook_z``) at each position by its mean over other sequences *at that
    position*. So what is taken away is what depends on the tokens; what the head writes there anyway, in the second copy for instance,
    stays. One mean over sequences and positions takes that away as well and gives larger effects: on SmolLM2-135M (4-bit Instruct file,
    8 sequences) 0.91 nats where this gives 0.19 for L17H3, 1.88 and 1.54 for L18H6, 0.14 and 0.01 for L17H4.

    The cost: each unflagged head and each random set is run once on ``ranked_on`` sequences; each flagged head four times on all of
    them, and once more for each template. Layers below the first ablated head are not run again. On SmolLM2-135M (270 heads; 11 flagged
    for two templates) with six sequences that was 650 forward passes of 2 sequences of 101 tokens, most of them halved: six minutes
    of one CPU core. Shorter periods cost less and say less: with few tokens to go by, that model hardly copies.
    If nothing is flagged, the model is not run.

    Parameters
    ----------
    scores
        What :func:`~causal_probe.probes.scan` found in this model.
    model
        The model. It is run in evaluation mode without gradients, with the caller's own hooks, and is left as it was.
    tokens
        Sequences to measure on, other than those of the scan: tokens [batch, pos], or an iterable of such tensors (or of
        anything with ``.tokens`` that ``measure`` understands), all of one length. By default repeated random tokens that are
        drawn anew, with a BOS token if the scan had one.
    templates
        Names of the templates whose heads are verified, of those that were scanned; by default all but ``current-token``,
        ``first-token`` and those of n-grams.
    measure
        What is asked of the model, ``measure(logits, batch) -> Measured``, with the loss of each sequence and the logit of its target.
        By default the loss of the next token: on the tokens made here, that of the second copy (and of those after it) but its
        first token, otherwise at all positions; :func:`next_token` makes others.
    reference
        Sequences over which the heads' means are taken, of the same length; by default ``tokens``, or as many again, at least 16,
        where they are made here.
    rule
        The constants of the verdicts.
    sequences, period, seed
        Of the tokens that are made; see :func:`~causal_probe.probes.repeated_tokens`. By default the period is 50, or what the
        model holds, and the seed one more than the scan's.
    ranked_on
        On how many sequences, at least, unflagged heads and random sets are ablated.
    random_sets
        How many random sets of unflagged heads are ablated for each number of flagged ones.
    batch_size
        Sequences in a forward pass, >= 2; by default as many as keep patterns and logits within 256 MiB.
    progress
        Show a bar.

    Raises
    ------
    CausalProbeError
        If the scores are of other heads or had one sequence only, a template was not scanned, an argument is out of range, the
        heads of the model can't be ablated, or a loss is not finite.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> from causal_probe.probes import scan
    >>> model = DisentangledTransformer(d_vocab=12, n_positions=24)                        # an ideal induction circuit:
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)     # each token looks one back,
    >>> _ = model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)        # then for itself before a token,
    >>> _ = model.output_block("L1H0.token").diagonal().fill_(9)                           # and says that token
    >>> scores = scan(model, templates=["previous-token", "induction"], period=10)
    >>> verify(scores, model, period=10).called("causal")[1].name
    'L1H0'
    """
    names = _check(scores, model, templates, sequences, ranked_on, random_sets, batch_size)
    excesses, flagged = _flag(scores, names, rule)
    provenance = {**describe(model), "versions": versions()}
    if not flagged:
        nothing = np.zeros(0)
        return Verification(
            (), {}, {}, nx.DiGraph(), nothing, rule, {}, {"templates": names, "forwards": 0}, provenance
        )

    settings: dict[str, Any] = {"templates": names}
    if tokens is None:
        made = _make(scores, model, sequences, period, seed)
        tokens, spare, begin, settings["tokens"] = made
        reference = spare if reference is None else reference
        measure = next_token(range(begin, tokens.shape[1] - 1)) if measure is None else measure
    batches = _batches(model, tokens, batch_size, ranked_on)
    with undisturbed(model):
        laboratory = Laboratory(
            model,
            next_token() if measure is None else measure,
            reference=batches if reference is None else list(_batches(model, reference, batch_size, 0)),
            example=_example(batches),
        )
        if [len(row) for row in _by_layer(laboratory.heads)] != list(scores.heads):
            raise CausalProbeError("The scores are of a model with other heads than this one's.")
        plan = _Plan.make(
            laboratory.heads, flagged, random_sets, seed=settings.get("tokens", {}).get("seed", seed or 0)
        )
        evidence = _measure(
            laboratory, batches, plan, [t for t in scores.templates if t.name in names], ranked_on, progress
        )
    settings |= {
        "sequences": evidence.count,
        "ranked_on": evidence.ranked,
        "random_sets": random_sets,
        "forwards": laboratory.forwards,
        "replays": laboratory.replays,
    }
    undefined = {}
    if laboratory.no_direct is not None:
        undefined["direct_effect"] = laboratory.no_direct
    if not plan.unflagged:
        undefined["exceeds"] = "there are no unflagged heads to compare with"
    for template, heads in flagged.items():
        if not plan.random[len(heads)]:
            undefined[f"{template}: random sets"] = f"there are only {len(plan.unflagged)} unflagged heads"
    joint = _joint(evidence, plan, rule)
    verdicts = _verdicts(evidence, plan, excesses, joint, rule)
    return Verification(
        verdicts=verdicts,
        joint=joint,
        unflagged={head: float(evidence.rise([head]).mean()) for head in plan.unflagged},
        dependence=_dependence(evidence, verdicts, rule),
        loss=evidence.losses[frozenset()],
        rule=rule,
        undefined=undefined,
        settings=settings,
        provenance=provenance,
    )


# ------------------------------------------------------------------------------------------------------- (a) who is flagged


class _Excess(NamedTuple):
    estimate: Estimate
    interval: tuple[float, float]


def _flag(
    scores: HeadScores, names: Sequence[str], rule: Rule
) -> tuple[dict[tuple[Head, str], _Excess], dict[str, list[Head]]]:
    """The excess of every head and template with its corrected p-value; and by template the heads that are flagged."""
    found = [score for score in scores if score.template in names and score.excess is not None]
    if any(score.excess_stderr is None for score in found):
        raise CausalProbeError("An excess on one sequence has no standard error; scan two sequences or more.")
    # Both are numbers: what is None has been left out, or raised.
    raw = [
        t_p_value(score.excess or 0, score.excess_stderr or 0, score.sequences, above=rule.minimum_excess)
        for score in found
    ]
    excesses, flagged = {}, defaultdict(list)
    for score, p_value in zip(found, holm(np.array(raw)), strict=True):
        value, stderr = score.excess or 0.0, score.excess_stderr or 0.0
        head = (score.layer, score.head)
        estimate = Estimate(value, stderr, float(p_value))
        excesses[head, score.template] = _Excess(estimate, t_interval(value, stderr, score.sequences))
        if p_value <= rule.level:
            flagged[score.template].append(head)
    return excesses, {name: flagged[name] for name in names if name in flagged}


# ------------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which sets of heads are ablated. A set is ablated once, whatever it is needed for."""

    flagged: Mapping[str, list[Head]]
    heads: tuple[Head, ...]
    unflagged: tuple[Head, ...]
    random: Mapping[int, list[frozenset[Head]]]

    @classmethod
    def make(cls, heads: Sequence[Head], flagged: Mapping[str, list[Head]], random_sets: int, *, seed: int) -> _Plan:
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
class _Evidence:
    """The raw numbers, sequence by sequence.

    Attributes
    ----------
    losses
        By set of heads that are ablated by their means; sets that only serve to rank are measured on the first sequences.
    zero, resample, direct
        By flagged head: losses, losses, and direct effects.
    falls
        By flagged head that is ablated, flagged head further up, and template of that: by how much its score falls.
    count, ranked
        Number of sequences, and how many of them serve to rank.
    """

    losses: Mapping[frozenset[Head], Float[np.ndarray, " sequence"]]
    zero: Mapping[Head, Float[np.ndarray, " sequence"]]
    resample: Mapping[Head, Float[np.ndarray, " sequence"]]
    direct: Mapping[Head, Float[np.ndarray, " sequence"]]
    falls: Mapping[tuple[Head, Head, str], Float[np.ndarray, " sequence"]]
    count: int
    ranked: int

    def rise(self, heads: Iterable[Head], *, ranked: bool = False) -> Float[np.ndarray, " sequence"]:
        """Rise of the loss when these heads are ablated by their means; ``ranked``: on the sequences that serve to rank."""
        losses = self.losses[frozenset(heads)]
        rise = losses - self.losses[frozenset()][: len(losses)]
        return np.asarray(rise[: self.ranked] if ranked else rise)

    def exceeds(self, heads: Iterable[Head], others: Iterable[Iterable[Head]]) -> float | None:
        """Share of other sets of heads whose ablation hurts less, on the same sequences; None without others."""
        theirs = [self.rise(other, ranked=True).mean() for other in others]
        return float(np.mean(self.rise(heads, ranked=True).mean() > np.array(theirs))) if theirs else None


def _measure(
    laboratory: Laboratory,
    batches: Sequence[Any],
    plan: _Plan,
    templates: Sequence[Template],
    ranked_on: int,
    progress: bool,
) -> _Evidence:
    losses: dict[Any, list[Tensor]] = defaultdict(list)
    others: dict[Any, list[Tensor]] = defaultdict(list)
    count = ranked = 0
    on_all, to_rank = plan.on_all, plan.to_rank
    n_ranking = int(np.searchsorted(np.cumsum([_size(batch) for batch in batches]), ranked_on)) + 1
    total = len(batches) * (len(on_all) + 3 * len(plan.heads)) + min(n_ranking, len(batches)) * len(to_rank)
    with tqdm(total=total, desc="ablations", disable=not progress) as bar:
        for index, batch in enumerate(batches):
            reading = _Reading(templates, plan, getattr(batch, "tokens", batch))
            experiment = Experiment(laboratory, batch, frozenset(layer for layer, _ in plan.heads), direct=True)
            clean = experiment.observe(reading.hooks())
            before = reading.take()
            losses[frozenset()].append(clean.loss)
            for heads in on_all:
                source = next(iter(heads)) if len(heads) == 1 else None
                hooks = [] if source is None else reading.hooks(above=source[0])
                losses[heads].append(experiment.mean(heads, hooks).loss)
                if source is not None:
                    for (target, template), after in reading.take().items():
                        others["fall", source, target, template].append(before[target, template] - after)
                bar.update()
            for head in plan.heads:
                others["zero", head].append(experiment.zero(head).loss)
                others["resample", head].append(experiment.resample(head).loss)
                if (direct := experiment.direct_effect(head)) is not None:
                    others["direct", head].append(direct)
                bar.update(3)
            count += _size(batch)
            if index < n_ranking:
                ranked = count
                for heads in to_rank:
                    losses[heads].append(experiment.mean(heads).loss)
                    bar.update()
    joined = {key: _numpy(values) for key, values in others.items()}
    return _Evidence(
        losses={heads: _numpy(values) for heads, values in losses.items()},
        zero={head: joined["zero", head] for head in plan.heads},
        resample={head: joined["resample", head] for head in plan.heads},
        direct={head: joined["direct", head] for head in plan.heads if ("direct", head) in joined},
        falls={key[1:]: values for key, values in joined.items() if key[0] == "fall"},
        count=count,
        ranked=ranked,
    )


class _Reading:
    """The scores of the flagged heads on one batch, read at the hooks of their patterns."""

    def __init__(self, templates: Sequence[Template], plan: _Plan, tokens: Tensor) -> None:
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
        return [(attention_hook(layer, "pattern"), self._recorder(layer)) for layer in self._wanted if layer > above]

    def take(self) -> dict[tuple[Head, str], Tensor]:
        """What was read since it was last taken: scores [batch] by head and template."""
        found, self._found = self._found, {}
        return found

    def _recorder(self, layer: int) -> Callable[..., None]:
        def record(pattern: Float[Tensor, "batch head query key"], hook: Any) -> None:
            heads = sorted({head for head, _ in self._wanted[layer]})
            parts = torch.split(pattern[:, heads], [len(targets.pairs) for targets in self._targets])
            sums = torch.cat([targets.attention(part) for targets, part in zip(self._targets, parts, strict=True)])
            for head, name in self._wanted[layer]:
                column = self._names.index(name)
                rows = (
                    self._rows[:, column].clamp(min=1).to(sums)
                )  # a sequence without a row has score 0, before and after
                self._found[(layer, head), name] = sums[:, heads.index(head), column] / rows

        return record


# -------------------------------------------------------------------------------------------------------------- the answers


def _joint(evidence: _Evidence, plan: _Plan, rule: Rule) -> dict[str, JointEffect]:
    effects = _estimates({name: evidence.rise(heads) for name, heads in plan.flagged.items()}, rule.minimum_effect)
    found = {}
    for name, heads in plan.flagged.items():
        sets = plan.random[len(heads)]
        random = np.array([evidence.rise(each).mean() for each in sets])
        found[name] = JointEffect(name, tuple(heads), effects[name], random, evidence.exceeds(heads, sets))
    return found


def _verdicts(
    evidence: _Evidence,
    plan: _Plan,
    excesses: Mapping[tuple[Head, str], _Excess],
    joint: Mapping[str, JointEffect],
    rule: Rule,
) -> tuple[HeadVerdict, ...]:
    clean = evidence.losses[frozenset()]
    above = rule.minimum_effect
    effect = _estimates({head: evidence.rise([head]) for head in plan.heads}, above)
    zero = _estimates({head: evidence.zero[head] - clean for head in plan.heads}, above)
    resample = _estimates({head: evidence.resample[head] - clean for head in plan.heads}, above)
    direct = _estimates(evidence.direct, above)
    restored = _estimates(
        {
            (head, name): evidence.rise(heads) - evidence.rise(set(heads) - {head})
            for name, heads in plan.flagged.items()
            for head in heads
        },
        above,
    )
    exceeds = {head: evidence.exceeds([head], [[other] for other in plan.unflagged]) for head in plan.heads}

    def answers(estimate: Estimate | None, share: float | None = None, least: float = 0.0) -> bool:
        return estimate is not None and estimate.p_value <= rule.level and (share is None or share >= least)

    found = []
    for name, heads in plan.flagged.items():
        together = answers(joint[name].effect, joint[name].exceeds, rule.joint_rank)
        for head in sorted(heads, key=lambda head: -excesses[head, name].estimate.value):
            b = answers(effect[head], exceeds[head], rule.rank)
            c = answers(direct.get(head))
            d = together and answers(restored[head, name])
            found.append(
                HeadVerdict(
                    *head,
                    template=name,
                    verdict="causal" if b else "redundant" if c and d else "attends only",
                    excess=excesses[head, name].estimate,
                    interval=excesses[head, name].interval,
                    effect=effect[head],
                    exceeds=exceeds[head],
                    zero_effect=zero[head],
                    resample_effect=resample[head],
                    direct_effect=direct.get(head),
                    restored=restored[head, name],
                )
            )
    return tuple(found)


def _dependence(evidence: _Evidence, verdicts: Sequence[HeadVerdict], rule: Rule) -> nx.DiGraph:
    graph = nx.DiGraph()
    for found in verdicts:
        if found.name not in graph:
            graph.add_node(found.name, layer=found.layer, head=found.head, verdicts={})
        graph.nodes[found.name]["verdicts"][found.template] = found.verdict
    falls = _estimates(evidence.falls, rule.minimum_fall)
    for (source, target, template), fall in sorted(falls.items(), key=lambda item: item[1].value):
        if fall.p_value <= rule.level:  # of several templates the largest fall comes last, and stays
            numbers = {"fall": fall.value, "stderr": fall.stderr, "p_value": fall.p_value}
            graph.add_edge(_name(source), _name(target), template=template, **numbers)
    return graph


def _estimates(values: Mapping[Any, Float[np.ndarray, " sequence"]], above: float) -> dict[Any, Estimate]:
    """Means with standard errors, and p-values of their being above a minimum, corrected over all of them."""
    means = {key: (float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))) for key, each in values.items()}
    raw = [t_p_value(*means[key], len(each), above=above) for key, each in values.items()]
    return {
        key: Estimate(*means[key], float(p)) for key, p in zip(means, holm(np.array(raw, dtype=float)), strict=True)
    }


# ---------------------------------------------------------------------------------------------------------------- the data


def _make(
    scores: HeadScores, model: HookedModel, sequences: int, period: int | None, seed: int | None
) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """Tokens, spare tokens for the heads' means, the first query whose next token is known, and what made them."""
    scanned: Mapping[str, Any] = next(
        (made for made in scores.settings.get("tokens", []) if made.get("kind") in ("repeated", "corpus")), {}
    )
    bos, seed = scanned.get("bos", "auto"), int(scanned.get("seed", 0)) + 1 if seed is None else seed
    count = sequences + max(16, sequences)
    made = repeated_tokens(model, n_sequences=count, period=period, bos=bos, seed=seed)
    begin = len(made.settings["start"]) + int(made.settings["period"])
    settings = {**made.settings, "sequences": sequences, "for_the_means": count - sequences}
    return made.tokens[:sequences], made.tokens[sequences:], begin, settings


def _batches(model: HookedModel, tokens: Any, batch_size: int | None, ranked_on: int) -> list[Any]:
    """Micro-batches; the first ``ranked_on`` sequences are in batches of their own, where batches can be split."""
    found: list[Any] = []
    for batch in each_batch(tokens):
        if not isinstance(batch, Tensor):
            found.append(batch)
            continue
        first = max(0, min(ranked_on - sum(map(_size, found)), len(batch)))
        if len(batch) - first == 1:  # a batch of one has no other sequence to take a head's output from
            first = len(batch)
        for part in filter(len, (batch[:first], batch[first:])):
            pieces = list(micro_batches(model, part, batch_size))
            if len(pieces) > 1 and len(pieces[-1]) == 1:
                pieces[-2:] = [torch.cat(pieces[-2:])]
            found += pieces
    if small := [_size(batch) for batch in found if _size(batch) < 2]:
        raise CausalProbeError(
            f"{len(small)} batches hold fewer than two sequences: a standard error needs two, and so does giving a head another "
            "sequence's output."
        )
    if not found:
        raise CausalProbeError("There are no sequences to measure on.")
    return found


def _example(batches: Sequence[Any]) -> Any:
    """A batch as small as can be."""
    return batches[0][:2] if isinstance(batches[0], Tensor) else batches[0]


def _check(
    scores: HeadScores,
    model: HookedModel,
    templates: Iterable[str] | None,
    sequences: int,
    ranked_on: int,
    random_sets: int,
    batch_size: int | None,
) -> list[str]:
    """The names of the templates that are verified; all that is wrong with the arguments is said at once."""
    # Not what doesn't look back: what repeats is not what it looks at. Nor n-grams, which coincide with induction where tokens don't
    # recur within a period.
    by_default = [each.name for each in scores.templates if each.kind == "repeated" and each.looks_back]
    names = by_default if templates is None else list(templates)
    problems = []
    if unknown := [name for name in names if name not in scores.names]:
        problems.append(f"{', '.join(unknown)} was not scanned (but {', '.join(scores.names)})")
    for what, value, least in (
        ("sequences", sequences, 2),
        ("ranked_on", ranked_on, 2),
        ("random_sets", random_sets, 0),
        ("batch_size", 2 if batch_size is None else batch_size, 2),
    ):
        if value < least:
            problems.append(f"{what} must be at least {least} and is {value}")
    if not names:
        problems.append("there is no template whose heads could be verified")
    if len(scores.heads) != int(model.cfg.n_layers):
        problems.append(f"the scores are of {len(scores.heads)} layers, the model has {model.cfg.n_layers}")
    if problems:
        raise CausalProbeError(f"The heads can't be verified: {'; '.join(problems)}.")
    return names


def _by_layer(heads: Sequence[Head]) -> Iterator[list[Head]]:
    for layer in range(1 + max(layer for layer, _ in heads)):
        yield [head for head in heads if head[0] == layer]


def _flat(found: HeadVerdict) -> dict[str, Any]:
    fields = found._asdict()
    row = {name: fields[name] for name in ("layer", "head", "template", "verdict", "exceeds")}
    row["low"], row["high"] = found.interval
    for name in ESTIMATES:
        if fields[name] is not None:
            row |= {
                name: fields[name].value,
                f"{name}_stderr": fields[name].stderr,
                f"{name}_p_value": fields[name].p_value,
            }
    return row


def _size(batch: Any) -> int:
    return len(getattr(batch, "tokens", batch))


def _name(head: Head) -> str:
    return f"L{head[0]}H{head[1]}"


def _numpy(values: Sequence[Tensor]) -> Float[np.ndarray, " sequence"]:
    return torch.cat(list(values)).detach().cpu().double().numpy()
