"""QK attributions: the contributions by hand, their sum, groups, pairs alone, streaming, and what is refused."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.models import DisentangledTransformer
from causal_probe.probes.qk_attributions import QKAttributions
from causal_probe.probes.qk_terms import term_reader
from tests import tiny_huggingface, tiny_models


def by_hand(model, tokens: torch.Tensor, layer: int, head: int, targets: torch.Tensor) -> np.ndarray:
    """[sequence, source, source], one number at a time."""
    terms = term_reader(model, layer, head)(tokens)
    n = len(terms.query)
    found = []
    for b in range(len(tokens)):
        rows = []
        for i in range(tokens.shape[1]):
            on = [j for j in range(i + 1) if targets[b, i, j]]
            off = [j for j in range(i + 1) if not targets[b, i, j]]
            if on and off:
                table = np.zeros((n, n))
                for s in range(n):
                    for t in range(n):
                        score = [float(terms.query[s, b, i] @ terms.key[t, b, j]) for j in range(i + 1)]
                        table[s, t] = np.mean([score[j] for j in on]) - np.mean([score[j] for j in off])
                rows.append(table)
        if rows:
            found.append(np.mean(rows, axis=0))
    return np.array(found)


@pytest.mark.parametrize("edges", ["previous-token", "duplicate-token"])
def test_contributions_by_hand(edges: str):
    model = to_hooked(tiny_huggingface.llama().double())
    tokens = tiny_huggingface.tokens(3, 6) % 4 + 3
    found = probes.qk_attributions(model, tokens, 1, 3, edges=edges)
    expected = by_hand(model, tokens, 1, 3, probes.template(edges)(tokens))
    assert np.allclose(found.contribution, expected.mean(0), atol=1e-10)
    assert np.allclose(found.stderr, expected.std(0, ddof=1) / np.sqrt(len(expected)), atol=1e-10)
    assert np.isclose(found.total, expected.sum((1, 2)).mean(), atol=1e-10)
    assert np.allclose(found.by_key.mean, expected.sum(1).mean(0), atol=1e-10)
    assert np.allclose(found.by_query.stderr, expected.sum(2).std(0, ddof=1) / np.sqrt(len(expected)), atol=1e-10)
    assert found.n_sequences == len(expected)


def test_score_and_chance_are_those_of_a_scan():
    model = to_hooked(tiny_huggingface.gpt2())
    tokens = tiny_huggingface.tokens(4, 10) % 5 + 3
    found = probes.qk_attributions(model, tokens, 1, 0, edges="duplicate-token")
    scanned = probes.scan(model, tokens, templates="duplicate-token").of(1, 0, "duplicate-token")
    assert found.score == pytest.approx(scanned.score, abs=1e-6)
    assert found.chance == pytest.approx(scanned.chance, abs=1e-6)
    assert (found.rows, found.n_sequences) == (scanned.rows, scanned.n_sequences)


def test_the_total_is_the_difference_of_the_hooked_scores():
    model = to_hooked(tiny_huggingface.neox())
    tokens = tiny_huggingface.tokens()
    _, cache = model.run_with_cache(tokens)
    scores = cache["blocks.1.attn.hook_attn_scores"][:, 0]
    n = tokens.shape[1]
    expected = np.mean(
        [
            [scores[b, i, i - 1] - (scores[b, i, : i - 1].sum() + scores[b, i, i]) / i for i in range(1, n)]
            for b in range(3)
        ]
    )
    assert probes.qk_attributions(model, tokens, 1, 0, edges="previous-token").total == pytest.approx(
        expected, abs=1e-4
    )


def test_on_the_disentangled_model_they_are_the_blocks_of_A():
    """With position x position alone not zero, the contribution is the difference of its entries."""
    model = DisentangledTransformer(3, 5, dtype=torch.float64)
    block = model.block(0, 0, query="position", key="position")
    block.copy_(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    truth = nx.DiGraph([(0, 2), (1, 4)])
    truth.add_nodes_from(range(5))
    tokens = tiny_models.random_tokens(4, n=5) % 3
    found = probes.qk_attributions(model, tokens, 0, 0, edges=truth, pairs=4)
    expected = np.mean([block[2, 0] - block[2, [1, 2]].mean(), block[4, 1] - block[4, [0, 2, 3, 4]].mean()])
    assert found.of("position", "position") == pytest.approx(float(expected), abs=1e-12)
    assert found.of("token", "position") == found.of("token", "token") == 0
    assert found.stderr.max() < 1e-12
    # ... and the pair alone has the graph of the block's row maxima.
    graph = next(pair for pair in found.pairs if (pair.query, pair.key) == ("position", "position")).graph
    assert set(graph.edges) == {(int(block[row, : row + 1].argmax()), row) for row in (2, 4)} - {(2, 2), (4, 4)}


def test_the_standard_form_has_the_same_blocks():
    """There the sources are sums of parts: a head's output is what it copied of tokens and of positions."""
    model = tiny_models.disentangled((2, 1), scale=0.3).float()
    tokens = tiny_models.random_tokens(6)
    parts = probes.qk_attributions(model, tokens, 1, 0, edges="previous-token", sources=lambda part: part.split(".")[0])
    standard = probes.qk_attributions(model.to_transformer_lens(), tokens, 1, 0, edges="previous-token")
    names = {"token": "embed", "position": "pos_embed", "L0H0": "L0H0", "L0H1": "L0H1"}
    for query in names:
        for key in names:
            assert parts.of(query, key) == pytest.approx(standard.of(names[query], names[key]), abs=1e-4)
    assert np.abs(standard.contribution[standard.sources.index("bias")]).max() < 1e-4


def test_groups_are_sums():
    model = to_hooked(tiny_huggingface.gpt2().double())
    tokens = tiny_huggingface.tokens()
    split = probes.qk_attributions(model, tokens, 1, 1, edges="previous-token")
    kinds = probes.qk_attributions(model, tokens, 1, 1, edges="previous-token", sources="kinds")
    layers = probes.qk_attributions(model, tokens, 1, 1, edges="previous-token", sources="layers")
    assert kinds.sources == ("embed", "pos_embed", "heads", "MLPs", "bias")
    assert layers.sources == ("embed", "pos_embed", "L0.heads", "L0.mlp", "bias")
    heads = sum(split.of(query, key) for query in ("L0H0", "L0H1") for key in ("L0H0", "L0H1"))
    assert kinds.of("heads", "heads") == pytest.approx(heads, abs=1e-12)
    assert layers.of("L0.heads", "embed") == pytest.approx(
        split.of("L0H0", "embed") + split.of("L0H1", "embed"), abs=1e-12
    )
    assert kinds.total == pytest.approx(split.total, abs=1e-12)


def test_the_size_of_the_micro_batch_changes_nothing():
    model = to_hooked(tiny_huggingface.llama())
    tokens = tiny_huggingface.tokens(5)
    whole = probes.qk_attributions(model, tokens, 1, 0, edges="previous-token")
    for other in (
        probes.qk_attributions(model, tokens, 1, 0, edges="previous-token", batch_size=2),
        probes.qk_attributions(model, [tokens[:1], tokens[1:]], 1, 0, edges="previous-token"),
    ):
        assert np.allclose(other.contribution, whole.contribution, atol=1e-5)
        assert np.allclose(other.stderr, whole.stderr, atol=1e-5)


def test_a_pair_alone_by_hand():
    model = to_hooked(tiny_huggingface.llama())
    tokens = tiny_huggingface.tokens(4)
    found = probes.qk_attributions(model, tokens, 1, 2, edges="previous-token", pairs=2)
    reader = term_reader(model, 1, 2)
    terms = reader(tokens)
    for pair in found.pairs:
        query, key = (reader.sources.index(name) for name in (pair.query, pair.key))
        hits = [
            np.mean([max(range(i + 1), key=lambda j: float(terms.query[query, b, i] @ terms.key[key, b, j])) == i - 1 for i in range(1, 12)])
            for b in range(4)
        ]  # fmt: skip
        assert pair.hits == pytest.approx(np.mean(hits))
        assert pair.stderr == pytest.approx(np.std(hits, ddof=1) / 2)
    assert found.top(2)["query"].tolist() == [pair.query for pair in found.pairs]


def test_half_precision_is_judged_by_its_own_rounding():
    tokens = tiny_huggingface.tokens(4)
    exact, rounded = (
        probes.qk_attributions(to_hooked(model), tokens, 1, 0, edges="previous-token")
        for model in (tiny_huggingface.llama(), tiny_huggingface.llama().bfloat16())
    )
    assert 1e-3 < rounded.error < 0.1
    assert rounded.total == pytest.approx(exact.total, abs=0.05)


def test_the_first_layer_has_only_embeddings():
    found = probes.qk_attributions(
        to_hooked(tiny_huggingface.neox()), tiny_huggingface.tokens(), 0, 0, edges="previous-token"
    )
    assert found.sources == ("embed", "bias")


def test_one_sequence_has_no_error():
    found = probes.qk_attributions(
        to_hooked(tiny_huggingface.gpt2()), tiny_huggingface.tokens(1), 1, 0, edges="previous-token"
    )
    assert found.stderr is None
    assert found.total_stderr is None
    assert found.to_dict()["by_key"]["stderr"] is None
    assert "stderr" in found.to_pandas()


def test_it_shows_and_keeps_itself(tmp_path: Path):
    model = to_hooked(tiny_huggingface.gpt2())
    found = probes.qk_attributions(model, tiny_huggingface.tokens(), 1, 0, edges="previous-token")
    assert repr(found).startswith("QKAttributions of L1H0 of ")
    assert "<table" in found._repr_html_()
    assert found.heatmap(3).shape == (3, 3)
    assert found.margin("key")["contribution"].sum() == pytest.approx(found.total, abs=1e-5)
    assert "frozen" not in found.cite().methods
    assert "held fixed" in found.cite().methods
    found.save(tmp_path / "found.safetensors")
    loaded = QKAttributions.load(tmp_path / "found.safetensors")
    assert (loaded.to_dict(), repr(loaded)) == (found.to_dict(), repr(found))
    assert np.array_equal(loaded.pairs[0].scores, found.pairs[0].scores)
    assert "scores" not in found.to_dict()["pairs"][0]
    assert found.to_dict()["contribution"][0][0] == pytest.approx(found.of("embed", "embed"))


def test_bad_input():
    model = to_hooked(tiny_huggingface.gpt2())
    tokens = tiny_huggingface.tokens()
    with pytest.raises(CausalProbeError, match=r"No row of these sequences has an edge of 'induction'"):
        probes.qk_attributions(model, torch.arange(3, 12)[None], 1, 0, edges="induction")
    with pytest.raises(CausalProbeError, match=r"no template 'inductoin'; did you mean 'induction'"):
        probes.qk_attributions(model, tokens, 1, 0, edges="inductoin")
    with pytest.raises(CausalProbeError, match=r"can't be put together by 'all'; choose split, layers, kinds"):
        probes.qk_attributions(model, tokens, 1, 0, edges="induction", sources="all")
    with pytest.raises(CausalProbeError, match=r"There are no sequences"):
        probes.qk_attributions(model, tokens[:0], 1, 0, edges="induction")
    with pytest.raises(CausalProbeError, match=r"`pairs` is -1. It must be a whole number of at least 0"):
        probes.qk_attributions(model, tokens, 1, 0, edges="induction", pairs=-1)
    with pytest.raises(CausalProbeError, match=r"There is no head L5H0. Heads, counted from 0: layer 0: 2, layer 1: 2"):
        probes.qk_attributions(model, tokens, "L5H0", edges="induction")
    found = probes.qk_attributions(model, tokens, -1, 0, edges="previous-token")
    assert repr(probes.qk_attributions(model, tokens, "L1H0", edges="previous-token")) == repr(found)
    with pytest.raises(CausalProbeError, match=r"There is no source 'L9H9'; there are embed"):
        found.of("L9H9", "embed")
    with pytest.raises(CausalProbeError, match=r"two sides, 'query' and 'key'; found 'value'"):
        found.margin("value")


@pytest.mark.parametrize("probe", [probes.qk_attributions, probes.upstream])
def test_sequences_beyond_the_context_of_a_rotary_model(probe):
    model = to_hooked(tiny_huggingface.llama())
    long = tiny_huggingface.tokens(2, tiny_huggingface.N_CTX + 1)
    with pytest.raises(CausalProbeError, match="have 33 tokens, and the model's context holds 32"):
        probe(model, long, 1, 0, edges="previous-token")
    probe(model, long[:, :-1], 1, 0, edges="previous-token")  # the longest that there is


def test_what_pairs_add_to_the_log_of_attention_by_hand():
    """Of two pairs that favour different keys, one alone adds to the edges and the other takes away, though its score there is not negative."""
    model = DisentangledTransformer(3, 5, dtype=torch.float64)
    block = model.block(0, 0, query="position", key="position")
    block[4, 1], block[4, 3] = 2.0, 1.5
    truth = nx.DiGraph([(1, 4)])
    truth.add_nodes_from(range(5))
    tokens = tiny_models.random_tokens(4, n=5) % 3
    found = probes.qk_attributions(model, tokens, 0, 0, edges=truth, competition=True, sources=lambda name: name)
    place = found.sources.index("position")
    expected = 2 - np.log(np.exp([0, 2, 0, 1.5, 0]).sum()) + np.log(5)
    assert found.attention[place, place] == pytest.approx(expected, abs=1e-9)
    assert np.abs(found.attention).sum() == pytest.approx(expected, abs=1e-9)
    softmax = np.exp([0, 2, 0, 1.5, 0]) / np.exp([0, 2, 0, 1.5, 0]).sum()
    assert found.first_order[place, place] == pytest.approx(2 - 2 * softmax[1] - 1.5 * softmax[3], abs=1e-9)
    assert probes.qk_attributions(model, tokens, 0, 0, edges=truth).attention is None


def test_a_pair_that_raises_another_key_counts_against_the_edge():
    model = DisentangledTransformer(3, 5, dtype=torch.float64)
    model.block(0, 0, query="position", key="position")[4, 1] = 2.0
    model.block(0, 0, query="position", key="token")[4, 2] = 3.0  # token 2 stands at position 3 alone
    truth = nx.DiGraph([(1, 4)])
    truth.add_nodes_from(range(5))
    found = probes.qk_attributions(model, torch.tensor([[0, 0, 1, 2, 1]]), 0, 0, edges=truth, competition=True)
    by_pair = dict(
        zip(
            [tuple(row) for row in found.to_pandas()[["query", "key"]].to_numpy()],
            found.to_pandas()["attention"],
            strict=True,
        )
    )
    assert by_pair["position", "position"] > 0 > by_pair["position", "token"]
    assert sum(by_pair.values()) == pytest.approx(2 - np.log(np.exp([0, 2, 0, 3, 0]).sum()) + np.log(5), abs=1e-9)
