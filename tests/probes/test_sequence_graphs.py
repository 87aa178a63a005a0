"""Graphs sequence by sequence, the rules for the attention sink, and graphs by relative offset."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import chain, random_forest
from causal_probe.probes import head_graphs, template
from causal_probe.probes.evidence import Evidence
from causal_probe.probes.sequence_graphs import SequenceComparison, SequenceGraphs, largest_parents
from tests.tiny_models import MODELS, disentangled, random_tokens

PROVENANCE = {"model": "by hand", "dtype": "float64", "device": "cpu", "versions": {"transformer-lens": "4.3.0"}}


def of_pattern(pattern, sink, tokens=None):
    """The sequence graphs of one layer's pattern [sequence, head, query, key]."""
    tokens = torch.zeros(len(pattern), pattern.shape[-1], dtype=torch.long) if tokens is None else tokens
    found = [each.numpy() for each in largest_parents(pattern)]
    return SequenceGraphs(*((each,) for each in found), tokens.numpy(), sink, provenance=PROVENANCE)


def from_mean(pattern, sink):
    return Evidence.from_arrays([pattern.mean(0)], sink=sink)


def random_pattern(batch=3, heads=2, n=8, *, sharpness=3.0, seed=0):
    raw = sharpness * torch.randn(
        batch, heads, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return raw.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


def by_the_rule(row, i, sink, threshold):
    """The parent of row i, in plain Python, as the docstring has it."""
    a = [float(value) for value in row]
    candidates = list(range(1, i))
    c = max(candidates, key=lambda j: (a[j], -j)) if candidates else None
    if sink == "keep":
        best = max(range(i), key=lambda j: (a[j], -j)) if i else None
        return best if best is not None and a[best] >= threshold else -1
    if c is None:
        return -1
    if sink == "root":
        return c if a[c] >= threshold and a[c] > a[0] else -1
    return c if 1 - a[0] >= 0.1 and a[c] / (1 - a[0]) >= threshold else -1


@pytest.mark.parametrize("sink", ["keep", "root", "exclude"])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_parents_follow_the_stated_rule(sink, threshold):
    pattern = random_pattern(n=9)
    found = of_pattern(pattern, sink)
    seen = set()
    for head in range(2):
        parents = found.parents(0, head, threshold=threshold)
        for sequence in range(3):
            expected = [by_the_rule(pattern[sequence, head, i], i, sink, threshold) for i in range(9)]
            assert parents[sequence].tolist() == expected
            graph = found.graph(sequence, 0, head, threshold=threshold)
            assert set(graph.edges) == {(parent, child) for child, parent in enumerate(expected) if parent >= 0}
            assert len(graph) == 9
            seen |= set(expected)
    assert {-1, 2} < seen
    assert (0 in seen) == (sink == "keep")


@pytest.mark.parametrize("sink", ["keep", "root", "exclude"])
def test_the_mean_of_one_sequence_has_the_graph_of_that_sequence(sink):
    pattern = random_pattern(batch=1, n=9, seed=1)
    for threshold in (0.2, 0.5):
        for head in range(2):
            mean = from_mean(pattern, sink).graph(0, head, claim=threshold)
            assert set(mean.edges) == set(of_pattern(pattern, sink).graph(0, 0, head, threshold=threshold).edges)


def test_the_three_readings_of_one_row():
    """Row 3 looks at the sink with 0.6 and at key 1 with 0.3; row 4 with 0.95 and at key 2 with 0.04."""
    pattern = torch.eye(5, dtype=torch.float64)[None, None].clone()
    pattern[0, 0, 3] = torch.tensor([0.6, 0.3, 0.05, 0.05, 0])
    pattern[0, 0, 4] = torch.tensor([0.95, 0, 0.04, 0, 0.01])
    assert of_pattern(pattern, "keep").parents(0, 0)[0].tolist() == [-1, -1, -1, 0, 0]
    assert of_pattern(pattern, "root").parents(0, 0)[0].tolist() == [-1] * 5
    assert of_pattern(pattern, "exclude").parents(0, 0)[0].tolist() == [
        -1,
        -1,
        -1,
        1,
        -1,
    ]  # 0.3 of 0.4; 0.05 is too little
    assert of_pattern(pattern, "exclude").graph(0, 0, 0).edges[1, 3]["weight"] == pytest.approx(0.75)
    # Below one half the root rule asks for more than the sink gets.
    assert of_pattern(pattern, "root").parents(0, 0, threshold=0.25)[0].tolist() == [-1] * 5
    evidence = from_mean(pattern, "exclude").decisive(0, 0)
    np.testing.assert_allclose(evidence[3], [0, 0.75, 0.125, 0.125, 0])
    np.testing.assert_allclose(evidence[4], np.zeros(5))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_model_is_read_as_its_full_cache(kind, batch_size):
    model, tokens = MODELS[kind](), random_tokens(5)
    found = head_graphs(model, [tokens[:3], tokens[3:]], per="sequence", batch_size=batch_size)
    assert (found.n_sequences, found.n_positions, found.sink) == (5, 7, "root")
    _, cache = model.run_with_cache(tokens)
    for layer in (0, 1):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"].detach()
        expected = of_pattern(pattern, "root", tokens)
        for head in range(pattern.shape[1]):
            assert (found.parents(layer, head) == expected.parents(0, head)).all()
    assert (found.tokens == tokens.numpy()).all()


def test_heads_that_look_by_content_have_graphs_on_each_sequence_and_none_on_the_mean():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, (20, 10), generator=generator)
    targets = template("induction")(tokens).tril(-1)
    targets[..., 0] |= ~targets.any(-1)  # rows without a target look at the sink
    pattern = (targets / targets.sum(-1, keepdim=True)).double()[:, None]
    mean = from_mean(pattern, "root")
    found = of_pattern(pattern, "root", tokens)
    assert not mean.graph(0, 0).edges
    result = found.compare(template("induction"), 0, 0, threshold=0.01)
    assert result.precision == 1
    single = targets[..., 1:].sum(-1) == 1  # rows with one target: it is found
    assert result.recall > single.sum().item() / targets[..., 1:].sum().item()
    assert result.recall < 1  # rows with several have one parent in the graph
    rows = found.compare(template("induction"), 0, 0, threshold=0.01, rows="all")
    assert all(each.root_accuracy == 1 for each in rows.each)
    assert found.compare(random_forest(10, seed=1), 0, 0, threshold=0.01).precision < 0.5


def test_a_comparison_sums_over_sequences():
    pattern = random_pattern(batch=4, heads=1, n=8, sharpness=5, seed=3)
    found = of_pattern(pattern, "keep")
    result = found.compare(chain(8), 0, 0, threshold=0.3)
    parents = found.parents(0, 0, threshold=0.3)
    right = sum(int(parents[s, i] == i - 1) for s in range(4) for i in range(1, 8))
    assert 0 < right < (parents[:, 1:] >= 0).sum() < 28
    assert result.precision == pytest.approx(right / (parents[:, 1:] >= 0).sum())
    assert result.recall == pytest.approx(right / 28)
    assert result.f1 == pytest.approx(2 / (1 / result.precision + 1 / result.recall))
    assert result.shd == pytest.approx(np.mean([each.shd for each in result.each]))
    assert "over 4 sequences" in repr(result)
    json.dumps(result.to_dict(), allow_nan=False)


def test_what_is_undefined_is_none():
    found = of_pattern(torch.eye(4, dtype=torch.float64)[None, None], "root")
    nothing = found.compare(chain(4), 0, 0)
    assert (nothing.precision, nothing.recall, nothing.f1) == (None, 0, 0)
    assert "precision: no edge was found" in repr(nothing)


def test_graphs_by_relative_offset():
    """A noisy head that looks two back: 0.6 there on average, but below one half in every other row."""
    n = 12
    pattern = torch.zeros(1, 1, n, n, dtype=torch.float64)
    for i in range(n):
        there = 0.8 if i % 2 else 0.4
        pattern[0, 0, i, max(i - 2, 0)] += there
        pattern[0, 0, i, i] += 1 - there
    for sink in ("keep", "root"):
        mean = from_mean(pattern, sink)
        offsets = mean.by_offset(0, 0)
        first = 2 if sink == "keep" else 3
        assert offsets[2] == pytest.approx(np.mean([0.8 if i % 2 else 0.4 for i in range(first, n)]))
        graph = mean.offset_graph(0, 0)
        assert set(graph.edges) == {(i - 2, i) for i in range(first, n)}
        assert not mean.offset_graph(0, 0, claim=0.7).edges
    each = of_pattern(pattern, "root").by_offset(0, 0)
    assert each[2] == pytest.approx(5 / 10)  # of the ten rows with a key two back, 3, 5, 7, 9, 11; row 2's is the sink
    assert each.sum() == each[2]


def test_it_prints_cites_and_writes_itself(tmp_path):
    found = of_pattern(random_pattern(), "exclude")
    assert "by hand: one for each of 3 sequences of 8 positions, sink='exclude'" in repr(found)
    assert "L0H1" in repr(found)
    assert "<table>" in found._repr_html_()
    assert "'exclude'" in found.cite().methods
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["sink"] == "exclude"
    found.save(tmp_path / "found.safetensors")
    back = SequenceGraphs.load(tmp_path / "found.safetensors")
    np.testing.assert_array_equal(back.parents("L0H1"), found.parents(0, 1))
    compared = found.compare(chain(8), 0, 0)
    compared.save(tmp_path / "compared.safetensors")
    assert SequenceComparison.load(tmp_path / "compared.safetensors").each == compared.each


def test_bad_input_is_told():
    model, tokens = disentangled(), random_tokens(2)
    with pytest.raises(CausalProbeError, match=r"L0H9\. Heads, counted from 0: layer 0: 2, layer 1: 1"):
        head_graphs(model, tokens, per="sequence").parents(0, 9)
    found = of_pattern(random_pattern(), "root")
    with pytest.raises(CausalProbeError, match="no sequence 3; there are 3"):
        found.graph(3, 0, 0)
    with pytest.raises(CausalProbeError, match="threshold"):
        found.parents(0, 0, threshold=1.5)
    with pytest.raises(CausalProbeError, match="'with-target' or 'all'"):
        found.compare(chain(8), 0, 0, rows="some")
