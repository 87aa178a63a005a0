"""What a causal check of heads found: the verdict on each flagged head, and the numbers that it follows from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Float

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.heads import parse_head
from causal_probe.probes.ablation import Head
from causal_probe.probes.head_scores import CALLED
from causal_probe.probes.p_values import Estimate
from causal_probe.results import Result, Rows, Table

__all__ = ["HeadVerdict", "JointEffect", "Rule", "Verification"]

VERDICTS = ("causal", "redundant", "attends only")
ESTIMATES = ("excess", "effect", "zero_effect", "resample_effect", "direct_effect", "restored")


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
        The same rise when the output is replaced by zero, and by that in another sequence. The mean decides: a zero may lie far from
        anything the model has seen, and another sequence's output adds its own content.
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
        return f"L{self.layer}H{self.head}"


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
class Verification(Result):
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
        Among others ``n_sequences``, and ``forwards``, the number of forward passes that it took.
    """

    KIND = "verification"
    WORKS = ("olsson2022",)

    verdicts: tuple[HeadVerdict, ...]
    joint: Mapping[str, JointEffect]
    unflagged: Mapping[Head, float]
    dependence: nx.DiGraph
    loss: Float[np.ndarray, " sequence"]
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
        columns = ["layer", "head", "template", "verdict", "exceeds", "low", "high"]
        columns += [name + suffix for name in ESTIMATES for suffix in ("", "_stderr", "_p_value")]
        rows = [
            (*v[:4], v.exceeds, *v.interval, *chain(*(getattr(v, name) or (None,) * 3 for name in ESTIMATES)))
            for v in self.verdicts
        ]
        return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[4:], float))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        rule = self.rule
        return (
            f"A head of {self.provenance['model']} was flagged if its excess attention on a template's targets was above "
            f"{rule.minimum_excess:g}, and called causal if mean ablation raised the loss by more than {rule.minimum_effect:g} "
            f"nats and more than for {rule.rank:.0%} of the unflagged heads of all layers; redundant if instead its own output "
            "raised the target's logit, leaving it alone in lowered the loss, and joint ablation of the flagged heads hurt more "
            f"than {rule.joint_rank:.0%} of random sets of as many heads (paired one-sided t-tests over {len(self.loss)} "
            f"sequences, Holm-corrected, level {rule.level:g}; {self.measured_with})."
        )

    def table(self) -> Table:
        """One row per verdict, and the joint effects below."""
        title = f"Verification of {self.provenance['model']}: {len(self.verdicts)} flagged"
        if self.verdicts:
            title += (
                f", loss {self.loss.mean():.3f} on {len(self.loss)} sequences, {len(self.unflagged)} heads not flagged"
            )
        else:
            title += ", nothing to verify"
        notes = []
        for joint in self.joint.values():
            beyond = (
                "" if joint.exceeds is None else f", more than {joint.exceeds:.0%} of {len(joint.random)} random sets"
            )
            plural = "s" * (len(joint.heads) > 1)
            effect = f"{joint.effect.value:.3f} ± {joint.effect.stderr:.3f}"
            notes.append(f"{joint.template}: {len(joint.heads)} head{plural} together {effect}{beyond}")
        return Table(
            title,
            ("head", "template", "verdict", "excess", "effect", "stderr", "exceeds", "direct", "restored"),
            [
                (
                    v.name,
                    v.template,
                    v.verdict,
                    v.excess.value,
                    *v.effect[:2],
                    v.exceeds,
                    v.direct_effect and v.direct_effect.value,
                    v.restored.value,
                )
                for v in self.verdicts
            ],
            [*notes, *(f"{what}: {why}" for what, why in self.undefined.items())],
        )
