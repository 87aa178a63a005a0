"""The check itself: against a forward pass of its own, and where the truth is wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from causal_probe.circuits import check_truth, known_circuit
from causal_probe.circuits.check_truth import ablate, parts_of
from causal_probe.circuits.handset import HAND_SET
from causal_probe.circuits.known import KnownCircuit, order_of, sources_of
from causal_probe.circuits.planting import plant
from causal_probe.circuits.program import Match, Offset, Program
from causal_probe.errors import CausalProbeError


def edge_by_edge(circuit: KnownCircuit, tokens: Tensor, donors: dict[tuple[str, str], Tensor]) -> Tensor:
    """The logits, each receiver reading the sum of its sources' parts, the donors' in their place: no hooks."""
    model: Any = circuit.model
    written = {"embed": model.W_E[tokens], "pos_embed": model.W_pos[: tokens.shape[1]].expand(len(tokens), -1, -1)}

    def read(receiver: str, norm: Any) -> Tensor:
        before = [source for source in sources_of(model) if order_of(source) < order_of(receiver)]
        x = sum(donors.get((source, receiver), written[source]) for source in before)
        assert isinstance(x, Tensor)
        return x if norm is None else x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.w

    for layer, block in enumerate(model.blocks):
        for h in range(model.cfg.n_heads):
            q, k, v = (
                read(f"L{layer}H{h}.{side}", block.ln1) @ W[h]
                for side, W in zip("qkv", (block.attn.W_Q, block.attn.W_K, block.attn.W_V), strict=True)
            )
            scores = (q @ k.mT).masked_fill(torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1), -torch.inf)
            written[f"L{layer}H{h}"] = scores.softmax(-1) @ v @ block.attn.W_O[h]
        if block.mlp is not None:
            hidden = (read(f"L{layer}.mlp", block.ln2) @ block.mlp.W_in + block.mlp.b_in).relu()
            written[f"L{layer}.mlp"] = hidden @ block.mlp.W_out + block.mlp.b_out
    return read("logits", model.ln_final) @ model.W_U


@pytest.mark.parametrize("norm", [False, True])
def test_ablating_is_reading_another_part(norm: bool) -> None:
    circuit = HAND_SET["mlp-between"](norm=norm, rotation=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = circuit.sample(6, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    parts = parts_of(circuit.model, tokens)
    every = {
        edge: parts[edge[0]] + 0.3 * torch.randn(parts[edge[0]].shape, generator=generator, dtype=torch.float64)
        for edge in circuit.candidates()
    }
    chosen = [[edge] for edge in every] + [list(every)[::2], list(every)]
    for edges in chosen:
        donors = {edge: every[edge] for edge in edges}
        expected = circuit.metric(edge_by_edge(circuit, tokens, donors), tokens)
        assert torch.allclose(
            ablate(circuit.model, tokens, {e: partial(donors.__getitem__, e) for e in donors}, circuit.metric),
            expected,
            atol=1e-8,
        ), edges


def test_a_missing_edge_is_found() -> None:
    circuit = known_circuit("key-composition")
    truth = circuit.truth.copy()
    truth.remove_edge("L0H0", "L1H0.k")
    found = check_truth(replace(circuit, truth=truth))
    assert not found.holds
    assert found.without_effect == ()
    assert found.others > 0.1


def test_an_edge_too_many_is_found() -> None:
    circuit = known_circuit("unread-head")
    truth = circuit.truth.copy()
    truth.add_edge("L0H0", "L1H1.v", kind="token", contrast=("resample",), redundant_with=())
    found = check_truth(replace(circuit, truth=truth))
    assert found.without_effect == ("L0H0 -> L1H1.v",)
    assert not found.holds


def test_an_edge_that_needs_no_other_is_not_called_redundant() -> None:
    circuit = known_circuit("and-gate")
    truth = circuit.truth.copy()
    truth.edges["L0H0", "L0.mlp"]["redundant_with"] = (("L0H1", "L0.mlp"),)
    found = check_truth(replace(circuit, truth=truth))
    assert found.alone["L0H0 -> L0.mlp"] > 0.1
    assert not found.holds


def test_all_sequences_there_are() -> None:
    heads = {"L0H0": Offset(1, "embed"), "L1H0": Match("embed", "L0H0", "embed")}
    circuit = plant("short", Program(3, 6, heads, "L1H0"), description="Induction on short sequences.")
    assert circuit.every is not None
    tokens = circuit.every()
    assert len(tokens) == len(tokens.unique(dim=0)) == 3**6  # type: ignore[no-untyped-call]
    found = check_truth(circuit, tokens, draws=1)
    assert found.holds
    assert found.settings["n_sequences"] == 3**6
    assert known_circuit("key-composition").every is None
    with pytest.raises(CausalProbeError, match="give two or more"):
        check_truth(circuit, tokens[:1])


def test_a_positional_edge_is_in_no_contrast_by_position() -> None:
    found = check_truth(known_circuit("value-composition"), contrast="mean-by-position")
    assert found.holds
    assert set(found.outside) == {f"pos_embed -> L{layer}H0.{side}" for layer in (0, 1) for side in "qk"}
    assert max(found.outside.values()) < 1e-6


def test_the_result_is_one_like_others(tmp_path: Any) -> None:
    found = check_truth(known_circuit("and-gate"), n_sequences=8)
    assert "10 sequences" not in found.methods
    assert "8 sequences" in found.methods
    assert len(found.table().rows) == 9
    assert found.clean == pytest.approx(1)
    with pytest.raises(CausalProbeError, match="Unknown contrast 'median'; choose from resample, mean"):
        check_truth(known_circuit("and-gate"), contrast="median")
