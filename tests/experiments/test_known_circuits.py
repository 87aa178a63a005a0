"""Methods judged on known circuits: what is right by construction, a method of one's own, and one that lies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from causal_probe import circuits
from causal_probe.circuits.edge_methods import EdgeMethod, Scores
from causal_probe.circuits.known import KnownCircuit
from causal_probe.circuits.turning import rotated
from causal_probe.errors import CausalProbeError
from causal_probe.experiments import known_circuits

NAMES = ["key-composition", "value-composition"]


def knows(circuit: KnownCircuit, model: Any, tokens: Tensor, metric: Any) -> Scores:
    true = set(circuit.edges())
    return Scores({edge: float(edge in true) for edge in circuit.candidates()}, {0.05: true})


def test_a_method_of_ten_lines_enters_the_table_beside_the_others() -> None:
    def late(model: Any, tokens: Tensor, metric: Any) -> dict[tuple[str, str], float]:
        """Heads of layer 0 into layer 1."""
        return {(f"L0H{head}", f"L1H0.{side}"): 1.0 for head in range(model.cfg.n_heads) for side in "k"} | {
            ("embed", "L0H0.k"): 0.0
        }

    found = known_circuits(["key-composition"], ["EAP", "random"], own={"late": late}, n_prompts=24)
    frame = found.to_pandas().set_index("method")
    assert list(frame.index) == ["EAP", "random", "late"]
    assert (frame.loc["late", "edges"], frame.loc["late", "true"], frame.loc["late", "auroc"]) == (2, 1, 1.0)
    assert "late" in str(found)
    assert "late" in found.settings["methods"]


def test_knowledge_scores_one_and_its_opposite_zero() -> None:
    for name in NAMES:
        circuit = circuits.known_circuit(name)

        def opposite(model: Any, tokens: Tensor, metric: Any, circuit: KnownCircuit = circuit) -> Any:
            return {edge: -score for edge, score in knows(circuit, model, tokens, metric).scores.items()}

        def right(model: Any, tokens: Tensor, metric: Any, circuit: KnownCircuit = circuit) -> Any:
            return knows(circuit, model, tokens, metric)

        found = known_circuits([name], [], own={"right": right, "wrong": opposite}, n_prompts=24)
        first, second = found.rows
        assert (first.auroc, first.average_precision, second.auroc) == (1, 1, 0)
        assert set(first.by_kind.values()) == {1.0}
        assert set(second.by_kind.values()) == {0.0}


def test_the_truth_is_that_of_the_method_s_contrast() -> None:
    circuit = circuits.known_circuit("key-composition")
    at_each = set(circuit.edges("mean-by-position"))

    def says(model: Any, tokens: Tensor, metric: Any) -> dict[tuple[str, str], float]:
        return {edge: float(edge in at_each) for edge in circuit.candidates()}

    found = known_circuits([circuit], [], own={"positions": EdgeMethod("positions", "", says, "mean-by-position")})
    (row,) = found.rows
    assert (row.auroc, row.true) == (1, len(at_each))
    assert row.auroc_all is not None
    assert row.auroc_all == pytest.approx(1 - 0.5 * (len(circuit.edges()) - len(at_each)) / len(circuit.edges()))


def test_false_claims_are_counted_by_circuit() -> None:
    def claims_all(model: Any, tokens: Tensor, metric: Any) -> Scores:
        circuit = circuits.known_circuit("key-composition")
        return Scores(dict.fromkeys(circuit.candidates(), 1.0), {0.05: circuit.candidates(), 0.001: []})

    found = known_circuits(["key-composition"], [], own={"bold": claims_all}, n_prompts=24)
    bold, shy = found.false_claims().to_dict("records")
    assert (bold["claimed"], bold["false"], bold["circuits_with_false"], bold["bound"]) == (19, 10, 1, 1)
    assert (shy["claimed"], shy["false"], shy["false_share"]) == (0, 0, 0)
    assert found.rows[0].auroc == 0.5
    assert "10 of 19 claims false" in str(found)


def test_a_rotation_of_the_stream_changes_no_row() -> None:
    plain = circuits.known_circuit("mlp-between")
    turned = rotated(plain, seed=2)
    asked = ["EAP-IG", "ablation, resample", "attention", "QK attributions", "path patching"]
    own, other = (known_circuits([each], asked, n_prompts=24) for each in (plain, turned))
    for first, second in zip(own.rows, other.rows, strict=True):
        assert replace(first, seconds=0) == replace(second, seconds=0)


def test_one_that_can_t_be_asked_is_named_and_the_others_go_on() -> None:
    found = known_circuits(["and-gate"], ["upstream", "random"], n_prompts=24)
    assert [row.method for row in found.rows] == ["random"]
    assert "one layer" in found.refused["upstream, and-gate"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"circuits": ["key-compositoin"]}, "Did you mean 'key-composition'"),
        ({"methods": ["EAP-GI"]}, "did you mean 'EAP-IG'"),
        ({"circuits": []}, "no circuit"),
        ({"own": {"strange": lambda model, tokens, metric: {("embed", "L9H0.q"): 1.0}}}, "no edge of key-composition"),
        ({"own": {"empty": lambda model, tokens, metric: {}}}, "gives no score"),
        ({"n_prompts": 0}, "n_prompts"),
        ({"methods": []}, "no method to judge"),
        ({"methods": ["random"], "own": {"random": lambda model, tokens, metric: {}}}, "is a method of the package"),
    ],
)
def test_what_can_t_be_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(CausalProbeError, match=said):
        known_circuits(**{"circuits": ["key-composition"], "methods": [], **asked})
