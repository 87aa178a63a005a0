"""Losses late and early, and on two copies, against log-probabilities picked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.probes.in_context import copy_losses, in_context_score, token_losses
from tests.tiny_models import MODELS, N_POSITIONS, disentangled, random_tokens, transformer_lens


def losses_by_hand(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """-log p of each token but the first, [sequence, pos - 1], one at a time."""
    with torch.no_grad():
        probabilities = model(tokens).double().exp()
    probabilities /= probabilities.sum(-1, keepdim=True)
    return np.array(
        [
            [-np.log(float(probabilities[b, i - 1, tokens[b, i]])) for i in range(1, tokens.shape[1])]
            for b in range(len(tokens))
        ]
    )


@pytest.mark.parametrize("kind", MODELS)
def test_score_equals_picked_log_probabilities(kind: str) -> None:
    model, tokens = MODELS[kind](), random_tokens(9)
    by_hand = losses_by_hand(model, tokens)
    found = in_context_score(model, tokens, early=2, late=5, batch_size=4)
    each = by_hand[:, 4] - by_hand[:, 1]  # entry i is position i + 1
    assert found.score == pytest.approx(each.mean(), abs=1e-4)
    assert found.stderr == pytest.approx(each.std(ddof=1) / 3, abs=1e-4)
    np.testing.assert_allclose(found.to_pandas()["loss"], by_hand.mean(0), atol=1e-4)
    assert list(found.to_pandas()["position"]) == list(range(1, N_POSITIONS))


def test_merging_equals_one_run() -> None:
    model, tokens = disentangled(), random_tokens(8)
    whole = in_context_score(model, tokens, early=1, late=6)
    halves = [in_context_score(model, half, early=1, late=6) for half in tokens.split(3)]
    merged = halves[0].merge(halves[1]).merge(halves[2])
    assert merged.score == pytest.approx(whole.score)
    assert merged.stderr == pytest.approx(whole.stderr)
    with pytest.raises(CausalProbeError, match=r"differ in .* can't be merged"):
        whole.merge(in_context_score(model, tokens, early=1, late=5))


def test_copies_equal_picked_log_probabilities() -> None:
    model = transformer_lens()
    copy = torch.tensor([[0, 1, 2], [3, 1, 4], [2, 3, 0], [4, 0, 1]])
    tokens = torch.cat([torch.full((4, 1), 4), copy, copy], 1)  # a start token, then two copies
    by_hand = losses_by_hand(model, tokens)
    found = copy_losses(model, tokens, period=3, batch_size=3)
    assert found.start == 1
    first, second = by_hand[:, [1, 2]], by_hand[:, [4, 5]]  # positions 2, 3 and 5, 6
    assert found.first == pytest.approx(first.mean(), abs=1e-4)
    assert found.second == pytest.approx(second.mean(), abs=1e-4)
    gain = (first - second).mean(1)
    assert found.gain == pytest.approx(gain.mean(), abs=1e-4)
    assert found.gain_stderr == pytest.approx(gain.std(ddof=1) / 2, abs=1e-4)
    table = found.to_pandas()
    np.testing.assert_allclose(table["loss"], np.concatenate([first.mean(0), second.mean(0)]), atol=1e-4)
    assert list(table["copy"]) == [1, 1, 2, 2]
    assert list(table["token"]) == [1, 2, 1, 2]
    halves = [copy_losses(model, half, period=3) for half in tokens.split(2)]
    assert halves[0].merge(halves[1]).gain_stderr == pytest.approx(found.gain_stderr, abs=1e-6)


def test_an_induction_circuit_gains_a_copy_and_a_uniform_model_nothing() -> None:
    model = DisentangledTransformer(d_vocab=8, n_positions=10)
    copy = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:5] for seed in range(4)])
    tokens = copy.repeat(1, 2)
    flat = copy_losses(model, tokens, period=5)
    assert (flat.first, flat.gain) == (pytest.approx(np.log(8)), pytest.approx(0, abs=1e-6))
    for i in range(1, 10):
        model.block(0, 0, query="position", key="position")[i, i - 1] = 30.0
    model.block(1, 0, query="token", key="L0H0.token").fill_diagonal_(30.0)
    model.block(1, 0, query="token", key="position")[:, 0] = -60.0  # nothing comes before position 0
    model.output_block("L1H0.token").fill_diagonal_(30.0)
    ideal = copy_losses(model, tokens, period=5)
    assert ideal.second < 1e-3
    assert ideal.gain > 5


def test_a_loss_in_low_precision_is_computed_in_single() -> None:
    logits = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = token_losses(logits, tokens)
    expected = -logits.float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_one_sequence_has_no_standard_error() -> None:
    found = in_context_score(disentangled(), random_tokens(1), early=1, late=2)
    assert found.stderr is None
    assert found.to_dict()["stderr"] is None
    assert found.to_dict()["losses"]["stderr"] is None
    assert "stderr" in found.to_dict()["undefined"]
    copies = copy_losses(disentangled(), torch.tensor([[1, 2, 1, 2]]), period=2)
    assert copies.gain_stderr is None
    assert copies.to_dict()["second_by_token"]["stderr"] is None
    for result in (found, copies):
        assert "Induction Heads" in result.cite().bibtex


def test_the_model_is_left_as_it_was() -> None:
    model = disentangled().train()
    in_context_score(model, random_tokens(3), early=1, late=2)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("early", "late"), [(0, 3), (3, 3), (4, 3), (1, 7)])
def test_wrong_positions(early: int, late: int) -> None:
    with pytest.raises(CausalProbeError, match="0 < early < late < 7"):
        in_context_score(disentangled(), random_tokens(2), early=early, late=late)


def test_wrong_copies() -> None:
    model = disentangled()
    with pytest.raises(CausalProbeError, match="don't repeat after 3"):
        copy_losses(model, torch.tensor([[0, 1, 2, 0, 1, 3]]), period=3)
    with pytest.raises(CausalProbeError, match="Two copies of 4 tokens from position -1 don't fit into sequences of 7"):
        copy_losses(model, random_tokens(2), period=4)
    with pytest.raises(CausalProbeError, match="no sequences"):
        copy_losses(model, [], period=4)
    with pytest.raises(CausalProbeError, match="of whole numbers"):
        copy_losses(model, torch.rand(2, 4), period=2)
    with pytest.raises(CausalProbeError, match=r"`batch_size` is 0. It must be a whole number of at least 1"):
        copy_losses(model, random_tokens(2), period=2, batch_size=0)
    model.W_U.data.fill_(torch.nan)
    with pytest.raises(CausalProbeError, match="not finite"):
        copy_losses(model, torch.tensor([[1, 2, 1, 2]]), period=2)
