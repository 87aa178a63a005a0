"""The circuits set by hand: their answers by plain loops, their edges one by one, and the truth checked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from causal_probe.circuits import check_truth, known_circuit
from causal_probe.circuits.handset import HAND_SET
from causal_probe.circuits.known import CONTRASTS, receivers_of, sources_of
from causal_probe.circuits.program import Component, Gate, Match, Offset, Pointer, Program, Table
from causal_probe.errors import CausalProbeError

# ------------------------------------------------------------------------------------------- what is right, by plain loops


def latest(row: list[int], i: int, token: int) -> int | None:
    return next((j for j in reversed(range(i)) if row[j] == token), None)


def induction(row: list[int], i: int) -> int:
    """What stands behind the latest occurrence of this token before the last one; else the previous token."""
    behind = [j for j in range(1, i) if row[j - 1] == row[i]]
    if row[0] == row[i] and i > 0:  # before position 0 stands position 0 itself
        behind.append(0)
    return row[max(behind)] if behind else row[max(i - 1, 0)]


def pointer(row: list[int], i: int) -> int:
    at = latest(row, i, row[i])
    return row[min((max(i - 1, 0) if at is None else at) + 1, i)]


RENAMED = {0: 1, 1: 2, 2: 3, 3: 0}


def through_table(row: list[int], i: int) -> int:
    behind = [j for j in range(i) if RENAMED[row[max(j - 1, 0)]] == row[i]]
    return row[max(behind)] if behind else row[max(i - 1, 0)]


ANSWERS: dict[str, Callable[[list[int], int], int]] = {
    "key-composition": induction,
    "query-composition": pointer,
    "value-composition": lambda row, i: row[max(max(i - 1, 0) - 2, 0)],
    "or-gate": lambda row, i: int(row[max(i - 1, 0)] == 0),
    "and-gate": lambda row, i: int(row[max(i - 1, 0)] == 0 and row[max(i - 2, 0)] == 0),
    "unread-head": induction,
    "mlp-between": through_table,
    "duplicate-token": lambda row, i: int(i == 0 or row[i] in row[:i]),
}


def edges(*said: str) -> set[tuple[str, str]]:
    """Edges said as "source > receiver receiver"."""
    return {(line.split(" > ")[0], receiver) for line in said for receiver in line.split(" > ")[1].split()}


EDGES = {
    "key-composition": edges(
        "pos_embed > L0H0.q L0H0.k L1H0.q L1H0.k", "embed > L0H0.v L1H0.q L1H0.v", "L0H0 > L1H0.k", "L1H0 > logits"
    ),
    "query-composition": edges(
        "pos_embed > L0H0.q L0H0.k L0H0.v L1H0.k", "embed > L0H0.q L0H0.k L1H0.v", "L0H0 > L1H0.q", "L1H0 > logits"
    ),
    "value-composition": edges(
        "pos_embed > L0H0.q L0H0.k L1H0.q L1H0.k", "embed > L0H0.v", "L0H0 > L1H0.v", "L1H0 > logits"
    ),
    "or-gate": edges(
        "pos_embed > L0H0.q L0H0.k L0H1.q L0H1.k", "embed > L0H0.v L0H1.v", "L0H0 > L0.mlp", "L0H1 > L0.mlp", "L0.mlp > logits"
    ),
    "mlp-between": edges(
        "pos_embed > L0H0.q L0H0.k L1H0.q L1H0.k", "embed > L0H0.v L1H0.q L1H0.v", "L0H0 > L0.mlp", "L0.mlp > L1H0.k", "L1H0 > logits"
    ),
    "duplicate-token": edges("pos_embed > L0H0.q L0H0.k", "embed > L0H0.q L0H0.k L0H0.v L0.mlp", "L0H0 > L0.mlp", "L0.mlp > logits"),
}  # fmt: skip
EDGES |= {"and-gate": EDGES["or-gate"], "unread-head": EDGES["key-composition"]}


def test_every_circuit_is_judged_here() -> None:
    assert set(ANSWERS) == set(EDGES) == set(HAND_SET)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", HAND_SET)
def test_the_model_gives_the_right_answer(name: str, norm: bool) -> None:
    circuit = HAND_SET[name](norm=norm, rotation=torch.Generator().manual_seed(3))
    tokens = torch.randint(4, (64, 10), generator=torch.Generator().manual_seed(1))
    right = torch.tensor([[ANSWERS[name](row, i) for i in range(10)] for row in tokens.tolist()])
    logits = circuit.model(tokens)
    assert torch.equal(logits.argmax(-1), right)
    assert torch.allclose(logits, torch.nn.functional.one_hot(right, logits.shape[-1]).float(), atol=1e-4)


@pytest.mark.parametrize("name", HAND_SET)
def test_the_metric_is_one_where_all_is_right(name: str) -> None:
    circuit = known_circuit(name)
    tokens = circuit.sample(32, torch.Generator().manual_seed(2))
    assert torch.allclose(circuit.metric(circuit.model(tokens), tokens), torch.ones(32), atol=1e-4)
    assert bool((circuit.metric(-circuit.model(tokens), tokens) < 0).all())


@pytest.mark.parametrize("name", HAND_SET)
def test_the_edges_are_these(name: str) -> None:
    circuit = known_circuit(name)
    assert set(circuit.truth.edges) == EDGES[name]
    assert set(circuit.edges("zero")) == EDGES[name]
    positional = {edge for edge in EDGES[name] if edge[0] == "pos_embed"}
    # A head that copies positions writes where the token was, which depends on the tokens.
    assert set(circuit.edges("zero")) - set(circuit.edges("mean-by-position")) == positional
    assert {(s, r) for s, r, kind in circuit.truth.edges(data="kind") if kind == "positional"} == positional


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("name", HAND_SET)
def test_the_truth_holds(name: str, contrast: str) -> None:
    found = check_truth(known_circuit(name), contrast=contrast, n_sequences=48)
    assert found.holds, repr(found)
    assert min(found.effects.values()) > 0.2 * found.baseline
    if contrast != "zero":
        assert all(effect <= 1e-6 for effect in found.outside.values())


@pytest.mark.parametrize("name", HAND_SET)
def test_with_norms_the_truth_holds_when_resampled(name: str) -> None:
    circuit = HAND_SET[name](norm=True, rotation=torch.Generator().manual_seed(3))
    assert circuit.truth.graph["exact"] == ("resample",)
    assert check_truth(circuit, n_sequences=48).holds


def test_an_or_gate_hides_its_edges_and_an_and_gate_does_not() -> None:
    either, both = known_circuit("or-gate"), known_circuit("and-gate")
    assert either.truth.graph["gates"] == {"or": [("L0.mlp", ("L0H0", "L0H1"))], "and": []}
    assert both.truth.graph["gates"] == {"or": [], "and": [("L0.mlp", ("L0H0", "L0H1"))]}
    found = check_truth(either)
    assert len(found.alone) == 8
    assert max(found.alone.values()) == 0
    assert check_truth(both).alone == {}


def test_an_unread_head_has_sources_and_no_reader() -> None:
    circuit = known_circuit("unread-head")
    assert {"L0H1", "L1H1"} < set(sources_of(circuit.model))
    assert not {"L0H1", "L1H1"} & set(circuit.truth)
    assert not {"L1H1.v", "L0H1.v"} & set(circuit.truth)
    assert bool((circuit.model.W_O[1, 1] != 0).any())  # it writes


def test_candidates_are_all_that_comes_before() -> None:
    circuit = known_circuit("mlp-between")
    assert receivers_of(circuit.model) == ["L0H0.q", "L0H0.k", "L0H0.v", "L0.mlp", "L1H0.q", "L1H0.k", "L1H0.v", "L1.mlp", "logits"]  # fmt: skip
    assert len(circuit.candidates()) == 3 * 2 + 3 + 3 * 4 + 5 + 6
    assert set(circuit.truth.edges) <= set(circuit.candidates())


@pytest.mark.parametrize(
    ("name", "component", "said"),
    [
        ("L0H0", Offset(-1, "embed"), "L0H0 attends -1 positions back"),
        ("L0H0", Pointer("embed", 1, "embed"), "takes embed for a position, which has 3 symbols, not the 4"),
        ("L0H0", Match("embed", "pos_embed", "embed"), "compares embed of 3 symbols with pos_embed of 4"),
        ("L0.mlp", Gate("xor", ("embed",), 0), "a gate 'xor' of symbol 0; gates are 'or' and 'and', of symbols 0 to 2"),
        ("L0.mlp", Gate("or", ("embed",), 3), "of symbol 3"),
        ("L0.mlp", Table(("embed",), (0, 1), 2), "of 3 symbols, in a table of another shape"),
        ("L0.mlp", Table(("embed", "pos_embed"), ((0, 1, 0), (0, 1, 0), (0, 1, 0)), 2), "of 3 x 4 symbols, in a table"),
        ("L0.mlp", Table(("embed", "embed"), ((0, 1, 0), (0, 1, 0), (0, 1, 0)), 2), "one or two different inputs"),
        ("L0.mlp", Table(("embed",), (0, 1, 2), 2), "writes 2; its symbols are 0 to 1"),
    ],
)
def test_what_is_no_component_is_refused(name: str, component: Component, said: str) -> None:
    with pytest.raises(CausalProbeError, match=said):
        Program(3, 4, {name: component}, name)


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(CausalProbeError, match="L0H0 reads L1H0, which writes nothing before it"):
        Program(3, 4, {"L0H0": Offset(1, "L1H0")}, "L0H0")
    with pytest.raises(CausalProbeError, match="L0H1 reads L0H0, which writes nothing before it"):
        Program(3, 4, {"L0H0": Offset(1, "embed"), "L0H1": Offset(1, "L0H0")}, "L0H0")
    with pytest.raises(CausalProbeError, match="L0H0 is a Gate"):
        Program(3, 4, {"L0H0": Gate("or", ("embed",), 0)}, "L0H0")
    with pytest.raises(CausalProbeError, match="The output is one of the components"):
        Program(3, 4, {"L0.mlp": Table(("embed",), (0, 1, 2), 3)}, "embed")
    with pytest.raises(CausalProbeError, match=r"Unknown circuit 'or-gat'. Did you mean 'or-gate'\?"):
        known_circuit("or-gat")
    with pytest.raises(CausalProbeError, match="Unknown contrast 'resampled'; choose from resample"):
        known_circuit("or-gate").edges("resampled")
