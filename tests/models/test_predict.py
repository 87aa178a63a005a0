"""The fast last-position forward is the hooked forward: values, gradients, and under hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_probe.models import DisentangledTransformer, disentangled
from tests.models.definition import SHAPES, random_model, random_tokens

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # of the largest logit


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float64) -> None:
    assert found.dtype == dtype
    found, expected = found.detach(), expected.detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max()))


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooked forward is out of order: who answers has taken the fast way."""

    def forward(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the hooked forward was run")

    monkeypatch.setattr(DisentangledTransformer, "forward", forward)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_predict_is_the_last_position(
    shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype, scale: float
) -> None:
    model = random_model(*shape, scale=scale, dtype=dtype)
    for n in (model.n_positions, model.n_positions // 2, 1):
        tokens = random_tokens(model, batch=6, n=n)
        assert_close(model.predict(tokens), model(tokens)[:, -1], dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_equal(shape: tuple[int, int, tuple[int, ...]]) -> None:
    model = random_model(*shape)
    tokens = random_tokens(model)
    weights = torch.randn(4, model.d_vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fast = torch.autograd.grad((model.predict(tokens) * weights).sum(), list(model.parameters()))
    slow = torch.autograd.grad((model(tokens)[:, -1] * weights).sum(), list(model.parameters()))
    for found, expected in zip(fast, slow, strict=True):
        assert expected.any()
        assert_close(found, expected)


@pytest.mark.usefixtures("no_forward")
def test_without_hooks_the_hooked_forward_is_not_run() -> None:
    model = random_model()
    assert model.predict(random_tokens(model)).shape == (4, 3)


# ----------------------------------------------------------------------------------------------------------- position only


@pytest.mark.parametrize("heads", [(1,), (1, 1), (2, 1), (1, 1, 1)])
def test_zero_token_blocks_are_left_out(heads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    last_logits = disentangled.last_logits

    def spy(*args: Any, position_only: bool, **kwargs: Any) -> torch.Tensor:
        taken.append(position_only)
        return last_logits(*args, position_only=position_only, **kwargs)

    monkeypatch.setattr(disentangled, "last_logits", spy)
    model = random_model(heads=heads)
    model.A[0].data[:, :3] = 0
    model.A[0].data[:, :, :3] = 0
    tokens = random_tokens(model)
    with torch.no_grad():
        assert_close(model.predict(tokens), model(tokens)[:, -1])
        assert_close(model.predict(tokens[:, :2]), model(tokens[:, :2])[:, -1])
    model.predict(tokens)  # with gradients: those of the blocks that are zero are wanted
    for query, key in (("token", "token"), ("token", "position"), ("position", "token")):
        model.block(0, heads[0] - 1, query=query, key=key)[1, 2] = 1.0
        with torch.no_grad():
            assert_close(model.predict(tokens), model(tokens)[:, -1])
        model.block(0, heads[0] - 1, query=query, key=key).zero_()
    assert taken == [True, True, False, False, False, False]


# ------------------------------------------------------------------------------------------------------------------ hooks


def halve_one_entry(value: torch.Tensor, hook: Any) -> torch.Tensor:
    value = value.clone()
    value[:, 0, 2, 1] *= 0.5
    return value


def write_in_place(value: torch.Tensor, hook: Any) -> torch.Tensor:
    value[:, 0, 2] = value[:, 0, 1]
    return value


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("edit", [halve_one_entry, write_in_place])
@pytest.mark.parametrize("name", ["hook_pattern", "hook_attn_scores"])
@pytest.mark.parametrize("position_only", [False, True])
def test_hooks_below_the_last_layer_take_the_fast_way(edit: Any, name: str, position_only: bool) -> None:
    model = random_model(heads=(2, 1, 1))
    if position_only:
        model.A[0].data[:, :3] = 0
        model.A[0].data[:, :, :3] = 0
    tokens = random_tokens(model)
    for layer in (0, 1):
        shapes = []

        def hook_fn(value: torch.Tensor, hook: Any, shapes: list[Any] = shapes) -> Any:
            shapes.append((hook.name, value.shape))
            return edit(value, hook)

        with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.{name}", hook_fn)]):
            fast = model.predict(tokens)
        assert shapes == [(f"blocks.{layer}.attn.{name}", (4, model.heads[layer], 6, 6))]
        expected = hooked_forward(model, tokens, [(f"blocks.{layer}.attn.{name}", edit)])
        assert_close(fast, expected)
        with torch.no_grad():
            assert (fast - model.predict(tokens)).abs().max() > 1e-3


def hooked_forward(model: DisentangledTransformer, tokens: torch.Tensor, hooks: list[Any]) -> torch.Tensor:
    """The last position by the hooked forward, also where it is out of order: the layers one by one."""
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        eye = torch.eye(model.n_positions, dtype=torch.float64)[: tokens.shape[1]]
        x = torch.cat(
            [torch.nn.functional.one_hot(tokens, model.d_vocab).double(), eye.expand(len(tokens), -1, -1)], dim=-1
        )
        for block in model.blocks:
            x = block(x)
        return x[:, -1] @ model.W_U


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), heads=st.sampled_from([(1,), (1, 1), (2, 1), (1, 2, 1)]))
def test_predict_honours_every_hook(data: st.DataObject, heads: tuple[int, ...]) -> None:
    """Whatever is hooked, alone or together: predict is the last position of the hooked forward."""
    model = random_model(heads=heads)
    tokens = random_tokens(model)
    names = data.draw(st.lists(st.sampled_from(sorted(model.hook_dict)), min_size=1, max_size=3, unique=True))
    seen: list[str] = []

    def edit(value: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(hook.name)
        return value * 0.5

    hooks = [(name, edit) for name in names]
    expected = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
    assert set(seen) == set(names)
    seen.clear()
    with model.hooks(fwd_hooks=hooks):
        found = model.predict(tokens)
    assert set(seen) == set(names)
    assert_close(found, expected)
    assert_close(model.predict(tokens), model(tokens)[:, -1])  # nothing is left behind


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.hook_pattern", "blocks.0.attn.hook_attn_scores", "blocks.1.attn.hook_z"]
)
def test_backward_hooks_see_the_same_gradient(name: str) -> None:
    model = random_model()
    tokens = random_tokens(model)
    gradients: list[torch.Tensor] = []

    def keep(gradient: torch.Tensor, hook: Any) -> None:
        gradients.append(gradient.clone())

    with model.hooks(bwd_hooks=[(name, keep)]):
        model.predict(tokens).square().sum().backward()
        model(tokens)[:, -1].square().sum().backward()
    fast, slow = gradients
    assert slow.any()
    assert_close(fast, slow)
