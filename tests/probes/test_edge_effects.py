from __future__ import annotations

import json
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from scipy import stats

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import edge_effects, head_graphs
from causal_probe.probes.edge_tests import EdgeEffects
from causal_probe.probes.p_values import holm
from causal_probe.tasks import InContextMarkov, cross_entropy
from causal_probe.tasks.stationary import stationary_distribution
from tests.tiny_models import MODELS, disentangled, native_bridge, random_tokens

PAIRS = [(0, 1), (1, 3), (2, 3), (0, 4)]


def next_token_loss(model, tokens):
    """Minus the log probability of state 0 after the last token."""
    return -model(tokens)[:, -1].log_softmax(-1)[:, 0]


def loss_by_hand(model, tokens, layer, head, child, row):
    """The same with a row replaced by a hook of this test's own, in place."""

    def edit(pattern, hook):
        pattern = pattern.clone()
        for key in range(pattern.shape[-1]):
            pattern[:, head, child, key] = row[key] if key < len(row) else 0
        return pattern

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(attention_hook(layer, "pattern"), edit)])
    return next_token_loss(lambda tokens: logits, tokens).double().numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_every_number_is_that_of_a_loop_by_hand(kind):
    model, tokens = MODELS[kind](), random_tokens(40)
    found = edge_effects(model, tokens.split(15), next_token_loss, layer=0, head=1, candidates=PAIRS)
    with torch.no_grad():
        clean = next_token_loss(model, tokens).double().numpy()
    assert found.loss == pytest.approx(clean.mean())
    assert (found.edges, found.n_sequences) == (tuple(PAIRS), 40)
    p_values = []
    for index, (parent, child) in enumerate(PAIRS):
        even = loss_by_hand(model, tokens, 0, 1, child, [1 / (child + 1)] * (child + 1))
        routed = loss_by_hand(model, tokens, 0, 1, child, [float(key == parent) for key in range(child + 1)])
        assert found.gain[index] == pytest.approx((even - routed).mean(), abs=1e-6)
        assert found.stderr[index] == pytest.approx((even - routed).std(ddof=1) / 40**0.5, abs=1e-6)
        assert found.cut[index] == pytest.approx((even - clean).mean(), abs=1e-6)
        assert found.cut_stderr[index] == pytest.approx((even - clean).std(ddof=1) / 40**0.5, abs=1e-6)
        p_values.append(stats.ttest_rel(even, routed, alternative="greater").pvalue)
    np.testing.assert_allclose(found.p_value, p_values, atol=1e-4)
    for level in (0.01, 0.1, 0.3, 0.6, 0.99):
        np.testing.assert_array_equal(
            replace(found, level=level).confirmed, rejected_by_holm(np.array(p_values), level)
        )


def rejected_by_holm(p_values, level):
    """As its author has it: go through the p-values from the smallest, and stop at the first above level / remaining."""
    rejected = np.zeros(len(p_values), dtype=bool)
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


@pytest.mark.parametrize("seed", range(5))
def test_holms_adjusted_p_values_reject_what_his_procedure_rejects(seed):
    p_values = np.random.default_rng(seed).uniform(size=12) ** 4
    p_values[3] = p_values[7]
    for level in (1e-3, 0.01, 0.1, 0.5):
        np.testing.assert_array_equal(holm(p_values) <= level, rejected_by_holm(p_values, level))


def test_a_merge_equals_one_run_over_all():
    model, tokens = disentangled(), random_tokens(20)

    def effects(tokens):
        return edge_effects(model, tokens, next_token_loss, layer=0, head=0, candidates=PAIRS)

    merged, whole = effects(tokens[:7]).merge(effects(tokens[7:])), effects(tokens)
    assert merged.n_sequences == whole.n_sequences == 20
    for name in ("loss", "gain", "stderr", "cut", "cut_stderr", "p_value", "adjusted_p_value"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-9)
    with pytest.raises(CausalProbeError, match="differ in level can't be merged"):
        whole.merge(replace(whole, level=0.5))


def test_a_batch_costs_one_run_one_per_child_and_one_per_candidate():
    runs = []

    def counting(model, tokens):
        runs.append(len(tokens))
        return next_token_loss(model, tokens)

    edge_effects(disentangled(), random_tokens(6).split(3), counting, layer=0, head=0, candidates=PAIRS)
    assert len(runs) == 2 * (1 + 3 + 4) + 1  # and one to see that the hook is live


# ------------------------------------------------------------------------------------------------------- roots and children


def redraw(batch, child, edges, generator):
    """The batch with a child redrawn as a root of the tree task, and its descendants along ``edges``."""
    tokens, pi = batch.tokens.clone(), batch.tables[1]
    tokens[:, child] = stationary_distribution(pi).multinomial(1, generator=generator)[:, 0]
    for node in sorted(nx.descendants(edges, child)):
        (parent,) = edges.predecessors(node)
        tokens[:, node] = pi[torch.arange(len(pi)), tokens[:, parent]].multinomial(1, generator=generator)[:, 0]
    return replace(batch, tokens=tokens)


def task_loss(model, batch):
    return cross_entropy(model.predict(batch.tokens).softmax(-1), batch.target)


def solving(truth, *, roots_attend_to=lambda node: node):
    """A model that solves the tree task of a graph: layer 1 copies the parent's state, layer 2 matches it with the query's."""
    model = DisentangledTransformer(3, len(truth) + 1)
    block = model.block(0, 0, query="position", key="position")
    for child in truth:
        block[child, next(iter(truth.predecessors(child)), roots_attend_to(child))] = 20
    model.block(1, 0, query="token", key="L0H0.token").copy_(3 * torch.eye(3))
    model.output_block("L1H0.token").copy_(2 * torch.eye(3))
    return model


def sampled(truth, batches, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    task = InContextMarkov(truth, 3, 0.1)
    return [task.sample(1024, generator) for _ in range(batches)], generator


@pytest.mark.parametrize("seed", [0, 1])
def test_a_solving_model_has_exactly_its_edges_confirmed_though_its_root_rows_are_saturated(seed):
    truth = graphs.random_forest(9, seed=seed)
    model = solving(truth, roots_attend_to=lambda node: max(0, node - 1))
    batches, generator = sampled(truth, 6, seed=seed)
    candidates = head_graphs(model, batches).graph(0, 0, claim=0, nodes=9)
    assert head_graphs(model, batches).compare(truth, 0, 0).shd > 0  # attention takes saturated roots for children
    found = edge_effects(
        model, batches, task_loss, layer=0, head=0, candidates=candidates,
        redraw=lambda *arguments: redraw(*arguments, generator),
    )  # fmt: skip
    result = graphs.compare(found.graph(9), truth, weights=found.weights(9))
    assert (result.shd, result.auroc, result.average_precision) == (0, 1, 1)


def test_a_root_may_gain_and_is_told_by_redrawing_it():
    # Node 1 is a root. Half of its even row is on itself, which says that its state follows itself: worse than any parent.
    truth = graphs.from_parents([None, None, 0, 1])
    batches, generator = sampled(truth, 8)
    options = {"layer": 0, "head": 0, "candidates": [(0, 1), (0, 2), (1, 3)]}
    plain = edge_effects(solving(truth), batches, task_loss, **options)
    assert plain.confirmed.tolist() == [True, True, True]
    found = edge_effects(
        solving(truth), batches, task_loss, **options, redraw=lambda *arguments: redraw(*arguments, generator)
    )
    assert found.confirmed.tolist() == [False, True, True]
    assert abs(found.margin[0]) < 3 * found.margin_stderr[0]
    np.testing.assert_allclose(found.gain, plain.gain)


def test_children_are_redrawn_from_the_last_to_the_first_along_what_was_found():
    truth = graphs.chain(5)
    batches, generator = sampled(truth, 4)
    asked = []

    def watched(batch, child, edges):
        asked.append((child, frozenset(edges.edges)))
        return redraw(batch, child, edges, generator)

    found = edge_effects(solving(truth), batches, task_loss, layer=0, head=0, candidates=truth, redraw=watched)
    assert found.confirmed.all()
    expected = [(child, frozenset((node - 1, node) for node in range(child + 1, 5))) for child in (4, 3, 2, 1)]
    assert list(dict.fromkeys(asked)) == expected
    assert len(asked) == 4 * len(batches)
    # The margin is a paired mean: repeat it by hand for the last child, whose redrawing comes first.
    generator.manual_seed(9)
    again = edge_effects(
        solving(truth), batches, task_loss, layer=0, head=0, candidates=[(3, 4)],
        redraw=lambda *arguments: redraw(*arguments, generator),
    )  # fmt: skip
    generator.manual_seed(9)
    differences = []
    for batch in batches:
        tokens = redraw(batch, 4, graphs.from_parents([None] * 5), generator).tokens
        gains = []
        for its in (batch.tokens, tokens):
            routed, even = (by_hand(solving(truth), its, batch.target, row) for row in ([0, 0, 0, 1, 0], [0.2] * 5))
            gains.append(even - routed)
        differences.append(gains[0] - gains[1])
    difference = np.concatenate(differences)
    assert again.margin[0] == pytest.approx(difference.mean(), abs=1e-7)
    assert again.margin_stderr[0] == pytest.approx(difference.std(ddof=1) / len(difference) ** 0.5, rel=1e-4)
    assert again.margin_p_value[0] == pytest.approx(
        stats.ttest_1samp(difference, 0, alternative="greater").pvalue, rel=0.1
    )


def by_hand(model, tokens, target, row):
    """The loss of the full forward, with node 4's row replaced."""

    def edit(pattern, hook):
        pattern = pattern.clone()
        pattern[:, 0, 4, :5] = torch.tensor(row)
        return pattern

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(attention_hook(0, "pattern"), edit)])[:, -1]
    return -(target * logits.log_softmax(-1)).sum(-1).double().numpy()


def test_a_model_without_weights_has_no_edge():
    truth = graphs.chain(4)
    batches, generator = sampled(truth, 2)
    found = edge_effects(
        DisentangledTransformer(3, 5), batches, task_loss, layer=0, head=0, candidates=truth,
        redraw=lambda *arguments: redraw(*arguments, generator),
    )  # fmt: skip
    assert found.gain.tolist() == found.stderr.tolist() == found.cut.tolist() == [0, 0, 0]
    assert found.p_value.tolist() == [1, 1, 1]
    assert found.graph(4).number_of_edges() == 0
    assert found.margins == {}
    assert not found.weights(4).any()


def test_a_gain_within_rounding_is_no_gain():
    # The same in every sequence, so without any spread, and far below what a loss of 5 can resolve.
    model = disentangled()
    model(random_tokens(1))

    def loss(model, tokens):
        pattern = []
        model.run_with_hooks(
            tokens, fwd_hooks=[(attention_hook(0, "pattern"), lambda value, hook: pattern.append(value))]
        )
        return 5 - 1e-15 * pattern[-1][:, 0, 3, 1]

    found = edge_effects(model, random_tokens(50), loss, layer=0, head=0, candidates=[(1, 3)], level=0.5)
    assert found.resolution == pytest.approx(5 * np.finfo(np.float64).eps)
    assert found.gain[0] > 0
    assert not found.confirmed.any()


# ----------------------------------------------------------------------------------------------------------------- results


def test_of_several_confirmed_parents_a_child_keeps_the_one_that_gains_most():
    truth = graphs.chain(6)
    batches, _ = sampled(truth, 6)
    candidates = [(parent, child) for child in range(1, 6) for parent in range(child)]
    found = edge_effects(solving(truth), batches, task_loss, layer=0, head=0, candidates=candidates)
    assert set(found.graph(6).edges) == set(truth.edges)
    every = found.graph(6, max_parents=None)
    assert set(every.edges) > set(truth.edges)  # a grandparent gains too
    table = found.to_pandas()
    assert {(row.parent, row.child) for row in table.itertuples() if row.confirmed} == set(every.edges)
    row = table[(table.parent == 1) & (table.child == 2)].iloc[0]
    assert every.edges[1, 2]["gain"] == row["gain"]
    assert every.edges[1, 2]["margin"] is None
    weights = found.weights(6)
    assert weights[2, 1] == pytest.approx(row["gain"] / row["stderr"], rel=1e-3)
    assert weights[1, 2] == 0
    with pytest.raises(CausalProbeError, match="node 5 were tested; a graph over 5 nodes"):
        found.graph(5)


def test_a_result_is_strict_json_and_says_why_what_is_undefined():
    model = disentangled()
    found = edge_effects(model, random_tokens(1), next_token_loss, layer=0, head=1, candidates=PAIRS)
    assert found.stderr is None
    assert found.p_value is None
    assert not found.confirmed.any()
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["edges"][1] == [1, 3]
    assert content["each"][1]["gain"] == pytest.approx(found.gain[1])
    assert content["each"][1]["p_value"] is None
    assert content["undefined"]["p_value"] == "a standard error needs two sequences or more"
    assert content["undefined"]["margin"] == "the child was not redrawn as a root: no way to redraw was given"
    with pytest.raises(CausalProbeError, match="no standard error"):
        found.weights(7)


def test_a_result_shows_cites_and_keeps_itself(tmp_path):
    model = disentangled()
    model.cfg.model_name = "<b>"
    found = edge_effects(model, random_tokens(30), next_token_loss, layer=0, head=1, candidates=PAIRS, level=0.01)
    assert f"{found.confirmed.sum()} of 4 tested edges confirmed at the family-wise level 0.01" in repr(found)
    assert repr(found).count("\n") == 5
    found.save(tmp_path / "effects.safetensors")
    back = EdgeEffects.load(tmp_path / "effects.safetensors")
    assert back.to_dict() == found.to_dict()
    np.testing.assert_array_equal(back.weights(7), found.weights(7))
    assert "<b>" not in found._repr_html_()
    methods = found.cite().methods
    assert "head L0H1" in methods
    assert "30 sequences" in methods
    assert "Holm-corrected over 4 tested pairs" in methods
    assert "redrawn" not in methods


# ------------------------------------------------------------------------------------------------------------------ errors


def test_everything_that_is_wrong_with_the_candidates_is_said_at_once():
    with pytest.raises(CausalProbeError) as error:
        edge_effects(
            disentangled(), random_tokens(2), next_token_loss, layer=0, head=0,
            candidates=[(0, 0), (3, 2), (2, 2), (0, 1), (0, 1)],
        )  # fmt: skip
    message = str(error.value)
    assert "row 0 has one key only and can't be tested: 0 -> 0" in message
    assert "a parent must come before its child: 3 -> 2, 2 -> 2" in message
    assert "given twice: 0 -> 1" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": []}, "there are none"),
        ({"level": 0.0}, "`level` is 0.0. It must be a finite number of more than 0 and less than 1"),
        ({"batches": []}, "no batches"),
        ({"layer": 2}, r"Layer 2 was asked for; there are 2 layers"),
        ({"head": 2}, "head 2 was asked for"),
        ({"candidates": [(0, 7)]}, "query 7 was asked for"),
        (
            {"loss": lambda model, tokens: next_token_loss(model, tokens).mean()},
            r"one loss per sequence.*returned a tensor \[\]",
        ),
        ({"loss": lambda model, tokens: next_token_loss(model, tokens) / 0}, "not finite for 2 of 2 sequences"),
        (
            {"loss": lambda model, tokens: torch.zeros(2)},
            "does not depend on the pattern at blocks.0.attn.hook_pattern",
        ),
        ({"batches": iter([]), "redraw": redraw}, "can be read once"),
    ],
)
def test_what_can_not_be_measured_is_refused_and_the_model_is_left_as_it_was(options, message):
    model = disentangled().train()
    given = {
        "batches": random_tokens(2),
        "loss": next_token_loss,
        "layer": 0,
        "head": 0,
        "candidates": PAIRS,
        **options,
    }
    with pytest.raises(CausalProbeError, match=message):
        edge_effects(model, given.pop("batches"), given.pop("loss"), **given)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_redrawing_must_keep_the_sequences():
    truth = graphs.chain(4)
    batches, _ = sampled(truth, 4)

    def drop(batch, child, edges):
        return replace(batch, tokens=batch.tokens[1:], target=batch.target[1:], tables={1: batch.tables[1][1:]})

    with pytest.raises(CausalProbeError, match="of 1024 it made 1023"):
        edge_effects(solving(truth), batches, task_loss, layer=0, head=0, candidates=truth, redraw=drop)


def test_a_bridge_is_measured_if_its_pattern_can_be_edited_and_refused_otherwise():
    shape = {"d_model": 8, "d_head": 4, "n_layers": 1, "n_ctx": 7, "n_heads": 2, "d_vocab": 5, "attn_only": True}
    model = native_bridge({**shape, "normalization_type": None})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))

    def measure():
        return edge_effects(model, random_tokens(4), next_token_loss, layer=0, head=0, candidates=[(0, 6), (1, 3)])

    try:
        from transformer_lens import HookedTransformer  # noqa: F401 - TransformerLens 3.9: the hook shows a copy
    except ImportError:
        found = measure()
        assert found.edges == ((1, 3), (0, 6))
        assert found.gain[1] != 0
        assert found.gain[0] == 0  # with one layer, the last row alone reaches the last token's logits
        assert isinstance(found, EdgeEffects)
    else:
        with pytest.raises(CausalProbeError, match="nothing reads that hook's value"):
            measure()
