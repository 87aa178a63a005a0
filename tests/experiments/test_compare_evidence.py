"""Kinds of evidence side by side: what each row says, against graphs and models whose answer is known."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from causal_probe import CausalProbeError, graphs, probes
from causal_probe.cli.main import main
from causal_probe.experiments import compare_evidence, measure_evidence, methods
from causal_probe.experiments.compare_evidence import without_model
from causal_probe.experiments.compared_evidence import Agreement, EvidenceTable
from causal_probe.experiments.methods import METHODS, method, union
from causal_probe.graphs.mixed import mixed_edges, show_mixed_edge
from causal_probe.models import hand_set
from causal_probe.papers import reproduce
from causal_probe.reports import report
from causal_probe.tasks import InContextMarkov, generator

LEARNERS = {name: methods.ALGORITHMS[name] for name in ("pc", "ordered-icd")}


@pytest.fixture(scope="module")
def table() -> EvidenceTable:
    with pytest.MonkeyPatch.context() as patch:  # a quick look is enough here
        patch.setattr(methods, "FIRST_SEQUENCES", {True: 1024, False: 2**14})
        patch.setattr(methods, "ALGORITHMS", LEARNERS)
        models = ("copy parents", "step to children")
        return compare_evidence(
            ("chain", "two-parent"), models=models, n_positions=7, d_vocab=3, inputs=2, n_sequences=32
        )


def test_every_model_layer_and_kind_has_its_rows(table: EvidenceTable) -> None:
    frame = table.to_pandas()
    counts = frame.groupby(["graph", "model"]).size().to_dict()
    each = 2 * (2 * 3 * 2 + 3)  # layers; algorithms, sources and samples of discovery, and three other kinds
    assert counts == {
        ("chain", "none"): 4,
        ("chain", "copy parents"): each,
        ("chain", "step to children"): each,  # for trees alone
        ("two-parent", "none"): 4,
        ("two-parent", "copy parents"): each,
    }
    of_discovery = frame[frame["evidence"] == "discovery"]
    assert set(of_discovery["readings"]) == {2}
    assert (of_discovery["sequences"] == 2 * np.where(of_discovery["source"] == "values", 2, 1)).all()
    assert (frame.loc[frame["evidence"] == "attention", "sequences"] == 32).all()
    assert (frame.loc[frame["evidence"] == "ablation", "sequences"] > 32).all()


def test_every_pair_and_a_perfect_test(table: EvidenceTable) -> None:
    """A chain of six: 5 of 15 pairs. Its skeleton can be known, its arrows only with the order; two-parent colliders show."""
    frame = table.to_pandas().set_index(["graph", "evidence"]).sort_index()
    every = frame.loc[("chain", "every pair")]
    assert every["skeleton_precision"] == pytest.approx(1 / 3)
    assert every["skeleton_f1"] == every["arrowheads_f1"] == pytest.approx(0.5)
    perfect = frame.loc[("chain", "perfect test")].set_index("algorithm")
    assert (perfect["skeleton_exact"] == 1).all()
    assert perfect.loc["ordered-icd", "arrowheads_f1"] == 1
    assert perfect.loc["pc", "arrowheads_recall"] == 0
    colliders = frame.loc[("two-parent", "perfect test")].set_index("algorithm")
    assert colliders.loc["pc", "arrowheads_recall"] > 0


def test_attention_shows_the_graph_of_the_model_that_copies_parents_and_not_of_the_other(table: EvidenceTable) -> None:
    frame = table.to_pandas().set_index(["graph", "model", "evidence", "layer"]).sort_index()["skeleton_f1"]
    assert frame["chain", "copy parents", "attention", 0] == 1
    assert frame["two-parent", "copy parents", "attention", 0] == 1
    assert frame["chain", "step to children", "attention", 0] == 0


def test_discovery_is_what_probes_discover_finds(table: EvidenceTable) -> None:
    """Rows against the calls by hand: the same hand-set model, inputs drawn from the same stream."""
    task = InContextMarkov(graphs.chain(6), 3)
    model = hand_set(task.graph, 3, match_scale=8, output_scale=4, graph_scale=16)
    options = {"attention": {}, "values": {"source": "values"}, "residual": {"residual": 0.5}}
    for source, chosen in options.items():
        (row,) = (
            r
            for r in table.rows
            if (r.graph, r.model, r.algorithm, r.source, r.samples, r.layer)
            == ("chain", "copy parents", "ordered-icd", source, 10**6, 1)
        )
        f1 = []
        for tokens in task.sample(2, generator(0, "inputs")).tokens:
            nodes = [[node] for node in range(6)]
            found = probes.discover_from_attention(
                model, tokens, layer=1, algorithm="ordered-icd", samples=10**6, groups=nodes, **chosen
            )
            f1.append(found.graphs[0].compare(nx.DiGraph(task.graph)).f1)
        assert row.skeleton.f1 == pytest.approx(np.mean(f1))
        assert row.skeleton.f1_stderr == pytest.approx(np.std(f1, ddof=1) / 2**0.5)


def test_ablation_confirms_what_the_model_needs() -> None:
    """With sequences enough; and nothing in the layer that holds no graph."""
    task = InContextMarkov(graphs.pairs(6), 3)
    model = hand_set(task.graph, 3, match_scale=8, output_scale=4, graph_scale=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "ALGORITHMS", {})
        rows = {(r.evidence, r.layer): r for r in measure_evidence(model, task, inputs=1, n_sequences=4096)}
    assert rows["ablation", 0].skeleton.exact == rows["ablation", 0].arrowheads.exact == 1
    assert rows["ablation", 1].skeleton.f1 == 0
    assert rows["ablation", 1].skeleton.precision is None


def test_the_first_gradient_needs_no_model() -> None:
    rows = {row.evidence: row for row in without_model(InContextMarkov(graphs.chain(6), 3))}
    assert rows["first gradient"].skeleton.exact == 1
    assert rows["first gradient"].sequences == methods.FIRST_SEQUENCES[True]


def test_a_method_is_told_once() -> None:
    """One function: it is asked in every layer, its first line describes it, and evidence answers by its own claim."""
    task = InContextMarkov(graphs.chain(6), 3)
    model = hand_set(task.graph, 3, match_scale=8, output_scale=4, graph_scale=16)
    compared = importlib.import_module("causal_probe.experiments.compare_evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "ALGORITHMS", {})
        patch.setattr(methods, "METHODS", dict(METHODS))
        patch.setattr(compared, "METHODS", methods.METHODS)

        @method("largest attention")
        def largest(model, task, batches, asked):
            """The largest attention of a row, however small."""
            found = probes.head_graphs(model, [batch.tokens for batch in batches])
            return [found.graph(asked.layer, 0, claim=0, nodes=len(task.children))]

        rows = {(r.evidence, r.layer): r for r in measure_evidence(model, task, inputs=1, n_sequences=64)}
        assert methods.METHODS["largest attention"].description == "The largest attention of a row, however small."
    assert rows["largest attention", 0].skeleton.f1 == 1
    assert rows["largest attention", 1].readings == 1
    assert "largest attention" not in METHODS
    assert all(each.description.endswith(".") for each in METHODS.values())


def test_union_keeps_the_marks_that_heads_agree_on() -> None:
    one, two = graphs.mixed_graph(3, [(0, "-", ">", 1)]), graphs.mixed_graph(3, [(0, "<", ">", 1), (1, "o", ">", 2)])
    both = union([one, two])
    assert [show_mixed_edge(both, *edge) for edge in mixed_edges(both)] == ["0 o-> 1", "1 o-> 2"]
    plain = union([nx.DiGraph([(0, 1)])])
    assert show_mixed_edge(plain, 0, 1) == "0 --> 1"


def test_agreement_over_readings() -> None:
    truth = nx.DiGraph([(0, 1), (1, 2)])
    empty = nx.empty_graph(3, create_using=nx.DiGraph)
    found = Agreement.of([truth, empty], truth, "skeleton")
    assert (found.f1, found.recall, found.precision, found.shd, found.exact) == (0.5, 0.5, 1.0, 1.0, 0.5)
    assert found.f1_stderr == pytest.approx(0.5)
    assert Agreement.of([empty], truth, "arrowheads").precision is None


def test_summary_and_layers(table: EvidenceTable) -> None:
    summary = table.summary()
    frame = table.to_pandas()
    assert not summary.duplicated(["evidence", "model", "layer"]).any()
    chosen = summary[
        (summary["evidence"] == "discovery") & (summary["model"] == "step to children") & (summary["layer"] == 1)
    ]
    of_it = frame[(frame["evidence"] == "discovery") & (frame["model"] == "step to children") & (frame["layer"] == 1)]
    assert chosen["skeleton_f1"].item() == of_it["skeleton_f1"].max()  # of one graph, the best options
    layers = table.deepest()
    assert layers.loc[("chain", "step to children"), 1.0] == of_it["skeleton_f1"].max()
    assert list(layers.columns) == [0.0, 1.0]


def test_shown_kept_and_cited(table: EvidenceTable, tmp_path: Path) -> None:
    report(table).write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Is the deepest layer best?" in page
    assert "<svg" in page
    for suffix in ("json", "csv", "safetensors"):
        table.save(tmp_path / f"evidence.{suffix}")
    content = json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))
    assert len(content["rows"]) == len(pd.read_csv(tmp_path / "evidence.csv")) == len(table.rows)
    assert EvidenceTable.load(tmp_path / "evidence.safetensors").rows == table.rows
    assert "first gradient" in repr(table)
    assert "<table" in table._repr_html_()
    assert "rohekar2023" in table.cite().bibtex
    scope: dict[str, object] = {}
    exec(table.call.splitlines()[0], scope)
    assert "compare_evidence" in table.call


def test_the_command_reproduces_it_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("causal_probe.papers.evidence")
    tiny = {"GRAPHS": ("chain", "pairs"), "MODELS": ("copy parents",), "POSITIONS": 6, "VOCAB": 3}
    for name, value in {**tiny, "INPUTS": {True: 2}, "SEQUENCES": {True: 32}}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(methods, "ALGORITHMS", {"icd": methods.ALGORITHMS["icd"]})
    monkeypatch.setattr(methods, "FIRST_SEQUENCES", {True: 1024})
    monkeypatch.setitem(module.INPUTS, True, 2)
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "evidence", "--quick", "--out", str(tmp_path / "out")])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "attention, copy parents, layer 0" in shown
    content = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    lines = {line["quantity"]: line for line in content["lines"]}
    assert lines["attention, copy parents, layer 0: F1 of the skeleton, mean over 2 graphs"]["ours"] == 1
    assert "discovery, copy parents: F1 in the last layer, with the best options for each graph" in lines
    # The parts are there: nothing is measured again.
    monkeypatch.setattr(module, "compare_evidence", None)
    again = reproduce("evidence", quick=True, out=tmp_path / "out")
    assert [line.ours for line in again.lines] == [line["ours"] for line in content["lines"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"graphs": ()}, "`graphs` is empty"),
        ({"models": ()}, "`models` is empty"),
        ({"models": ("gpt",)}, "each of it 'trained' or 'copy parents' or 'step to children'"),
        ({"graphs": ("circle",)}, "neither a family"),
        ({"inputs": 0}, "`inputs` is 0"),
        ({"n_sequences": 1}, "`n_sequences` is 1"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    options = {
        "graphs": ("chain",),
        "models": ("copy parents",),
        "n_positions": 5,
        "out": tmp_path / "out",
        **arguments,
    }
    with pytest.raises(CausalProbeError, match=message):
        compare_evidence(options.pop("graphs"), **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
