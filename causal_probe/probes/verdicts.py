"""What follows for a head from what its ablation did: the answers to the questions of :func:`~causal_probe.probes.verify`, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from causal_probe.probes.ablation import Head
from causal_probe.probes.ablation_runs import AblationRuns, Plan
from causal_probe.probes.baselines import BASELINES, Baseline
from causal_probe.probes.p_values import Effect, Estimate, effects, estimates
from causal_probe.probes.ranking import share_of_heads, share_of_sets
from causal_probe.probes.verification import HeadVerdict, JointEffect, Rule

__all__ = ["Answers"]


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers to (b), (c) and (d), and what follows from them.

    Attributes
    ----------
    restored
        By baseline, flagged head and template, the fall of the loss when the head is put back; without those of which it was not asked.
    shares
        By baseline and flagged head, the share of unflagged heads that hurt less; without those of which it was not asked. None without any unflagged head.
    joint_shares
        By baseline and template, the share of random sets that hurt less; the same.
    """

    runs: AblationRuns
    plan: Plan
    rule: Rule
    alone: Mapping[tuple[Baseline, Head], Effect]
    together: Mapping[tuple[Baseline, str], Estimate]
    restored: dict[tuple[Baseline, Head, str], Estimate] = field(default_factory=dict)
    shares: dict[tuple[Baseline, Head], float | None] = field(default_factory=dict)
    joint_shares: dict[tuple[Baseline, str], float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: AblationRuns, plan: Plan, rule: Rule, *, exhaustive: bool, seed: int, progress: bool) -> Answers:
        """Test what was measured, and ablate what it is to be compared with: all, or as little as the verdicts need."""
        together = {
            (baseline, name): runs.rise(baseline, heads)
            for baseline in BASELINES
            for name, heads in plan.flagged.items()
        }
        alone = {(baseline, head): runs.rise(baseline, [head]) for baseline in BASELINES for head in plan.heads}
        found = effects(alone, delta=rule.delta), estimates(together, above=rule.delta)
        answers = cls(runs, plan, rule, *found)
        answers._put_back(exhaustive=exhaustive, progress=progress)
        rng = np.random.default_rng([seed, 1])
        for baseline in BASELINES:
            answers._rank_heads(baseline, exhaustive=exhaustive, rng=rng, progress=progress)
        for baseline in BASELINES:
            answers._rank_sets(baseline, exhaustive=exhaustive, progress=progress)
        return answers

    def _put_back(self, *, exhaustive: bool, progress: bool) -> None:
        """(d) Put each head back of which a verdict depends on that, while the others flagged for its template stay ablated."""
        every = [
            (each, head, name) for each in BASELINES for name, heads in self.plan.flagged.items() for head in heads
        ]
        asked = [each for each in every if self._may_be_redundant(*each)]
        rest = [each for each in every if each not in asked] if exhaustive else []
        others = {(each, head, name): frozenset(self.plan.flagged[name]) - {head} for each, head, name in every}
        self.runs.ablate([(each[0], others[each]) for each in (*asked, *rest)], progress=progress)

        def falls(those: Sequence[tuple[Baseline, Head, str]]) -> dict[tuple[Baseline, Head, str], np.ndarray]:
            whole = {each: self.runs.rise(each[0], self.plan.flagged[each[2]]) for each in those}
            return {each: rise - self.runs.rise(each[0], others[each]) for each, rise in whole.items()}

        self.restored.update(estimates(falls(asked), above=self.rule.delta, family=len(every)))
        for each in rest:  # reported alone: what is said of those that were asked must not depend on them
            self.restored.update(estimates(falls([each]), above=self.rule.delta, family=len(every)))

    def _may_be_redundant(self, baseline: Baseline, head: Head, name: str) -> bool:
        """Whether the head has no effect alone, and its template's heads have one together."""
        hurts = any(self.above(each, head) for each in BASELINES)
        p_values = self.alone[baseline, head].p_within, self.together[baseline, name].p_value
        return not hurts and not self._helps(head) and max(p_values) <= self.rule.level

    def _rank_heads(self, baseline: Baseline, *, exhaustive: bool, rng: np.random.Generator, progress: bool) -> None:
        """(b) Ask how many unflagged heads hurt less than each flagged one of whose effect a verdict depends on that."""
        asked: Sequence[Head] = [head for head in self.plan.heads if self._is_open(baseline, head)]
        if exhaustive:
            asked = self.plan.heads
        found = share_of_heads(
            self.runs,
            baseline,
            asked,
            self.plan.unflagged,
            {} if exhaustive or not asked else self.runs.predicted(baseline),
            rank=self.rule.rank,
            error=None if exhaustive else self.rule.rank_error / len(BASELINES),
            rng=rng,
            progress=progress,
        )
        self.shares.update({(baseline, head): share for head, share in found.items()})

    def _is_open(self, baseline: Baseline, head: Head) -> bool:
        """Whether the verdict hangs on the rank of this effect: it hurts, it helps with neither baseline, and no other baseline settled it."""
        settled = any(self.stands(other, head) for other in BASELINES if other != baseline)
        return self.above(baseline, head) and not settled and not self._helps(head)

    def _helps(self, head: Head) -> bool:
        return any(self.alone[baseline, head].p_negative <= self.rule.level for baseline in BASELINES)

    def _rank_sets(self, baseline: Baseline, *, exhaustive: bool, progress: bool) -> None:
        """(d) Ask how many random sets hurt less than the heads of each template of which a verdict depends on that."""
        for name, heads in self.plan.flagged.items():
            if exhaustive or any(self._hangs_on_sets(baseline, head, name) for head in heads):
                found = share_of_sets(
                    self.runs,
                    baseline,
                    heads,
                    self.plan.random[len(heads)],
                    rank=0.0 if exhaustive else self.rule.joint_rank,
                    progress=progress,
                )
                self.joint_shares[baseline, name] = found

    def _hangs_on_sets(self, baseline: Baseline, head: Head, name: str) -> bool:
        """Whether the head is redundant if its template's heads together stand out, and no other baseline settled it."""
        settled = any(self._redundant(other, head, name) for other in BASELINES if other != baseline)
        return not settled and self.needed(baseline, head, name)

    def _redundant(self, baseline: Baseline, head: Head, name: str) -> bool:
        if (baseline, name) not in self.joint_shares or not self.needed(baseline, head, name):
            return False
        share = self.joint_shares[baseline, name]
        return share is None or share >= self.rule.joint_rank

    def above(self, baseline: Baseline, head: Head) -> bool:
        """Whether ablating the head alone hurts by more than delta."""
        return self.alone[baseline, head].p_value <= self.rule.level

    def stands(self, baseline: Baseline, head: Head) -> bool:
        """Whether it hurts by more than ablating nearly all others, where there are any."""
        if not self.above(baseline, head) or (baseline, head) not in self.shares:
            return False
        share = self.shares[baseline, head]
        return share is None or share >= self.rule.rank

    def needed(self, baseline: Baseline, head: Head, name: str) -> bool:
        """Whether the head has no effect alone, but has one where the other flagged heads are ablated."""
        back = self.restored.get((baseline, head, name))
        return self._may_be_redundant(baseline, head, name) and back is not None and back.p_value <= self.rule.level

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
            most = max(self.shares.get((baseline, head)) or 0.0 for baseline in hurts)
            return "undecided", f"ablation hurts, but only more than for {most:.0%} of the unflagged heads"
        if helps:
            return "negative", f"ablation helps with {BASELINES[helps[0]]}"
        if which := next((baseline for baseline in BASELINES if self._redundant(baseline, head, name)), None):
            return "redundant", f"no effect alone, but one without the other flagged heads, with {BASELINES[which]}"
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
                    exceeds=self.shares.get(("mean", head)),
                    pooled_exceeds=self.shares.get(("pooled", head)),
                    zero_effect=zero.get(head),
                    direct_effect=direct.get(head),
                    restored=self.restored.get(("mean", head, name)),
                    pooled_restored=self.restored.get(("pooled", head, name)),
                    distance=float(runs.distance["mean", head].mean()),
                    pooled_distance=float(runs.distance["pooled", head].mean()),
                )

    def joint(self) -> dict[str, JointEffect]:
        """By template, what ablating its flagged heads together does."""
        found = {}
        for name, heads in self.plan.flagged.items():
            sets = [each for each in self.plan.random[len(heads)] if ("mean", each) in self.runs.ablated]
            found[name] = JointEffect(
                name,
                tuple(heads),
                self.together["mean", name],
                self.together["pooled", name],
                np.array([self.runs.rise("mean", each).mean() for each in sets]),
                self.joint_shares.get(("mean", name)),
                self.joint_shares.get(("pooled", name)),
            )
        return found
