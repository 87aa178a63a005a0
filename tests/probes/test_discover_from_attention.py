"""Discovery on models: what is read, how it is shown, kept and cited, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from causal_probe import CausalProbeError
from causal_probe.discovery import FisherZ, ordered_icd
from causal_probe.hooks.check import HookedModel
from causal_probe.hooks.read import read_layer
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import discover_from_attention
from causal_probe.probes.attention_correlation import attention_correlation
from causal_probe.probes.discovered_graphs import Discovery
from causal_probe.viz import mixed

TOKENS = torch.tensor([3, 1, 4, 2, 0, 3])


@pytest.fixture(scope="module")
def model() -> DisentangledTransformer:
    torch.manual_seed(0)
    model = DisentangledTransformer(d_vocab=5, n_positions=6, heads=(2, 1))
    with torch.no_grad():
        model.block(0, 0, query="position", key="position").normal_(std=2)
    return model


def test_it_is_the_learner_on_the_pattern(model: DisentangledTransformer) -> None:
    found = discover_from_attention(model, TOKENS, layer=0, samples=200)
    _, cache = model.run_with_cache(TOKENS[None])
    for head in range(2):
        pattern = cache["blocks.0.attn.hook_pattern"][0, head]
        assert torch.equal(read_layer(model, TOKENS[None], 0)[head], pattern)
        correlation = attention_correlation(pattern)
        learned = ordered_icd(FisherZ(correlation.matrix, samples=200, tolerance=correlation.tolerance))
        assert {(u, v): d["mark"] for u, v, d in found.of(head).graph.edges(data=True)} == {
            (u, v): d["mark"] for u, v, d in learned.marks.to_networkx().edges(data=True)
        }
    mean = discover_from_attention(model, TOKENS, layer=0, head="mean", samples=200).of(None)
    assert np.allclose(
        mean.correlation.matrix, attention_correlation(cache["blocks.0.attn.hook_pattern"][0].mean(0)).matrix
    )


def test_values_are_the_heads_outputs(model: DisentangledTransformer) -> None:
    _, cache = model.run_with_cache(TOKENS[None])
    z = cache["blocks.0.attn.hook_z"][0, :, 1].double().numpy()
    found = discover_from_attention(model, TOKENS, layer=0, head=1, source="values")
    cosine = z @ z.T / np.linalg.norm(z, axis=1) / np.linalg.norm(z, axis=1)[:, None]
    assert np.allclose(found.of(1).correlation.matrix, cosine, atol=1e-6)
    assert found.settings["samples"] == z.shape[1]


def test_the_residual_stream_is_counted_and_named(model: DisentangledTransformer) -> None:
    found = discover_from_attention(model, TOKENS, layer=0, head=0, samples=200, residual=0.5)
    pattern = read_layer(model, TOKENS[None], 0)[0]
    assert np.array_equal(found.of(0).correlation.matrix, attention_correlation(pattern, residual=0.5).matrix)
    assert found.settings["residual"] == 0.5
    assert "0.5 of each token's own value" in found.cite().methods


def test_tokens_can_be_merged_and_left_out(model: DisentangledTransformer) -> None:
    found = discover_from_attention(
        model, TOKENS, layer=0, samples=200, groups=[[1, 2], [4], [5]], texts=list("abcdef")
    )
    assert found.nodes == ("bc", "e", "f")
    assert sorted(found.graphs[0].graph) == [0, 1, 2]


def test_shown_kept_and_cited(model: DisentangledTransformer, tmp_path: Path) -> None:
    found = discover_from_attention(model, TOKENS, layer=0, samples=200)
    found.save(tmp_path / "found.json")
    content = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert content["settings"]["algorithm"] == "ordered-icd"
    edges = {
        (edge["source"], edge["target"])
        for edge in content["graphs"][0]["graph"]["edges"]
        if edge["source"] < edge["target"]
    }
    removed = {tuple(pair) for pair, _ in content["graphs"][0]["separating"]}
    assert edges.isdisjoint(removed)
    assert len(edges | removed) == 15
    found.save(tmp_path / "found.safetensors")
    loaded = Discovery.load(tmp_path / "found.safetensors")
    assert (loaded.to_dict(), repr(loaded)) == (found.to_dict(), repr(found))
    assert np.array_equal(loaded.of("L0H1").correlation.matrix, found.of(1).correlation.matrix)
    table = found.to_pandas()
    assert set(table["head"]) == {0, 1}
    assert (table.loc[table["edge"].isna(), "p"] > 0.01).all()
    assert (table.loc[table["edge"].notna(), "p"] <= 0.01).all()
    assert "rohekar2023" in found.cite().bibtex
    assert "<table" in found._repr_html_()
    figure = mixed(found.graphs[0].graph, found.nodes, highlight=[1], target=5)
    drawn = {patch.get_gid() for patch in figure.axes[0].patches if patch.get_gid()}
    assert drawn == {f"edge-{u}-{v}" for u, v in edges}


def test_a_hugging_face_model_without_hooks() -> None:
    """The same patterns as the model returns; its own attention implementation stays."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    bert = BertModel._from_config(config, attn_implementation="sdpa")
    bert.train()
    found = discover_from_attention(bert, torch.tensor([1, 2, 3, 4, 5]), head=0, samples=50)
    assert found.settings["algorithm"] == "icd"
    assert bert.training
    assert bert.config._attn_implementation == "sdpa"
    assert not isinstance(bert, HookedModel)
    with pytest.raises(CausalProbeError, match="read at hook points"):
        discover_from_attention(bert, torch.tensor([1, 2, 3]), source="values")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 0.0}, "`level` is 0.0"),
        ({"level": 1.5}, "`level` is 1.5"),
        ({"algorithm": "ges"}, "must be 'pc' or 'fci' or 'icd' or 'ordered-icd'"),
        ({"residual": 1.0}, "residual is 1.0"),
        ({"residual": 0.5, "source": "values"}, "leave residual at 0"),
        ({"source": "keys"}, "'attention' or 'values'"),
        ({"layer": 2}, "there are 2 layers"),
        ({"layer": -3}, "there are 2 layers"),
        ({"head": 5}, "the layer has the heads 0..0"),
        ({"head": True}, "`head` is True. It must be a whole number or 'all' or 'mean'"),
        ({"samples": 3}, "at least 4"),
        ({"texts": ["a"]}, "6 tokens and 1 texts"),
        ({"groups": [[9]]}, "groups of the positions"),
    ],
)
def test_bad_arguments(model: DisentangledTransformer, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        discover_from_attention(model, TOKENS, **arguments)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.empty(0, dtype=torch.long), "no tokens"),
        (torch.zeros(2, 6, dtype=torch.long), "One input is tokens"),
        (torch.zeros(6), "whole numbers"),
        (torch.zeros(7, dtype=torch.long), "the model's context holds 6"),
        (torch.tensor([0, 9]), "from 0 to 4"),
        ("text", "the model has no tokenizer"),
    ],
)
def test_bad_tokens(model: DisentangledTransformer, tokens: Any, message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        discover_from_attention(model, tokens)
