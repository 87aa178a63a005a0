"""Random planted circuits: what they compute, that their truth holds, and that they are drawn from the seed alone."""

from __future__ import annotations

import pytest
import torch

from causal_probe.circuits import check_truth, known_circuit, random_circuit
from causal_probe.circuits.known import sources_of
from causal_probe.circuits.program import Match, Offset, Program, Table
from causal_probe.errors import CausalProbeError


def by_loops(program: Program, row: list[int]) -> list[int]:
    """The output's variable, position by position."""
    held: dict[str, list[int]] = {"embed": row, "pos_embed": list(range(len(row)))}
    for name, component in program.components.items():
        values = []
        for i in range(len(row)):
            if isinstance(component, Offset):
                values.append(held[component.value][max(i - component.back, 0)])
            elif isinstance(component, Match):
                before = [j for j in range(i) if held[component.key][j] == held[component.query][i]]
                values.append(held[component.value][before[-1] if before else max(i - 1, 0)])
            else:
                assert isinstance(component, Table)
                entry: object = component.table
                for source in component.inputs:
                    entry = entry[held[source][i]]  # type: ignore[index]
                values.append(int(entry))  # type: ignore[call-overload]
        held[name] = values
    return held[program.output]


@pytest.mark.parametrize("seed", range(10))
def test_the_truth_holds(seed: int) -> None:
    circuit = random_circuit(seed)
    found = check_truth(circuit, seed=100)
    assert found.holds, repr(found)
    assert found.clean == pytest.approx(1, abs=1e-4)
    assert circuit.model.cfg.normalization_type == "RMS"
    assert (
        len(set(sources_of(circuit.model)) - set(circuit.truth)) >= 3
    )  # distractors, and there is no axis that is a variable
    assert float(circuit.model.W_E.detach().abs().median()) > 0.01


@pytest.mark.parametrize("seed", range(4))
def test_the_model_computes_the_program(seed: int) -> None:
    circuit = random_circuit(seed, n_layers=2, n_heads=2, d_vocab=3, n_positions=6, size=3, norm=bool(seed % 2))
    program = circuit.metric.args[0]  # type: ignore[attr-defined]
    tokens = torch.cartesian_prod(*[torch.arange(3)] * 6)  # every sequence there is
    right = torch.tensor([by_loops(program, row) for row in tokens.tolist()])
    assert torch.equal(program.run(tokens)[program.output], right)
    assert torch.equal(circuit.model(tokens).argmax(-1), right)


def test_without_norms_every_contrast_is_exact() -> None:
    circuit = random_circuit(3, norm=False)
    for contrast in ("resample", "mean", "mean-by-position"):
        found = check_truth(circuit, contrast=contrast, tolerance=1e-5)
        assert found.others <= 1e-5 * found.baseline


def test_a_seed_is_a_circuit() -> None:
    first, again, other = (random_circuit(seed) for seed in (5, 5, 6))
    assert set(first.truth.edges) == set(again.truth.edges) != set(other.truth.edges)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    named = known_circuit("planted-5")
    assert (named.name, set(named.truth.edges)) == ("planted-5", set(first.truth.edges))


def test_larger_models() -> None:
    circuit = random_circuit(1, n_layers=6, n_heads=8, size=8, n_positions=16, d_vocab=6)
    assert len(sources_of(circuit.model)) == 2 + 6 * 9
    assert len(circuit.candidates()) == 3779
    tokens = circuit.sample(32, torch.Generator().manual_seed(0))
    assert torch.allclose(circuit.metric(circuit.model(tokens), tokens), torch.ones(32), atol=1e-3)


def test_what_is_too_small_is_refused() -> None:
    with pytest.raises(CausalProbeError, match="`size` is 1 to 4, the heads and MLPs of the model; found 4, 10, 5"):
        random_circuit(0, n_layers=2, n_heads=1)
    with pytest.raises(CausalProbeError, match="`d_vocab` and `n_positions` are 3 or more"):
        random_circuit(0, d_vocab=2)
