"""How many ablations tell whether a head stands out, and how often they tell it wrongly; and that no verdict differs from the one after all ablations."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from causal_probe.hooks import to_hooked
from causal_probe.probes import Rule, repeated_tokens, scan, verify
from causal_probe.probes.ablation import Experiment, Laboratory
from causal_probe.probes.measures import Measured, next_token, repeated_token, rows_of
from causal_probe.probes.ranking import allowed, sample_size, share_of_heads, share_of_sets
from tests import tiny_huggingface as tiny
from tests.architectures import zoo


@dataclass
class Runs:
    """Effects that are known; what is asked for is counted."""

    effects: dict[Any, float]
    asked: list[Any] = field(default_factory=list)

    def rank(self, baseline: str, sets: Any, *, progress: bool = False) -> None:
        self.asked += [each for each in sets if each not in self.asked]

    def rise(self, baseline: str, heads: Any, *, ranked: bool = False) -> np.ndarray:
        heads = frozenset(heads)
        assert heads in self.asked or heads == frozenset([(9, 9)]), "its effect was used and not measured"
        return np.array([sum(self.effects[head] for head in heads)])


def asked(effects: np.ndarray, predicted: np.ndarray, seed: int, *, error: float | None = 0.01) -> tuple[Any, int]:
    """The share for a head of effect 1 among others of these effects, and how many of them were ablated."""
    others = [(0, number) for number in range(len(effects))]
    runs: Any = Runs({(9, 9): 1.0, **dict(zip(others, effects, strict=True))})
    found = share_of_heads(
        runs, "mean", [(9, 9)], others, dict(zip(others, predicted, strict=True)),
        rank=0.95, error=error, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return found[9, 9], len(runs.asked)


@pytest.mark.parametrize(
    ("total", "many", "error", "seen"),
    [(249, 12, 0.01, 0), (50, 3, 0.05, 1), (30, 1, 0.2, 0), (7, 7, 0.01, 6), (260, 12, 1e-3, 4)],
)
def test_a_sample_is_as_large_as_the_hypergeometric_distribution_asks(
    total: int, many: int, error: float, seen: int
) -> None:
    drawn = sample_size(total, many, error, seen=seen)
    assert stats.hypergeom(total, many, drawn).cdf(seen) <= error * (1 + 1e-6)
    assert drawn == 0 or stats.hypergeom(total, many, drawn - 1).cdf(seen) > error


def test_a_rank_is_misjudged_no_more_often_than_stated() -> None:
    """The worst case: one head more than may hurt as much does, and the gradient predicts none of them. The level is seen at 0.2 as well."""
    effects = np.zeros(260)
    effects[100 : 100 + allowed(260, 0.95) + 1] = 2.0
    predicted = -np.arange(260.0)  # those that hurt come behind the first eight
    for error, runs in ((0.01, 600), (0.2, 200)):
        wrong = sum(asked(effects, predicted, seed, error=error)[0] >= 0.95 for seed in range(runs))
        assert 0 < wrong <= stats.binom(runs, error).ppf(0.999)
    assert not any(asked(effects, predicted, seed, error=None)[0] >= 0.95 for seed in range(3))


def test_a_good_prediction_saves_ablations_and_a_bad_one_costs_no_more_than_all() -> None:
    rng = np.random.default_rng(0)
    effects = np.abs(rng.normal(0, 0.05, 260))
    effects[:5] = 3.0
    share, count = asked(effects, effects + rng.normal(0, 0.02, 260), 0)
    assert share == pytest.approx(1 - 5 / 260)
    assert count < 150
    effects[:40] = 3.0
    share, count = asked(effects, effects, 0)  # too many: known at once
    assert share < 0.95
    assert count < 60
    share, count = asked(effects, -effects, 1)  # found in the sample, and then more are asked
    assert share < 0.95
    assert count < 260
    assert asked(np.zeros(3), np.zeros(3), 0) == (1.0, 3)


def test_random_sets_stop_where_the_answer_is_known() -> None:
    heads = [(0, number) for number in range(200)]
    sets = [frozenset([head]) for head in heads[:100]]
    for hurting, share, count in ((0, 1.0, 100), (1, 0.99, 100), (50, 0.0, 2)):
        runs: Any = Runs({(9, 9): 1.0, **{head: 2.0 * (head[1] < hurting) for head in heads}})
        assert (share_of_sets(runs, "mean", [(9, 9)], sets, rank=0.99), len(runs.asked)) == (share, count)
    assert share_of_sets(runs, "mean", [(9, 9)], [], rank=0.99) is None


@pytest.mark.parametrize("kind", tiny.CAUSAL)
@pytest.mark.parametrize("seed", range(3))
def test_verdicts_are_those_after_all_ablations(kind: str, seed: int) -> None:
    """On random models, of which some heads are taken for flagged, with a delta of the size of their effects."""
    torch.manual_seed(seed)
    plain = tiny.CAUSAL[kind]()
    for parameter in plain.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model = to_hooked(plain)
    scores = scan(model, templates=["previous-token", "induction"], n_sequences=128, period=8)
    least = float(np.quantile([each.excess for each in scores], 0.7))
    rule = Rule(minimum_excess=least, level=0.3, delta=0.01, rank=0.5, joint_rank=0.8)

    def measure(logits: torch.Tensor, batch: Any) -> Measured:
        found = next_token()(logits, batch)
        return Measured(found.loss, found.logit)

    both = [
        verify(scores, model, measure=measure, period=8, rule=rule, random_sets=10, exhaustive=whole, seed=seed)
        for whole in (False, True)
    ]
    assert [each[:4] for each in both[0].verdicts] == [each[:4] for each in both[1].verdicts]
    assert both[0].verdicts
    assert both[0].settings["forwards"] < both[1].settings["forwards"]
    for quick, whole in zip(*(each.verdicts for each in both), strict=True):
        assert quick.effect == whole.effect
        assert quick.restored in (None, whole.restored)


@pytest.mark.parametrize(
    "name", ["GPT-2", "Llama 3", "Gemma 2", "Pythia", "Phi-2", "OLMo 2", "Granite 3", "Falcon-7B", "Gemma 3"]
)
def test_short_cuts_give_the_same(name: str) -> None:
    """Some rows of the logits alone, and later layers passed by: with norms behind the block, parallel MLPs, caps and multipliers."""
    model = to_hooked(zoo.hooked(zoo.ARCHITECTURES[name])[0].double())
    tokens = repeated_tokens(model, n_sequences=4, period=6, bos="no").tokens
    with torch.no_grad():
        laboratory = Laboratory(model, repeated_token, reference=tokens.repeat(4, 1), n_sequences=4, example=tokens[:2])
        assert laboratory.picks
        assert laboratory.passes
        assert laboratory.replays
        short = Experiment(laboratory, tokens, direct=True)
        short.observe()
        found = [(short.ablate([head], "pooled").loss, short.direct_effect(head)) for head in laboratory.heads]
        laboratory.picks = laboratory.passes = laboratory.replays = False
        whole = Experiment(laboratory, tokens, direct=True)
        assert whole.observe().without
        for head, (loss, direct) in zip(laboratory.heads, found, strict=True):
            torch.testing.assert_close(loss, whole.ablate([head], "pooled").loss, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(direct, whole.direct_effect(head), rtol=1e-9, atol=1e-9)


def test_a_measure_of_ones_own_is_used_though_it_wraps_one_of_ours() -> None:
    """Where it differs from that on other sequences than the first, by which the short cuts are tried."""
    base = next_token()
    assert rows_of(base) is not None

    @functools.wraps(base)
    def own(logits: torch.Tensor, batch: Any) -> Measured:
        return base(logits, batch)

    assert rows_of(own) is None
