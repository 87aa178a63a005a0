"""Evidence: comparison by node, arrays that are given, groups, merging and files."""

from __future__ import annotations

import json

import networkx as nx
import numpy as np
import pytest
import torch

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.probes import head_graphs, scan, score_patterns
from causal_probe.probes.evidence import AboveZero, Evidence, Quantity
from causal_probe.probes.score_gradients import GRADIENT, score_gradients
from tests.tiny_models import MODELS, disentangled, random_tokens

PREVIOUS = np.eye(12, k=-1)[None] + np.eye(12)[0] * np.eye(12)[:, :1]


def previous_token() -> Evidence:
    """A head that attends to the previous token alone."""
    return Evidence.from_arrays([PREVIOUS])


# ------------------------------------------------------------------------------------------------------ comparison by node


def test_a_truth_is_compared_on_its_own_nodes() -> None:
    found = previous_token().compare(nx.DiGraph([(8, 9), (9, 10)]), 0, 0)
    assert (found.children, found.true_positives, found.shd, found.auroc) == ((8, 9, 10), 2, 0, 1)
    # A node without edges may be missing: nothing is moved up into its place.
    gap = previous_token().compare(nx.DiGraph([(0, 1), (4, 5), (10, 11)]), 0, 0)
    assert (gap.children, gap.recall, gap.missing) == ((0, 1, 4, 5, 10, 11), 1, ())
    assert gap.extra == ()
    wrong = previous_token().compare(nx.DiGraph([(2, 5), (8, 9)]), 0, 0)
    assert (wrong.missing, wrong.true_positives) == (((2, 5),), 1)


def test_the_order_of_the_nodes_plays_no_part() -> None:
    one, other = nx.DiGraph([(8, 9), (2, 3)]), nx.DiGraph([(2, 3), (8, 9)])
    assert previous_token().compare(one, 0, 0) == previous_token().compare(other, 0, 0)


def test_nodes_beyond_the_sequences_leave_the_last_row_out() -> None:
    found = previous_token().compare(nx.DiGraph([(9, 10), (10, 11), (11, 12)]), 0, 0)
    assert (found.children, found.missing) == ((9, 10), ())
    with pytest.raises(CausalProbeError, match="No node of the truth has a row"):
        previous_token().compare(nx.DiGraph([(20, 21)]), 0, 0)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (nx.DiGraph([(5, 2)]), "must come before its child; the truth has 5 -> 2"),
        (nx.DiGraph([(-1, 2)]), "positions, counted from 0; it has -1"),
        (nx.DiGraph([("a", "b")]), "positions, counted from 0"),
    ],
)
def test_what_is_no_graph_of_positions_is_refused(truth: nx.DiGraph, message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        previous_token().compare(truth, 0, 0)


def test_a_graph_over_some_positions() -> None:
    found = previous_token()
    assert set(found.graph("L0H0", nodes=[3, 4, 8]).edges) == {(3, 4)}
    assert [candidate[:2] for candidate in found.parents(0, 0, nodes=[3, 4, 8])] == [(4, 3), (8, 3)]
    with pytest.raises(CausalProbeError, match="12, 13 can't be nodes"):
        found.graph(0, 0, nodes=[1, 12, 13])


# ------------------------------------------------------------------------------------------------------------ naming a head


def test_a_head_has_one_name_in_several_forms() -> None:
    found = head_graphs(disentangled(), random_tokens(3))
    for name in ((0, 1), ("L0H1",), ((0, 1),), (-2, 1), (np.int64(0), torch.tensor(1))):
        np.testing.assert_array_equal(found.of(*name), found.values[0][1])
    for name in (("L0H1", 2), ("H1",), (0,), (0, 1.0), ("L0", "H1"), ((1, 2, 3),)):
        with pytest.raises(CausalProbeError, match="A head is named 'L18H6'"):
            found.of(*name)
    with pytest.raises(
        CausalProbeError, match=r"There is no head L1H1\. Heads, counted from 0: layer 0: 2, layer 1: 1"
    ):
        found.of("L1H1")


# ------------------------------------------------------------------------------------------------------------ given arrays


@pytest.mark.parametrize("kind", MODELS)
def test_given_patterns_have_the_numbers_of_the_probe(kind: str) -> None:
    model, tokens = MODELS[kind](), random_tokens(6)
    _, cache = model.run_with_cache(tokens)
    listed = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(2)]
    expected, scores = head_graphs(model, tokens), scan(model, tokens)
    forms = {
        "cache": cache,
        "names": dict(cache.items()),
        "layers": dict(enumerate(listed)),
        "tuple": tuple(listed),
        "numpy": [pattern.detach().numpy() for pattern in listed],
    }
    for name, patterns in forms.items():
        found = Evidence.from_arrays(patterns)
        assert found.n_sequences == 6
        assert found.nothing is None
        for layer in range(2):
            np.testing.assert_array_equal(found.values[layer], expected.values[layer], err_msg=name)
            np.testing.assert_array_equal(found.stderr[layer], expected.stderr[layer])
        assert list(score_patterns(patterns, tokens, scores.templates)) == list(scores)


def test_attention_on_nothing_is_kept() -> None:
    pattern = np.array([[[[0.5, 0.0], [0.25, 0.25]]], [[[1.0, 0.0], [0.5, 0.25]]]])  # two sequences, one head
    found = Evidence.from_arrays([pattern])
    np.testing.assert_allclose(found.nothing[0], [[0.25, 0.375]])
    full = Evidence.from_arrays([np.broadcast_to([[[1.0, 0.0], [0.5, 0.5]]], (2, 1, 2, 2)).copy()])
    np.testing.assert_allclose(found.merge(full).nothing[0], [[0.125, 0.1875]])
    assert full.nothing is None


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([np.ones((1, 3, 3))], {}, "sums to 3"),
        ([np.full((1, 3, 3), -0.5)], {}, "they run from -0.5"),
        ([np.full((1, 3, 3), np.nan)], {}, "not finite"),
        ([np.ones((1, 3, 4))], {}, r"that of layer 0 is \[1, 3, 4\]"),
        ([np.ones((3, 3), dtype=int)], {}, "real numbers"),
        ([np.eye(3)[None], np.eye(4)[None]], {}, "of the same sequences"),
        ([None, None], {}, "eager"),
        ([], {}, "There are no patterns"),
        (np.eye(3)[None], {}, "doesn't say which axis"),
        ({"hook_embed": np.eye(3)}, {}, "There are no patterns"),
        ([np.eye(3)[None]], {"stderr": [np.eye(3)[None]]}, "two sequences or more"),
        ([np.eye(3)[None]], {"stderr": [np.eye(4)[None]], "n_sequences": 4}, "the shapes of the values"),
        ([np.eye(3)[None, None]], {"n_sequences": 4}, "leave out the others"),
        ([np.eye(3)[None]], {"sink": "no"}, "sink is one of"),
    ],
)
def test_arrays_that_are_no_evidence_are_refused(values, options, message) -> None:
    with pytest.raises(CausalProbeError, match=message):
        Evidence.from_arrays(values, **options)


def test_patterns_that_do_not_fit_are_not_scored() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(CausalProbeError, match="later positions"):
        score_patterns([np.full((2, 1, 3, 3), 1 / 3)], tokens, "induction")
    with pytest.raises(CausalProbeError, match=r"there are \[\[1, 3, 3\]\]"):
        score_patterns([np.eye(3)[None]], tokens, "induction")


def test_half_precision_has_its_own_rounding() -> None:
    pattern = torch.rand(4, 2, 9, 9, generator=torch.Generator().manual_seed(0)).tril()
    pattern = (pattern / pattern.sum(-1, keepdim=True)).bfloat16()
    assert Evidence.from_arrays([pattern]).nothing is None


# ------------------------------------------------------------------------------------------------------------------ claims


def test_a_test_claims_what_is_above_zero() -> None:
    found = score_gradients(disentangled(scale=0.3), random_tokens(40))
    z = found.z_values(0, 0)
    pairs = 2 * 7 * 6 / 2
    from scipy import stats

    bound = stats.norm.isf(0.2 / pairs)
    expected = {(c.parent, c.child) for c in found.parents(0, 0) if z[c.child, c.parent] > bound}
    assert set(found.graph(0, 0, claim=AboveZero(0.2)).edges) == expected
    assert set(found.graph(0, 0, claim=lambda *_: np.ones((7, 7), dtype=bool)).edges) == {
        (c.parent, c.child) for c in found.parents(0, 0)
    }
    one = score_gradients(disentangled(), random_tokens(1))
    with pytest.raises(CausalProbeError, match="A threshold is a value of the gradient"):
        one.graph(0, 0)
    with pytest.raises(CausalProbeError, match="no standard error to test with"):
        one.graph(0, 0, claim=AboveZero())
    assert "L0H0" in repr(one)


def test_a_quantity_of_ones_own() -> None:
    mine = Quantity("worth", "nats", "0", ("nichani2024",), "what the edge is worth", threshold=2.0)
    found = Evidence.from_arrays([3 * np.eye(4, k=-1)[None]], quantity=mine, model="mine")
    assert set(found.graph("L0H0").edges) == {(0, 1), (1, 2), (2, 3)}
    assert not found.graph("L0H0", claim=3.5).edges
    assert "What the edge is worth was measured in mine" in found.cite().methods
    assert found.to_pandas()["claimed"].all()


# --------------------------------------------------------------------------------------------------------- merging, groups


def test_merging_is_one_run_over_all(tmp_path) -> None:
    model, tokens = disentangled(), random_tokens(9)
    for probe in (head_graphs, score_gradients):
        whole, parts = (
            probe(model, tokens),
            [probe(model, tokens[:1]), probe(model, tokens[1:4]), probe(model, tokens[4:])],
        )
        merged = parts[0].merge(parts[1]).merge(parts[2])
        assert merged.n_sequences == 9
        for layer in whole.values:
            np.testing.assert_allclose(merged.values[layer], whole.values[layer], atol=1e-15)
            np.testing.assert_allclose(merged.stderr[layer], whole.stderr[layer], atol=1e-8)


def test_only_like_is_merged_with_like() -> None:
    model, tokens = disentangled(), random_tokens(4)
    found = head_graphs(model, tokens)
    for other, message in (
        (score_gradients(model, tokens), "quantities differ, attention and gradient"),
        (head_graphs(model, tokens, sink="root"), "sink differ"),
        (head_graphs(disentangled((1, 1)), tokens), "shapes differ"),
        (Evidence.from_arrays(dict(found.values)), "models differ"),
        (Evidence.stack({"a": found}), "the other none"),
    ):
        with pytest.raises(CausalProbeError, match=message):
            found.merge(other)
    unknown = Evidence.from_arrays([PREVIOUS], n_sequences=3)
    with pytest.raises(CausalProbeError, match="without their standard errors"):
        unknown.merge(Evidence.from_arrays([PREVIOUS], n_sequences=3))


def test_groups_of_sequences() -> None:
    model, tokens = disentangled(), random_tokens(6)
    one, two, three = (head_graphs(model, part) for part in (tokens[:1], tokens[1:3], tokens[3:]))
    found = Evidence.stack({"short": one, "long": two})
    assert (found.labels, found.n_by_label, found.n_sequences) == (("short", "long"), (1, 2), 3)
    assert found.at("short").stderr is None
    np.testing.assert_array_equal(found.at("long").stderr[1], two.stderr[1])
    both = found.merge(Evidence.stack({"long": three, "new": one}))
    assert both.n_by_label == (1, 5, 1)
    np.testing.assert_array_equal(both.at("long").values[0], two.merge(three).values[0])
    for ask in (lambda: found.of(0, 0), lambda: found.graph("L0H0"), lambda: found.compare(graphs.chain(3), 0, 0)):
        with pytest.raises(CausalProbeError, match="several groups"):
            ask()
    with pytest.raises(CausalProbeError, match="no group 'x'; the groups are short, long"):
        found.at("x")
    assert "2 groups" in repr(found)


def test_files_hold_everything(tmp_path) -> None:
    model, tokens = disentangled(), random_tokens(5)
    pattern = np.array([[[[0.5, 0.0], [0.25, 0.25]]]] * 2)
    each = [
        head_graphs(model, tokens, sink="root"),
        score_gradients(model, tokens[:1], layers=[1]),
        Evidence.from_arrays([pattern]),
        Evidence.stack({"a": head_graphs(model, tokens), "b": head_graphs(model, tokens[:1])}),
    ]
    for found in each:
        found.save(tmp_path / "evidence.safetensors")
        back = Evidence.load(tmp_path / "evidence.safetensors")
        assert (back.quantity, back.n_sequences, back.labels) == (found.quantity, found.n_sequences, found.labels)
        assert (back.settings, back.provenance) == (found.settings, found.provenance)
        for what in ("values", "stderr", "nothing"):
            one, other = getattr(found, what), getattr(back, what)
            assert (one is None) == (other is None)
            for layer in one or ():
                np.testing.assert_array_equal(one[layer], other[layer])
        assert repr(back) == repr(found)
    assert json.loads(json.dumps(each[0].to_dict(), allow_nan=False))["settings"] == {"sink": "root"}
    assert each[1].quantity == GRADIENT
