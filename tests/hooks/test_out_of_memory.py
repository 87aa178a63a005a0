"""Memory that does not suffice: a micro-batch is run again in halves, once, and counts once."""

from __future__ import annotations

import pytest
import torch

from causal_probe import CausalProbeError, probes
from causal_probe.hooks import record
from causal_probe.hooks.record import micro_batch_size
from tests.tiny_models import disentangled, random_tokens


def limited(most, device="cpu"):
    """A model whose second layer has memory for so many sequences; and the sizes of the batches that it was given."""
    model, seen = disentangled().to(device), []

    def refuse(module, given):
        seen.append(len(given[0]))
        if len(given[0]) > most:
            raise torch.OutOfMemoryError("out of memory")

    model.blocks[1].register_forward_pre_hook(refuse)  # the first layer's patterns have been counted by then
    return model, seen


@pytest.mark.parametrize("most", [4, 5, 7])
def test_a_batch_that_is_too_large_is_halved_and_counts_once(most, device):
    tokens = random_tokens(20)
    model, seen = limited(most, device)
    found = probes.scan(model, tokens, templates=["previous-token", "induction"], batch_size=8)
    wanted = probes.scan(disentangled(), tokens, templates=["previous-token", "induction"], batch_size=8)
    assert seen[-6:] == [8, 4, 4, 4, 4, 4]
    assert found.shared == wanted.shared
    for one, other in zip(found, wanted, strict=True):
        assert one.rows == other.rows
        assert one.score == pytest.approx(other.score, abs=1e-7)
    model, _ = limited(most, device)
    graphs, once = (probes.head_graphs(m, tokens, batch_size=8) for m in (model, disentangled()))
    assert graphs.n_sequences == once.n_sequences == 20
    for one, other in zip(graphs.values.values(), once.values.values(), strict=True):
        assert abs(one - other).max() < 1e-12


def test_it_is_tried_once():
    model, _ = limited(3)
    with pytest.raises(CausalProbeError, match="does not suffice for 4 sequences of 7 tokens"):
        probes.scan(model, random_tokens(20), templates=["previous-token"], batch_size=8)


def test_the_rule_on_a_gpu(monkeypatch):
    """A quarter of what is free: of what the driver gives, and what torch has and doesn't use."""
    monkeypatch.setattr(record, "describe", lambda model: {"device": "cuda:0"})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    assert micro_batch_size(disentangled((2, 2)), 7) == (2 * 2**30) // (4 * 2 * 2 * 7 * 7)


def test_the_rule_and_the_memory_of_this_machine(device):
    model = disentangled((2, 2)).to(device)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 4 * 2**28
    assert micro_batch_size(model, 7) == pytest.approx(free / 4 / (4 * 2 * 2 * 7 * 7), rel=0.05)
