from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import head_graphs, match_heads, template
from causal_probe.probes.evidence import Evidence
from tests.tiny_models import MODELS, disentangled, random_tokens


def holding(*graphs_of_heads, strength=20.0):
    """A model whose heads of layer 0 attend to the true parents; roots attend to themselves."""
    n = len(graphs_of_heads[0])
    model = DisentangledTransformer(3, n, [len(graphs_of_heads), 1])
    for head, graph in enumerate(graphs_of_heads):
        block = model.block(0, head, query="position", key="position")
        for child in graph:
            block[child, next(iter(graph.predecessors(child)), child)] = strength
    return model


def from_weights(*layers, stderr=None, sequences=4):
    """Evidence of given mean attention."""
    return Evidence.from_arrays([np.asarray(layer, dtype=float) for layer in layers], stderr, n_sequences=sequences)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_the_mean_patterns_of_the_full_cache(kind):
    model, tokens = MODELS[kind](), random_tokens(8)
    found = head_graphs(model, [tokens[:5], tokens[5:]])
    _, cache = model.run_with_cache(tokens)
    assert (found.n_sequences, found.n_positions, len(found.values)) == (8, 7, 2)
    for layer in (0, 1):
        patterns = cache[attention_hook(layer, "pattern")].detach().double().numpy()
        np.testing.assert_allclose(found.values[layer], patterns.mean(0), atol=1e-7)
        np.testing.assert_allclose(found.stderr[layer], patterns.std(0, ddof=1) / 8**0.5, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_a_graph_set_by_hand_is_read_exactly(seed):
    truth = graphs.random_forest(12, seed=seed)
    found = head_graphs(holding(truth), torch.randint(3, (4, 12), generator=torch.Generator().manual_seed(seed)))
    assert set(found.graph(0, 0).edges) == set(truth.edges)
    result = found.compare(truth, 0, 0)
    assert (result.shd, result.auroc, result.root_accuracy) == (0, 1, 1)


def test_each_head_has_its_own_graph():
    truths = graphs.chain(6), graphs.pairs(6)
    found = head_graphs(holding(*truths), torch.zeros(2, 6, dtype=torch.long))
    for head, truth in enumerate(truths):
        assert set(found.graph(0, head).edges) == set(truth.edges)


def test_uniform_attention_makes_every_node_beyond_the_first_pair_a_root():
    found = head_graphs(DisentangledTransformer(3, 6), torch.zeros(2, 6, dtype=torch.long))
    # Node 1 gives its one earlier node exactly half of its attention, which is the default threshold.
    assert list(found.graph(0, 0).edges) == [(0, 1)]
    assert list(found.graph(0, 0, claim=0.51).edges) == []
    # Of equals the candidate is the smallest.
    assert [(c.child, c.parent, c.margin) for c in found.parents(0, 0)] == [
        (1, 0, None),
        *((i, 0, 0.0) for i in range(2, 6)),
    ]


ROWS = [[1, 0, 0, 0], [0.3, 0.7, 0, 0], [0.1, 0.5, 0.4, 0], [0.2, 0.2, 0.6, 0.0]]


def test_the_rule_for_a_parent_or_a_root():
    found = from_weights([ROWS], stderr=(np.full((1, 4, 4), 0.01),))
    assert [tuple(candidate) for candidate in found.parents(0, 0)] == [
        (1, 0, 0.3, None),
        (2, 1, 0.5, pytest.approx(0.4)),
        (3, 2, 0.6, pytest.approx(0.4)),
    ]
    graph = found.graph(0, 0)
    assert list(graph.nodes) == [0, 1, 2, 3]
    assert graph.edges[1, 2] == {"weight": 0.5, "margin": pytest.approx(0.4), "stderr": 0.01}
    assert set(graph.edges) == {(1, 2), (2, 3)}  # node 1 keeps most to itself
    assert set(found.graph(0, 0, claim=0.55).edges) == {(2, 3)}
    assert set(found.graph(0, 0, claim=0).edges) == {(0, 1), (1, 2), (2, 3)}
    assert set(found.graph(0, 0, nodes=3).edges) == {(1, 2)}
    assert len(found.graph(0, 0, nodes=3)) == 3


def test_a_comparison_covers_the_nodes_that_have_a_row_of_their_own():
    found = from_weights([ROWS])
    smaller, equal, larger = graphs.chain(3), graphs.chain(4), graphs.chain(5)
    assert found.compare(smaller, 0, 0).children == (0, 1, 2)  # the tree task: the last token is a query
    assert found.compare(equal, 0, 0).children == (0, 1, 2, 3)
    beyond = found.compare(larger, 0, 0)  # the k-parent task: the last row is the query of node 4
    assert beyond.children == (0, 1, 2)
    assert beyond.missing == ((0, 1),)
    result = found.compare(larger, 0, 0, children=[2, 3], claim=0.55)
    assert (result.children, result.missing, result.true_positives) == ((2, 3), ((1, 2),), 1)
    # Of (0,2) .1, (1,2) .5 true, (0,3) .2, (1,3) .2, (2,3) .6 true: every true pair outweighs every other.
    assert result.auroc == 1


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda found: found.graph(1, 0), r"no head L1H0. Heads, counted from 0: layer 0: 1"),
        (lambda found: found.graph(0, -1), "no head L0H-1"),
        (lambda found: found.graph(0, 0, claim=1.2), "from 0 to 1; it is 1.2"),
        (lambda found: found.graph(0, 0, nodes=5), "over 5 nodes was asked for; the sequences have 4 positions"),
        (lambda found: found.compare(graphs.chain(3), 0, 0, children=[2, 3, 9]), r"children \[3, 9\] have no row"),
    ],
)
def test_what_is_not_there_is_refused(ask, message):
    with pytest.raises(CausalProbeError, match=message):
        ask(from_weights([ROWS]))


def test_one_sequence_has_no_standard_error_and_says_so():
    found = head_graphs(disentangled(), random_tokens(1))
    assert found.stderr is None
    assert found.graph(0, 0, claim=0).edges[0, 1]["stderr"] is None
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["stderr"] is None
    assert content["undefined"] == {"stderr": "a standard error needs two sequences or more"}


def test_a_result_carries_its_numbers_and_where_they_come_from():
    found = head_graphs(disentangled(), SimpleNamespace(tokens=random_tokens(3)), batch_size=2)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert np.shape(content["values"]["0"]) == (2, 7, 7)
    assert content["values"]["1"][0][3][2] == pytest.approx(found.values[1][0, 3, 2])
    assert content["undefined"] == {}
    assert content["provenance"]["model"] == "disentangled-transformer"
    citation = found.cite()
    assert "averaged over 3 sequences of 7 tokens" in citation.methods
    assert "float64 on cpu" in citation.methods
    assert "2402.14735" in citation.bibtex


def test_a_result_shows_every_head_in_words_and_as_a_table():
    found = from_weights([ROWS, ROWS], [ROWS])
    # Largest attention on an earlier node: 0.3, 0.5, 0.6.
    assert re.findall(r"(L\dH\d) +(\d) +([\d.]+)", repr(found)) == [
        ("L0H0", "2", "0.4667"),
        ("L0H1", "2", "0.4667"),
        ("L1H0", "2", "0.4667"),
    ]
    assert found._repr_html_().count("<tr><td>L") == 3
    many = from_weights([ROWS] * 30)
    assert "and 6 more" in repr(many)


def test_a_hostile_model_name_is_escaped():
    found = head_graphs(disentangled(), random_tokens(2))
    found.provenance["model"] = "<script>"
    assert "<script>" not in found._repr_html_()


# ---------------------------------------------------------------------------------------------------- of what a row speaks


def test_a_row_of_a_language_model_speaks_of_the_next_token_and_says_so():
    """Three kinds of models; the default follows from the task, whatever the comparison gives."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    from causal_probe.hooks.check import row_shift
    from tests import tiny_huggingface

    model = tiny_huggingface.gpt2(bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    gpt2 = build_bridge_from_module(model, architecture="GPT2LMHeadModel", hf_config=model.config)
    encoder = tiny_huggingface.bert(attn_implementation="eager")
    bert = build_bridge_from_module(encoder, architecture="BertForMaskedLM", hf_config=encoder.config)
    own = DisentangledTransformer(5, 12)
    assert [row_shift(each) for each in (gpt2, bert, own, own.to_transformer_lens())] == [1, 0, 0, 0]
    tokens = tiny_huggingface.tokens(6)
    found = head_graphs(gpt2, tokens)
    assert (found.shift, head_graphs(own, tokens % 5).shift) == (1, 0)
    truth = graphs.random_forest(tokens.shape[1], seed=1)
    result = found.compare(truth, 1, 0, claim=0)
    assert (result.shift, 1 in result.children) == (1, False)
    # By hand: the child's candidate is where the row before it attends most, its own position included.
    pattern = found.values[1][0]
    right = sum(truth.has_edge(int(pattern[child - 1, :child].argmax()), child) for child in result.children if child)
    assert result.true_positives == right
    other = found.compare(truth, 1, 0, claim=0, shift=0)
    assert (other.shift, other.children) == (0, tuple(range(len(truth))))
    assert result.otherwise == {"shift": 0, "shd": other.shd, "precision": other.precision, "recall": other.recall}
    assert other.otherwise["shd"] == result.shd
    assert (
        f"shift 1: the edges into node i are read in row i - 1, which predicts it; with shift 0: shd {other.shd}"
        in repr(result)
    )
    assert "read in row i - 1" in result.cite().methods
    with pytest.raises(CausalProbeError, match=r"0, its own, or 1, the one before; it is 2\."):
        found.compare(truth, 1, 0, shift=2)
    one = head_graphs(gpt2, tokens, per="sequence")
    assert one.compare(truth, 1, 0).shift == 1
    assert one.compare(template("induction"), 1, 0).shift is None
    with pytest.raises(CausalProbeError, match="A template says of each row where it attends"):
        one.compare(template("induction"), 1, 0, shift=1)


def test_a_planted_prediction_head_is_found_one_row_up():
    """A head that attends from where a token is predicted to the token's parent, as in-context predictors do."""
    truth = graphs.from_parents([None, 0, 0, 2, 1, 2, 5])
    weights = np.zeros((1, 7, 7))
    weights[0, 0, 0] = weights[0, 6, 6] = 1
    for parent, child in truth.edges:
        weights[0, child - 1, parent] = 1
    for rows in range(1, 6):
        weights[0, rows, 0] += 1 - weights[0, rows].sum()
    found = Evidence.from_arrays([weights])
    assert found.compare(truth, 0, 0, shift=1).exact
    assert not found.compare(truth, 0, 0).exact
    assert found.compare(truth, 0, 0).otherwise == {"shift": 1, "shd": 0, "precision": 1.0, "recall": 1.0}
    match = match_heads(found, truth, shift=1)
    assert (match.shift, match.mean_parent_attention) == (1, 1.0)
    assert match.otherwise == match_heads(found, truth).mean_parent_attention < 0.6
    assert "shift 1: the edges into node i are read in row i - 1" in repr(match)
