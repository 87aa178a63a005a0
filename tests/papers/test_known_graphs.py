"""The figures of Nichani, Damian & Lee 2024, each end to end with tiny settings; runs that stop go on; what is learnt is told from what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from causal_probe import graphs
from causal_probe.models import DisentangledTransformer, hand_set
from causal_probe.papers import (
    REPRODUCTIONS,
    forests,
    known_graphs,
    out_of_distribution,
    reproduce,
    residual,
    sequences_needed,
    trees,
    two_parents,
)
from causal_probe.papers.base import Run
from causal_probe.probes import head_graphs
from causal_probe.tasks import InContextMarkov, generator
from causal_probe.training.stages import Stage

NAMES = ("figure-2", "figure-5", "figure-6", "figure-7", "figure-8", "figure-9", "ood", "sample-complexity")
TINY: dict[Any, dict[str, Any]] = {
    known_graphs: {"WATCHING": 16, "ATTENTION": 128},
    forests: {"FORESTS": 2, "POSITIONS": 8, "JOINT": {True: {"forests": 2, "steps": 32}}, "BATCH": 32, "REST": {True: 4}, "PROBING": 256, "SHOWN": 2},
    out_of_distribution: {"LENGTHS": {True: (8, 12)}, "STEPS": {True: 4}, "MATRICES": 5, "SEQUENCES": {True: 8}, "READING": 256},
    residual: {"SIZE": {True: {"steps": 8, "batch_size": 16}}, "EVALUATION": 256},
    sequences_needed: {
        "POSITIONS": 8, "GRADIENT_FORESTS": {True: 4}, "STAGED_FORESTS": {True: 2}, "JOINT_FORESTS": {True: 2}, "GRADIENT": (64, 1024), "STAGED": (8, 64),
        "JOINT": {True: ((1024, 4), (64, 4))}, "LOOKS": 2, "WATCHING": 32,
    },
    trees: {"POSITIONS": 8, "VOCAB": 3, "STEPS": {True: 16}, "LOOKS": 2, "BATCH": 16, "REST": {True: 4}, "EVALUATION": 256},
    two_parents: {"CONTROL": {True: 4}, "POSITIONS": 8, "VOCAB": 3, "REST": {True: 4}, "EVALUATION": 256},
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, values in TINY.items():
        for name, value in values.items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, value)


def test_all_are_registered() -> None:
    assert set(NAMES) <= set(REPRODUCTIONS)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", NAMES)
def test_each_runs(name: str) -> None:
    result = reproduce(name, quick=True)
    content = result.to_dict()
    assert content["settings"]["quick"] is True
    assert any(line.paper is not None for line in result.lines) or name == "sample-complexity"
    assert result.figures
    assert set(result.captions) == set(result.figures)
    assert len({line.quantity for line in result.lines}) == len(result.lines)


@pytest.mark.usefixtures("tiny")
def test_one_is_written_and_read_again(tmp_path: Path) -> None:
    name = "figure-9"
    result = reproduce(name, quick=True, out=tmp_path / "out")
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    assert content["name"] == name
    assert content["settings"]["quick"] is True
    assert {f"{figure}.svg" for figure in result.figures} < set(content["files"])
    assert not [file for file in content["files"] if "checkpoint" in file]
    assert reproduce(name, quick=True, out=tmp_path / "out").lines == result.lines  # the second run reads all parts


def test_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = InContextMarkov(graphs.chain(5), 3)
    stages = [Stage("all", 50, 8, "sgd", 1.0, moves=("A0", "A1", "W_U"))]
    monkeypatch.setattr(known_graphs, "CHECKPOINT", 10)
    whole = known_graphs.train(Run(settings={"name": "n"}), "model", task, stages, every=5)
    looked: list[int] = []
    honest = known_graphs.parent_attention

    def interrupted(*given: Any) -> tuple[float, float]:
        looked.append(1)
        if len(looked) == 7:
            raise KeyboardInterrupt
        return honest(*given)

    monkeypatch.setattr(known_graphs, "parent_attention", interrupted)
    with pytest.raises(KeyboardInterrupt):
        known_graphs.train(Run(folder=tmp_path / "out", settings={"name": "n"}), "model", task, stages, every=5)
    assert list((tmp_path / "out" / "parts").glob("*.checkpoint.safetensors"))
    resumed = known_graphs.train(Run(folder=tmp_path / "out", settings={"name": "n"}), "model", task, stages, every=5)
    assert len(looked) == 7 + 5  # the first 30 steps were not made again
    assert (resumed.step, resumed.attention, resumed.losses) == (whole.step, whole.attention, whole.losses)
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    assert not list((tmp_path / "out" / "parts").glob("*.checkpoint.safetensors"))


def test_the_position_block_s_own_softmax() -> None:
    task = InContextMarkov(graphs.from_parents([None, 0, 0, None, 2]), 3)
    blank = DisentangledTransformer(3, 6)
    assert forests._by_position(blank, task) == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 5]))
    assert forests._by_position(hand_set(task.graph, 3), task) == pytest.approx(1, abs=1e-3)


def test_attention_on_true_parents_says_yes_and_no() -> None:
    task = InContextMarkov(graphs.from_parents([None, 0, 0, None, 2]), 3)
    tokens = task.sample(64, generator(0, "test")).tokens
    assert known_graphs.parent_attention(task, head_graphs(hand_set(task.graph, 3), tokens)) == pytest.approx(
        (1, 1), abs=1e-3
    )
    blank = known_graphs.parent_attention(task, head_graphs(DisentangledTransformer(3, 6), tokens))
    assert blank[0] == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 5]))
    wrong = DisentangledTransformer(3, 6)
    wrong.block(0, 0, query="position", key="position")[[1, 2, 4], [1, 1, 3]] = 50
    assert known_graphs.parent_attention(task, head_graphs(wrong, tokens)) == (
        pytest.approx(0, abs=1e-6),
        pytest.approx(1 / 3),
    )


def test_a_shuffled_model_is_far_from_the_known_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_distribution, "MATRICES", 20)
    monkeypatch.setattr(out_of_distribution, "READING", 4096)
    monkeypatch.setattr(out_of_distribution, "SEQUENCES", {True: 64})
    task = InContextMarkov(graphs.chain(15), 3)
    model = DisentangledTransformer(3, 16)
    measured = out_of_distribution.measure(Run(quick=True), task, model)
    for kind, its in measured.items():
        assert 0 < its["model"]["mean"] <= its["model"]["worst"], kind
    # A model of zeros answers uniformly; nothing is known of rows that are nearly permutations.
    assert measured["near-permutations"]["model"]["mean"] > 0.3
    assert measured["alpha 0.1"]["gradient"] == 1
    assert measured["alpha 0.1"]["leading"] < 1


def test_near_permutations_are_stochastic_and_near() -> None:
    matrices = out_of_distribution.draw_matrices("near-permutations", 50, generator(0, "test"))
    torch.testing.assert_close(matrices.sum(-1), torch.ones(50, 3))
    torch.testing.assert_close(matrices.sum(-2), torch.ones(50, 3))
    assert float(matrices.amax(-1).min()) > 0.95


def test_first_above() -> None:
    assert sequences_needed.first_above([1, 2, 4], [0.1, 0.5, 0.4], 0.5) == 2
    assert sequences_needed.first_above([1, 2, 4], [0.1, 0.2, 0.4], 0.5) is None
