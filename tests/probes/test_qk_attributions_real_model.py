"""QK attributions and upstream on SmolLM2-135M-Instruct, the 4-bit file: who feeds its best induction head."""

from __future__ import annotations

from typing import Any

import pytest

from causal_probe import probes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokens(smollm2: Any) -> Any:
    return probes.repeated_tokens(smollm2, n_sequences=8, period=25, bos="yes", seed=3).tokens


def test_the_keys_of_the_induction_head_hold_what_the_previous_token_head_wrote(smollm2: Any, tokens: Any):
    found = probes.qk_attributions(smollm2, tokens, 18, 6, edges="induction", pairs=0)
    assert found.error < 1e-3
    assert len(found.sources) == 1 + 18 * 9 + 18 + 1  # embedding, heads, MLPs, biases
    keys = found.margin("key")
    assert keys["source"][0] == "L16H0"
    assert keys["contribution"][0] > 0.5 * found.total
    assert keys["contribution"][0] - 3 * keys["stderr"][0] > keys["contribution"][1]


def test_without_it_there_the_head_no_longer_attends(smollm2: Any, tokens: Any):
    found = probes.upstream(smollm2, tokens, 18, 6, edges="induction", depth=1)
    edge = found.graph.edges["L16H0", "L18H6"]
    assert edge["side"] == "key"
    assert edge["controls"] == 20
    assert edge["drop"] > 0.6
    assert edge["drop"] > 5 * edge["largest_control"]
    assert found.roles["L16H0"][0] == "previous-token"
