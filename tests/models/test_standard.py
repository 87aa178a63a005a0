"""The standard transformer, beside a plain computation and TransformerLens' own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.models.standard import EPS, StandardTransformer


def random_model(*, norm: bool, d_mlp: int | None = 6, dtype: torch.dtype = torch.float64) -> StandardTransformer:
    model = StandardTransformer(
        5, 6, d_model=7, n_layers=2, n_heads=3, d_head=4, d_mlp=d_mlp, norm=norm, d_out=3, dtype=dtype
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def by_hand(model: Any, row: list[int]) -> Tensor:
    """One sequence's logits, position by position, head by head."""

    def normed(x: Tensor, norm: Any) -> Tensor:
        return x if norm is None else x / (x.square().mean() + EPS).sqrt() * norm.w

    stream = [model.W_E[token] + model.W_pos[i] for i, token in enumerate(row)]
    for block in model.blocks:
        read = [normed(x, block.ln1) for x in stream]
        after = []
        for i, x in enumerate(stream):
            added = block.attn.b_O.clone()
            for h in range(model.cfg.n_heads):
                q = read[i] @ block.attn.W_Q[h] + block.attn.b_Q[h]
                scores = torch.stack([q @ (read[j] @ block.attn.W_K[h] + block.attn.b_K[h]) for j in range(i + 1)])
                weights = (scores - scores.max()).exp()
                weights = weights / weights.sum()
                for j in range(i + 1):
                    added = added + weights[j] * (read[j] @ block.attn.W_V[h] + block.attn.b_V[h]) @ block.attn.W_O[h]
            after.append(x + added)
        if block.mlp is not None:
            after = [
                x + (normed(x, block.ln2) @ block.mlp.W_in + block.mlp.b_in).clamp(min=0) @ block.mlp.W_out + block.mlp.b_out
                for x in after
            ]  # fmt: skip
        stream = after
    return torch.stack([normed(x, model.ln_final) @ model.W_U + model.unembed.b_U for x in stream])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("d_mlp", [None, 6])
def test_it_is_what_its_docstring_says(norm: bool, d_mlp: int | None) -> None:
    model = random_model(norm=norm, d_mlp=d_mlp)
    row = [4, 0, 2, 2, 1, 3]
    assert torch.allclose(model(torch.tensor([row, row[::-1]]))[0], by_hand(model, row), atol=1e-9)


@pytest.mark.parametrize("norm", [False, True])
def test_its_state_dict_is_transformer_lens_own(norm: bool) -> None:
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = random_model(norm=norm)
    shape = {name: getattr(model.cfg, name) for name in ("n_layers", "d_model", "d_head", "n_heads", "d_mlp", "d_vocab", "d_vocab_out")}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = HookedTransformer(
            {**shape, "n_ctx": 6, "act_fn": "relu", "normalization_type": "RMS" if norm else None, "use_attn_scale": False,
             "dtype": torch.float64, "device": "cpu"}
        )  # fmt: skip
    missed = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not missed.unexpected_keys
    assert all(name.endswith(("mask", "IGNORE")) for name in missed.missing_keys)
    tokens = torch.tensor([[4, 0, 2, 2, 1, 3]])
    assert torch.allclose(theirs(tokens), model(tokens), atol=1e-6)  # its RMSNorm computes in single precision


@pytest.mark.parametrize("norm", [False, True])
def test_inputs_of_queries_keys_values_and_mlps_are_their_own(norm: bool) -> None:
    model = random_model(norm=norm)
    tokens = torch.tensor([[4, 0, 2, 2, 1, 3]])
    clean = model(tokens)

    def same(value: Tensor, hook: Any) -> Tensor:
        return value.clone()

    points = ["hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in"]
    names = [f"blocks.{layer}.{point}" for layer in range(2) for point in points]
    assert torch.allclose(model.run_with_hooks(tokens, fwd_hooks=[(name, same) for name in names]), clean, atol=1e-12)
    seen: dict[str, Tensor] = {}

    def shift(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, 1] += 1
        return value

    def keep(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value

    attention = [f"blocks.1.attn.hook_{side}" for side in "qkv"]
    model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in attention])
    before = dict(seen)
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_k_input", shift), *((name, keep) for name in attention)])
    changed = {name: (seen[name] - before[name]).abs().amax((0, 1, 3)) > 1e-6 for name in attention}
    assert changed["blocks.1.attn.hook_k"].tolist() == [False, True, False]
    assert not changed["blocks.1.attn.hook_q"].any()
    assert not changed["blocks.1.attn.hook_v"].any()


def test_other_input_is_refused() -> None:
    model = random_model(norm=False)
    with pytest.raises(CausalProbeError, match=r"whole numbers \[batch, pos\] of at most 6 positions"):
        model(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(CausalProbeError, match="Tokens are 0 to 4; found 0 to 5"):
        model(torch.tensor([[0, 5]]))
    with pytest.raises(CausalProbeError, match="return_type"):
        model(torch.tensor([[0]]), return_type="loss")
    with pytest.raises(CausalProbeError, match="d_head = 0"):
        StandardTransformer(5, 6, d_model=7, n_layers=2, n_heads=3, d_head=0)
