"""The disentangled transformer against its definition, and what it says to bad input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from tests.models.definition import SHAPES, define, random_model, random_tokens

# ------------------------------------------------------------------------------------------------------------- definition


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    d_vocab=st.integers(2, 5),
    n_positions=st.integers(2, 6),
    heads=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    data=st.data(),
)
def test_forward_is_the_definition(
    d_vocab: int, n_positions: int, heads: tuple[int, ...], scale: float, data: st.DataObject
) -> None:
    model = random_model(d_vocab, n_positions, heads, scale=scale)
    tokens = data.draw(st.lists(st.integers(0, d_vocab - 1), min_size=1, max_size=n_positions))
    logits, cache = model.run_with_cache(torch.tensor([tokens]))
    expected_logits, expected_patterns = define(model, tokens)
    np.testing.assert_allclose(logits[0].detach(), expected_logits, rtol=0, atol=1e-12 * np.abs(expected_logits).max())
    for layer, pattern in enumerate(expected_patterns):
        np.testing.assert_allclose(cache["pattern", layer][0].detach(), pattern, rtol=0, atol=1e-12)


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    model = random_model()
    tokens = random_tokens(model)
    torch.testing.assert_close(model(tokens), torch.cat([model(row) for row in tokens]), rtol=0, atol=1e-13)


def test_later_tokens_do_not_reach_earlier_positions() -> None:
    model = random_model(heads=(2, 1))
    tokens = random_tokens(model)
    torch.testing.assert_close(model(tokens)[:, :3], model(tokens[:, :3]), rtol=0, atol=1e-13)


def test_a_new_model_is_zero_and_in_eval_mode() -> None:
    model = DisentangledTransformer(3, 5, (2, 1))
    assert not any(parameter.any() for parameter in model.parameters())
    assert not model.training
    assert model.cfg.d_model == len(model.W_U) == 8 * 3 * 2
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_vocab) == (2, 2, 3)
    assert (model.cfg.attn_only, model.cfg.normalization_type) == (True, None)


# ------------------------------------------------------------------------------------------------------- names and blocks


def test_subspaces_name_what_the_stream_holds() -> None:
    model = random_model(3, 6, (2, 1))
    tokens = random_tokens(model)
    _, cache = model.run_with_cache(tokens)
    X = torch.nn.functional.one_hot(tokens, 3).double()
    P_00, P_01 = cache["pattern", 0].unbind(1)
    P_10 = cache["pattern", 1][:, 0]
    eye = torch.eye(6, dtype=torch.float64).expand(len(tokens), 6, 6)
    expected = {
        "token": X,
        "position": eye,
        "L0H0.token": P_00 @ X,
        "L0H0.position": P_00,
        "L0H1.token": P_01 @ X,
        "L0H1.position": P_01,
        "L1H0.token": P_10 @ X,
        "L1H0.position": P_10,
        "L1H0.L0H0.token": P_10 @ P_00 @ X,
        "L1H0.L0H0.position": P_10 @ P_00,
        "L1H0.L0H1.token": P_10 @ P_01 @ X,
        "L1H0.L0H1.position": P_10 @ P_01,
    }
    parts = model.subspaces(2)
    assert list(parts) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(cache["resid_post", 1][..., parts[name]], value, rtol=0, atol=1e-13)


def test_blocks_are_views_that_write_through() -> None:
    model = DisentangledTransformer(3, 5, (1, 2))
    model.block(1, 1, query="token", key="L0H0.position")[2, 4] = 7.0
    assert model.A[1][1, 2, 8 + 3 + 4] == 7.0
    assert model.A[1].count_nonzero() == 1
    model.output_block("L1H1.L0H0.token")[0, 1] = 5.0
    parts = model.subspaces(2)
    assert model.W_U[parts["L1H1.L0H0.token"].start, 1] == 5.0
    assert model.W_U.count_nonzero() == 1


def test_the_blocks_of_a_head_tile_its_matrix() -> None:
    model = random_model(3, 5, (1, 2))
    blocks = model.named_blocks()
    for layer, head in ((0, 0), (1, 0), (1, 1)):
        names = list(model.subspaces(layer))
        rows = [torch.cat([blocks[layer, head, query, key] for key in names], dim=1) for query in names]
        assert torch.equal(torch.cat(rows), model.A[layer][head])
    assert len(blocks) == 2**2 + 2 * 4**2
    blocks[1, 1, "token", "L0H0.token"].zero_()
    assert not model.block(1, 1, query="token", key="L0H0.token").any()


@pytest.mark.parametrize(
    ("layer", "head", "query", "key", "message"),
    [
        (2, 0, "token", "token", "There is no head L2H0; the heads per layer are [1, 1]"),
        (-1, 0, "token", "token", "There is no head L-1H0"),
        (0, 1, "token", "token", "There is no head L0H1"),
        (0, 0, "tokens", "token", "Layer 0 reads no part 'tokens'; its parts are token, position."),
        (0, 0, "token", "L0H0.token", "Layer 0 reads no part 'L0H0.token'"),
    ],
)
def test_a_block_that_is_not_there(layer: int, head: int, query: str, key: str, message: str) -> None:
    with pytest.raises(CausalProbeError) as error:
        DisentangledTransformer(3, 5).block(layer, head, query=query, key=key)
    assert message in str(error.value)


def test_an_output_block_that_is_not_there() -> None:
    with pytest.raises(CausalProbeError, match=r"no part 'L2H0\.token'; its parts are token, position, L0H0\.token"):
        DisentangledTransformer(3, 5).output_block("L2H0.token")


# ----------------------------------------------------------------------------------------------------------------- hooks

HOOKS = [
    "hook_embed",
    "hook_pos_embed",
    *(
        f"blocks.{layer}.{name}"
        for layer in range(2)
        for name in (
            *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z"),
            *("hook_resid_pre", "hook_attn_out", "hook_resid_post"),
        )
    ),
]


def test_hook_names_and_shapes() -> None:
    model = random_model(3, 6, (2, 1))
    _, cache = model.run_with_cache(random_tokens(model, batch=4, n=5))
    assert set(cache) == set(HOOKS) == set(model.hook_dict)
    d, n_heads = [9, 27, 54], [2, 1]
    for layer in range(2):
        for name in ("q", "k", "v", "z"):
            assert cache[name, layer].shape == (4, 5, n_heads[layer], d[layer])
        for name in ("attn_scores", "pattern"):
            assert cache[name, layer].shape == (4, n_heads[layer], 5, 5)
        assert cache["resid_pre", layer].shape == (4, 5, d[layer])
        assert cache["attn_out", layer].shape == (4, 5, n_heads[layer] * d[layer])
        assert cache["resid_post", layer].shape == (4, 5, d[layer + 1])


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_live(name: str) -> None:
    """Replaced by a leaf, each activation has a gradient; edited, it changes the logits."""
    model = random_model()
    tokens = random_tokens(model)
    leaves: list[torch.Tensor] = []

    def cut(value: torch.Tensor, hook: Any) -> torch.Tensor:
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[0]

    model.run_with_hooks(tokens, fwd_hooks=[(name, cut)]).square().sum().backward()
    assert leaves[0].grad is not None
    assert leaves[0].grad.abs().max() > 1e-3

    edited = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: value * 0.5)])
    assert (edited - model(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("name", HOOKS)
def test_writing_at_a_hook_leaves_what_was_cached_before_it_alone(name: str) -> None:
    """Patching tools write in place: an activation must not share memory with an earlier one."""
    model = random_model()
    tokens = random_tokens(model)
    _, untouched = model.run_with_cache(tokens)
    seen: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = value

    def overwrite(value: torch.Tensor, hook: Any) -> torch.Tensor:
        # A stream is one activation under two names: what leaves a layer enters the next, as in TransformerLens.
        seen.pop("blocks.0.hook_resid_post" if name == "blocks.1.hook_resid_pre" else name, None)
        for earlier, activation in seen.items():
            assert torch.equal(activation, untouched[earlier])
        value[...] = 9.0
        for earlier, activation in seen.items():
            assert torch.equal(activation, untouched[earlier]), f"writing at {name} changed {earlier}"
        return value

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(hook, keep) for hook in HOOKS if hook != name] + [(name, overwrite)])
    assert len(seen) >= len(HOOKS) - 2


# --------------------------------------------------------------------------------------------------------------- forward


def test_return_types() -> None:
    model = random_model()
    tokens = random_tokens(model)
    logits = model(tokens)
    n_classes = logits.shape[-1]
    loss = cross_entropy(logits[:, :-1].reshape(-1, n_classes), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(model(tokens, return_type="loss"), loss)
    both = model(tokens, return_type="both")
    assert torch.equal(both[0], logits)
    torch.testing.assert_close(both[1], loss)
    per_token = model(tokens, return_type="loss", loss_per_token=True)
    assert per_token.shape == (4, 5)
    one = cross_entropy(logits[2, 3], tokens[2, 4])
    torch.testing.assert_close(per_token[2, 3], one)
    assert model(tokens, return_type=None) is None
    with pytest.raises(CausalProbeError, match="return_type must be 'logits', 'loss', 'both' or None, not 'probs'"):
        model(tokens, return_type="probs")


@pytest.mark.parametrize("shape", [(2, 1), (0, 4)])
def test_a_loss_without_a_next_token(shape: tuple[int, int]) -> None:
    model = random_model()
    tokens = torch.zeros(shape, dtype=torch.long)
    assert model(tokens).shape == (*shape, 3)
    with pytest.raises(CausalProbeError, match="needs a sequence of two tokens or more"):
        model(tokens, return_type="loss")


def test_stop_at_layer() -> None:
    model = random_model()
    tokens = random_tokens(model)
    _, cache = model.run_with_cache(tokens)
    for layer in (0, 1, -1, -2):
        assert torch.equal(model(tokens, stop_at_layer=layer), cache["resid_pre", layer % 2])
    assert torch.equal(model(tokens, stop_at_layer=2), cache["resid_post", 1])


def test_one_sequence_needs_no_batch_axis() -> None:
    model = random_model()
    tokens = random_tokens(model, batch=1)
    assert torch.equal(model(tokens[0]), model(tokens))
    assert torch.equal(model.predict(tokens[0]), model.predict(tokens))


# ---------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[0, 3]]), "Token 3 is outside the vocabulary; states are 0 to 2."),
        (torch.tensor([[0, -1]]), "Token -1 is outside the vocabulary"),
        (torch.tensor([[0, -(2**62)]]), "is outside the vocabulary"),
        (torch.tensor([[0, 255]], dtype=torch.uint8), "Token 255 is outside"),
        (torch.tensor([[0.0, 1.0]]), "Tokens must be whole numbers; the tensor's dtype is torch.float32."),
        (torch.tensor([[True, False]]), "the tensor's dtype is torch.bool"),
        (torch.tensor([[1j]]), "the tensor's dtype is torch.complex64"),
        (torch.zeros(1, 7, dtype=torch.long), "must hold 1 to 6 tokens, the model's n_positions; these hold 7"),
        (torch.zeros(2, 0, dtype=torch.long), "these hold 0"),
        (torch.zeros(1, 1, 2, dtype=torch.long), "shape [batch, pos]; theirs is [1, 1, 2]"),
        (torch.tensor(1), "shape [batch, pos]; theirs is []"),
        ("0 1 x", "written as whole numbers between blanks; got ['0 1 x']"),
        ("0 3", "Token 3 is outside the vocabulary"),
        (["0 1", "0 1 2"], "Sequences of one batch must be of one length; theirs are [2, 3]"),
        ([], "Sequences of one batch must be of one length; theirs are []"),
        ("", "must hold 1 to 6 tokens"),
    ],
)
def test_tokens_that_are_none(tokens: Any, message: str) -> None:
    model = random_model()
    for run in (model, model.predict, model.to_tokens):
        with pytest.raises(CausalProbeError) as error:
            run(tokens)
        assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_tokens_of_any_integer_dtype(dtype: torch.dtype) -> None:
    model = random_model()
    tokens = random_tokens(model)
    assert torch.equal(model(tokens.to(dtype)), model(tokens))


def test_text() -> None:
    model = random_model()
    assert model.to_tokens("0 2 1").tolist() == [[0, 2, 1]]
    assert model.to_tokens(["0 2", "1 1"]).tolist() == [[0, 2], [1, 1]]
    assert model.to_str_tokens("0 2 1") == ["0", "2", "1"]
    assert model.to_str_tokens(torch.tensor([[0, 2], [1, 1]])) == [["0", "2"], ["1", "1"]]
    assert torch.equal(model("0 2 1"), model(torch.tensor([0, 2, 1])))
    assert model.to_tokens("0 1", prepend_bos=False).tolist() == [[0, 1]]
    with pytest.raises(CausalProbeError, match="no beginning-of-sequence token"):
        model.to_tokens("0 1", prepend_bos=True)


# ----------------------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ((1, 5, (1,)), ["d_vocab must be at least 2, not 1"]),
        ((3, 1, (1,)), ["n_positions must be at least 2, not 1"]),
        ((3, 5, ()), ["heads must name at least one layer"]),
        ((3, 5, (0, 1)), ["at least one head in each; it is [0, 1]"]),
        ((-3, 0, (1, -1)), ["d_vocab", "n_positions", "heads"]),  # all problems at once
        ((3, 20, (1,) * 70), ["more than 2^34 weights", "take fewer layers"]),
        ((3, 10**6, (1,)), ["more than 2^34 weights"]),
    ],
)
def test_models_that_cannot_be(arguments: tuple[int, int, tuple[int, ...]], messages: list[str]) -> None:
    with pytest.raises(CausalProbeError, match="No such disentangled transformer can be built") as error:
        DisentangledTransformer(*arguments)
    assert all(message in str(error.value) for message in messages)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)],
)
def test_moving_takes_the_configuration_along(dtype: torch.dtype, tolerance: float) -> None:
    model = random_model(scale=0.3)
    tokens = random_tokens(model)
    expected = model(tokens)
    moved = copy.deepcopy(model).to(dtype)
    assert (moved.cfg.dtype, moved.cfg.device) == (dtype, "cpu")
    assert model.cfg.dtype == torch.float64
    for last in (moved(tokens)[:, -1], moved.predict(tokens)):
        assert last.dtype == dtype
        torch.testing.assert_close(last.double(), expected[:, -1], rtol=0, atol=tolerance)


def test_every_way_of_changing_the_dtype() -> None:
    model = DisentangledTransformer(3, 5)
    assert [model.double().cfg.dtype, model.half().cfg.dtype, model.bfloat16().cfg.dtype, model.float().cfg.dtype] == [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]


def test_a_copy_is_a_model_of_its_own() -> None:
    model = random_model()
    tokens = random_tokens(model)
    before = model(tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens), before)
    twin.block(0, 0, query="position", key="position").zero_()
    assert torch.equal(model(tokens), before)
    zeroed = [("blocks.0.attn.hook_pattern", lambda pattern, hook: 0 * pattern)]
    with twin.hooks(fwd_hooks=zeroed):
        assert torch.equal(model(tokens), before)
        assert torch.equal(model.predict(tokens), model.predict(tokens))
        assert not torch.allclose(twin.predict(tokens), before[:, -1])


@pytest.mark.parametrize("shape", SHAPES)
def test_representation(shape: tuple[int, int, tuple[int, ...]]) -> None:
    d_vocab, n_positions, heads = shape
    assert f"d_vocab={d_vocab}, n_positions={n_positions}, heads={list(heads)}" in repr(random_model(*shape))
