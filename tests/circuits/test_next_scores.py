"""Next and copy scores: a planted successor head, and every number from Hugging Face's weights alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from causal_probe.circuits import next_scores
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.models.standard import StandardTransformer
from tests import tiny_huggingface as tiny

WORDS = [f"t{i}" for i in range(5, 17)]


def test_a_head_that_writes_the_next_word_and_one_that_copies() -> None:
    model: Any = StandardTransformer(60, 4, d_model=60, n_layers=2, n_heads=2, d_head=60)
    for parameter in model.parameters():
        parameter.data.zero_()
    eye = torch.eye(60)
    weights = dict(model.named_parameters())
    for name, value in weights.items():
        if name.endswith("W_E") or name.endswith("W_U"):
            value.data = eye.clone()
        elif name == "blocks.1.attn.W_V":
            value.data = eye.expand_as(value).clone()
        elif name == "blocks.1.attn.W_O":
            value.data = torch.stack([eye.roll(1, 1), eye])
    model.tokenizer = tiny.tokenizer()
    found = next_scores(model, WORDS, top=1, bos="no")
    by_head = dict(zip(found.heads, zip(found.next, found.copy, found.other, strict=True), strict=True))
    assert by_head[1, 0] == (1.0, 0.0, 0.0)
    assert by_head[1, 1] == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_number_from_the_weights(kind: str) -> None:
    plain = getattr(tiny, kind)().double()
    model = to_hooked(getattr(tiny, kind)().double(), tiny.tokenizer())
    found = next_scores(model, WORDS, top=7, bos="no")
    ids = torch.arange(5, 17)
    blocks = plain.model.layers if kind == "llama" else plain.transformer.h
    with torch.no_grad():
        stream = plain(ids[:, None], output_hidden_states=True).hidden_states[1][:, 0]
        expected = []
        for block in blocks:
            if kind == "llama":
                normed = block.input_layernorm(stream)
                values = block.self_attn.v_proj(normed).unflatten(-1, (2, 4)).repeat_interleave(2, 1)
                out = block.self_attn.o_proj.weight.T.unflatten(0, (4, 4))
                last, unembed = plain.model.norm, plain.lm_head.weight.T
            else:
                normed = block.ln_1(stream)
                values = (normed @ block.attn.c_attn.weight + block.attn.c_attn.bias)[:, 32:].unflatten(-1, (2, 8))
                out = block.attn.c_proj.weight.unflatten(0, (2, 8))
                last, unembed = plain.transformer.ln_f, plain.lm_head.weight.T
            for head in range(values.shape[1]):
                largest = (last(values[:, head] @ out[head]) @ unembed).argsort(-1, descending=True)[:, :7]
                there = np.array([[word in row for word in ids.tolist()] for row in largest.tolist()])
                expected.append(
                    (
                        np.mean([there[i, i + 1] for i in range(11)]),
                        np.mean([there[i, i] for i in range(12)]),
                        np.mean([there[i, j] for i in range(12) for j in range(12) if j not in (i, i + 1)]),
                    )
                )
    assert np.transpose([found.next, found.copy, found.other]) == pytest.approx(np.array(expected))
    assert found.other.max() > 0


def test_words_that_make_no_order() -> None:
    model = to_hooked(tiny.gpt2(), tiny.tokenizer())
    for words, message in (
        (["t3", "t4"], "2 words make no order"),
        (["t3", "t4 t5", "t6"], "'t4 t5' is 2 tokens"),
        (["t3", "t4", "t3"], "occurs twice"),
        (["t3", "t4", ""], "'' is 0 tokens"),
        ("sums", "Unknown order 'sums'; choose from numerals"),
        ("months", "A word occurs twice"),
        ([1, 2, 3], "each of it a text"),
    ):
        with pytest.raises(CausalProbeError, match=message):
            next_scores(model, words)
