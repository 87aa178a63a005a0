"""Attribution graphs: what the format asks for, that links into the head sum to its score, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.probes.attribution_graph import attribution_graph

#: Fields of the format and their types, as circuit-tracer's viewer and Neuronpedia's read them.
METADATA = {"slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str}
SHOWN = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
NODE = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "token_prob": float, "is_target_logit": bool, "run_idx": int,
    "reverse_ctx_idx": int, "jsNodeId": str, "clerp": str,
}  # fmt: skip
LINK = {"source": str, "target": str, "weight": float}


@pytest.fixture(scope="module")
def model() -> DisentangledTransformer:
    model = DisentangledTransformer(d_vocab=6, n_positions=12, heads=[2, 1])
    model.block(0, 1, query="position", key="position").diagonal(-1).fill_(30)
    model.block(1, 0, query="token", key="L0H1.token").diagonal().fill_(30)
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(n)).repeat(2) for n in range(8)])


def follows_the_format(graph: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(graph, allow_nan=False))
    for fields, part in ((METADATA, plain["metadata"]), (SHOWN, plain["qParams"])):
        assert all(isinstance(part[name], kind) for name, kind in fields.items())
    for fields, parts in ((NODE, plain["nodes"]), (LINK, plain["links"])):
        assert parts
        assert all(type(part[name]) is kind for part in parts for name, kind in fields.items())
    names = [node["node_id"] for node in plain["nodes"]]
    assert len(set(names)) == len(names)
    assert all(link[end] in names for link in plain["links"] for end in ("source", "target"))
    for node in plain["nodes"]:
        assert node["layer"] == "E" or node["layer"].isdigit()
        assert 0 <= node["ctx_idx"] < len(plain["metadata"]["prompt_tokens"])
        assert node["feature_type"] in ("cross layer transcoder", "mlp reconstruction error", "embedding", "logit")
    (top,) = (node for node in plain["nodes"] if node["feature_type"] == "logit")
    assert float(top["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(
        top["token_prob"], abs=1e-3
    )  # read so by the viewer
    assert plain["qParams"]["clickedId"] == top["node_id"]


def test_the_links_into_the_head_sum_to_its_score(model: DisentangledTransformer, tokens: torch.Tensor):
    found = probes.qk_attributions(model.to_transformer_lens(), tokens, 1, 0, edges="induction")
    for k in (1, 3, 1000):
        graph = attribution_graph(found, k=k)
        follows_the_format(graph)
        top = graph["qParams"]["clickedId"]
        into = [link for link in graph["links"] if link["target"] == top]
        assert sum(link["weight"] for link in into) == pytest.approx(found.total)
        assert len(into) == min(k, found.contribution.size) + 1
    label = {node["node_id"]: node["clerp"] for node in graph["nodes"]}
    largest = max(into, key=lambda link: link["weight"])
    assert label[largest["source"]] == "embed (query) with L0H1 (key)"
    assert largest["weight"] == pytest.approx(found.of("embed", "L0H1"))
    feeding = {label[link["source"]]: link["weight"] for link in graph["links"] if link["target"] == largest["source"]}
    assert feeding == {"embed": largest["weight"], "L0H1": largest["weight"]}


def test_one_edge_of_one_sequence_stands_in_its_prompt(model: DisentangledTransformer, tokens: torch.Tensor):
    import networkx as nx

    edge = nx.DiGraph([(1, 6)])
    edge.add_nodes_from(range(12))
    found = probes.qk_attributions(model, tokens[:1], 1, 0, edges=edge)
    words = [f"w{n}" for n in range(12)]
    graph = attribution_graph(found, prompt=words, at=(6, 1))
    follows_the_format(graph)
    assert graph["metadata"]["prompt_tokens"] == words
    assert {node["ctx_idx"] for node in graph["nodes"]} == {1, 6}


def test_arrows_are_links(model: DisentangledTransformer, tokens: torch.Tensor):
    found = probes.upstream(model.to_transformer_lens(), tokens, 1, 0, edges="induction")
    graph = attribution_graph(found)
    follows_the_format(graph)
    assert sorted(link["weight"] for link in graph["links"]) == sorted(arrow.drop for arrow in found.arrows)
    (confirmed,) = (node for node in graph["nodes"] if node["clerp"].endswith(", confirmed"))
    assert confirmed["clerp"].startswith("L0H1 through the key, previous-token")


def test_the_file_and_the_list_beside_it(model: DisentangledTransformer, tokens: torch.Tensor, tmp_path: Path):
    found = probes.qk_attributions(model, tokens, 1, 0, edges="induction", pairs=0)
    for name in ("one", "other", "one"):
        graph = attribution_graph(found, tmp_path / f"{name}.json")
        assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) == graph
    listed = json.loads((tmp_path / "graph-metadata.json").read_text(encoding="utf-8"))["graphs"]
    assert [each["slug"] for each in listed] == ["other", "one"]


def test_tables_of_both_as_csv_and_parquet(model: DisentangledTransformer, tokens: torch.Tensor, tmp_path: Path):
    import pandas as pd

    standard = model.to_transformer_lens()
    for found in (
        probes.qk_attributions(standard, tokens, 1, 0, edges="induction"),
        probes.upstream(standard, tokens, 1, 0, edges="induction"),
    ):
        for suffix, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
            found.save(tmp_path / f"found.{suffix}")
            back = read(tmp_path / f"found.{suffix}")
            assert list(back.columns) == list(found.to_pandas().columns)
            assert back["contribution"].to_numpy() == pytest.approx(found.to_pandas()["contribution"].to_numpy())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": ["one"]}, "give two tokens or more"),
        ({"at": (2, 0)}, "two different positions"),
        ({"at": (1, 1)}, "two different positions"),
        ({"k": 0}, "at least 1"),
        ({"path": "graph.csv"}, "its name ends in .json"),
    ],
)
def test_what_is_refused(model: DisentangledTransformer, tokens: torch.Tensor, options: dict[str, Any], said: str):
    found = probes.qk_attributions(model, tokens, 1, 0, edges="induction", pairs=0)
    with pytest.raises(CausalProbeError, match=said):
        attribution_graph(found, **options)
