"""Training to a program: its losses are 0 where the circuit is planted, and tell where it is another; a short training is a circuit that can be asked."""

from __future__ import annotations

import pytest
import torch

from causal_probe import circuits
from causal_probe.circuits.handset import PROGRAMS
from causal_probe.circuits.planting import plant
from causal_probe.circuits.trained import TRAINED, _loss, _renamed_copy, trained_circuit
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import undisturbed


@pytest.mark.parametrize("name", TRAINED)
def test_planted_weights_have_no_loss_and_with_an_edge_less_in_the_truth_they_have(name: str) -> None:
    program = PROGRAMS[name]() if name in PROGRAMS else _renamed_copy()
    circuit = plant(name, program, description="")
    with undisturbed(circuit.model):
        circuit.model.W_U.mul_(40)  # right answers with certainty
        for strict in (False, True):
            assert float(_loss(circuit, program, torch.Generator().manual_seed(0), strict, strict, 32)) < 1e-3
        edge = (program.output, "logits")
        circuit.truth.remove_edge(*edge)
        assert float(_loss(circuit, program, torch.Generator().manual_seed(0), True, True, 32)) > 1


def test_interchange_asks_for_the_variable_and_not_for_the_answer_alone() -> None:
    """A model that computes the answer elsewhere has no loss but in interchange."""
    circuit, program = circuits.known_circuit("unread-head"), PROGRAMS["unread-head"]()
    with undisturbed(circuit.model):
        circuit.model.W_U.mul_(40)
        # the heads of layer 0 change places in the program: L0H0 would have to look three back
        swapped = type(program)(program.d_vocab, program.n_positions, {**program.components, "L0H0": program.components["L0H1"]}, program.output)  # fmt: skip
        right, wrong = (float(sum(_loss(circuit, each, torch.Generator().manual_seed(seed), True, False, 32) for seed in range(3))) for each in (program, swapped))  # fmt: skip
    assert right < 1e-2 < 1 < wrong


def test_a_short_training_gives_a_circuit_that_says_how_it_was_made() -> None:
    first, again = (trained_circuit("duplicate-token", steps=6, batch_size=16) for _ in range(2))
    assert torch.equal(first.model.W_E, again.model.W_E)
    assert first.name == first.truth.graph["name"] == first.model.cfg.model_name == "trained-duplicate-token"
    assert first.edges() == circuits.known_circuit("duplicate-token").edges()
    assert len(first.candidates()) > len(circuits.known_circuit("duplicate-token").candidates())
    assert not circuits.check_truth(first, n_sequences=16).holds  # six steps teach nothing
    assert "6 steps of 16 sequences" in first.description
    plain = trained_circuit("duplicate-token", steps=6, batch_size=16, strict=False)
    assert plain.name == "untaught-duplicate-token"
    assert not torch.equal(plain.model.W_U, first.model.W_U)


def test_there_is_a_program_to_train() -> None:
    with pytest.raises(CausalProbeError, match="no program 'induction' to train; choose from value-composition"):
        trained_circuit("induction")
    with pytest.raises(CausalProbeError, match="trained-value-composition"):
        circuits.known_circuit("trained-nothing")
    with pytest.raises(CausalProbeError, match="steps"):
        trained_circuit("duplicate-token", steps=0)
