"""The result of a causal check of heads: the verdict on each flagged head, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, NamedTuple

import networkx as nx
import numpy as np
from jaxtyping import Float

from causal_probe.arguments import Help, Level, Share, checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.heads import parse_head
from causal_probe.probes.ablation import Head
from causal_probe.probes.head_scores import CALLED
from causal_probe.probes.p_values import Effect, Estimate
from causal_probe.results import Result, Rows, Table
from causal_probe.results.lazy import pandas as pd

__all__ = ["HeadVerdict", "JointEffect", "Rule", "Verification"]

VERDICTS = ("causal", "redundant", "negative", "no effect above delta", "undecided")
ESTIMATES = (
    "excess", "effect", "pooled_effect", "zero_effect", "direct_effect", "restored", "pooled_restored",
)  # fmt: skip
#: A baseline that differs from a head's output by less than this share of it is close to the output itself.
HARDLY = 0.01


@checked
@dataclass(frozen=True)
class Rule:
    """Every constant of the verdicts.

    Attributes
    ----------
    level
        All tests are one-sided t-tests over sequences, paired where two runs are compared. A p-value counts if it is at most
        this after Holm's correction over everything that the same question was asked of: (a) all heads and verified templates;
        (b) the flagged heads and both baselines, for each of the three null hypotheses; (c) the flagged heads; (d) the templates and both
        baselines for the joint effect, the flagged heads, their templates and both baselines for putting one back, of which those that are not asked
        count as not rejected; for dependence all pairs of flagged heads and both baselines.
    minimum_excess
        (a): the excess is above this. (The same that a scan calls a head by.)
    delta
        The smallest effect of interest, in nats (of the target's logit in (c)). The null hypothesis of every claim of an effect is "the
        effect is at most delta", and "no effect above delta" is claimed where the effect surely lies within +-delta. The default,
        0.05 nats, is a change of the perplexity on the targets by 5%; a default run resolves little less on a real model.
    rank
        (b): the effect is larger than that of this share of all unflagged heads of all layers, on the same sequences. Where
        there are none, this is not asked.
    joint_rank
        (d): the joint effect is larger than that of this share of the random sets. Where there are none, this is not asked.
    rank_error
        (b): the probability that ``rank`` is misjudged for any head, where not all unflagged heads are ablated to tell.
    minimum_fall
        Dependence: ablating one head lowers the other's score by more than this.
    """

    level: Level = 0.01
    minimum_excess: Annotated[float, Help("Attention above chance.", most=1)] = CALLED
    delta: Annotated[float, Help("Of an effect.", least=0)] = 0.05
    rank: Share = 0.95
    joint_rank: Share = 0.99
    rank_error: Level = 0.02
    minimum_fall: Share = 0.05


class HeadVerdict(NamedTuple):
    """The verdict on one flagged head and template. Effects are rises of the loss in nats; what is undefined is None.

    Attributes
    ----------
    layer, head
        Counted from 0.
    template
        The template that the head was flagged for.
    verdict
        ``"causal"``, ``"redundant"``, ``"negative"``, ``"no effect above delta"`` or ``"undecided"``.
    reason
        Why, in a few words.
    excess
        (a) Attention on the targets above chance, from the scan.
    interval
        Its 95% confidence interval.
    effect, pooled_effect
        (b) Rise of the loss when the head's output is replaced by its mean at each position, and by its mean over all
        positions, but 0 and outliers.
    exceeds, pooled_exceeds
        Share of the unflagged heads of all layers whose effect is smaller, on the sequences on which these were ablated; an estimate where not all
        were. None without unflagged heads, and where the verdict doesn't ask for it.
    zero_effect
        The same rise when the output is replaced by zero, which may lie far from anything the model has seen: it decides nothing. None
        unless all was asked for (``exhaustive``).
    direct_effect
        (c) By how much the head's output itself, over its mean, raises the target's logit (less the vocabulary's mean logit),
        everything after it held as it was; it decides nothing. None where that can't be measured; see :attr:`Verification.undefined`.
    restored, pooled_restored
        (d) Fall of the loss when, of all heads flagged for the template, only this one is left in. None where the verdict doesn't ask for it.
    distance, pooled_distance
        How far each baseline is from the head's output: mean square of the difference over that of the output. A baseline that is the output
        itself can't show an effect.
    """

    layer: int
    head: int
    template: str
    verdict: str
    reason: str
    excess: Estimate
    interval: tuple[float, float]
    effect: Effect
    pooled_effect: Effect
    exceeds: float | None
    pooled_exceeds: float | None
    zero_effect: Estimate | None
    direct_effect: Estimate | None
    restored: Estimate | None
    pooled_restored: Estimate | None
    distance: float
    pooled_distance: float

    @property
    def name(self) -> str:
        """Such as ``"L18H6"``."""
        return f"L{self.layer}H{self.head}"

    @property
    def shown(self) -> Effect:
        """Of both baselines' effects the larger in size."""
        return max(self.effect, self.pooled_effect, key=lambda effect: abs(effect.value))


@dataclass(frozen=True, eq=False)
class JointEffect:
    """(d) All heads flagged for a template ablated together.

    Attributes
    ----------
    template, heads
        The template and its flagged heads.
    effect, pooled_effect
        Rise of the loss in nats, with either baseline.
    random
        Mean rise for each random set of as many unflagged heads of all layers that was ablated, on the sequences on which it was.
    exceeds, pooled_exceeds
        Share of these whose effect is smaller, on the same sequences; None without any, and where no verdict asks for it.
    """

    template: str
    heads: tuple[Head, ...]
    effect: Estimate
    pooled_effect: Estimate
    random: Float[np.ndarray, " set"]
    exceeds: float | None
    pooled_exceeds: float | None


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Result):
    """The result of :func:`verify`.

    Attributes
    ----------
    verdicts
        One for each flagged head and template, by template in the order of the scan, largest excess first. None if the model does not
        do the task: see ``undefined["verdicts"]``.
    joint
        By template, the joint effect of its flagged heads.
    unflagged
        By head that was not flagged and was ablated, the mean rise of the loss when its mean at each position replaces it, in nats.
    dependence
        A directed graph of the flagged heads, named ``"L18H6"``, with ``layer``, ``head`` and ``verdicts`` (by template). An edge
        u -> v with ``fall``, ``stderr``, ``p_value``, ``template``: ablating u lowers the score of v, by more than the rule's
        minimum; of several templates that with the largest fall.
    loss
        The loss of the model as it is, sequence by sequence, in nats.
    without
        By name, the mean loss on the same sequences of predictors that don't do the task.
    rule
        The constants of the verdicts.
    undefined
        Reasons for what is None.
    settings
        Among others ``n_sequences``; ``forwards``, the number of forward passes that it took; ``unflagged``, how many heads were not flagged; and
        ``exhaustive``, whether they were all ablated.
    """

    KIND = "verification"
    WORKS = ("olsson2022",)

    verdicts: tuple[HeadVerdict, ...]
    joint: Mapping[str, JointEffect]
    unflagged: Mapping[Head, float]
    dependence: nx.DiGraph
    loss: Float[np.ndarray, " sequence"]
    without: Mapping[str, float]
    rule: Rule
    undefined: Mapping[str, str]

    def of(self, layer: Any, head: Any = None, template: str | None = None) -> HeadVerdict | None:
        """The verdict on one head and template; None if it was not flagged.

        Parameters
        ----------
        layer, head
            A layer and a head, counted from 0; or the head alone, as ``"L18H6"`` or ``(18, 6)``.
        template
            By default the first for which the head was flagged.
        """
        asked = parse_head(layer, head)
        return next((v for v in self.verdicts if v[:2] == asked and template in (None, v.template)), None)

    def called(self, verdict: str) -> tuple[HeadVerdict, ...]:
        """The heads with this verdict.

        Raises
        ------
        CausalProbeError
            If there is no such verdict.
        """
        if verdict not in VERDICTS:
            raise CausalProbeError(f"There is no verdict {verdict!r}; there is {', '.join(VERDICTS)}.")
        return Rows(found for found in self.verdicts if found.verdict == verdict)

    def to_pandas(self) -> pd.DataFrame:
        """One row per verdict; an estimate takes three columns, ``x``, ``x_stderr``, ``x_p_value``. What is undefined is NaN."""
        numbers = ("exceeds", "pooled_exceeds", "distance", "pooled_distance")
        columns = ["layer", "head", "template", "verdict", "reason", *numbers, "low", "high"]
        columns += [name + suffix for name in ESTIMATES for suffix in ("", "_stderr", "_p_value")]
        columns += [f"{name}{suffix}" for name in ESTIMATES[1:3] for suffix in ("_p_negative", "_p_within")]
        rows = [
            (
                *v[:5],
                *(getattr(v, name) for name in numbers),
                *v.interval,
                *chain(*((getattr(v, name) or (None,) * 3)[:3] for name in ESTIMATES)),
                *v.effect[3:],
                *v.pooled_effect[3:],
            )
            for v in self.verdicts
        ]
        return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[5:], float))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        rule = self.rule
        return (
            f"A head of {self.provenance['model']} was flagged if its excess attention on a template's targets was above "
            f"{rule.minimum_excess:g}, and its output was replaced by its mean at each position and by its mean over "
            f"positions, in other sequences. On these data and this loss it was called causal if either raised the loss by more than delta = {rule.delta:g} "
            f"nats and more than for {rule.rank:.0%} of the unflagged heads of all layers; negative if either lowered it by more than delta; "
            "redundant if alone it had no effect above delta, but leaving it alone in of all flagged heads lowered the loss by more than delta, "
            f"and joint ablation of these hurt more than {rule.joint_rank:.0%} of random sets of as many heads; of no effect above delta if both "
            "effects lay within +-delta; and undecided otherwise "
            f"(paired one-sided t-tests over {len(self.loss)} sequences, Holm-corrected, level {rule.level:g}; {self._compared}{self.measured_with})."
        )

    @property
    def _compared(self) -> str:
        """How many unflagged heads were ablated, where not all were."""
        total = self.settings.get("unflagged", len(self.unflagged))
        if len(self.unflagged) >= total:
            return ""
        return (
            f"{len(self.unflagged)} of {total} unflagged heads were ablated, those that the gradient predicts to come near a flagged one and others drawn "
            f"at random, so that a rank is misjudged with a probability of at most {self.rule.rank_error:g}; "
        )

    @property
    def unflagged_are(self) -> str:
        """The text for a head without a verdict."""
        return "no verdict" if "verdicts" in self.undefined else "not flagged"

    @property
    def legend(self) -> str:
        """The meaning of verdicts and effects, in a sentence or two."""
        return (
            f"verdict: on these data and this loss; effects are told from delta = {self.rule.delta:g} nats. effect: rise of the loss in nats when the "
            "head's output is replaced by its mean at each position, or over all positions, whichever is larger in size."
        )

    @property
    def notes(self) -> list[str]:
        """Where a baseline could not show an effect, because it hardly differs from the head's output."""
        seen = {
            v[:2]: (v.name, what, distance)
            for v in self.verdicts
            for what, distance in (
                ("its mean at each position", v.distance),
                ("its mean over all positions", v.pooled_distance),
            )
            if distance < HARDLY
        }
        return [
            f"{name}: what it writes hardly differs from {what} ({distance:.1%} of its size), which can't show what it does"
            for name, what, distance in seen.values()
        ]

    def table(self) -> Table:
        """One row per verdict, and the joint effects below."""
        title = f"Verification of {self.provenance['model']}: {len(self.verdicts)} flagged"
        if self.verdicts:
            total = self.settings.get("unflagged", len(self.unflagged))
            some = "" if len(self.unflagged) >= total else f" ({len(self.unflagged)} ablated)"
            title += (
                f", loss {self.loss.mean():.3f} on {len(self.loss)} sequences, {total} heads not flagged{some}, "
                f"delta {self.rule.delta:g} nats"
            )
        else:
            title += ", no verdicts" if "verdicts" in self.undefined else ", nothing to verify"
        notes = []
        for joint in self.joint.values():
            beyond = (
                "" if joint.exceeds is None else f", more than {joint.exceeds:.0%} of {len(joint.random)} random sets"
            )
            if joint.exceeds is None and joint.pooled_exceeds is not None:
                beyond = f"; pooled, more than {joint.pooled_exceeds:.0%} of random sets"
            plural = "s" * (len(joint.heads) > 1)
            effect = f"{joint.effect.value:.3f} ± {joint.effect.stderr:.3f}"
            notes.append(f"{joint.template}: {len(joint.heads)} head{plural} together {effect}{beyond}")
        if self.verdicts:
            notes.append("effect: mean at each position replaces the output; pooled: its mean over all positions")
        return Table(
            title,
            (
                "head",
                "template",
                "verdict",
                "excess",
                "effect",
                "stderr",
                "exceeds",
                "pooled",
                "pooled stderr",
                "restored",
            ),
            [
                (
                    v.name,
                    v.template,
                    v.verdict,
                    v.excess.value,
                    *v.effect[:2],
                    v.exceeds,
                    *v.pooled_effect[:2],
                    v.restored and v.restored.value,
                )
                for v in self.verdicts
            ],
            [*notes, *self.notes, *(f"{what}: {why}" for what, why in self.undefined.items())],
        )
