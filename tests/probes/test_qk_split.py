"""Sources of one's own: a planted dictionary is found again, parts and rest sum to the score, groups are sums, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.models import DisentangledTransformer
from causal_probe.probes.qk_split import parts_along
from causal_probe.probes.qk_terms import term_reader
from tests.architectures.zoo import ARCHITECTURES, tokens

LAYER, HEAD = 1, 2


def attributed(model: Any, batch: torch.Tensor, **options: Any) -> Any:
    return probes.qk_attributions(model, batch, LAYER, HEAD, edges="previous-token", **{"pairs": 0, **options})


def dictionary(width: int, features: int) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """A random decoder, and a ReLU encoder."""
    generator = torch.Generator().manual_seed(5)
    decoder = torch.randn(features, width, generator=generator)
    encoder = torch.randn(width, features, generator=generator) / width**0.5
    return decoder, lambda value: (value @ encoder).relu()


def test_a_planted_dictionary():
    """Layer 0 copies the token before; the feature of each token carries its share of the match, the error nothing."""
    model = DisentangledTransformer(d_vocab=6, n_positions=12)
    model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    strength = torch.arange(1.0, 7)
    model.block(1, 0, query="token", key="L0H0.token").diagonal().copy_(10 * strength)
    standard = model.to_transformer_lens()
    sequences = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(n)).repeat(2) for n in range(4)])
    start = model.subspaces(1)["L0H0.token"].start
    words = {f"token {n}": torch.eye(standard.cfg.d_model)[start + n] for n in range(6)}
    found = probes.qk_attributions(
        standard, sequences, 1, 0, edges="induction", parts={"L0H0": parts_along(words)}, pairs=0
    )
    plain = probes.qk_attributions(standard, sequences, 1, 0, edges="induction", pairs=0)
    # By hand: on a row of token n, the pair's score is 10 (n + 1) on the targets, and on every other key that holds n before it.
    held = torch.zeros(4, 12, dtype=torch.long)
    held[:, 1:] = sequences[:, :-1]
    held[:, 0] = sequences[:, 0]  # position 0 has nothing before it
    targets = probes.template("induction")(sequences)
    for n in range(6):
        each = []
        for b in range(4):
            rows = []
            for i in range(12):
                on = [j for j in range(i + 1) if targets[b, i, j]]
                off = [j for j in range(i + 1) if not targets[b, i, j]]
                if on:
                    score = [10.0 * (n + 1) * (sequences[b, i] == n) * (held[b, j] == n) for j in range(i + 1)]
                    rows.append(np.mean([score[j] for j in on]) - np.mean([score[j] for j in off]))
            each.append(np.mean(rows))
        assert found.of("embed", f"L0H0.token {n}") == pytest.approx(np.mean(each), abs=1e-3)
    keys = [f"L0H0.token {n}" for n in range(6)]
    assert sum(found.of("embed", key) for key in keys) == pytest.approx(plain.of("embed", "L0H0"), abs=1e-3)
    assert found.of("embed", "L0H0.error") == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("name", ["Llama 3", "Gemma 3", "GPT-2", "OLMo 2"])
@pytest.mark.parametrize(
    ("point", "replaced"),
    [
        ("L0.mlp", ("L0.mlp",)), ("blocks.0.hook_mlp_out", ("L0.mlp",)), ("L0H1", ("L0H1",)),
        ("blocks.0.hook_attn_out", ("L0H0", "L0H1", "L0H2", "L0H3")), ("hook_embed", ("embed",)),
        ("blocks.1.hook_resid_pre", ("embed", "pos_embed", "L0H0", "L0H1", "L0H2", "L0H3", "L0.mlp")),
    ],
)  # fmt: skip
def test_parts_and_rest_sum_to_the_score(name: str, point: str, replaced: tuple[str, ...]):
    model = to_hooked(ARCHITECTURES[name].build())
    batch = tokens(3, 8)
    decoder, encode = dictionary(32, 5)
    parts = parts_along({f"f{n}": decoder[n] for n in range(5)}, encode)
    plain, found = attributed(model, batch), attributed(model, batch, parts={point: parts})
    new = [source for source in found.sources if source not in plain.sources]
    assert len(new) == 6
    assert [source.rpartition(".")[2] for source in new] == ["f0", "f1", "f2", "f3", "f4", "error"]
    assert not set(found.sources) & set(replaced)
    assert found.contribution.sum() == pytest.approx(plain.total, abs=1e-4)
    assert found.total == pytest.approx(plain.total, abs=1e-4)
    assert found.settings["parts"] == [point]
    if name != "GPT-2":  # its heads' biases are written there, too
        ours, theirs = (
            sum(each.of(query, key) for query in names for key in names)
            for each, names in ((found, new), (plain, [source for source in plain.sources if source in replaced]))
        )
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_feature_by_hand():
    """Its term is its coefficient times direction W_K times the norm's scale, rotated."""
    model = to_hooked(ARCHITECTURES["Llama 3"].build())
    batch = tokens(2, 6)
    decoder, encode = dictionary(32, 3)
    reader = term_reader(model, LAYER, HEAD)
    reader.cut({"L0.mlp": parts_along({f"f{n}": decoder[n] for n in range(3)}, encode)}, batch)
    terms = reader(batch)
    _, cache = model.run_with_cache(batch)
    mlp, scale = cache["blocks.0.hook_mlp_out"], cache["blocks.1.ln1.hook_scale"]
    gain = model.blocks[1].ln1.weight
    W_K = model.original_model.model.layers[1].self_attn.k_proj.weight.reshape(2, 8, 32)[HEAD // 2].mT
    expected = encode(mlp)[..., 1, None] * ((decoder[1] * gain) @ W_K) / scale
    at = reader.sources.index("L0.mlp.f1")
    assert torch.allclose(terms.unrotated_key[at], expected, atol=1e-4)


def test_a_part_is_taken_out_like_any_source():
    model = to_hooked(ARCHITECTURES["Qwen3"].build())
    whole = parts_along({"all": torch.ones(32)}, lambda value: value.new_zeros(*value.shape[:2], 1))
    batch = tokens(3, 8)
    plain = attributed(model, batch, pairs=49)
    found = attributed(model, batch, pairs=64, parts={"L0.mlp": whole})  # all of it is the error
    theirs = {(pair.query, pair.key): pair.intervened for pair in plain.pairs}
    for pair in found.pairs:
        query, key = (name.replace("L0.mlp.error", "L0.mlp") for name in (pair.query, pair.key))
        if "bias" in (query, key):
            assert pair.intervened is None
        elif "L0.mlp.all" in (query, key):
            assert pair.intervened == pytest.approx(0, abs=1e-6)
        else:
            assert pair.intervened == pytest.approx(theirs[query, key], abs=1e-4)


def test_least_squares_by_default():
    directions = {"one": torch.tensor([1.0, 0, 0, 0]), "other": torch.tensor([1.0, 1, 0, 0])}
    parts = parts_along(directions)(torch.tensor([[[3.0, 5, 7, 0]]]))
    assert torch.allclose(parts["one"], torch.tensor([-2.0, 0, 0, 0]), atol=1e-6)
    assert torch.allclose(parts["other"], torch.tensor([5.0, 5, 0, 0]), atol=1e-6)


def test_named_groups_are_sums():
    model = to_hooked(ARCHITECTURES["Llama 3"].build())
    batch = tokens(3, 8)
    plain = attributed(model, batch)
    found = attributed(model, batch, sources={"words": ["embed", "L0.mlp"], "pair": ["L0H0", "L0H3"]})
    assert found.sources == ("words", "pair", "L0H1", "L0H2", "bias")
    expected = sum(plain.of(query, key) for query in ("embed", "L0.mlp") for key in ("L0H0", "L0H3"))
    assert found.of("words", "pair") == pytest.approx(expected, abs=1e-5)
    assert found.contribution.sum() == pytest.approx(plain.total, abs=1e-4)
    assert found.settings["sources"] == {"words": ["embed", "L0.mlp"], "pair": ["L0H0", "L0H3"]}


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"a": ["embd"]}, "names 'embd'; the sources are embed"),
        ({"a": ["embed"], "b": ["embed"]}, "in two groups"),
        ({"a": 3}, "A group is a list of sources' names"),
        ({"embed": ["L0.mlp"]}, "has the name of a source that isn't in it"),
    ],
)
def test_groups_that_are_refused(groups: Mapping[Any, Any], said: str):
    model = to_hooked(ARCHITECTURES["Llama 3"].build())
    with pytest.raises(CausalProbeError, match=said):
        attributed(model, tokens(2, 8), sources=groups)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"L9.mlp": lambda value: {}}, "There is no source 'L9.mlp' below layer 1"),
        ({"blocks.2.hook_resid_pre": lambda value: {}}, "below layer 1"),
        ({"embed": lambda value: [value]}, "must return a dict"),
        ({"embed": lambda value: {"a": value[0]}}, r"The part 'a' of embed is \[8, 32\]"),
        ({"embed": lambda value: {"a": value / 0}}, "not finite"),
        ({"embed": lambda value: {"error": value}}, "which is what the parts leave"),
        ({"embed": lambda value: {}, "blocks.1.hook_resid_pre": lambda value: {}}, "in two activations"),
        ({"embed": parts_along({"a": torch.ones(3)})}, "have 3 numbers, the activation 32"),
        ({"embed": parts_along({"a": torch.ones(32)}, lambda value: value)}, "coefficients"),
    ],
)
def test_parts_that_are_refused(parts: Mapping[str, Any], said: str):
    model = to_hooked(ARCHITECTURES["Llama 3"].build())
    with pytest.raises(CausalProbeError, match=said):
        attributed(model, tokens(2, 8), parts=parts)


def test_directions_that_are_refused():
    for directions in ({}, {"a": torch.ones(2, 2)}, {"a": torch.ones(2), "b": torch.ones(3)}):
        with pytest.raises(CausalProbeError, match="vectors of one length"):
            parts_along(directions)


def test_a_concatenated_stream_has_its_parts_already():
    model = DisentangledTransformer(d_vocab=6, n_positions=12)
    with pytest.raises(CausalProbeError, match="parts of a concatenated stream"):
        probes.qk_attributions(
            model, torch.tensor([[0, 1, 0, 1]]), 1, 0, edges="induction", parts={"token": lambda value: {}}
        )
