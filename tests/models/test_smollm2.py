"""A real pretrained model through the path that a user takes: SmolLM2-135M-Instruct, quantised to 4 bits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from causal_probe.hooks import attention_hook, find_faults, self_test
from causal_probe.hooks.tokens import special_tokens

pytestmark = pytest.mark.slow

PERIOD = 50


@pytest.fixture(scope="module")
def tokens(smollm2):
    """BOS and 50 random tokens, repeated. The rarest tokens, at either end of the ids, are left out."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.stack([1_000 + torch.randperm(47_000, generator=generator)[:PERIOD] for _ in range(8)])
    bos = torch.full((len(halves), 1), special_tokens(smollm2).bos)
    return torch.cat([bos, halves, halves], 1)


def test_its_shape_and_special_tokens(smollm2):
    cfg = smollm2.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, cfg.d_vocab, cfg.n_ctx) == (30, 9, 3, 49_152, 8_192)
    assert cfg.model_name == "SmolLM2-135M-Instruct.Q4_1"
    found = special_tokens(smollm2)
    assert (found.ids, found.bos, found.before) == (set(range(17)), 1, ())


def test_nothing_is_wrong_with_it(smollm2, tokens):
    assert find_faults(smollm2, tokens[:, :20], hooks=("pattern", "attn_scores", "z")) == ()
    assert all(answer.passed for answer in self_test(smollm2, tokens[:2, :20]))


def test_the_known_heads_and_losses(smollm2, tokens):
    induction, previous, losses = torch.zeros(30, 9), torch.zeros(30, 9), []
    second = torch.arange(PERIOD + 1, 2 * PERIOD + 1)

    def look(layer):
        def record(pattern, hook):
            # A hook may fire under several names in one forward, with the same value: it is kept, not added.
            found[layer] = (
                pattern[:, :, second, second - PERIOD + 1].mean((0, 2)),
                pattern.diagonal(-1, 2, 3).mean((0, 2)),
            )

        return record

    hooks = [(attention_hook(layer, "pattern"), look(layer)) for layer in range(30)]
    for batch in tokens.split(2):
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.no_grad():
            logits = smollm2.run_with_hooks(batch, fwd_hooks=hooks)
        losses.append(cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none"))
        for layer, (to_next, to_previous) in found.items():
            induction[layer] += to_next * len(batch) / len(tokens)
            previous[layer] += to_previous * len(batch) / len(tokens)

    top = [divmod(int(head), 9) for head in induction.flatten().topk(3).indices]
    assert top == [(18, 6), (17, 3), (17, 4)]
    expected = torch.tensor([0.90, 0.78, 0.76])
    torch.testing.assert_close(induction.flatten().topk(3).values, expected, atol=0.03, rtol=0)
    assert divmod(int(previous.argmax()), 9) == (16, 0)
    assert float(previous.max()) == pytest.approx(0.89, abs=0.03)
    loss = torch.cat(losses).mean(0)
    assert float(loss[:PERIOD].mean()) == pytest.approx(14.1, abs=0.3)
    assert float(loss[PERIOD + 1 :].mean()) == pytest.approx(2.8, abs=0.5)
