"""Score gradients against central finite differences, on every kind of model, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.models import ReducedTransformer
from causal_probe.models.reduced import first_gradient
from causal_probe.probes import score_gradients
from tests import tiny_huggingface, tiny_models
from tests.architectures.zoo import ARCHITECTURES

#: Where to look, (layer, head, query, key): the diagonal, the first column, the last row that predicts, both layers, several heads.
ENTRIES = [(0, 0, 3, 1), (0, 1, 4, 4), (0, 0, 4, 0), (1, 0, 4, 2), (1, 0, 1, 0)]
STEP = 1e-5


def hugging_face(build: Callable[[], Any]) -> Any:
    return to_hooked(build().double())


def exported() -> Any:
    """HookedTransformer on 3.9; on 4.3 the native bridge, whose score hook carries the pattern."""
    return tiny_models.disentangled(scale=0.3).to_transformer_lens()


MODELS = {
    "disentangled": (lambda: tiny_models.disentangled(scale=0.3), tiny_models.D_VOCAB),
    "standard": (exported, tiny_models.D_VOCAB),
    "gpt2": (lambda: hugging_face(tiny_huggingface.gpt2), tiny_huggingface.D_VOCAB),
    "llama": (lambda: hugging_face(tiny_huggingface.llama), tiny_huggingface.D_VOCAB),
}


def next_token_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens)[:, :-1].log_softmax(-1)
    return -logits.gather(2, tokens[:, 1:, None])[..., 0].mean(1)


def finite_difference(model: Any, tokens: torch.Tensor, entry: tuple[int, int, int, int]) -> float:
    """Minus the central difference of the mean loss in one score, made at the pattern, which is live on all of these models."""
    layer, head, query, key = entry

    def loss_at(step: float) -> float:
        def shift(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
            pattern = pattern.clone()
            row = pattern[:, head, query].clone()
            row[:, key] *= np.exp(step)
            pattern[:, head, query] = row / row.sum(-1, keepdim=True)
            return pattern

        with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", shift)]):
            return float(next_token_loss(model, tokens).mean())

    return -(loss_at(STEP) - loss_at(-STEP)) / (2 * STEP)


@pytest.mark.parametrize("name", MODELS)
def test_they_are_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, d_vocab = MODELS[name]
    if name == "llama":
        # Its norms and softmax compute in float32 whatever the model's dtype, by naming it at every call: too coarse to difference.
        monkeypatch.setattr(torch, "float32", torch.float64)
    model = build()
    tokens = torch.randint(3 if d_vocab > 10 else 0, d_vocab, (4, 6), generator=torch.Generator().manual_seed(0))
    found = score_gradients(model, tokens, next_token_loss)
    for layer, head, query, key in ENTRIES:
        expected = finite_difference(model, tokens, (layer, head, query, key))
        assert abs(expected) > 1e-7
        assert found.values[layer][head, query, key] == pytest.approx(expected, rel=1e-5, abs=1e-11)
    for gradient in found.values.values():
        assert (gradient[:, ~np.tri(6, dtype=bool)] == 0).all()
        np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-12)
    assert found.provenance["dtype"] == "float64"


def test_the_route_is_said() -> None:
    """Scores where they are live; the exported model's are on 3.9 and not on 4.3."""
    tokens = tiny_models.random_tokens(2)
    ours = score_gradients(tiny_models.disentangled(), tokens)
    assert ours.settings["routes"] == {"L0": "scores", "L1": "scores"}
    standard = exported()
    routes = set(score_gradients(standard, tokens).settings["routes"].values())
    native = type(standard).__name__ == "TransformerBridge"
    assert routes == ({"pattern"} if native else {"scores"})


def test_both_routes_agree() -> None:
    tokens = tiny_models.random_tokens(5)
    by_scores = score_gradients(tiny_models.disentangled(scale=0.3), tokens)
    by_export = score_gradients(exported(), tokens)
    np.testing.assert_allclose(by_export.values[0], by_scores.values[0], atol=1e-12)
    np.testing.assert_allclose(by_export.values[1][:1], by_scores.values[1], atol=1e-12)


def test_on_the_reduced_transformer_it_is_its_first_gradient() -> None:
    model = ReducedTransformer(3, 7, dtype=torch.float64)
    tokens = torch.randint(3, (20, 7), generator=torch.Generator().manual_seed(0))
    target = torch.eye(3, dtype=torch.float64)[torch.arange(20) % 3]
    found = score_gradients(model, tokens, lambda model, batch: model.loss(batch, target), layers=[0])
    u, m = first_gradient(tokens, target)
    product = np.tril((u.mT @ m / 20).numpy())
    share = 1 / np.arange(1, 8)[:, None]
    expected = np.tril(share * (product - share * product.sum(-1, keepdims=True)))
    np.testing.assert_allclose(found.values[0][0], expected, atol=1e-12)


def test_streaming_and_standard_errors() -> None:
    model, tokens = tiny_models.disentangled(), tiny_models.random_tokens(9)
    whole = score_gradients(model, tokens)
    cut = score_gradients(model, [tokens[:2], tokens[2:]], batch_size=3)
    each = np.stack([score_gradients(model, row[None]).values[0] for row in tokens])
    np.testing.assert_allclose(whole.values[0], each.mean(0), atol=1e-12)
    np.testing.assert_allclose(cut.values[1], whole.values[1], atol=1e-12)
    assert whole.stderr is not None
    np.testing.assert_allclose(whole.stderr[0], each.std(0, ddof=1) / 3, atol=1e-9)
    assert score_gradients(model, tokens[:1]).stderr is None


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_models.disentangled()
    model.train()
    model.W_U.grad = torch.ones_like(model.W_U)
    model.A[0].requires_grad_(False)
    score_gradients(model, tiny_models.random_tokens(2))
    assert model.training
    assert model.A[1].grad is None
    assert bool((model.W_U.grad == 1).all())
    assert not model.A[0].requires_grad
    assert model.W_U.requires_grad
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_a_pattern_that_nothing_reads_is_refused() -> None:
    with pytest.raises(
        CausalProbeError, match="neither the scores nor the pattern"
    ):  # nor does it take a mask for each head
        score_gradients(to_hooked(ARCHITECTURES["XGLM"].build()), tiny_huggingface.tokens())
    found = score_gradients(to_hooked(tiny_huggingface.opt()), tiny_huggingface.tokens())
    assert found.settings["routes"] == {"L0": "mask", "L1": "mask"}
    model = tiny_models.disentangled()
    constant = torch.zeros(3, requires_grad=True)
    with pytest.raises(CausalProbeError, match="does not depend on"):
        score_gradients(model, tiny_models.random_tokens(3), lambda model, batch: constant * 1)


def test_bad_input_is_refused() -> None:
    model, tokens = tiny_models.disentangled(), tiny_models.random_tokens(3)
    with pytest.raises(CausalProbeError, match="one loss per sequence"):
        score_gradients(model, tokens, lambda model, batch: model(batch).mean())
    with pytest.raises(CausalProbeError, match="no sequences"):
        score_gradients(model, [])
    with pytest.raises(CausalProbeError, match="one length"):
        score_gradients(model, [tokens, tokens[:, :4]])
    with pytest.raises(CausalProbeError, match="batch_size"):
        score_gradients(model, tokens, batch_size=0)
    with pytest.raises(CausalProbeError, match="no head L7H0"):
        score_gradients(model, tokens).of(7, 0)


def test_the_result_shows_and_cites() -> None:
    found = score_gradients(tiny_models.disentangled(), tiny_models.random_tokens(4))
    assert "L0H1" in repr(found)
    assert "<table" in found._repr_html_()
    assert [candidate.child for candidate in found.parents("L0H0")] == list(range(1, 7))
    z = found.z_values(0, 0)
    assert z is not None
    assert np.isfinite(z).all()
    assert set(found.to_dict()) >= {"values", "quantity", "settings"}
    assert "nichani2024" in found.cite().bibtex
    assert "score_gradients" in probes.__all__
