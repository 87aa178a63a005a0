"""Recovering a known graph, end to end, on small tasks."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from causal_probe import experiments, graphs, models, probes, tasks, training
from causal_probe.errors import CausalProbeError, CausalProbeWarning
from causal_probe.experiments import recover
from causal_probe.experiments.recovery import Recovery
from causal_probe.models import choose_device
from causal_probe.reports import report, save
from causal_probe.viz import Report

SMALL = {"n_positions": 6, "probe_sequences": 4096, "device": "cpu"}


@pytest.fixture
def plain_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without pictures, where it is not what is tested."""
    monkeypatch.setattr("causal_probe.reports.saving.report", lambda result: Report("", [], {}, {}, ""))


@pytest.fixture(scope="module")
def chain() -> Recovery:
    return recover("chain", seed=3, **SMALL)


def test_a_chain_is_recovered_exactly(chain: Recovery) -> None:
    assert chain.exact
    assert set(chain.recovered.edges) == set(graphs.chain(5).edges)
    assert chain.comparison.shd == 0
    assert chain.comparison.root_accuracy == chain.comparison.parent_accuracy == chain.comparison.auroc == 1
    assert chain.argmax_parent_accuracy == 1
    assert chain.steps_to_all_parents is not None
    assert chain.reference_losses["known-graph"] < chain.loss < chain.reference_losses["in-context unigram"]


def test_mean_parent_attention_is_the_mean_of_the_patterns(chain: Recovery) -> None:
    tokens = chain.task.sample(2000, torch.Generator().manual_seed(1)).tokens
    _, cache = chain.model.run_with_cache(tokens)
    by_hand = cache["pattern", 0][:, 0, range(1, 5), range(4)].mean()
    assert chain.mean_parent_attention == pytest.approx(float(by_hand), abs=1e-6)  # layer 0 reads positions alone


def test_the_recovered_edges_carry_their_evidence(chain: Recovery) -> None:
    for _, _, evidence in chain.recovered.edges(data=True):
        assert evidence["gain"] > 0
        assert evidence["margin"] > 0
        assert evidence["adjusted_p_value"] <= chain.settings["level"]
        assert evidence["head"] == "L0H0"


def test_the_graph_is_invisible_to_the_probe_and_not_a_constant() -> None:
    """Two graphs, one code path: what is found follows the data."""
    pairs = recover("pairs", seed=3, **SMALL)
    assert pairs.exact
    assert set(pairs.recovered.edges) == {(0, 1), (2, 3)}
    assert pairs.comparison.root_accuracy == 1


def test_no_edges_are_found_where_there_are_none() -> None:
    with pytest.warns(CausalProbeWarning, match="has no edge"):
        nothing = recover("forest", root_probability=1.0, seed=0, **SMALL)
    assert nothing.recovered.number_of_edges() == 0
    assert nothing.exact
    assert nothing.mean_parent_attention is None
    undefined = nothing.to_dict()["undefined"]
    assert {"precision", "recall", "auroc", "mean_parent_attention"} <= set(undefined)


def test_an_untrained_model_has_no_graph() -> None:
    untrained = recover("chain", training="joint", steps=0, **SMALL)
    assert untrained.recovered.number_of_edges() == 0
    assert untrained.comparison.shd == 4
    assert untrained.steps_to_all_parents is None
    uniform = np.mean([1 / (child + 1) for child in range(1, 5)])  # every row is spread evenly over its past
    assert untrained.mean_parent_attention == pytest.approx(uniform, abs=1e-6)
    assert untrained.loss == pytest.approx(np.log(3), abs=1e-6)


def test_several_parents_are_matched_to_heads_and_reported() -> None:
    found = recover("two-parent", n_positions=6, d_vocab=3, heads=(2, 1), steps=20, probe_sequences=512, device="cpu")
    assert found.match is not None
    assert sorted(head for head in found.match.heads if head is not None) == [0, 1]
    assert len(found.effects) == 2
    assert found.last_row is not None
    assert [row["head"] for row in found.last_row] == ["L0H0", "L0H1"]
    assert found.last_row[0]["as_query"]["parents"] == (2, 5)
    assert found.last_row[0]["as_node"]["parents"] == (2, 4)
    assert found.comparison.children == tuple(range(5))
    json.dumps(found.to_dict(), allow_nan=False)
    page = report(found).to_html()
    assert "Nodes after 4 are left out" in page
    # Who reads the page, or the methods sentence, is told where the graph came from.
    assert found.given[0].startswith("layer 0 begins with what gradients of the untrained model show")
    assert found.given[0] in found.cite().methods
    assert "began with the graph that gradients showed" in page


def test_joint_training_starts_from_zero_with_nothing_given() -> None:
    found = recover(
        "chain", training="joint", steps=3, batch_size=16, probe_sequences=64, d_vocab=3, n_positions=5, device="cpu"
    )
    assert found.given == ()
    assert found.history.n_sequences == 48
    assert [stage["moves"] for stage in found.settings["stages"]] == [("A0", "A1", "W_U")]


def test_the_same_call_gives_the_same_result(chain: Recovery) -> None:
    again = recover("chain", seed=3, **SMALL)
    assert again.loss == chain.loss
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), chain.model.parameters(), strict=True))
    assert again.effects[0].gain.tolist() == chain.effects[0].gain.tolist()


def test_the_export_gives_the_same_graphs_edge_effects_and_head_scores(chain: Recovery) -> None:
    """What is found in our model is found in the same function as a standard TransformerLens model."""
    standard = chain.model.to_transformer_lens()
    batches = [chain.task.sample(256, torch.Generator().manual_seed(2))]
    tokens = [batch.tokens for batch in batches]
    ours, theirs = probes.head_graphs(chain.model, tokens), probes.head_graphs(standard, tokens)
    for layer in range(2):
        np.testing.assert_allclose(ours.values[layer], theirs.values[layer], atol=1e-6)
    assert set(ours.graph(0, 0).edges) == set(theirs.graph(0, 0).edges)

    def loss(model: object, batch: tasks.Batch) -> torch.Tensor:
        return training.task_loss(model(batch.tokens)[:, -1], batch.target)  # type: ignore[operator]  # any model

    candidates = ours.graph(0, 0, claim=0, nodes=5)
    a, b = (
        probes.edge_effects(model, batches, loss, layer=0, head=0, candidates=candidates)
        for model in (chain.model, standard)
    )
    np.testing.assert_allclose(a.gain, b.gain, atol=1e-6)
    np.testing.assert_allclose(a.cut, b.cut, atol=1e-6)

    scores, exported = (probes.scan(model, tokens) for model in (chain.model, standard))
    compared = [(head.layer, head.head, head.template) for head in scores]
    assert "previous-token" in {name for _, _, name in compared}
    assert len(compared) >= 8
    for name in compared:
        assert scores.of(*name).score == pytest.approx(exported.of(*name).score, abs=1e-6)


def test_what_is_saved(chain: Recovery, tmp_path: Path) -> None:
    written = save(chain, tmp_path / "out")
    assert written.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    for name in ("truth", "recovered"):
        edges = [(edge["source"], edge["target"]) for edge in result[name]["edges"]]
        assert edges == [(i, i + 1) for i in range(4)]
    assert {
        "precision", "recall", "f1", "shd", "parent_accuracy", "root_accuracy", "auroc"
    } <= set(result["comparison"])  # fmt: skip
    assert {"loss", "reference_losses", "mean_parent_attention", "timings", "history", "settings", "provenance"} <= set(
        result
    )
    found = {path.relative_to(written.parent).as_posix() for path in written.parent.rglob("*") if path.is_file()}
    assert found == set(result["files"])
    assert "model/model.safetensors" in found
    assert nx.utils.graphs_equal(graphs.read_graph(written.parent / "graph.json"), chain.truth)
    assert set(graphs.read_graph(written.parent / "recovered.json").edges) == set(chain.recovered.edges)
    loaded = models.load(written.parent / "model")
    tokens = chain.task.sample(8, torch.Generator().manual_seed(0)).tokens
    assert torch.equal(loaded.predict(tokens), chain.model.predict(tokens))
    arrays = load_file(written.parent / "attention.safetensors")
    np.testing.assert_array_equal(arrays["layer0.mean"], chain.head_graphs.values[0])


@pytest.mark.usefixtures("plain_report")
def test_an_earlier_result_is_kept_unless_it_may_be_replaced(chain: Recovery, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(chain, out)
    before = (out / "result.json").read_bytes()
    with pytest.raises(CausalProbeError, match="other settings"):
        recover("pairs", out=out, **SMALL)
    assert (out / "result.json").read_bytes() == before
    save(chain, out)  # the same settings: the same result
    for mine in (out / "notes.txt", out / "model" / "notes.txt"):
        mine.write_text("mine")
        with pytest.raises(CausalProbeError, match=r"notes\.txt"):
            save(chain, out, overwrite=True)
        assert mine.read_text() == "mine"
        mine.unlink()


def test_a_save_that_breaks_off_leaves_the_old_files(
    chain: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_report: None
) -> None:
    out = tmp_path / "out"
    save(chain, out)
    before = {path.name: path.stat().st_ino for path in out.iterdir()}

    def broken(self: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("causal_probe.reports.saving.report", broken)
    with pytest.raises(KeyboardInterrupt):
        save(chain, out)
    assert {path.name: path.stat().st_ino for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_call_in_the_report_gives_the_same_settings(chain: Recovery) -> None:
    seen = {}

    def record(graph: str, **arguments: object) -> None:
        seen.update({"graph": graph, **arguments})

    source = chain.call.splitlines()[-1].removeprefix("experiments.")
    eval(source, {"recover": record})  # the call is ours
    assert seen == {
        "graph": "chain", "n_positions": 6, "seed": 3, "probe_sequences": 4096,
    }  # fmt: skip


def test_a_graph_that_was_given_is_written_out_in_the_call() -> None:
    given = graphs.from_parents([None, 0, None, 2])
    found = recover(given, steps=5, batch_size=8, probe_sequences=64, device="cpu")
    again = eval(found.call.splitlines()[-1], {"experiments": experiments, "graphs": graphs})
    assert again.settings == {**found.settings, "device": again.settings["device"]}  # where, not what
    assert nx.utils.graphs_equal(nx.DiGraph(again.truth), nx.DiGraph(given))


def test_it_is_cited_and_shown(chain: Recovery) -> None:
    citation = chain.cite()
    assert "nichani2024" in citation.bibtex
    assert "4096 sequences" in citation.methods
    assert "seed 3" in citation.methods
    assert repr(chain).startswith("Recovery of chain: exact")
    html = report(chain).to_html()
    assert "4 of 4" in html
    assert chain._repr_html_().startswith("<")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"heads": (0, 1)}, r"`heads` is \(0, 1\)"),
        ({"heads": ()}, "at least one layer"),
        ({"heads": (1, 1, 1)}, "two layers"),
        ({"n_positions": 1}, "at least 2"),
        ({"concentration": 0.0}, "`concentration` is 0.0. It must be a finite number of more than 0"),
        ({"concentration": float("nan")}, "`concentration` is nan"),
        ({"d_vocab": 1}, "at least 2"),
        ({"steps": -1}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"probe_sequences": 1}, "at least 2"),
        ({"seed": -1}, "seed"),
        ({"device": "cuda:99"}, "can't be used here"),
        ({"device": "meta"}, "can't be used here"),
        ({"root_probability": 1.5}, "root_probability"),
        ({"learning_rate": 1e30, "training": "joint", "steps": 5, "batch_size": 8}, "learning_rate"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_nothing(
    arguments: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CausalProbeError, match=words):
        recover(**{"n_positions": 5, "device": "cpu", "out": tmp_path / "out", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_the_device_is_chosen() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_it_runs_on_a_gpu() -> None:
    assert recover("chain", seed=3, n_positions=8, probe_sequences=4096, device="cuda").exact
