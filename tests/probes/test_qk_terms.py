"""A head's scores taken apart: exact on every shape of model, against an independent computation, or refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.probes.qk_terms import term_reader
from tests import tiny_huggingface, tiny_models
from tests.architectures.zoo import ARCHITECTURES
from tests.architectures.zoo import tokens as zoo_tokens

ROTARY = {"neox", "llama"}


def centred(values: torch.Tensor) -> torch.Tensor:
    """Scores [.., query, key] of the past, less each row's mean: all that attention depends on."""
    seen = torch.ones_like(values, dtype=torch.bool).tril()
    mean = torch.where(seen, values, 0).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    return torch.where(seen, values - mean, 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_the_sum_is_the_score(name: str, dtype: torch.dtype, tolerance: float):
    model = to_hooked(tiny_huggingface.CAUSAL[name]().to(dtype))
    tokens = tiny_huggingface.tokens()
    _, cache = model.run_with_cache(tokens)
    for layer in (0, 1):
        for head in range(model.cfg.n_heads):
            terms = term_reader(model, layer, head)(tokens)
            scores = cache[f"blocks.{layer}.attn.hook_attn_scores"][:, head]
            assert (centred(terms.scores) - centred(scores)).abs().max() < tolerance
            assert terms.error < tolerance
            assert (terms.turns[0].matrix is not None) == (name in ROTARY)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_the_sum_is_the_score_on_transformer_lens_own_models(name: str):
    model = tiny_models.MODELS[name]()
    tokens = tiny_models.random_tokens(3)
    _, cache = model.run_with_cache(tokens)
    for layer, n_heads in ((0, 2), (1, 1)):
        for head in range(n_heads):
            terms = term_reader(model, layer, head)(tokens)
            pattern = terms.scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
            assert (pattern - cache[f"blocks.{layer}.attn.hook_pattern"][:, head]).abs().max() < 1e-5


def test_each_term_is_what_its_source_gives():
    """GPT-2 by hand: LayerNorm's scale, gain and mean, then the slice of c_attn that makes one head's query or key."""
    huggingface = tiny_huggingface.gpt2(attn_implementation="eager").double()
    with torch.no_grad():  # a fresh model's norms do nothing and its biases are zero
        for index, parameter in enumerate(huggingface.parameters()):
            if parameter.ndim == 1:
                generator = torch.Generator().manual_seed(index)
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    tokens = tiny_huggingface.tokens()
    reader = term_reader(to_hooked(copy.deepcopy(huggingface)), 1, 1)
    terms = reader(tokens)

    body, block = huggingface.transformer, huggingface.transformer.h[1]
    hidden = huggingface(tokens, output_hidden_states=True).hidden_states[1].detach()

    def centre(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)

    scale = (centre(hidden).square().mean(-1, keepdim=True) + block.ln_1.eps).sqrt()
    gain, bias = block.ln_1.weight.detach(), block.ln_1.bias.detach()
    W, b = block.attn.c_attn.weight.detach(), block.attn.c_attn.bias.detach()
    embed = body.wte.weight.detach()[tokens]
    first = body.h[0]
    normed = first.ln_1(embed + body.wpe.weight[: tokens.shape[1]])
    pattern = huggingface(tokens, output_attentions=True).attentions[0].detach()
    values = normed @ first.attn.c_attn.weight[:, 32:40] + first.attn.c_attn.bias[32:40]
    head_0 = (pattern[:, 0] @ values @ first.attn.c_proj.weight[:8]).detach()

    for what, terms_of, columns in (
        ("query", terms.unrotated_query, slice(8, 16)),
        ("key", terms.unrotated_key, slice(24, 32)),
    ):
        for source, written in (("embed", embed), ("L0H0", head_0)):
            expected = (centre(written) * gain / scale) @ W[:, columns]
            found = terms_of[reader.sources.index(source)]
            assert torch.allclose(found, expected, atol=1e-12), (what, source)
        from_heads = centre(first.attn.c_proj.bias.detach()) * gain / scale
        expected = (from_heads + bias) @ W[:, columns] + b[columns]
        assert torch.allclose(terms_of[reader.sources.index("bias")], expected, atol=1e-12), what


def test_the_parts_of_a_concatenated_stream_are_the_blocks_of_A():
    model = tiny_models.disentangled()
    tokens = tiny_models.random_tokens(2)
    reader = term_reader(model, 1, 0)
    terms = reader(tokens)
    _, cache = model.run_with_cache(tokens)
    stream = cache["blocks.1.hook_resid_pre"]
    for q, query in enumerate(reader.sources):
        for k, key in enumerate(reader.sources):
            parts = model.subspaces(1)
            expected = stream[..., parts[query]] @ model.block(1, 0, query=query, key=key) @ stream[..., parts[key]].mT
            assert torch.allclose(terms.query[q] @ terms.key[k].mT, expected, atol=1e-12)


def test_scores_that_are_no_sum_are_refused():
    with pytest.raises(CausalProbeError, match=r"bidirectional|not the sum of what"):
        term_reader(to_hooked(tiny_huggingface.bert()), 1, 0)(tiny_huggingface.tokens())
    with pytest.raises(CausalProbeError, match=r"There is no head L2H0. Heads, counted from 0: layer 0: 2, layer 1: 2"):
        term_reader(to_hooked(tiny_huggingface.gpt2()), 2, 0)
    with pytest.raises(CausalProbeError, match=r"There is no head L1H2. Heads, counted from 0"):
        term_reader(to_hooked(tiny_huggingface.gpt2()), 1, 2)


def test_norms_of_the_stream_itself_are_refused_with_the_reason():
    """OpenAI GPT normalizes the stream behind each block: what sources below have written there is written no more."""
    config = transformers.OpenAIGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32)
    model = to_hooked(tiny_huggingface._random(transformers.OpenAIGPTLMHeadModel, config))
    with pytest.raises(CausalProbeError, match=r"layer 0 are not the sum of what the sources below have written"):
        term_reader(model, 1, 0)(tiny_huggingface.tokens())


def test_what_alibi_adds_is_a_source_of_its_own():
    model = to_hooked(tiny_huggingface.bloom())
    tokens = tiny_huggingface.tokens()
    reader = term_reader(model, 1, 1)
    terms = reader(tokens)
    place = reader.sources.index("alibi")
    slope = 2.0**-8  # of the second of two heads
    assert torch.allclose(
        terms.query[place] @ terms.key[place].mT, slope * torch.arange(12.0).expand(3, 12, 12), atol=1e-6
    )
    assert not (terms.query[place] @ terms.key[:place].sum(0).mT).any()


def test_a_cap_bends_the_sum_and_a_sink_shares_the_row():
    """Gemma 2 and GPT-OSS: the attention that Hugging Face returns, from the sums; without the cap or the sink it is another."""
    for name, field in (("Gemma 2", "cap"), ("GPT-OSS", "sink")):
        original = ARCHITECTURES[name].build()
        tokens = zoo_tokens(2)
        with torch.no_grad():
            pattern = original(tokens, output_attentions=True).attentions[1][:, 0]
        terms = term_reader(to_hooked(original), 1, 0)(tokens)
        assert (terms.attention(terms.scores) - pattern).abs().max() < 1e-5
        assert (replace(terms, **{field: None}).attention(terms.scores) - pattern).abs().max() > 1e-3


def test_the_model_is_left_as_it_was():
    model = to_hooked(tiny_huggingface.llama()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    term_reader(model, 1, 0)(tiny_huggingface.tokens())
    assert model.training
    after: Any = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(point.has_hooks() for point in model.hook_dict.values())
