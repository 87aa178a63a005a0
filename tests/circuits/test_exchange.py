"""Graphs of EAP-IG and MIB, written and read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_probe import circuits
from causal_probe.circuits.exchange import mib_graph, read_mib_graph
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from tests import tiny_huggingface as tiny


@pytest.fixture(scope="module")
def found() -> circuits.Circuit:
    known = circuits.known_circuit("mlp-between")
    return circuits.find_circuit(known.model, known.sample(48, torch.Generator().manual_seed(0)), known.metric, sizes=1)


def test_what_is_written_is_read(found: circuits.Circuit, tmp_path: Path) -> None:
    graph = mib_graph(found, tmp_path / "circuit.json")
    assert json.loads((tmp_path / "circuit.json").read_text()) == graph
    back = read_mib_graph(tmp_path / "circuit.json")
    merged = {("embed" if source == "pos_embed" else source, receiver) for source, receiver in found.members}
    assert set(back.edges) == merged
    assert back.edges["L0.mlp", "L1H0.k"]["score"] == pytest.approx(found.graph.edges["L0.mlp", "L1H0.k"]["effect"])
    assert found.compare(back).missing == tuple(sorted(merged - set(found.members)))


def test_every_edge_of_the_format_is_there_and_no_other(found: circuits.Circuit) -> None:
    graph = mib_graph(found)
    assert graph["cfg"] == {"n_layers": 2, "n_heads": 1, "parallel_attn_mlp": False, "d_model": found.settings["shape"]["d_model"]}  # fmt: skip
    # input into 3 sides and an MLP, twice; head 0 and MLP 0 into layer 1's 3 sides; head and MLP into MLPs behind; all five into the logits
    assert len(graph["edges"]) == 3 + 2 + 3 * 3 + 4 + 5
    assert [name for name, its in graph["nodes"].items() if its["in_graph"]] == [
        "input",
        "a0.h0",
        "m0",
        "a1.h0",
        "logits",
    ]


def test_keys_that_heads_share_are_each_head_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = to_hooked(tiny.CAUSAL["llama"]())
    tokens = torch.randint(3, tiny.D_VOCAB, (24, 6), generator=torch.Generator().manual_seed(0))
    answers = dict(zip(map(tuple, tokens.tolist()), model(tokens)[:, -1].argmax(-1).tolist(), strict=True))

    def metric(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        own = torch.tensor([answers[tuple(row)] for row in rows.tolist()])
        return logits[:, -1].gather(-1, own[:, None])[:, 0]

    found = circuits.find_circuit(model, tokens, metric, most=1000, delta=0.0, sizes=1)
    graph = mib_graph(found)
    heads, keys = model.cfg.n_heads, found.settings["shape"]["groups"][1][1]
    assert keys < heads
    effects = {(edge.source, edge.receiver): edge.effect for edge in found.edges}
    for head in range(heads):
        first = head * keys // heads * heads // keys
        assert graph["edges"][f"a0.h1->a1.h{head}<k>"]["score"] == effects["L0H1", f"L1H{first}.k"]
        assert graph["edges"][f"a0.h1->a1.h{head}<q>"]["score"] == effects["L0H1", f"L1H{head}.q"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "no graph of EAP-IG"),
        ({"cfg": {}, "nodes": {}}, "no graph of EAP-IG"),
        (
            {"cfg": {}, "nodes": {}, "edges": {"a0.h0->a1.h0": {"score": 1, "in_graph": True}}},
            "has an edge 'a0.h0->a1.h0'",
        ),
        (
            {"cfg": {}, "nodes": {}, "edges": {"m0->logits": {"score": "1", "in_graph": True}}},
            "has an edge 'm0->logits'",
        ),
        ({"cfg": {}, "nodes": {}, "edges": {"m0->logits": True}}, "has an edge"),
    ],
)
def test_other_files_are_refused(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CausalProbeError, match=said):
        read_mib_graph(path)


def test_single_positions_and_layers_without_attention_are_refused(found: circuits.Circuit) -> None:
    with pytest.raises(CausalProbeError, match="single positions"):
        mib_graph(replace(found, text=("a", "b")))
    shape = {**found.settings["shape"], "heads": [1, 0]}
    with pytest.raises(CausalProbeError, match=r"\[1, 0\]"):
        mib_graph(replace(found, settings={**found.settings, "shape": shape}))
