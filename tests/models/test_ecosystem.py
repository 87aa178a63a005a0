"""TransformerLens' and circuitsvis' own tools take the disentangled transformer as it is."""

from __future__ import annotations

from typing import Any

import circuitsvis
import pytest
import torch
from transformer_lens import patching
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.head_detector import detect_head

from causal_probe.models import DisentangledTransformer
from tests.models.definition import random_model, random_tokens


@pytest.fixture
def induction() -> DisentangledTransformer:
    """An induction circuit by hand: L0H0 attends to the token before; L1H0 to where a token like this one was just before."""
    model = DisentangledTransformer(d_vocab=5, n_positions=10)
    model.block(0, 0, query="position", key="position").diagonal(-1).fill_(1000.0)
    model.block(1, 0, query="token", key="L0H0.token").fill_diagonal_(1000.0)
    return model


# ---------------------------------------------------------------------------------------------------------- head detector


def test_detect_head(induction: DisentangledTransformer) -> None:
    text = "0 1 2 3 4 0 1 2 3 4"
    # Rows 1..9 of ten attend to the position before; row 0 can't.
    previous = detect_head(induction, text, "previous_token_head")
    torch.testing.assert_close(previous[0, 0], torch.tensor(0.9))
    # Row 5 splits itself between position 1, after the first 0, and position 0, which stands before itself; rows 6..9 look at
    # 2..5 alone. Rows 0..4 find nothing like themselves: row 0 itself, the others the even mean.
    found = detect_head(induction, text, "induction_head")
    torch.testing.assert_close(found[1, 0], torch.tensor(0.45))
    assert found[1, 0] > found[0, 0]


def test_detect_head_on_layers_of_different_sizes() -> None:
    model = random_model(heads=(2, 1), dtype=torch.float32)
    scores = detect_head(model, "0 1 2 0 1 2", "duplicate_token_head", heads=[(0, 0), (0, 1), (1, 0)])
    assert scores.shape == (2, 2)
    assert (scores[0] >= 0).all()
    assert scores[1].tolist()[1] == -1  # there is no L1H1


# --------------------------------------------------------------------------------------------------------------- patching


def metric(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, 0] - logits[:, -1, 1]).mean()


def patched_by_hand(model: Any, corrupted: torch.Tensor, name: str, index: Any, clean: torch.Tensor) -> float:
    def patch(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[index] = clean[index]
        return value

    return metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])).item()


@pytest.fixture
def runs() -> tuple[DisentangledTransformer, torch.Tensor, ActivationCache]:
    model = random_model(heads=(2, 2), n_positions=5)
    clean, corrupted = random_tokens(model, seed=1), random_tokens(model, seed=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    return model, corrupted, cache


@torch.no_grad()
def test_patching_heads(runs: tuple[DisentangledTransformer, torch.Tensor, ActivationCache]) -> None:
    model, corrupted, cache = runs
    saved = {name: value.clone() for name, value in cache.items()}
    found = patching.get_act_patch_attn_head_all_pos_every(model, corrupted, cache, metric)
    assert found.shape == (5, 2, 2)  # output, query, key, value, pattern
    for kind, name in enumerate(("z", "q", "k", "v", "pattern")):
        for layer in range(2):
            for head in range(2):
                index = (slice(None), head) if name == "pattern" else (slice(None), slice(None), head)
                point = f"blocks.{layer}.attn.hook_{name}"
                by_hand = patched_by_hand(model, corrupted, point, index, cache[name, layer])
                assert found[kind, layer, head].item() == pytest.approx(by_hand, rel=1e-6)  # patching keeps float32
    assert len({round(value, 9) for value in found.flatten().tolist()}) == found.numel()  # each patch does its own
    for name, value in saved.items():
        assert torch.equal(cache[name], value)  # patching writes in place, and not into the cache


@torch.no_grad()
def test_patching_positions(runs: tuple[DisentangledTransformer, torch.Tensor, ActivationCache]) -> None:
    model, corrupted, cache = runs
    for name, patch in (("resid_pre", patching.get_act_patch_resid_pre), ("attn_out", patching.get_act_patch_attn_out)):
        found = patch(model, corrupted, cache, metric)
        assert found.shape == (2, 5)
        for layer in range(2):
            for position in range(5):
                index = (slice(None), position)
                by_hand = patched_by_hand(model, corrupted, f"blocks.{layer}.hook_{name}", index, cache[name, layer])
                assert found[layer, position].item() == pytest.approx(by_hand, rel=1e-6)  # patching keeps float32


@torch.no_grad()
def test_patching_heads_by_position(runs: tuple[DisentangledTransformer, torch.Tensor, ActivationCache]) -> None:
    model, corrupted, cache = runs
    found = patching.get_act_patch_attn_head_out_by_pos(model, corrupted, cache, metric)
    assert found.shape == (2, 5, 2)
    index = (slice(None), 3, 1)
    by_hand = patched_by_hand(model, corrupted, "blocks.1.attn.hook_z", index, cache["z", 1])
    assert found[1, 3, 1].item() == pytest.approx(by_hand, rel=1e-6)  # patching keeps float32


# ------------------------------------------------------------------------------------------------------------------ cache


def test_activation_cache() -> None:
    model = random_model(heads=(2, 2))
    tokens = random_tokens(model)
    logits, cache = model.run_with_cache(tokens)
    assert isinstance(cache, ActivationCache)
    assert torch.equal(logits, model(tokens))
    assert torch.equal(cache["pattern", 1], cache["blocks.1.attn.hook_pattern"])
    assert torch.equal(cache["blocks.0.attn.hook_z"], cache["z", 0])
    stacked = cache.stack_activation("pattern")
    assert torch.equal(stacked, torch.stack([cache["pattern", 0], cache["pattern", 1]]))
    one = cache.apply_slice_to_batch_dim(2)
    assert torch.equal(one["pattern", 0], cache["pattern", 0][2])
    assert cache.to("cpu")["pattern", 0].device.type == "cpu"


def test_run_with_cache_options() -> None:
    model = random_model()
    tokens = random_tokens(model)
    _, cache = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    _, whole = model.run_with_cache(tokens[:1])
    assert not cache.has_batch_dim
    assert torch.equal(cache["pattern", 0], whole["pattern", 0][0])
    _, plain = model.run_with_cache(tokens, return_cache_object=False, names_filter="blocks.0.attn.hook_pattern")
    assert type(plain) is dict
    assert list(plain) == ["blocks.0.attn.hook_pattern"]
    loss, gradients = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert loss.ndim == 0
    assert gradients["blocks.0.attn.hook_pattern_grad"].any()
    assert not any(point.has_hooks() for point in model.hook_dict.values())


# ------------------------------------------------------------------------------------------------------------ circuitsvis


def test_circuitsvis(induction: DisentangledTransformer) -> None:
    tokens = induction.to_str_tokens("0 1 2 3 4")
    _, cache = induction.run_with_cache(torch.arange(5)[None], remove_batch_dim=True)
    html = str(circuitsvis.attention.attention_patterns(tokens=tokens, attention=cache["pattern", 0]))
    assert '"0", "1", "2", "3", "4"' in html
    assert "AttentionPatterns" in html
