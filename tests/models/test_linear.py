"""The linear transformer against its definition, its fast prediction against its forward, and the hand-set weights against autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from causal_probe import CausalProbeError
from causal_probe.models import LinearTransformer, gradient_steps, mesa_step
from causal_probe.tasks import AutoregressiveProcess, LinearRegression, generator, predict_descent

DOUBLE = torch.float64


def random_model(**options: Any) -> LinearTransformer:
    options = {"d_token": 4, "n_positions": 6, "n_layers": 2, "n_heads": 2, "dtype": DOUBLE, **options}
    model = LinearTransformer(**options)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=source, dtype=DOUBLE))
    return model


def random_tokens(n: int = 5, *, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(3, n, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)


def define(model: LinearTransformer, h: np.ndarray) -> np.ndarray:
    """One sequence through all layers, position by position, as in the module's text; [pos, d_model]."""
    n = len(h)
    for layer, block in enumerate(model.blocks):
        out = np.zeros_like(h)
        W = {name: getattr(block.attn, name).detach().numpy() for name in ("W_Q", "W_K", "W_V", "W_O")}
        for head in range(len(W["W_Q"])):
            for i in range(n):
                keys = range(n - 1) if model.mask == "context" else range(i + 1)
                score = np.array([(h[i] @ W["W_Q"][head]) @ (h[j] @ W["W_K"][head]).conj() for j in keys])
                if model.kinds[layer]:
                    score = np.exp(score / math.sqrt(W["W_Q"].shape[-1]))
                    score = score / score.sum()
                elif block.attn.per_pair:
                    score = score / max(1, len(keys) - 1)
                out[i] += sum(s * h[j] @ W["W_V"][head] @ W["W_O"][head] for s, j in zip(score, keys, strict=True))
        h = h + out if model.residual else out
    return h


@pytest.mark.parametrize("mask", ["context", "causal"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax": True},
        {"softmax": (True, False), "d_head": 3},
        {"shared": True, "n_layers": 3},
        {"per_pair": True, "residual": False},
        {"d_positions": 4, "n_heads": 1},
        {"d_out": 2},
    ],
)
def test_forward_is_the_definition_and_predict_is_the_forward(mask: str, options: dict[str, Any]) -> None:
    model = random_model(mask=mask, **options)
    tokens = random_tokens()
    stream = model(tokens)
    for row, start in zip(stream, model.embed(tokens), strict=True):
        np.testing.assert_allclose(row.detach(), define(model, start.detach().numpy()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.predict(tokens), model.read(stream), rtol=1e-10, atol=1e-10)


def test_predict_honours_hooks() -> None:
    model, tokens = random_model(), random_tokens()
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda pattern, hook: pattern * 0)]):
        cut = model.predict(tokens)
        torch.testing.assert_close(cut, model.read(model(tokens)))
    assert not torch.allclose(cut, model.predict(tokens))


def test_hooks_carry_what_their_names_say() -> None:
    model, tokens = random_model(d_positions=2), random_tokens()
    _, cache = model.run_with_cache(tokens)
    assert set(cache) == set(model.hook_dict)
    assert cache["pattern", 0].shape == cache["attn_scores", 1].shape == (3, 2, 5, 5)
    assert cache["q", 0].shape == (3, 5, 2, 6)
    torch.testing.assert_close(cache["resid_pre", 1], cache["resid_post", 0])
    assert not cache["pattern", 0][..., -1].any()  # no position sees the query
    torch.testing.assert_close(cache["attn_out", 0] + cache["resid_pre", 0], cache["resid_post", 0])
    assert model.W_Q.shape == (2, 2, 6, 6)


def test_the_mlp_sees_x_alone() -> None:
    model = random_model(d_hidden=5, d_features=7, n_heads=1)
    tokens = random_tokens()
    stream = model.embed(tokens)
    assert stream.shape == (3, 5, 8)
    assert torch.equal(stream[..., 7:], tokens[..., 3:])
    torch.testing.assert_close(model.predict(tokens), model.read(model(tokens)))
    hidden = torch.nn.functional.gelu(tokens[..., :3] @ model.features.W_in + model.features.b_in)
    torch.testing.assert_close(stream[..., :7], hidden @ model.features.W_out + model.features.b_out)


def test_shared_layers_have_the_weights_of_one() -> None:
    shared, apart = (random_model(shared=shared, n_layers=3) for shared in (True, False))
    count = [sum(p.numel() for p in model.parameters()) for model in (shared, apart)]
    assert 3 * count[0] == count[1]
    moved = shared.to(torch.float32)
    assert sum(p.numel() for p in moved.parameters()) == count[0]
    assert moved.cfg.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- constructions


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (DOUBLE, 1e-12)])
@pytest.mark.parametrize(
    ("n", "d", "d_out", "noise"), [(1, 1, 1, 0.0), (10, 10, 1, 0.0), (3, 7, 4, 0.5), (20, 2, 2, 1.0)]
)
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_hand_set_layers_are_gradient_steps(
    dtype: torch.dtype, tolerance: float, n: int, d: int, d_out: int, noise: float, start: bool, steps: int
) -> None:
    """Against autograd on the least-squares loss, for random sizes, starts and noise."""
    source = torch.Generator().manual_seed(n + d)
    W0 = torch.randn(d_out, d, generator=source, dtype=dtype) if start else None
    task = LinearRegression(d, n, d_out=d_out, noise=noise, W0=W0)
    eta = [0.3 / n, 0.2 / n, 0.1 / n][:steps]
    batch = task.sample(4, source, dtype=dtype)
    model = gradient_steps(d, n, eta=eta, W0=W0, d_out=d_out, dtype=dtype)
    for index in range(4):
        W = (torch.zeros(d_out, d) if W0 is None else W0).to(DOUBLE)
        x, y = batch.x[index].to(DOUBLE), batch.y[index].to(DOUBLE)
        for step in eta:
            W = W.clone().requires_grad_()
            loss = 0.5 * (x @ W.T - y).square().sum()
            W = (W - step * torch.autograd.grad(loss, W)[0]).detach()
        expected = W @ batch.x_query[index].to(DOUBLE)
        for found in (model.predict(batch.tokens), model.read(model(batch.tokens))):
            assert (found[index].to(DOUBLE) - expected).norm() <= tolerance * (1e-3 + expected.norm())


def test_hand_set_layers_with_curvature_are_gdpp() -> None:
    batch = LinearRegression(4, 6, d_out=2, noise=0.2).sample(5, generator(0, "x"), dtype=DOUBLE)
    eta, gamma = [0.3, 0.4, 0.2], [0.1, 0.2, 0.05]
    model = gradient_steps(4, 6, eta=eta, gamma=gamma, d_out=2, dtype=DOUBLE)
    expected = predict_descent(batch.x, batch.y, batch.x_query, eta=eta, gamma=gamma)
    torch.testing.assert_close(model.predict(batch.tokens), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", ["normal", "sparse", "ones"])
def test_the_mesa_layer_is_a_step_of_in_context_least_squares(start: str) -> None:
    process = AutoregressiveProcess(3, 7, start=start)
    batch = process.sample(4, generator(0, "x"))
    x = batch.x.to(torch.complex128)
    tokens = batch.tokens.to(torch.complex128)
    model = mesa_step(3, 6, a=0.5, b=0.8, dtype=torch.complex128)
    found = model(tokens)[..., :3]
    for t in range(2, 7):  # autograd in W of 1 / (2 (t - 1)) sum_j |W x_j - x_{j+1}|^2, at W = 0
        W = torch.zeros(4, 3, 3, dtype=torch.complex128, requires_grad=True)
        missed = torch.einsum("brs,bjs->bjr", W, x[:, : t - 1]) - x[:, 1:t]
        (gradient,) = torch.autograd.grad(missed.abs().square().sum() / (2 * (t - 1)), W)
        expected = torch.einsum("brs,bs->br", -0.4 * gradient, x[:, t - 1])
        torch.testing.assert_close(found[:, t - 1], expected, rtol=1e-6, atol=1e-6)  # the samples are single precision


def test_the_real_mesa_layer_is_the_complex_one() -> None:
    plain, real = (AutoregressiveProcess(3, 7, real=real).sample(4, generator(0, "x")) for real in (False, True))
    one = mesa_step(3, 6, a=0.5, b=0.8, dtype=torch.complex128)(plain.tokens.to(torch.complex128))[..., :3]
    other = mesa_step(3, 6, a=0.5, b=0.8, real=True, dtype=DOUBLE)(real.tokens.double())[..., :6]
    torch.testing.assert_close(torch.cat([one.real, one.imag], -1), other, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"d_token": 1}, "d_token must be above d_out"),
        ({"softmax": (True,), "n_layers": 2}, "softmax must have 2 entries"),
        ({"d_hidden": 3}, "d_hidden and d_features go together"),
        ({"softmax": (True, False), "shared": True}, "all linear or all softmax"),
        ({"dtype": torch.complex64, "softmax": True}, "a complex model has linear layers"),
        ({"d_positions": 3}, "come in pairs"),
    ],
)
def test_no_such_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        LinearTransformer(**{"d_token": 3, "n_positions": 4, "n_layers": 2, **options})


def test_tokens_that_do_not_fit() -> None:
    model = LinearTransformer(4, 6)
    for shape in ((2, 5, 3), (2, 7, 4), (2, 1, 4)):
        with pytest.raises(CausalProbeError, match="reads tokens"):
            model(torch.zeros(shape))
    with pytest.raises(CausalProbeError, match="sample with dtype"):
        model(torch.zeros(2, 5, 4, dtype=DOUBLE))


def test_no_such_construction() -> None:
    with pytest.raises(CausalProbeError, match="finite number"):
        gradient_steps(3, 4, eta=[])
    with pytest.raises(CausalProbeError, match="finite number"):
        gradient_steps(3, 4, eta=[math.inf])
    with pytest.raises(CausalProbeError, match="W0 must have the shape"):
        gradient_steps(3, 4, eta=[0.1], W0=torch.zeros(3, 1))
    with pytest.raises(CausalProbeError, match="Leave one out"):
        gradient_steps(3, 4, eta=[0.1], gamma=[0.1], W0=torch.ones(1, 3))
    with pytest.raises(CausalProbeError, match="can't have weights of dtype"):
        mesa_step(3, 4, real=True, dtype=torch.complex64)
