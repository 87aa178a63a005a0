"""The study of methods on known circuits: what it measures, on few of each."""

from __future__ import annotations

import pytest

from causal_probe.circuits.compiled import has_tracr
from causal_probe.papers import circuits, reproduce


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "FEW": ("key-composition", "planted-500"),
        "PROMPTS": {True: 24, False: 24},
        "ESTIMAND": {True: 400, False: 400},
        "REPEATS": {True: 2, False: 2},
        "CHUNK": 200,
    }
    for name, value in values.items():
        assert hasattr(circuits, name)
        monkeypatch.setattr(circuits, name, value)


@pytest.mark.usefixtures("few")
def test_a_quick_run_has_a_line_for_each_method_and_each_claim() -> None:
    result = reproduce("circuits", quick=True)
    names = [line.quantity for line in result.lines]
    assert len(set(names)) == len(names)
    assert sum(name.endswith(": AUROC") for name in names) == 22
    assert result.holds
    by_name = {line.quantity: line.ours for line in result.lines}
    assert float(by_name["ablation, resample: AUROC"] or 0) == 1
    assert by_name["circuit, level 0.05, planted: circuits with a false claim"] == 0
    assert 0.5 < float(by_name["circuit: intervals of 0.9 that hold the edge's mean effect"] or 0) <= 1
    assert {"auroc", "edges"} == set(result.figures)


def test_the_whole_run_has_the_circuits_and_leaves_greedy_pruning_to_some() -> None:
    names = circuits.names(False)
    assert sum(name.startswith("planted-") for name in names) == 200
    assert sum(name.startswith("tracr-") for name in names) == (19 if has_tracr() else 0)
    asked = {name: circuits.asked_of(name, False) for name in ("planted-500", "planted-519", "planted-520", "or-gate")}
    assert ["ACDC" in its for its in asked.values()] == [True, True, False, True]


def test_the_estimand_is_the_mean_over_many_sequences(few: None) -> None:
    found = circuits.intervals("value-composition", True, 0)
    assert found["of"] == 2 * 7  # two askings, seven true edges
    assert 7 <= found["held"] <= 14
    assert abs(found["error"]) < 1.5


def test_power_counts_true_edges_and_others() -> None:
    found = circuits.power(700, 48)
    assert 0 < found["found"] <= found["true"]
    assert found["false"] == 0


@pytest.mark.skipif(not has_tracr(), reason="tracr is not installed")
def test_missing_positional_edges_is_what_a_contrast_at_each_position_costs() -> None:
    found = circuits.five("share-of-a")
    assert found["distance, mean by position"] == pytest.approx(found["expected"], abs=1e-9) == pytest.approx(0.75)
    assert found["distance, resample"] == 1
