"""Which keys a layer shows, and attention on nothing: windows, sinks, and layers without attention, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import preflight, to_hooked
from causal_probe.probes.bootstrap import bootstrap_intervals
from tests.architectures.zoo import ARCHITECTURES, GROUPED, tokens

WINDOW, LENGTH = 8, 41


@pytest.fixture(scope="module")
def even():
    """A window of eight tokens, and attention that is even within it: the queries are zero."""
    config = transformers.MistralConfig(**GROUPED, sliding_window=WINDOW)
    original = transformers.MistralForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for layer in original.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    return to_hooked(original)


def test_chance_counts_the_keys_in_the_window(even):
    ids = torch.randint(3, 60, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    found = probes.scan(even, ids, templates=["previous-token"]).of("L1H2", "previous-token")
    chance = np.mean([1 / min(i + 1, WINDOW) for i in range(1, LENGTH)])
    assert chance == pytest.approx(0.1461, abs=1e-4)
    assert found.chance == pytest.approx(chance, abs=1e-7)
    assert found.score == pytest.approx(chance, abs=1e-6)
    assert found.excess == pytest.approx(0, abs=1e-6)


def test_a_target_outside_the_window_is_none(even):
    ids = torch.randint(3, 60, (4, 20), generator=torch.Generator().manual_seed(0)).repeat(1, 2)  # 19 tokens back
    found = probes.scan(even, ids, templates=["induction", "previous-token"])
    assert found.of("L0H0", "previous-token").rows == 4 * 39
    near = sum(
        any(key > 0 and ids[b, key - 1] == ids[b, query] for key in range(max(0, query - WINDOW + 1), query + 1))
        for b in range(4)
        for query in range(40)
    )  # tokens that chance has drawn twice
    assert found.of("L0H0", "induction").rows == near < 40


def test_layers_with_other_windows_have_other_rows_and_chances():
    model = to_hooked(ARCHITECTURES["Gemma 3"].build())  # layer 0 sees five tokens, layer 1 all
    found = probes.scan(model, tokens(4), templates=["induction"])
    windowed, full = found.of("L0H0", "induction"), found.of("L1H0", "induction")
    assert full.rows >= 32  # eight in each sequence, and tokens that chance has drawn twice
    assert windowed.rows < full.rows
    merged = found.merge(probes.scan(model, tokens(3, seed=1), templates=["induction"]))
    assert merged.of("L1H0", "induction").rows >= full.rows + 24
    assert merged.of("L0H0", "induction").rows < merged.of("L1H0", "induction").rows
    table = bootstrap_intervals(merged, resamples=100)
    assert (
        table.dropna()
        .query("layer == 1")[["score_low", "score", "score_high"]]
        .apply(lambda row: row.is_monotonic_increasing, axis=1)
        .all()
    )


def test_attention_on_nothing_is_a_column():
    original = ARCHITECTURES["GPT-OSS"].build()
    model, ids = to_hooked(original), tokens(4)
    preflight(model, ids)
    found = probes.head_graphs(model, ids)
    with torch.no_grad():
        pattern = original(ids, output_attentions=True).attentions[0].double()
    assert found.nothing[0] == pytest.approx((1 - pattern.sum(-1)).mean(0).numpy(), abs=1e-6)
    assert found.nothing[0].max() > 0.3
    assert probes.head_graphs(to_hooked(ARCHITECTURES["Llama 3"].build()), ids).nothing is None


def test_rows_that_sum_to_less_are_a_fault_where_there_is_no_sink():
    model, ids = to_hooked(ARCHITECTURES["Llama 3"].build()), tokens(2)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda value, hook: 0.9 * value)]):
        with pytest.raises(CausalProbeError, match=r"sum to one but to 0.9"):
            preflight(model, ids)
        with pytest.raises(CausalProbeError, match="must sum to one"):
            probes.head_graphs(model, ids)


def test_a_layer_without_attention_has_no_heads():
    model = to_hooked(ARCHITECTURES["Qwen3.5"].build())
    assert sorted(probes.head_graphs(model, tokens(2)).values) == [1, 3]
    assert probes.scan(model, tokens(2), templates="previous-token").heads == (0, 4, 0, 4)
    found = probes.qk_attributions(model, tokens(2), "L3H0", edges="previous-token", pairs=0)
    assert found.sources == (
        "embed", "L0.mixer", "L0.mlp", "L1H0", "L1H1", "L1H2", "L1H3", "L1.mlp", "L2.mixer", "L2.mlp", "bias",
    )  # fmt: skip
    with pytest.raises(CausalProbeError, match=r"There is no head L2H0. Heads, counted from 0: layer 1: 4, layer 3: 4"):
        probes.qk_attributions(model, tokens(2), "L2H0", edges="previous-token")
