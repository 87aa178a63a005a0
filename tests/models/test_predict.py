"""The fast last-position forward is the hooked forward: values, gradients, and under hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import edited, replace_row
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


# -------------------------------------------------------------------------------------------------------- many rows at once


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (2, 3), (1,), (1, 1, 1)])
@pytest.mark.parametrize("by_position", [True, False])
def test_rows_of_layer_0_in_one_run_are_those_of_hooks_one_by_one(heads, by_position):
    model = DisentangledTransformer(3, 9, heads=heads).double()
    generator = torch.Generator().manual_seed(0)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, generator=generator)
    if by_position:  # the pattern is then the same for every sequence
        with torch.no_grad():
            model.A[0][:, :3] = 0
            model.A[0][:, :, :3] = 0
    tokens = torch.randint(3, (5, 8), generator=generator)
    head = heads[0] - 1
    for queries in ([3, 3, 0, 6, 5], [2, 7]):  # the last position changes everything: it is run by hooks
        rows = torch.rand(len(queries), max(queries) + 1, generator=generator, dtype=torch.float64).tril(queries[0])
        rows /= rows.sum(1, keepdim=True)
        for others in ([], [replace_row(0, 0, query=2, row=torch.tensor([0.5, 0.5]).double())]):
            with edited(model, *others):
                found = model.predict_by_rows(tokens, head=head, queries=torch.tensor(queries), rows=rows)
            for query, row, logits in zip(queries, rows, found, strict=True):
                with torch.no_grad(), edited(model, *others, replace_row(0, head, query=query, row=row)):
                    torch.testing.assert_close(logits, model(tokens)[:, -1], rtol=1e-10, atol=1e-10)


def test_rows_are_computed_in_portions_under_hooks_of_ones_own_and_in_single_precision(monkeypatch):
    model = DisentangledTransformer(3, 9)
    generator = torch.Generator().manual_seed(0)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, generator=generator)
    tokens, queries, rows = torch.randint(3, (5, 9), generator=generator), torch.tensor([3, 4, 5]), torch.eye(4)[:3]
    whole = model.predict_by_rows(tokens, head=0, queries=queries, rows=rows)
    monkeypatch.setattr("causal_probe.models.disentangled.MAX_PATTERN_ENTRIES", 100)
    torch.testing.assert_close(model.predict_by_rows(tokens, head=0, queries=queries, rows=rows), whole)
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", lambda value, hook: 0 * value)]):
        assert not model.predict_by_rows(tokens, head=0, queries=queries, rows=rows).equal(whole)
        for row, logits in zip(
            range(3), model.predict_by_rows(tokens, head=0, queries=queries, rows=rows), strict=True
        ):
            with torch.no_grad(), edited(model, replace_row(0, 0, query=int(queries[row]), row=rows[row])):
                torch.testing.assert_close(logits, model(tokens)[:, -1])


def test_no_rows_and_no_sequences_have_no_logits():
    model, queries = DisentangledTransformer(3, 9), torch.tensor([2])
    tokens = torch.zeros(2, 9, dtype=torch.long)
    assert model.predict_by_rows(tokens[:0], head=0, queries=queries, rows=torch.ones(1, 1)).shape == (1, 0, 3)
    assert model.predict_by_rows(tokens, head=0, queries=queries[:0], rows=torch.ones(0, 1)).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": 1}, "Layer 0 has 1 heads, counted from 0; there is no head 1"),
        (
            {"queries": torch.tensor([9])},
            "queries \\[row\\] whole numbers below 9; they are \\[1, 4\\] and int64 \\[1\\], up to 9",
        ),
        ({"queries": torch.tensor([-1])}, "queries"),
        ({"queries": torch.tensor([1, 2])}, "\\[1, 4\\] and int64 \\[2\\]"),
        ({"rows": torch.ones(1, 10)}, "at most 9 keys"),
        ({"rows": torch.ones(1, 4)}, "must be a distribution"),
        ({"rows": torch.tensor([[2.0, -1.0]])}, "must be a distribution"),
        ({"rows": torch.tensor([[float("nan"), 1.0]])}, "must be a distribution"),
    ],
)
def test_rows_that_can_not_be(options, message):
    given = {"head": 0, "queries": torch.tensor([2]), "rows": torch.ones(1, 4) / 4, **options}
    with pytest.raises(CausalProbeError, match=message):
        DisentangledTransformer(3, 9).predict_by_rows(torch.zeros(2, 9, dtype=torch.long), **given)
