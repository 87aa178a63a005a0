"""Order: one layer without positions can't tell, two can; by hand on models of other kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.models.standard import StandardTransformer
from causal_probe.probes.permutation_sensitivity import permutation_sensitivity
from tests import tiny_huggingface
from tests.tiny_models import MODELS, random_tokens


def without_positions(n_layers: int) -> Any:
    """Random weights, position embeddings zero."""
    model = StandardTransformer(5, 9, d_model=12, n_layers=n_layers, n_heads=2, d_head=6, d_mlp=16)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.0 if "W_pos" in name else 1.0)
    return model


def test_one_layer_without_positions_can_t_tell_an_order_and_two_can() -> None:
    tokens = random_tokens(12, n=9)
    one, two = (permutation_sensitivity(without_positions(n), tokens, n_permutations=6) for n in (1, 2))
    assert one.tokens_largest <= max(1e-9, 100 * one.rounding)
    assert max(one.largest) <= max(1e-9, 100 * one.rounding)
    assert two.tokens > 0.01
    assert two.layers[0] == pytest.approx(two.tokens, rel=1e-3)  # nothing but the token's vector enters layer 0
    assert two.largest[1] <= max(1e-9, 100 * two.rounding)  # the last layer alone can't tell either


@pytest.mark.parametrize("kind", MODELS)
def test_every_number_by_hand(kind: str) -> None:
    model = MODELS[kind]()
    tokens = random_tokens(4)
    found = permutation_sensitivity(model, tokens, n_permutations=3, start=1, seed=5)
    generator = torch.Generator().manual_seed(5)
    orders = [torch.rand(4, 5, generator=generator).argsort(1) + 1 for _ in range(3)]

    def predicted(some: torch.Tensor) -> np.ndarray:
        return model(some)[:, -1].detach().double().softmax(-1).numpy()

    clean, kl = predicted(tokens), []
    for order in orders:
        moved = tokens.clone()
        for b in range(4):
            moved[b, 1:6] = tokens[b, order[b]]
        kl.append((clean * np.log(clean / predicted(moved))).sum(1))
    assert found.tokens == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-6)
    assert found.tokens_largest == pytest.approx(np.max(kl), rel=1e-3, abs=1e-6)
    assert found.tokens_stderr == pytest.approx(np.mean(kl, 0).std(ddof=1) / 2, rel=1e-3, abs=1e-6)
    assert found.n_sequences == 4
    assert found.rounding < 1e-6


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(CausalProbeError, match="nothing to permute"):
        permutation_sensitivity(without_positions(1), random_tokens(3, n=3), start=1)
    with pytest.raises(CausalProbeError, match="two sequences"):
        permutation_sensitivity(without_positions(1), random_tokens(1))


def test_a_start_of_a_text_keeps_its_place() -> None:
    model: Any = to_hooked(tiny_huggingface.llama(), tiny_huggingface.tokenizer(bos=True))
    bos = model.tokenizer.bos_token_id
    tokens = torch.randint(5, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    without = permutation_sensitivity(model, tokens, n_permutations=1)
    tokens[:, 0] = bos
    found = permutation_sensitivity(model, tokens, n_permutations=1)
    assert (without.settings["start"], found.settings["start"]) == (0, 1)
    assert found.tokens == permutation_sensitivity(model, tokens, n_permutations=1, start=1).tokens


def test_a_model_of_nan_is_refused() -> None:
    model = without_positions(2)
    model.W_E.data.fill_(float("nan"))
    with pytest.raises(CausalProbeError, match="NaN"):
        permutation_sensitivity(model, random_tokens(3))
