"""The exported model is a standard TransformerLens model that computes the same function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer, export
from causal_probe.models.export import real_heads, to_transformer_lens
from tests.models.definition import SHAPES, define, random_model, random_tokens

try:
    from transformer_lens import HookedTransformer
except ImportError:
    LINE = 4
else:
    LINE = 3

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # of the largest logit, and of a pattern's entry
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in TOLERANCE}


def run_both(model: DisentangledTransformer, tokens: torch.Tensor) -> tuple[Any, Any, Any, Any]:
    standard = to_transformer_lens(model)
    with torch.no_grad():
        return (*model.run_with_cache(tokens), *standard.run_with_cache(tokens))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_logits_and_patterns_are_equal(
    shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype, scale: float
) -> None:
    model = random_model(*shape, scale=scale, dtype=dtype)
    for n in (model.n_positions, model.n_positions // 2, 1):
        logits, cache, standard_logits, standard_cache = run_both(model, random_tokens(model, batch=8, n=n))
        assert standard_logits.dtype == dtype
        largest = float(logits.abs().max())
        torch.testing.assert_close(standard_logits, logits, rtol=0, atol=TOLERANCE[dtype] * largest)
        for layer, n_heads in enumerate(model.heads):
            pattern = standard_cache["pattern", layer][:, :n_heads]
            torch.testing.assert_close(pattern, cache["pattern", layer], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_large_weights_cost_what_rounding_their_scores_costs(
    shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype, scale: float
) -> None:
    """A score s is known to eps |s| only, so a pattern that is not saturated is too, in whichever order it is summed."""
    model = random_model(*shape, scale=scale, dtype=dtype)
    logits, cache, standard_logits, standard_cache = run_both(model, random_tokens(model, batch=8))
    scores = torch.cat([cache["attn_scores", layer].flatten() for layer in range(len(model.heads))])
    tolerance = 8 * EPSILON[dtype] * float(scores[scores.isfinite()].abs().max())
    torch.testing.assert_close(standard_logits, logits, rtol=0, atol=tolerance * float(logits.abs().max()))
    for layer, n_heads in enumerate(model.heads):
        pattern = standard_cache["pattern", layer][:, :n_heads]
        torch.testing.assert_close(pattern, cache["pattern", layer], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_trained_model(dtype: torch.dtype) -> None:
    """Trained to repeat the second token, from noise: what training finds is exported as well as what chance draws."""
    model = random_model(3, 6, (2, 1), scale=0.02, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    for step in range(60):
        tokens = random_tokens(model, batch=64, seed=step)
        loss = torch.nn.functional.cross_entropy(model.predict(tokens), tokens[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    logits, cache, standard_logits, standard_cache = run_both(model, random_tokens(model, batch=64, seed=-1))
    torch.testing.assert_close(standard_logits, logits, rtol=0, atol=TOLERANCE[dtype] * float(logits.abs().max()))
    for layer, n_heads in enumerate(model.heads):
        pattern = standard_cache["pattern", layer][:, :n_heads]
        torch.testing.assert_close(pattern, cache["pattern", layer], rtol=0, atol=TOLERANCE[dtype])


def test_it_is_the_definition() -> None:
    model = random_model(4, 7, (2, 1))
    tokens = random_tokens(model, batch=1)
    logits, patterns = define(model, tokens[0].tolist())
    _, _, standard_logits, standard_cache = run_both(model, tokens)
    torch.testing.assert_close(standard_logits[0], torch.tensor(logits), rtol=0, atol=1e-12)
    torch.testing.assert_close(standard_cache["pattern", 1][0, :1], torch.tensor(patterns[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 6, (1, 1)), (4, 7, (2, 1)), (2, 4, (1, 2, 1))])
def test_the_stream_has_the_same_coordinates(shape: tuple[int, int, tuple[int, ...]]) -> None:
    model = random_model(*shape)
    _, cache, _, standard_cache = run_both(model, random_tokens(model))
    for layer in range(len(model.heads)):
        stream, standard = cache["resid_post", layer], standard_cache["resid_post", layer]
        torch.testing.assert_close(standard[..., : stream.shape[-1]], stream, rtol=0, atol=1e-13)
        assert not standard[..., stream.shape[-1] :].any()


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (1, 2)])
def test_pattern_gradients_and_edits_are_equal(heads: tuple[int, ...]) -> None:
    model = random_model(heads=heads)
    standard = to_transformer_lens(model)
    tokens = random_tokens(model)
    found = []
    for m in (model, standard):
        leaves: list[torch.Tensor] = []

        def cut(pattern: torch.Tensor, hook: Any, leaves: list[torch.Tensor] = leaves) -> torch.Tensor:
            pattern = pattern.detach().clone()
            pattern[:, 0, 3] = 0.25  # an edit, seen by everything above
            leaves.append(pattern.requires_grad_())
            return leaves[0]

        logits = m.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_pattern", cut)])
        logits.square().sum().backward()
        assert leaves[0].grad is not None
        found.append((logits.detach(), leaves[0].grad[:, : heads[0]].tril()))
    (logits, gradient), (standard_logits, standard_gradient) = found
    assert (logits - model(tokens)).abs().max() > 1e-3
    torch.testing.assert_close(standard_logits, logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(standard_gradient, gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_configuration(shape: tuple[int, int, tuple[int, ...]]) -> None:
    model = random_model(*shape, dtype=torch.float32)
    standard = to_transformer_lens(model)
    cfg = standard.cfg
    d_vocab, n_positions, heads = shape
    assert (cfg.d_vocab, cfg.n_ctx, cfg.n_layers, cfg.n_heads) == (d_vocab, n_positions, len(heads), max(heads))
    assert (cfg.d_model, cfg.d_head) == (len(model.W_U), model.A[-1].shape[-1])
    assert (cfg.attn_only, cfg.normalization_type, cfg.default_prepend_bos) == (True, None, False)
    assert (cfg.dtype, str(cfg.device)) == (torch.float32, "cpu")
    assert cfg.model_name == "disentangled-transformer"
    assert not standard.training
    assert not any(module.training for module in standard.modules())


def test_it_is_the_line_s_own_class() -> None:
    name = type(to_transformer_lens(random_model())).__name__
    assert name == {3: "HookedTransformer", 4: "TransformerBridge"}[LINE]
    if LINE == 3:
        assert isinstance(to_transformer_lens(random_model()), HookedTransformer)


def test_weights_can_be_read() -> None:
    """W_Q W_K^T, undone of what the scores are divided by, is A; W_OV copies the stream to the head's own place."""
    model = random_model(3, 5, (2, 1))
    standard = to_transformer_lens(model)
    attn_scale = {3: 1.0, 4: 0.5}[LINE]
    for layer, head in [(0, 0), (0, 1), (1, 0)]:
        A = model.A[layer][head]
        W_QK = standard.W_Q[layer, head] @ standard.W_K[layer, head].mT / attn_scale
        W_OV = standard.W_V[layer, head] @ standard.W_O[layer, head]
        d = len(A)
        assert torch.equal(W_QK[:d, :d], A)
        assert torch.equal(W_OV[:d, (1 + head) * d : (2 + head) * d], torch.eye(d, dtype=torch.float64))
        assert W_QK.count_nonzero() == A.count_nonzero()
        assert W_OV.count_nonzero() == d
    assert torch.equal(standard.W_U, model.W_U)
    assert torch.equal(standard.W_E[:, :3], torch.eye(3, dtype=torch.float64))
    assert not any(b.any() for b in (standard.b_Q, standard.b_K, standard.b_V, standard.b_O, standard.b_U))


@pytest.mark.parametrize("shape", SHAPES)
def test_real_and_inert_heads(shape: tuple[int, int, tuple[int, ...]]) -> None:
    model = random_model(*shape)
    standard = to_transformer_lens(model)
    real = real_heads(standard)
    assert real.tolist() == [[head < n for head in range(max(model.heads))] for n in model.heads]
    _, cache = standard.run_with_cache(random_tokens(model))
    n = model.n_positions
    even = torch.ones(n, n, dtype=torch.float64).tril()
    even /= even.sum(-1, keepdim=True)
    for layer, head in (~real).nonzero().tolist():
        pattern = cache["pattern", layer][:, head]
        torch.testing.assert_close(pattern, even.expand_as(pattern), rtol=0, atol=1e-15)


def test_it_is_independent_of_the_model_and_leaves_no_trace() -> None:
    model = random_model()
    tokens = random_tokens(model)
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    standard = model.to_transformer_lens()
    assert torch.equal(torch.get_rng_state(), state)
    before = standard(tokens)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(standard(tokens), before)
    model.load_state_dict(weights)
    for parameter in standard.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-12)


def test_it_can_be_trained_further() -> None:
    standard = to_transformer_lens(random_model())
    standard(random_tokens(random_model())).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in standard.named_parameters()}
    assert gradients
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_too_long_a_sequence_raises() -> None:
    standard = to_transformer_lens(random_model(n_positions=6))
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        standard(torch.zeros(1, 7, dtype=torch.long))


def test_a_version_that_names_its_weights_otherwise() -> None:
    standard = to_transformer_lens(random_model())
    with pytest.raises(CausalProbeError, match=r"has no blocks\.0\.attn\.W_X. Install transformer-lens"):
        export._fill(standard, {"blocks.0.attn.W_X": torch.zeros(1)})
