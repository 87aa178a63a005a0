"""Heads taken away in one call: the paired difference of the losses, against forward passes with hooks of one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from causal_probe import models, probes
from causal_probe.errors import CausalProbeError
from causal_probe.probes.ablate_heads import HeadAblation


@pytest.fixture(scope="module")
def model() -> Any:
    made = models.DisentangledTransformer(d_vocab=8, n_positions=12, heads=(2, 2))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator)
    return made.to_transformer_lens()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(8, (24, 12), generator=torch.Generator().manual_seed(1))


def losses(model: Any, tokens: torch.Tensor, hooks: list[Any]) -> np.ndarray[Any, Any]:
    """The next token's loss of each sequence, by torch's own cross-entropy."""
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return np.asarray(each.mean(1).double())


@pytest.mark.parametrize("by", ["mean", "zero"])
@pytest.mark.parametrize("heads", ["L1H0", [(0, 1), "L1H0"]])
def test_against_hooks_of_ones_own(by: Any, heads: Any, model: Any, tokens: torch.Tensor) -> None:
    tokens, others = (tokens[:6], tokens[6:]) if by == "mean" else (tokens[:6], tokens[:0])
    _, cache = model.run_with_cache(others if by == "mean" else tokens)
    named = [(1, 0)] if heads == "L1H0" else [(0, 1), (1, 0)]

    def edit(layer: int, head: int) -> Any:
        def replace(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z = z.clone()
            if by == "mean":  # each measured sequence has three references of its own
                z[:, :, head] = cache[f"blocks.{layer}.attn.hook_z"][:, :, head].unflatten(0, (6, 3)).mean(1)
            else:
                z[:, :, head] = 0
            return z

        return f"blocks.{layer}.attn.hook_z", replace

    found = probes.ablate_heads(model, torch.cat([tokens, others]), heads, by=by, batch_size=4)
    assert found.heads == tuple(named)
    clean, ablated = losses(model, tokens, []), losses(model, tokens, [edit(*each) for each in named])
    np.testing.assert_allclose(found.loss, clean, rtol=1e-5)
    np.testing.assert_allclose(found.ablated, ablated, rtol=1e-5)
    test = stats.ttest_rel(ablated, clean, alternative="greater")
    assert found.effect.value == pytest.approx((ablated - clean).mean(), rel=1e-3)
    assert found.effect.p_value == pytest.approx(test.pvalue, rel=1e-2)
    interval = stats.ttest_rel(ablated, clean).confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-3)


def test_it_is_shown_and_kept(model: Any, tokens: torch.Tensor, tmp_path: Any) -> None:
    found = probes.ablate_heads(model, tokens, "L1H1")
    row = found.to_pandas().iloc[0]
    assert row["rise"] == pytest.approx(row["without"] - row["loss"])
    assert "L1H1" in repr(found)
    assert "paired t-test" in found.methods
    found.save(tmp_path / "found.safetensors")
    assert HeadAblation.load(tmp_path / "found.safetensors").effect == found.effect


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": "L2H0"}, "no head L2H0"),
        ({"heads": ["L1H0", (1, 0)]}, "none twice"),
        ({"heads": []}, "one head or more"),
        ({"by": "noise"}, "`by` is 'noise'"),
        ({"reference": torch.zeros(3, 12, dtype=torch.long)}, "The reference holds 3 sequences"),
        ({"tokens": torch.zeros(1, 5, dtype=torch.long)}, "1 sequences were given, of which one in 4"),
        ({"tokens": torch.zeros(1, 5, dtype=torch.long), "by": "zero"}, "two sequences or more; there is one"),
    ],
)
def test_what_can_t_be_done_is_said(change: dict[str, Any], said: str, model: Any, tokens: torch.Tensor) -> None:
    asked: dict[str, Any] = {"tokens": tokens, "heads": "L1H0", **change}
    with pytest.raises(CausalProbeError, match=said):
        probes.ablate_heads(model, asked.pop("tokens"), asked.pop("heads"), **asked)
