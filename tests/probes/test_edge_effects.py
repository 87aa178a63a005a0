from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

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
from causal_probe.probes.edge_effects import Editing, Rivals
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
    # At so high a level that the rivals of each edge that gains at all are measured.
    found = edge_effects(model, tokens.split(15), next_token_loss, layer=0, head=1, candidates=PAIRS, level=0.999)
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
        np.testing.assert_array_equal(holm(found.p_value) <= level, rejected_by_holm(np.array(p_values), level))
    gaining = rejected_by_holm(np.array(p_values), 0.999)
    for index, (parent, child) in enumerate(PAIRS):
        if not gaining[index] or child == 1:
            assert found.margin[index] is None
            continue
        losses = [
            loss_by_hand(model, tokens, 0, 1, child, [float(key == node) for key in range(child + 1)])
            for node in range(child)
        ]
        rivals = [node for node in range(child) if node != parent]
        assert found.rivals((parent, child)) == tuple(rivals)
        margins = [losses[node] - losses[parent] for node in rivals]
        worst = int(np.argmin([each.mean() / each.std() for each in margins]))
        assert found.rival[index] == rivals[worst]
        assert found.margin[index] == pytest.approx(margins[worst].mean(), abs=1e-6)
        assert found.margin_stderr[index] == pytest.approx(margins[worst].std(ddof=1) / 40**0.5, abs=1e-6)
        margin_p = max(stats.ttest_1samp(each, 0, alternative="greater").pvalue for each in margins)
        assert found.margin_p_value[index] == pytest.approx(margin_p, abs=1e-3)
        twice = 2 if parent == 0 else 1  # 0 is a candidate of two nodes
        expected = max(holm(np.array(p_values))[index], min(1, 4 * twice * margin_p))
        assert found._alone[index] == pytest.approx(expected, abs=5e-3)


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


def test_a_batch_costs_one_run_one_per_child_one_per_candidate_and_what_is_tested_again():
    runs = []

    def counting(model, tokens):
        runs.append(len(tokens))
        return next_token_loss(model, tokens)

    edge_effects(disentangled(), random_tokens(6).split(3), counting, layer=0, head=0, candidates=PAIRS)
    # One to see that the hook is live; 0 -> 4 is tested again, with the row of 0's other candidate child spread: an even row and 0.
    assert len(runs) == 2 * (1 + 3 + 4) + 1 + 2 * 2


# ------------------------------------------------------------------------------------------------------- roots and children


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
    return [task.sample(1024, generator) for _ in range(batches)], partial(task.redraw, generator=generator)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_solving_model_has_exactly_its_edges_confirmed_though_its_root_rows_are_saturated(seed):
    truth = graphs.random_forest(9, seed=seed)
    model = solving(truth, roots_attend_to=lambda node: max(0, node - 1))
    batches, redraw = sampled(truth, 6, seed=seed)
    candidates = head_graphs(model, batches).graph(0, 0, claim=0, nodes=9)
    assert head_graphs(model, batches).compare(truth, 0, 0).shd > 0  # attention takes saturated roots for children
    found = edge_effects(model, batches, task_loss, layer=0, head=0, candidates=candidates, redraw=redraw)
    result = graphs.compare(found.graph(9), truth, weights=found.weights(9))
    assert (result.shd, result.auroc, result.average_precision) == (0, 1, 1)


def test_a_root_may_gain_and_is_told_by_redrawing_it():
    # Node 1 is a root. Half of its even row is on itself, which says that its state follows itself: worse than any parent.
    truth = graphs.from_parents([None, None, 0, 1])
    batches, redraw = sampled(truth, 8, seed=1)
    options = {"layer": 0, "head": 0, "candidates": [(0, 1), (0, 2), (1, 3)]}
    plain = edge_effects(solving(truth), batches, task_loss, **options)
    assert plain.confirmed.tolist() == [True, True, True]
    found = edge_effects(solving(truth), batches, task_loss, **options, redraw=redraw)
    assert found.confirmed.tolist() == [False, True, True]
    assert found.rival[0] == "none"
    assert abs(found.margin[0]) < 3 * found.margin_stderr[0]
    np.testing.assert_allclose(found.gain, plain.gain)


def test_a_wrong_parent_may_gain_and_is_told_by_redrawing_from_the_right_one():
    """In a chain a grandparent says something too. The level holds against it, and the parent itself is confirmed."""
    truth = graphs.chain(6)
    batches, redraw = sampled(truth, 8)
    candidates = [(parent, child) for child in range(2, 6) for parent in (child - 2, child - 1)]
    found = edge_effects(solving(truth), batches, task_loss, layer=0, head=0, candidates=candidates, redraw=redraw)
    assert {edge for edge, yes in zip(found.edges, found.confirmed, strict=True) if yes} == {*truth.edges} - {(0, 1)}


def test_margins_over_every_rival_by_hand():
    truth = graphs.from_parents([None, 0, None, 2, 1])
    batches, redraw = sampled(truth, 3)
    model, drawn = solving(truth), []

    def watched(batch, child, edges):
        assert sorted(edges.edges) == [(1, 4), (2, 3)]
        drawn.append(redraw(batch, child, edges))
        return drawn[-1]

    found = edge_effects(
        model, batches, task_loss, layer=0, head=0, candidates=[(2, 3), (1, 4)], redraw=watched, level=0.9
    )
    margins = []
    for batch, its in zip(batches, drawn[:3], strict=True):
        pi, mu = batch.tables[1].double(), stationary_distribution(batch.tables[1])
        losses = []
        for state, each in enumerate(its.batches):
            assert (each.tokens[:, 3] == state).all()
            assert torch.equal(
                each.tokens[:, [0, 1, 2, 5]], batch.tokens[:, [0, 1, 2, 5]]
            )  # what comes before, and the query
            losses.append(by_hand(model, each.tokens, each.target, 3, [0, 0, 1, 0]))
        own = np.choose(batch.tokens[:, 3].numpy(), losses)
        query, rows = batch.tokens[:, 5], range(len(batch))
        of_batch = []
        for rival in (None, 0, 1):
            laws = mu if rival is None else pi[rows, batch.tokens[:, rival]]
            mean = sum(laws[:, state].numpy() * losses[state] for state in range(3))
            counts = batch.tokens[:, 2] == query
            if rival is not None:
                counts &= batch.tokens[:, rival] != query
            of_batch.append((mean - own) * counts.numpy())
        margins.append(of_batch)
    expected = np.concatenate(margins, 1)
    assert found.rivals((2, 3)) == (None, 0, 1)
    moments = found.margins[2, 3]
    np.testing.assert_allclose(moments.mean, expected.mean(1), atol=1e-7)
    np.testing.assert_allclose(moments.stderr, expected.std(1, ddof=1) / expected.shape[1] ** 0.5, rtol=1e-4)
    p_values = [stats.ttest_1samp(each, 0, alternative="greater").pvalue for each in expected]
    np.testing.assert_allclose(found.rival_p_values(moments), p_values, rtol=1e-3)
    assert found.margin_p_value[0] == pytest.approx(max(p_values), rel=1e-3)


def by_hand(model, tokens, target, node, row):
    """The loss of the full forward, with a node's row replaced."""

    def edit(pattern, hook):
        pattern = pattern.clone()
        pattern[:, 0, node, : len(row)] = torch.tensor(row, dtype=pattern.dtype)
        return pattern

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(attention_hook(0, "pattern"), edit)])[:, -1]
    return -(target * logits.log_softmax(-1)).sum(-1).double().numpy()


@pytest.mark.parametrize("trained", [True, False])
def test_the_right_parent_is_a_rival_that_is_given_up_at_the_level(trained):
    """Wrong candidates, for models right and wrong: the p-value of the true hypothesis is uniform, whatever descends from the child."""
    p_values, decided = [], []
    for seed in range(10):
        truth = graphs.random_forest(7, root_probability=0.3, seed=seed)
        batches, redraw = sampled(truth, 1, seed=seed)
        model = solving(truth if trained else graphs.random_forest(7, root_probability=0.3, seed=seed + 100))
        rivals = Rivals(Editing(model, task_loss, 0, 0), batches, redraw, nx.freeze(nx.empty_graph(7, nx.DiGraph)))
        for child in range(1, 7):
            true = next(iter(truth.predecessors(child)), None)
            for parent in range(child):
                if parent == true:
                    continue
                margins = rivals.margins((parent, child))
                t = margins.mean / margins.stderr.clamp(min=1e-12)
                p = stats.t.sf(t.numpy(), margins.count - 1)
                names = (None, *(node for node in range(child) if node != parent))
                p_values.append(p[names.index(true)])
                decided.append(p.max())
    p_values = np.array(p_values)
    assert len(p_values) > 150
    for level in (0.05, 0.2, 0.5):  # three standard errors of a share, doubled, since pairs share a child
        slack = 3 * (2 * level * (1 - level) / len(p_values)) ** 0.5
        assert abs(np.mean(p_values <= level) - level) < slack
    assert np.mean(np.array(decided) <= 0.05) < 0.05
    assert stats.kstest(p_values, "uniform").statistic < 0.12


@pytest.mark.parametrize("n", [7, 13])
def test_a_star_is_confirmed_and_named(n):
    """Its children share a parent and a state's row: each can stand in for the others, and is told from a rival all the same."""
    truth = nx.DiGraph([(0, child) for child in range(1, n)])
    batches, redraw = sampled(truth, 4)
    found = edge_effects(solving(truth), batches, task_loss, layer=0, head=0, candidates=truth, redraw=redraw)
    assert set(found.graph(n).edges) == set(truth.edges)


def test_what_is_redundant_alone_is_confirmed_with_its_siblings_spread_and_said_so():
    """Two heads' worth of copies: the loss needs one of two children's rows on their parent, whichever."""
    model = disentangled()
    tokens = random_tokens(400)

    def loss(model, tokens):
        seen = []
        model.run_with_hooks(tokens, fwd_hooks=[(attention_hook(0, "pattern"), lambda value, hook: seen.append(value))])
        pattern = seen[-1][:, 0]
        noise = 0.01 * (tokens[:, 0] % 3)
        return 1 - torch.maximum(pattern[:, 3, 1], pattern[:, 4, 1]) + noise + 0 * pattern.sum((1, 2))

    found = edge_effects(model, tokens, loss, layer=0, head=0, candidates=[(1, 3), (1, 4), (2, 5)])
    # Alone neither has more than the other gives: the maximum is with the sibling's own row, so the gain is what is above it.
    assert found.siblings((1, 3)) == (4,)
    assert found.siblings((2, 5)) == ()
    assert found.confirmed.tolist() == [True, True, False]


def test_a_model_without_weights_has_no_edge():
    truth = graphs.chain(4)
    batches, redraw = sampled(truth, 2)
    found = edge_effects(
        DisentangledTransformer(3, 5), batches, task_loss, layer=0, head=0, candidates=truth, redraw=redraw
    )
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


def test_a_grandparent_gains_and_is_not_confirmed_since_the_row_is_better_on_the_parent():
    truth = graphs.chain(6)
    batches, _ = sampled(truth, 5)
    candidates = [(parent, child) for child in range(1, 6) for parent in range(child)]
    found = edge_effects(solving(truth), batches, task_loss, layer=0, head=0, candidates=candidates)
    assert {*found.gaining} > set(truth.edges)
    assert set(found.graph(6, max_parents=None).edges) == set(truth.edges)
    table = found.to_pandas()
    row = table[(table.parent == 1) & (table.child == 2)].iloc[0]
    assert found.graph(6).edges[1, 2]["gain"] == row["gain"]
    assert (row["rival"], row["redundant"]) == (0, False)
    weights = found.weights(6)
    assert weights[2, 1] == pytest.approx(
        min(row["gain"] / row["stderr"], row["margin"] / row["margin_stderr"]), rel=1e-3
    )
    assert weights[2, 0] < 0 < weights[2, 1]
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
    assert content["undefined"]["margin"] == "the gain is not positive at the level, or there is no rival"
    with pytest.raises(CausalProbeError, match="no standard error"):
        found.weights(7)


def test_a_result_shows_cites_and_keeps_itself(tmp_path):
    model = disentangled()
    model.cfg.model_name = "<b>"
    found = edge_effects(model, random_tokens(30), next_token_loss, layer=0, head=1, candidates=PAIRS, level=0.01)
    assert f"{found.confirmed.sum()} of 4 tested edges confirmed at the family-wise level 0.01" in repr(found)
    assert repr(found).count("\n") == 6
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
        ({"batches": []}, "There are no sequences"),
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
    batches, redraw = sampled(truth, 4)

    def drop(batch, child, edges):
        drawn = redraw(batch, child, edges)
        return replace(drawn, laws=drawn.laws[:, :1])

    with pytest.raises(
        CausalProbeError,
        match=r"laws \[batch, 2, state\] and asked \[batch, 1\]; of 1024 sequences it made laws \[1024, 1, 3\]",
    ):
        edge_effects(solving(truth), batches, task_loss, layer=0, head=0, candidates=truth, redraw=drop)

    def lose(batch, child, edges):
        drawn = redraw(batch, child, edges)
        return replace(drawn, draw=lambda rows: drawn.draw(rows[1:]))

    with pytest.raises(CausalProbeError, match=r"draw\(rows\) must return \d+ sequences for each of 3 states"):
        edge_effects(solving(truth), batches, task_loss, layer=0, head=0, candidates=truth, redraw=lose)

    with pytest.raises(CausalProbeError, match=r"as tasks\.Redrawn is; a tuple has no states"):
        edge_effects(solving(truth), batches, task_loss, layer=0, head=0, candidates=truth, redraw=lambda *given: ())


# --------------------------------------------------------------------------------------------------------------- short cut


def losses_by_rows(model, batch, queries, rows):
    logits = model.predict_by_rows(batch.tokens, head=0, queries=queries, rows=rows)
    return -(batch.target * logits.log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("redrawing", [True, False])
def test_a_short_cut_has_every_number_of_the_hooks(redrawing):
    """On a star, where edges are tested again, whose model compares tokens and positions in every block."""
    truth = graphs.from_parents([None, 0, 0, 0, 3, 3])
    batches, _ = sampled(truth, 2)
    model = solving(truth).double()
    for weights in model.parameters():
        with torch.no_grad():
            weights += 0.1 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0), dtype=weights.dtype)
    candidates = [*truth.edges, (1, 3), (2, 5)]
    options = {"layer": 0, "head": 0, "candidates": candidates, "level": 0.9}
    by_hooks, fast = (
        edge_effects(
            model, batches, task_loss, **options, losses_by_rows=way, redraw=sampled(truth, 2)[1] if redrawing else None
        )
        for way in (None, losses_by_rows)
    )
    assert fast.margins
    assert fast.to_dict()["edges"] == by_hooks.to_dict()["edges"]
    for name in ("gain", "stderr", "cut", "cut_stderr"):
        np.testing.assert_allclose(getattr(fast, name), getattr(by_hooks, name), rtol=1e-9, atol=1e-12)
    for edge, moments in by_hooks.margins.items():
        torch.testing.assert_close(fast.margins[edge].mean, moments.mean, rtol=1e-9, atol=1e-12)
    assert fast.again.keys() == by_hooks.again.keys()
    for edge, (gain, margins) in by_hooks.again.items():
        torch.testing.assert_close(fast.again[edge].gain.mean, gain.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fast.again[edge].margins.mean, margins.mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (
            lambda *given: 1.01 * losses_by_rows(*given),
            r"other losses than the model with its hooks: by up to 0\.\d+ nats",
        ),
        (lambda *given: losses_by_rows(*given)[:1], "here 2 rows; it returned a tensor"),
        (
            lambda *given: losses_by_rows(*given)[:, 1:],
            r"returned losses \[2, 1023\] where the model with its hooks has \[2, 1024\]",
        ),
        (lambda *given: None, "it returned a NoneType"),
        (lambda *given: losses_by_rows(*given) / 0, "not finite"),
    ],
)
def test_a_short_cut_that_is_none_is_refused(way, message):
    truth = graphs.chain(4)
    batches, _ = sampled(truth, 1)
    with pytest.raises(CausalProbeError, match=message):
        edge_effects(solving(truth), batches, task_loss, layer=0, head=0, candidates=truth, losses_by_rows=way)


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
