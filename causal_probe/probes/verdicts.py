"""What follows for a head from what its ablation did: the answers to the questions of :func:`~causal_probe.probes.verify`, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from causal_probe.probes.ablation import Head
from causal_probe.probes.ablation_runs import AblationRuns, Plan
from causal_probe.probes.baselines import BASELINES, Baseline
from causal_probe.probes.p_values import Effect, Estimate, effects, estimates
from causal_probe.probes.verification import HeadVerdict, JointEffect, Rule

__all__ = ["Answers"]


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers to (b), (c) and (d), and what follows from them."""

    runs: AblationRuns
    plan: Plan
    rule: Rule
    alone: Mapping[tuple[Baseline, Head], Effect]
    together: Mapping[tuple[Baseline, str], Estimate]
    restored: Mapping[tuple[Baseline, Head, str], Estimate]

    @classmethod
    def of(cls, runs: AblationRuns, plan: Plan, rule: Rule, *, progress: bool) -> Answers:
        """Test what was measured, and ablate what it is to be compared with."""
        flagged = [(head, name) for name, heads in plan.flagged.items() for head in heads]
        left_in = {
            (baseline, head, name): runs.rise(baseline, plan.flagged[name])
            - runs.rise(baseline, set(plan.flagged[name]) - {head})
            for baseline in BASELINES
            for head, name in flagged
        }
        together = {
            (baseline, name): runs.rise(baseline, heads)
            for baseline in BASELINES
            for name, heads in plan.flagged.items()
        }
        alone = {(baseline, head): runs.rise(baseline, [head]) for baseline in BASELINES for head in plan.heads}
        answers = cls(
            runs,
            plan,
            rule,
            effects(alone, delta=rule.delta),
            estimates(together, above=rule.delta),
            estimates(left_in, above=rule.delta),
        )
        runs.rank("mean", [*plan.alone, *(each for its in plan.random.values() for each in its)], progress=progress)
        # The second baseline is ranked where a verdict hangs on it: where it shows an effect, and the first does not.
        if any(answers.above("pooled", head) and not answers.stands("mean", head) for head in plan.heads):
            runs.rank("pooled", plan.alone, progress=progress)
        for head, name in flagged:
            if answers.needed("pooled", head, name) and not answers.needed("mean", head, name):
                runs.rank("pooled", plan.random[len(plan.flagged[name])], progress=progress)
        return answers

    def known(self, baseline: Baseline, others: Sequence[frozenset[Head]]) -> bool:
        """Whether these sets were ablated so."""
        return all((baseline, each) in self.runs.ablated for each in others)

    def exceeds(self, baseline: Baseline, heads: Sequence[Head], others: Sequence[frozenset[Head]]) -> float | None:
        """Share of other sets whose ablation hurts less; None if these were not ablated so, or there are none."""
        return self.runs.exceeds(baseline, heads, others) if self.known(baseline, others) else None

    def above(self, baseline: Baseline, head: Head) -> bool:
        """Whether ablating the head alone hurts by more than delta."""
        return self.alone[baseline, head].p_value <= self.rule.level

    def stands(self, baseline: Baseline, head: Head) -> bool:
        """Whether it hurts by more than ablating nearly all others, where there are any."""
        share = self.exceeds(baseline, [head], self.plan.alone)
        ranks = self.known(baseline, self.plan.alone) and (share is None or share >= self.rule.rank)
        return ranks and self.above(baseline, head)

    def needed(self, baseline: Baseline, head: Head, name: str) -> bool:
        """Whether the head has no effect alone, but has one where the other flagged heads are ablated."""
        p_values = (
            self.alone[baseline, head].p_within,
            self.together[baseline, name].p_value,
            self.restored[baseline, head, name].p_value,
        )
        return max(p_values) <= self.rule.level

    def verdict(self, head: Head, name: str) -> tuple[str, str]:
        """The verdict on a head and a template, and why."""
        rule = self.rule
        alone = {baseline: self.alone[baseline, head] for baseline in BASELINES}
        hurts = [baseline for baseline in BASELINES if self.above(baseline, head)]
        helps = [baseline for baseline in BASELINES if alone[baseline].p_negative <= rule.level]
        if hurts and helps:
            return "undecided", f"ablation hurts with {BASELINES[hurts[0]]} and helps with {BASELINES[helps[0]]}"
        if hurts:
            if which := next((baseline for baseline in hurts if self.stands(baseline, head)), None):
                return "causal", f"ablation hurts with {BASELINES[which]}"
            most = max(self.exceeds(baseline, [head], self.plan.alone) or 0.0 for baseline in hurts)
            return "undecided", f"ablation hurts, but only more than for {most:.0%} of the unflagged heads"
        if helps:
            return "negative", f"ablation helps with {BASELINES[helps[0]]}"
        sets = self.plan.random[len(self.plan.flagged[name])]
        for baseline in (each for each in BASELINES if self.needed(each, head, name) and self.known(each, sets)):
            share = self.exceeds(baseline, self.plan.flagged[name], sets)
            if share is None or share >= rule.joint_rank:
                reason = f"no effect alone, but one without the other flagged heads, with {BASELINES[baseline]}"
                return "redundant", reason
        if all(each.p_within <= rule.level for each in alone.values()):
            return "no effect above delta", "with either baseline the effect lies within delta"
        wide = max(alone, key=lambda baseline: alone[baseline].p_within)
        found = f"{alone[wide].value:.3f} ± {alone[wide].stderr:.3f} nats with {BASELINES[wide]}"
        return "undecided", f"{found}: too near delta, or too uncertain"

    def verdicts(
        self,
        excesses: Mapping[tuple[Head, str], Estimate],
        intervals: Mapping[tuple[Head, str], tuple[float, float]],
    ) -> Iterator[HeadVerdict]:
        """One for each flagged head and template."""
        runs, delta = self.runs, self.rule.delta
        zero = estimates({head: losses - runs.clean for head, losses in runs.zero.items()}, above=delta)
        direct = estimates(runs.direct, above=delta)
        for name, heads in self.plan.flagged.items():
            for head in sorted(heads, key=lambda head: -excesses[head, name].value):
                yield HeadVerdict(
                    *head,
                    name,
                    *self.verdict(head, name),
                    excess=excesses[head, name],
                    interval=intervals[head, name],
                    effect=self.alone["mean", head],
                    pooled_effect=self.alone["pooled", head],
                    exceeds=self.exceeds("mean", [head], self.plan.alone),
                    pooled_exceeds=self.exceeds("pooled", [head], self.plan.alone),
                    zero_effect=zero[head],
                    direct_effect=direct.get(head),
                    restored=self.restored["mean", head, name],
                    pooled_restored=self.restored["pooled", head, name],
                    distance=float(runs.distance["mean", head].mean()),
                    pooled_distance=float(runs.distance["pooled", head].mean()),
                )

    def joint(self) -> dict[str, JointEffect]:
        """By template, what ablating its flagged heads together does."""
        found = {}
        for name, heads in self.plan.flagged.items():
            sets = self.plan.random[len(heads)]
            found[name] = JointEffect(
                name,
                tuple(heads),
                self.together["mean", name],
                self.together["pooled", name],
                np.array([self.runs.rise("mean", each).mean() for each in sets]),
                self.exceeds("mean", heads, sets),
                self.exceeds("pooled", heads, sets),
            )
        return found
