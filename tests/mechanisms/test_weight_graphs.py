"""Where the graph lives in models whose weights are known, and what the blocks of trained ones are worth."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from causal_probe import graphs, training
from causal_probe.errors import CausalProbeError
from causal_probe.mechanisms import weight_graphs
from causal_probe.mechanisms.weight_graphs import _scramble, chance_of, leading_parents
from causal_probe.mechanisms.weight_result import WeightGraphs
from causal_probe.models import DisentangledTransformer, hand_set
from causal_probe.models.constructions import Circuit
from causal_probe.tasks import InContextMarkov, cross_entropy, generator
from causal_probe.tasks.predictors import in_context_unigram

FOREST = graphs.from_parents([None, 0, 0, 1, 1, None, 3, 2, 5, 4, 8])
TASK = InContextMarkov(FOREST, 3, concentration=0.1)
GRAPH_BLOCK = (0, 0, "position", "position")
STEP_BLOCK = (1, 0, "L0H0.position", "position")


#: About what fit_scales finds.
SCALES = {"copy parents": (5.0, 2.8), "step to children": (80.0, 2.6), "read other states": (1.3, 1.6)}


def fitted(circuit: Circuit = "copy parents", task: InContextMarkov = TASK) -> DisentangledTransformer:
    match_scale, output_scale = SCALES[circuit]
    return hand_set(
        task.graph, task.d_vocab, circuit=circuit, match_scale=match_scale, output_scale=output_scale, graph_scale=50
    )


@pytest.fixture(scope="module")
def copies() -> WeightGraphs:
    return weight_graphs(fitted(), TASK, n_sequences=2048)


def test_the_paper_s_circuit_holds_the_graph_in_layer_0(copies: WeightGraphs) -> None:
    assert [((b.layer, b.head, b.query, b.key), t) for b, t in copies.holders] == [(GRAPH_BLOCK, False)]
    held = copies.block(*GRAPH_BLOCK).as_it_stands
    assert held is not None
    assert str(held) == "9/9"
    assert all(held.parents[child] == parent for parent, child in FOREST.edges)
    assert copies.block(*GRAPH_BLOCK).transposed is None  # entries above the diagonal are masked: they mean nothing
    assert copies.block(1, 0, "token", "L0H0.token").identity == pytest.approx(1)
    assert [circuit.name for circuit in copies.circuits] == ["copy parents"]
    assert "L0H0 position x position: 9/9 edges" in str(copies)
    assert copies.block(*GRAPH_BLOCK).alone == pytest.approx(1)  # nothing else is in its layer


def test_the_other_circuit_holds_it_transposed_in_layer_1() -> None:
    found = weight_graphs(fitted("step to children"), TASK, n_sequences=1024)
    assert [((b.layer, b.head, b.query, b.key), t) for b, t in found.holders] == [(STEP_BLOCK, True)]
    assert [circuit.name for circuit in found.circuits] == ["step to children"]
    assert "L1H0 L0H0.position x position: transposed graph 9/9" in str(found)
    assert found.block(*STEP_BLOCK).share > 0.9


def test_the_circuit_without_a_graph_holds_none() -> None:
    found = weight_graphs(fitted("read other states"), TASK, n_sequences=2048)
    assert found.holders == ()
    assert [circuit.name for circuit in found.circuits] == ["read other states"]
    assert found.block(0, 0, "token", "token").identity == pytest.approx(-1)
    assert "the graph is written in: no block" in str(found)


def test_several_parents_slot_by_slot() -> None:
    task = InContextMarkov(graphs.two_parent_tree(13), 3, concentration=0.1)
    found = weight_graphs(fitted(task=task), task, n_sequences=1024)
    assert {(b.name, str(b.as_it_stands)) for b, _ in found.holders} == {
        ("L0H0 position x position", "9/9 + 0/9"),
        ("L0H1 position x position", "0/9 + 9/9"),
    }


def test_another_graph_is_not_found(copies: WeightGraphs) -> None:
    """The same weights beside a wrong truth."""
    other = InContextMarkov(graphs.from_parents([None, None, 1, 2, 3, 4, 5, 6, 7, 8, 9]), 3, concentration=0.1)
    found = weight_graphs(hand_set(FOREST, 3), other, n_sequences=16)
    assert not any(transposed or block.layer == 0 for block, transposed in found.holders)


def test_a_model_without_skill_has_nothing_to_share() -> None:
    found = weight_graphs(DisentangledTransformer(3, 12), TASK, n_sequences=64)
    assert all(
        block.share is None and block.scrambled is None and block.alone is None and block.cost == 0
        for block in found.blocks
    )
    assert found.holders == ()
    assert found.circuits == ()
    assert "share" in found.to_dict()["undefined"]


def test_costs_and_shares_by_hand(copies: WeightGraphs) -> None:
    """Ablated on a copy, run through the hooked forward on the same sequences."""
    model = fitted()
    source = generator(0, "weight graphs")
    batches = [TASK.sample(2048, source) for _ in range(1)]
    tokens, target = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "target"))

    def losses(model: DisentangledTransformer) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(tokens)[:, -1], target, reduction="none").double().detach()

    skill = cross_entropy(in_context_unigram(TASK, tokens), target).double() - losses(model)
    assert copies.skill == pytest.approx(float(skill.mean()), rel=1e-5)
    for name in (GRAPH_BLOCK, (1, 0, "token", "L0H0.token"), (1, 0, "position", "position")):
        ablated = copy.deepcopy(model)
        ablated.block(name[0], name[1], query=name[2], key=name[3]).zero_()
        cost = losses(ablated) - losses(model)
        block = copies.block(*name)
        assert block.cost == pytest.approx(float(cost.mean()), abs=1e-6)
        assert block.stderr == pytest.approx(float(cost.std() / 2048**0.5), rel=1e-4)
        # The jackknife of a ratio is another way to its standard error.
        n, totals = len(cost), (cost.sum(), skill.sum())
        left_out = (totals[0] - cost) / (totals[1] - skill)
        jackknife = float(((left_out - left_out.mean()).square().sum() * (n - 1) / n).sqrt())
        assert block.share == pytest.approx(float(totals[0] / totals[1]), rel=1e-4)
        assert block.share_stderr == pytest.approx(jackknife, rel=0.02)
        only = copy.deepcopy(model)
        only.A[name[0]].data.zero_()
        only.block(name[0], name[1], query=name[2], key=name[3]).copy_(
            model.block(name[0], name[1], query=name[2], key=name[3])
        )
        assert block.alone == pytest.approx(1 - float((losses(only) - losses(model)).mean() / skill.mean()), abs=1e-4)


def test_scrambled_by_hand(copies: WeightGraphs) -> None:
    """Another graph drawn for each part of the sequences: each row's entries are moved to other positions that the node sees."""
    model, rng = fitted(), np.random.default_rng(0)
    tokens, target = (getattr(TASK.sample(2048, generator(0, "weight graphs")), name) for name in ("tokens", "target"))

    def losses(model: DisentangledTransformer, some: slice = slice(None)) -> torch.Tensor:
        return (
            torch.nn.functional.cross_entropy(model(tokens[some])[:, -1], target[some], reduction="none")
            .double()
            .detach()
        )

    base = losses(model)
    skill = cross_entropy(in_context_unigram(TASK, tokens), target).double() - base
    costs = []
    for part in range(64):
        wrong = copy.deepcopy(model)
        block = wrong.block(*GRAPH_BLOCK[:2], query="position", key="position")
        for row in range(len(block)):
            cycle = torch.as_tensor(rng.permutation(row + 1))
            block[row, cycle] = block[row, cycle.roll(1)].clone()
        some = slice(part * 32, part * 32 + 32)
        costs.append(float((losses(wrong, some) - base[some]).mean()))
    found = copies.block(*GRAPH_BLOCK)
    assert found.scrambled is not None
    assert found.scrambled_stderr is not None
    by_hand, error = np.mean(costs) / float(skill.mean()), np.std(costs) / 8 / float(skill.mean())
    assert abs(found.scrambled - by_hand) < 3 * np.hypot(error, found.scrambled_stderr)
    assert found.scrambled_stderr == pytest.approx(error / np.sqrt(2), rel=0.6)  # twice as many scrambles
    assert all((b.scrambled == 0) == (b.norm == 0) for b in copies.blocks)


def test_a_scrambled_block_has_its_values_elsewhere() -> None:
    block = torch.arange(30.0).reshape(5, 6)
    for query, key, seen in (("token", "position", [6] * 5), ("position", "position", [1, 2, 3, 4, 5])):
        for seed in range(20):
            found = _scramble(block, query, key, torch.Generator().manual_seed(seed))
            for row, n in enumerate(seen):
                assert sorted(found[row, :n].tolist()) == block[row, :n].tolist()
                assert bool((found[row, :n] != block[row, :n]).all()) == (n > 1)
                assert torch.equal(found[row, n:], block[row, n:])


def test_the_model_is_left_as_it_was() -> None:
    model = fitted()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    weight_graphs(model, TASK, n_sequences=16)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_chance_is_that_of_drawing_every_parent_at_random() -> None:
    """Against the enumeration of all choices."""
    parents = [(), (0,), (0, 1), (), (1,), (0, 2)]
    children = [child for child, its in enumerate(parents) if its]
    outcomes = [
        sum(choice in parents[child] for child, choice in zip(children, choices, strict=True))
        for choices in itertools.product(*(range(child) for child in children))
    ]
    for right in range(6):
        assert chance_of(parents, right) == pytest.approx(np.mean([outcome >= right for outcome in outcomes]))


def test_constants_of_a_row_change_nothing() -> None:
    matrix = np.random.default_rng(0).normal(size=(8, 8))
    shifted = matrix + np.arange(8)[:, None] ** 2
    for transposed in (False, True):
        assert leading_parents(matrix, transposed=transposed) == leading_parents(shifted, transposed=transposed)


def test_trained_in_stages_the_graph_is_in_its_block_also_where_stage_2_moved_everything() -> None:
    for moves in (("A1", "W_U"), ("A0", "A1", "W_U")):
        model = DisentangledTransformer(3, 12)
        training.give_matcher(model)
        graph, rest = training.staged(n_positions=12, steps=60, batch_size=256, optimizer="sgd", learning_rate=1.0)
        stages = (graph, dataclasses.replace(rest, moves=moves))
        training.fit(model, TASK, stages, generator=torch.Generator().manual_seed(0))
        found = weight_graphs(model, TASK, n_sequences=2048)
        assert found.holders[0][0] is found.block(*GRAPH_BLOCK)
        assert str(found.block(*GRAPH_BLOCK).as_it_stands) == "9/9"
        assert found.block(*GRAPH_BLOCK).alone > 0.9
        others = [b for b in found.blocks if b.layer == 0 and b is not found.block(*GRAPH_BLOCK)]
        assert all(b.share < 0.05 for b in others)
        assert (len(moves) == 2) == all(b.norm == 0 for b in others)


def test_saved_and_cited(copies: WeightGraphs, tmp_path: Path) -> None:
    copies.save(tmp_path / "result.json")
    copies.save(tmp_path / "result.safetensors")
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["holders_by_name"] == [{"block": "L0H0 position x position", "transposed": False}]
    assert len(content["blocks"]) == 20
    again = WeightGraphs.load(tmp_path / "result.safetensors")
    np.testing.assert_array_equal(again.block(*GRAPH_BLOCK).matrix, copies.block(*GRAPH_BLOCK).matrix)
    assert again.to_dict() == copies.to_dict()
    assert "nichani2024" in copies.cite().bibtex
    assert len(copies.to_pandas()) == 20
    assert "<table" in copies._repr_html_()


def test_the_result_of_another_model_has_other_settings() -> None:
    first, again, other = (
        weight_graphs(hand_set(FOREST, 3, match_scale=scale, output_scale=4.0), TASK, n_sequences=64)
        for scale in (4.0, 4.0, 8.0)
    )
    assert first.settings == again.settings != other.settings


@pytest.mark.parametrize(
    ("positions", "options", "message"),
    [
        (9, {}, "The task has 3 states and 12 positions; the model has 3 and 9"),
        (12, {"n_sequences": 1}, "at least 2 are needed"),
        (12, {"level": 2.0}, "between 0 and 1"),
    ],
)
def test_bad_input(positions: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        weight_graphs(DisentangledTransformer(3, positions), TASK, **options)  # type: ignore[arg-type]


def test_no_such_block(copies: WeightGraphs) -> None:
    with pytest.raises(CausalProbeError, match="no block L3H0 token x token"):
        copies.block(3, 0, "token", "token")
