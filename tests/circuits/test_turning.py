"""A circuit in other coordinates."""

from __future__ import annotations

import pytest
import torch

from causal_probe.circuits import check_truth, known_circuit
from causal_probe.circuits.handset import HAND_SET
from causal_probe.circuits.turning import compressed, rotated
from causal_probe.errors import CausalProbeError


@pytest.mark.parametrize("name", ["mlp-between", "or-gate"])
def test_a_rotation_changes_no_figure(name: str) -> None:
    circuit = known_circuit(name)
    turned = rotated(circuit, seed=4)
    plain, other = check_truth(circuit, n_sequences=24), check_truth(turned, n_sequences=24)
    assert other.effects == pytest.approx(plain.effects, abs=1e-4)
    assert other.holds
    assert not torch.allclose(turned.model.W_E, circuit.model.W_E)


def test_compression_keeps_what_is_computed_and_mixes_the_parts() -> None:
    circuit = known_circuit("value-composition")
    small = compressed(circuit, 16, steps=150, n_sequences=32)
    tokens = circuit.sample(64, torch.Generator().manual_seed(5))
    assert small.model.cfg.d_model == 16 < circuit.model.cfg.d_model
    assert float(circuit.metric(small.model(tokens).detach(), tokens).mean()) > 0.8
    found = check_truth(small)
    assert found.without_effect == ()
    assert found.others > 0.01  # directions overlap, so other edges have an effect, too
    assert small.truth.graph["exact"] == ()
    assert "In 16 of 22 dimensions: the metric is" in small.description
    assert circuit.truth.graph["exact"] != ()


def test_norms_and_larger_widths_are_refused() -> None:
    with pytest.raises(CausalProbeError, match="with norms, whose gains lie along the axes"):
        rotated(HAND_SET["or-gate"](norm=True))
    with pytest.raises(CausalProbeError, match="`d_model` is less than the stream's 22; found 22"):
        compressed(known_circuit("value-composition"), 22)
