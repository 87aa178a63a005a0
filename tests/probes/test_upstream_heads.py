"""Upstream: a planted circuit is found exactly, by hand; nothing is confirmed where nothing was planted."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, to_hooked
from causal_probe.models import DisentangledTransformer
from causal_probe.probes.qk_terms import term_reader
from causal_probe.probes.upstream_heads import LEAST, Arrow, Upstream
from tests import tiny_huggingface

N_STATES = 8


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(N_STATES, generator=generator).repeat(2) for _ in range(12)])


@pytest.fixture(scope="module")
def planted():
    """Two layers on a standard residual stream: L0H2 looks one back, L1H1 is the induction head that reads it; the rest is random."""
    model = DisentangledTransformer(N_STATES, 2 * N_STATES, heads=[4, 2])
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.A[0].data[2] = 0
    model.block(0, 2, query="position", key="position").diagonal(-1).fill_(30)
    model.A[1].data[1] *= 0.1
    model.block(1, 1, query="token", key="L0H2.token").diagonal().fill_(12)
    return model.to_transformer_lens()


def test_the_planted_circuit_and_nothing_else(planted, tokens: torch.Tensor):
    found = probes.upstream(planted, tokens, 1, 1, edges="induction")
    assert set(found.graph.edges) == {("L0H2", "L1H1")}
    edge = found.graph.edges["L0H2", "L1H1"]
    assert edge["side"] == "key"
    assert edge["drop"] > 0.7
    assert edge["drop"] > 5 * edge["largest_control"]
    assert found.roles["L0H2"][0] == "previous-token"
    assert found.roles["L0H2"][1] > 0.99
    assert found.roles["L1H1"] == ("induction", pytest.approx(found.roles["L1H1"][1]))


def test_in_a_concatenated_stream_the_source_is_a_part(tokens: torch.Tensor):
    model = DisentangledTransformer(N_STATES, 2 * N_STATES, heads=[2, 1])
    model.block(0, 1, query="position", key="position").diagonal(-1).fill_(30)
    model.block(1, 0, query="token", key="L0H1.token").diagonal().fill_(12)
    found = probes.upstream(model, tokens, 1, 0, edges="induction")
    assert set(found.graph.edges) == {("L0H1.token", "L1H0")}
    assert found.roles["L0H1.token"][0] == "previous-token"


def test_a_random_head_has_no_upstream(planted, tokens: torch.Tensor):
    found = probes.upstream(planted, tokens, 1, 0, edges="induction")
    assert len(found.arrows) > 0
    assert found.graph.number_of_edges() == 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("edges", ["previous-token", "induction"])
def test_nothing_is_confirmed_on_random_models(name: str, edges: str):
    model = to_hooked(
        tiny_huggingface.CAUSAL[name](n_layer=3) if name == "gpt2" else tiny_huggingface.llama(num_hidden_layers=3)
    )
    tokens = tiny_huggingface.tokens(16, 8).repeat(1, 2)
    for head in range(model.cfg.n_heads):
        found = probes.upstream(model, tokens, 2, head, edges=edges)
        assert found.graph.number_of_edges() == 0, found


@pytest.mark.parametrize(("side", "hook"), [("key", "k"), ("query", "q")])
def test_an_ablation_is_what_an_edit_of_the_hook_does(side: str, hook: str):
    """The drop of an arrow, by really putting the changed key or query in (its rotation included)."""
    model = to_hooked(tiny_huggingface.llama().double())
    tokens = tiny_huggingface.tokens(6)
    found = probes.upstream(model, tokens, 1, 2, edges="previous-token", depth=1, controls=2)
    arrow = next(arrow for arrow in found.arrows if arrow.side == side)
    reader = term_reader(model, 1, 2)
    terms = reader(tokens)
    part = (terms.unrotated_key if side == "key" else terms.unrotated_query)[reader.sources.index(arrow.source)]
    place = 1 if side == "key" else 2  # the second of four query heads that share two keys; or the head itself
    seen: list[torch.Tensor] = []

    def edit(value: torch.Tensor, hook: object) -> torch.Tensor:
        changed = value.clone()
        changed[:, :, place] += part.mean((0, 1)) - part
        return changed

    def keep(pattern: torch.Tensor, hook: object) -> None:
        seen.append(pattern[:, 2])

    name = attention_hook(1, "pattern")
    model.run_with_hooks(tokens, fwd_hooks=[(name, keep)])
    before = seen[-1]
    model.run_with_hooks(tokens, fwd_hooks=[(attention_hook(1, hook), edit), (name, keep)])
    drops = (before - seen[-1]).diagonal(-1, 1, 2).mean(-1).detach().numpy()
    assert arrow.drop == pytest.approx(drops.mean(), abs=1e-6)
    assert arrow.stderr == pytest.approx(drops.std(ddof=1) / np.sqrt(6), abs=1e-6)


def test_an_arrow_is_confirmed_only_beyond_its_controls(planted, tokens: torch.Tensor):
    found = probes.upstream(planted, tokens, 1, 1, edges="induction", depth=1)
    for arrow in found.arrows:
        assert arrow.confirmed == (arrow.source == "L0H2" and arrow.side == "key")
        if arrow.confirmed:
            assert arrow.drop >= LEAST
            assert arrow.p_value <= 0.001


def test_it_shows_and_saves_itself(planted, tokens: torch.Tensor, tmp_path: Path):
    found = probes.upstream(planted, tokens, "L1H1", edges="induction")
    assert re.search("L0H2 +L1H1 +key .* yes\n", repr(found))
    assert "attention: L1H1 induction 0." in repr(found)
    assert "<table" in found._repr_html_()
    assert len(found.to_pandas()) == len(found.arrows) == len(found.to_dict()["arrows"])
    found.save(tmp_path / "found.safetensors")
    loaded = Upstream.load(tmp_path / "found.safetensors")
    assert (loaded.to_dict(), repr(loaded)) == (found.to_dict(), repr(found))
    assert "replacing that contribution" in found.cite().methods


def test_bad_input(planted, tokens: torch.Tensor):
    with pytest.raises(CausalProbeError, match=r"`width` is 0. It must be a whole number of at least 1"):
        probes.upstream(planted, tokens, 1, 1, edges="induction", width=0)
    with pytest.raises(CausalProbeError, match=r"give two or more"):
        probes.upstream(planted, tokens[:1], 1, 1, edges="induction")
    with pytest.raises(CausalProbeError, match=r"No row of these sequences has an edge of 'induction'"):
        probes.upstream(planted, tokens[:, :N_STATES], 1, 1, edges="induction")
    first = probes.upstream(planted, tokens, 0, 2, edges="previous-token")
    assert first.arrows == ()
    assert first.graph.number_of_edges() == 0


def test_too_few_sequences_are_said() -> None:
    def arrow(source: str, drop: float, control: float | None, confirmed: bool) -> Arrow:
        return Arrow(source, "L1H0", "key", "induction", 1.0, drop, 0.05, control, 4, 0.01, confirmed)

    arrows = (
        arrow("L0H0", 0.5, 0.1, True),
        arrow("L0H1", 0.4, 0.1, False),  # large, and larger than any control: only the test fails
        arrow("L0H2", 0.05, 0.01, False),  # small
        arrow("L0H3", 0.3, 0.35, False),  # a control does as much
    )
    about = {"model": "m", "dtype": "float32", "device": "cpu"}
    found = Upstream("L1H0", "induction", arrows, {}, settings={"n_sequences": 3, "controls": 4}, provenance=about)
    assert [each.source for each in found.too_few] == ["L0H1"]
    assert [row[-1] for row in found.table().rows] == ["yes", "too few sequences", "no", "no"]
    assert "p_value" in repr(found)
    assert found.to_pandas()["confirmed"].tolist() == [True, False, False, False]
