"""Gemma-3-270M, the 4-bit file: norms of queries and keys, norms behind the block, windows; what makes its best induction head attend.

Run where the environment names its folder alone (``tests/real_model.py`` says where it is to be had): about 2 minutes and 3 GB.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from causal_probe import probes
from tests.real_model import GEMMA, gemma_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(gemma_folder() is None, reason=f"{GEMMA} names no folder with Gemma-3-270M"),
]


@pytest.fixture(scope="module")
def gemma() -> Any:
    from causal_probe.hooks import to_hooked
    from causal_probe.models import load_model

    return to_hooked(*load_model(str(gemma_folder())))


@pytest.fixture(scope="module")
def tokens(gemma: Any) -> torch.Tensor:
    return probes.repeated_tokens(gemma, n_sequences=6, period=20, bos="yes", seed=7).tokens


@pytest.fixture(scope="module")
def found(gemma: Any, tokens: torch.Tensor) -> Any:
    return probes.qk_attributions(gemma, tokens, "L5H1", edges="induction", pairs=3)


def test_its_shape_and_that_the_file_is_read_rightly(gemma: Any):
    cfg = gemma.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, cfg.d_vocab) == (18, 4, 1, 262_144)
    text = gemma.tokenizer("Two plus two equals", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = gemma(text)[0, -1]
    assert gemma.tokenizer.decode([int(logits.argmax())]).strip() == "four"


def test_its_best_induction_head(gemma: Any, tokens: torch.Tensor):
    best = probes.scan(gemma, tokens, templates="induction").top("induction", 1)[0]
    assert (best.layer, best.head) == (5, 1)
    assert best.score > 0.7


def test_its_keys_hold_what_the_previous_token_head_wrote(found: Any):
    assert found.error < 1e-3
    keys = found.margin("key")
    assert keys["source"][0] == "L4H1"
    assert keys["contribution"][0] > 0.5 * found.total
    assert keys["contribution"][0] - 3 * keys["stderr"][0] > keys["contribution"][1]


def test_predicted_and_intervened_agree_in_sign_and_order(found: Any):
    first = found.pairs[0]
    assert first.key == "L4H1"
    assert first.intervened > 3 * first.intervened_stderr
    assert all(pair.intervened is None or pair.intervened < first.intervened for pair in found.pairs[1:])


def test_without_it_there_the_head_no_longer_attends(gemma: Any, tokens: torch.Tensor):
    arrows = probes.upstream(gemma, tokens, "L5H1", edges="induction", depth=1)
    edge = arrows.graph.edges["L4H1", "L5H1"]
    assert edge["side"] == "key"
    assert edge["drop"] > edge["largest_control"] + 0.1
    assert arrows.roles["L4H1"][0] == "previous-token"
