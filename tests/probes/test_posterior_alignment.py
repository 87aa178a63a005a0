"""Heads that weigh graphs as the posterior does, told from heads that choose, are fixed, or look elsewhere."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from causal_probe.errors import CausalProbeError
from causal_probe.probes.posterior_alignment import posterior_alignment
from causal_probe.tasks import GraphMixture, generator

LAGS, T = (1, 2, 4), 30
TASK = GraphMixture.of_lags(LAGS, T + 1, 5, seed=4)


class Weighs(HookedRootModule):
    """One layer without weights; each head divides its attention among the lags' parents by a power of the posterior, and leaves the rest at position 0."""

    def __init__(self, *powers: float, rest: float = 0.0) -> None:
        super().__init__()
        self.powers, self.rest = powers, rest
        self.cfg = SimpleNamespace(
            n_layers=1, n_heads=len(powers), d_vocab=5, n_ctx=T + 1, device="cpu", dtype=torch.float64, model_name="weighs"
        )  # fmt: skip
        self.blocks = torch.nn.ModuleList([torch.nn.Module()])
        self.blocks[0].attn = torch.nn.Module()  # type: ignore[union-attr]
        self.blocks[0].attn.hook_pattern = HookPoint()  # type: ignore[union-attr]
        self.setup()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        posterior = TASK.posterior(torch.nn.functional.pad(tokens, (0, 1)))[..., 1:]
        heads = []
        for power in self.powers:
            share = posterior**power
            share = (1 - self.rest) * share / share.sum(1, keepdim=True)
            pattern = torch.zeros(len(tokens), T, T, dtype=torch.float64)
            for i, lag in enumerate(LAGS):
                for t in range(lag - 1, T):
                    pattern[:, t, t + 1 - lag] += share[:, i, t]
            pattern[:, :, 0] += 1 - pattern.sum(-1)
            heads.append(pattern)
        passed: torch.Tensor = self.blocks[0].attn.hook_pattern(torch.stack(heads, 1))  # type: ignore[union-attr, operator]
        return passed


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    batch = TASK.sample(80, generator(4, "alignment"))
    return batch.tokens[:, :T], TASK.posterior(batch.tokens)


def test_heads_that_average_choose_and_look_alike(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, posterior = drawn
    found = posterior_alignment(Weighs(1.0, 50.0, 0.0), tokens, TASK.graphs, posterior, shift=1)
    averages, chooses, alike = found.divergence[0]
    assert averages == pytest.approx(0, abs=1e-4)
    assert alike == pytest.approx(found.uniform, abs=1e-4)
    assert chooses > 0.5
    assert found.slope[0][0] == pytest.approx(1, abs=1e-4)
    assert found.slope[0][1] > 1.2
    assert found.slope[0][2] == pytest.approx(0, abs=1e-9)
    assert found.mass[0] == pytest.approx([1, 1, 1])


def test_by_plain_loops(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, posterior = (each[:12] for each in drawn)
    model = Weighs(0.3, 2.0, rest=0.4)
    found = posterior_alignment(model, tokens, TASK.graphs, posterior, shift=1, burn_in=7, least_entropy=0.4)
    pattern = model(tokens).numpy()
    for head in range(2):
        kl, xy, xx, mass = [], 0.0, 0.0, []
        for n in range(12):
            for row in range(7, T):
                p = posterior[n, :, row + 1].numpy()
                if -(p * np.log(p)).sum() <= 0.4:
                    continue
                a = np.array([pattern[n, head, row, row + 1 - lag] for lag in LAGS])
                share = (a / a.sum() + 1e-6) / (1 + 3e-6)
                kl.append((p * np.log(p / share)).sum())
                xy += ((share - 1 / 3) * (p - 1 / 3)).sum()
                xx += ((p - 1 / 3) ** 2).sum()
                mass.append(a.sum())
        assert found.n_rows == len(kl)
        assert found.divergence[0][head] == pytest.approx(np.mean(kl), abs=1e-9)
        assert found.slope[0][head] == pytest.approx(xy / xx, abs=1e-9)
        assert found.mass[0][head] == pytest.approx(np.mean(mass))


def test_standard_errors_are_the_spread_over_data_sets() -> None:
    batch = TASK.sample(40 * 30, generator(5, "spread"))
    model = Weighs(0.5)
    made = [
        posterior_alignment(model, tokens[:, :T], TASK.graphs, TASK.posterior(tokens), shift=1, burn_in=6)
        for tokens in batch.tokens.split(30)
    ]
    for value, error in (("divergence", "stderr"), ("slope", "slope_stderr")):
        values, errors = (np.array([getattr(found, name)[0][0] for found in made]) for name in (value, error))
        assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(ddof=1), rel=0.3)


def test_batches_make_no_difference(drawn: tuple[torch.Tensor, torch.Tensor], tmp_path: Any) -> None:
    tokens, posterior = drawn
    model = Weighs(0.7)
    one, several = (
        posterior_alignment(model, tokens, TASK.graphs, posterior, shift=1, batch_size=size) for size in (None, 7)
    )
    assert one.divergence[0][0] == pytest.approx(several.divergence[0][0], abs=1e-12)
    one.save(tmp_path / "found.safetensors")
    assert type(one).load(tmp_path / "found.safetensors").to_dict() == one.to_dict()
    assert repr(one).splitlines()[2].split()[0] == "L0H0"
    assert "dangelo2025" in one.cite().bibtex


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"posterior": torch.ones(80, 3, T + 1)}, "sum to 1"),
        ({"posterior": torch.ones(79, 3, T + 1) / 3}, "80 sequences, 3 graphs"),
        ({"posterior": torch.full((80, 3, T + 1), float("nan"))}, "sum to 1"),
        ({"posterior": torch.ones(80, 3, T + 1, dtype=torch.long)}, "found int64"),
        ({"posterior": torch.ones(80, 3, T + 1) / 3}, "there is no slope"),
        ({"least_entropy": 2.0}, "in no sequence"),
        ({"least_entropy": float("nan")}, "`least_entropy`"),
        ({"burn_in": T}, "At no row"),
        ({"graphs": TASK.graphs[:1], "posterior": torch.ones(80, 1, T + 1)}, "there is one"),
        ({"shift": 40}, "At no row"),
    ],
)  # fmt: skip
def test_bad_input(drawn: tuple[torch.Tensor, torch.Tensor], change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"graphs": TASK.graphs, "posterior": drawn[1], "shift": 1} | change
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        posterior_alignment(Weighs(1.0), drawn[0], given.pop("graphs"), given.pop("posterior"), **given)
