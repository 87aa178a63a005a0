"""Scanning a model, end to end: what is found, shown, written; and the heads of trained models whose causal graph is known."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from causal_probe import experiments, graphs, probes
from causal_probe.errors import CausalProbeError
from causal_probe.experiments import scan
from causal_probe.experiments.model_scan import ModelScan
from causal_probe.hooks import corpus, to_hooked
from causal_probe.models import DisentangledTransformer, fit_scales, hand_set, save
from causal_probe.probes import TEMPLATES, successor_of_parent
from causal_probe.probes.bootstrap import bootstrap_intervals
from causal_probe.probes.scoring import score_patterns
from causal_probe.probes.template_choice import choose_templates
from causal_probe.reports import report, write_page
from causal_probe.tasks import InContextMarkov, generator
from causal_probe.training import fit, give_matcher, staged, task_loss
from causal_probe.viz import Report
from tests import tiny_huggingface


@cache
def induction_model() -> DisentangledTransformer:
    """An ideal induction circuit, set by hand."""
    model = DisentangledTransformer(d_vocab=12, n_positions=24)
    model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)
    model.output_block("L1H0.token").diagonal().fill_(9)
    return model


@cache
def verified() -> ModelScan:
    return scan(induction_model(), n_sequences=8, verify=True)


@pytest.fixture
def plain_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without pictures, where it is not what is tested."""
    monkeypatch.setattr("causal_probe.reports.saving.report", lambda result: Report("", [], {}, {}, ""))


# -------------------------------------------------------------------------------------------------------- what is found


def test_it_is_the_probes_scan_and_the_probes_verdicts() -> None:
    found = verified()
    scores = probes.scan(induction_model(), n_sequences=8)
    pd.testing.assert_frame_equal(found.scores.to_pandas(), scores.to_pandas())
    assert found.verification is not None
    assert [(v.name, v.template, v.verdict) for v in found.verification.verdicts] == [
        ("L0H0", "previous-token", "causal"),
        ("L1H0", "induction", "causal"),
    ]


def test_rows_are_what_is_described_and_the_best_that_is_not() -> None:
    found = verified()
    assert [(row.name, row.called) for row in found.rows("induction")] == [("L1H0", True), ("L0H0", False)]
    (best,) = found.rows("current-token")
    assert not best.called
    assert best.score == found.scores.top("current-token", 1)[0]
    assert found.left_out("induction") == 0


def test_more_heads_than_are_shown_are_counted() -> None:
    model = DisentangledTransformer(d_vocab=12, n_positions=24, heads=(3,))
    for head in range(3):
        model.block(0, head, query="position", key="position").diagonal(-1).fill_(30 - head)
    found = scan(model, templates="previous-token", n_sequences=4, top=2)
    assert [row.name for row in found.rows("previous-token")] == ["L0H0", "L0H1"]
    assert found.left_out("previous-token") == 1
    assert "previous-token: 1 more" in repr(found)


def test_graphs_of_the_leading_heads_are_compared_with_the_templates() -> None:
    induction = next(found for found in verified().graphs if found.template.name == "induction")
    assert (induction.name, induction.comparison.precision) == ("L1H0", 1)
    # All but the edges into the row of the first token's copy, which is half drawn to the sink.
    period = verified().scores.settings["tokens"][0]["period"]
    assert induction.comparison.recall == pytest.approx((period - 1) / period)
    assert {found.template.name for found in verified().graphs} == {
        name for name, template in TEMPLATES.items() if template.looks_back
    }


def test_patterns_are_the_models_own() -> None:
    (example,) = verified().examples  # no tokenizer, so no English
    tokens = torch.tensor([[int(token) for token in example.tokens]])
    _, cache_ = induction_model().run_with_cache(tokens)
    for (layer, head), pattern in zip(verified().leading, example.patterns, strict=True):
        np.testing.assert_allclose(pattern, cache_["pattern", layer][0, head].numpy(), atol=1e-6)
    assert set(verified().leading) == {(0, 0), (1, 0)}


def test_real_text_where_there_is_a_tokenizer() -> None:
    model = to_hooked(tiny_huggingface.llama(), tiny_huggingface.tokenizer(bos=True), name="tiny")
    found = scan(model, n_sequences=4)
    repeated, text = found.examples
    assert text.title == "English text"
    assert text.tokens[0] == repeated.tokens[0] == "<s>"
    assert text.patterns.shape[1:] == (len(text.tokens),) * 2
    assert len(text.tokens) <= tiny_huggingface.N_CTX
    np.testing.assert_allclose(text.patterns.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_random_models_have_no_such_heads(kind: str) -> None:
    found = scan(tiny_huggingface.CAUSAL[kind](), n_sequences=8, templates=["previous-token", "induction"])
    assert found.scores.called() == ()
    assert [row.called for name in found.scores.names for row in found.rows(name)] == [False, False]


def test_templates_that_coincide_are_said_to() -> None:
    found = scan(induction_model(), templates=["duplicate-token", "offset-12", "induction"], n_sequences=4, period=12)
    sentence = "duplicate-token and offset-12 coincide"
    assert any(sentence in note for note in found.notes)
    assert sentence in repr(found)
    assert sentence in found._repr_html_()
    assert sentence in report(found).to_html()


def test_templates_of_ngrams_alone_need_no_other_sequences() -> None:
    """Four tokens make a period of eight in a 2-gram walk, and could not if none came twice."""
    found = scan(DisentangledTransformer(4, 24), templates="induction-2gram", period=8, n_sequences=3)
    assert [made["kind"] for made in found.scores.settings["tokens"]] == ["2-gram"]
    assert len(found.examples) == len(found.graphs) == 1


def test_one_sequence_at_a_time() -> None:
    found = scan(induction_model(), n_sequences=8, verify=True, batch_size=1)
    assert found.verification is not None
    verdicts = [(v.name, v.verdict) for v in found.verification.verdicts]
    assert verdicts == [("L0H0", "causal"), ("L1H0", "causal")]
    pd.testing.assert_frame_equal(found.scores.to_pandas(), verified().scores.to_pandas())


# ----------------------------------------------------------------------------------------------- models with a known graph


def trained(graph: nx.DiGraph, d_vocab: int, *, beta: float = 1.0, steps: int) -> tuple[Any, DisentangledTransformer]:
    task = InContextMarkov(graph, d_vocab, 0.1)
    model = DisentangledTransformer(d_vocab, task.n_positions)
    give_matcher(model, beta=beta)
    stages = staged(n_positions=task.n_positions, steps=steps, batch_size=256)
    fit(model, task, stages, generator=generator(0, "training"))
    return task, model


def test_a_chain_is_learnt_by_a_previous_token_head_and_an_induction_head() -> None:
    _, model = trained(graphs.chain(11), 10, steps=100)
    found = scan(model)
    assert {score[:3] for score in found.scores.called()} == {(0, 0, "previous-token"), (1, 0, "induction")}


def test_a_forest_is_learnt_by_a_head_of_its_own_kind() -> None:
    """After a short second stage from a strong comparison. A long one from a weak comparison, as ``recover`` trains, lowers the loss
    further and leaves more attention beside the targets, which serves as a prior: an excess of 0.6 to 0.8.
    """
    graph = graphs.random_forest(11, root_probability=0.2, seed=1)
    task, model = trained(graph, 10, beta=6.0, steps=100)
    own = successor_of_parent(graph)
    tokens = task.sample(1024, generator(0, "scanning")).tokens
    found = probes.scan(model, tokens, templates=[*TEMPLATES, own], queries=[-1])
    excess = {name: found.of(1, 0, name).excess for name in found.names}
    assert excess[own.name] >= 0.9
    others = [name for name in found.names if name != own.name and found.overlap(name, own.name) != 1]
    assert len(others) == len(TEMPLATES)
    assert max(excess[name] for name in others) < 0.2


def test_the_best_attention_on_a_forest_is_not_the_sharpest() -> None:
    """What the excess of a well-trained head tends to: of the circuit set by hand, the sharpness with the lowest loss leaves attention
    beside the targets, more where there are more states and fewer positions, and all of it on the targets costs loss.
    """
    best = {}
    for nodes, d_vocab in ((11, 10), (47, 3)):
        graph = graphs.random_forest(nodes, root_probability=0.2, seed=1)
        task, own = InContextMarkov(graph, d_vocab, 0.1), successor_of_parent(graph)
        fitted, fresh = (task.sample(2048, generator(0, name)) for name in ("fitting", "scanning"))
        match_scale, output_scale = fit_scales(graph, fitted.tokens, fitted.target)
        excess, loss = [], []
        for scale in (match_scale, 2 * match_scale):
            model = hand_set(graph, d_vocab, match_scale=scale, output_scale=output_scale)
            excess.append(probes.scan(model, fresh.tokens, templates=[own], queries=[-1]).of(1, 0, own.name).excess)
            loss.append(task_loss(model.predict(fresh.tokens), fresh.target).mean())
        assert excess[1] > 0.95
        assert loss[1] > loss[0]
        best[nodes] = excess[0]
    assert best[11] < 0.85 < 0.95 < best[47]


def test_on_pairs_plain_induction_follows_the_graphs_own_type() -> None:
    """An edge joins 2k and 2k + 1, so whatever follows its parent directly follows it as an induction target would: the targets of
    the own type are the odd ones among those of plain induction. A head that attends evenly to its own targets therefore has all
    its attention on plain induction's targets as well, where it has any; where it has none, what it does is not defined, and
    here it attends evenly to all it sees. So plain induction is not at chance on pairs.
    """
    graph = graphs.pairs(12)
    task = InContextMarkov(graph, 10, 0.1)
    tokens = task.sample(512, generator(0, "scanning")).tokens
    query = tokens.shape[1] - 1
    pattern = torch.zeros(len(tokens), 1, query + 1, query + 1, dtype=torch.float64)
    pattern[:, 0, :, 0] = 1
    shares, chances, rows = [], [], 0
    for sequence, row in enumerate(tokens.tolist()):
        plain = [j for j in range(1, query + 1) if row[j - 1] == row[query]]
        mine = [j for j in plain if j % 2 == 1 and j < len(graph)]
        seen = mine or list(range(query + 1))
        pattern[sequence, 0, query] = 0
        pattern[sequence, 0, query, seen] = 1 / len(seen)
        if plain:
            shares.append(1.0 if mine else len(plain) / (query + 1))
            chances.append(len(plain) / (query + 1))
            rows += bool(mine)
    assert 0.4 < rows / len(shares) < 1  # both cases are there
    own = successor_of_parent(graph)
    found = score_patterns([pattern], tokens, templates=["induction", own], queries=[-1])
    assert found.of(0, 0, own.name).excess == pytest.approx(1)
    score, chance = np.mean(shares), np.mean(chances)
    assert found.of(0, 0, "induction").score == pytest.approx(score, abs=1e-6)
    assert found.of(0, 0, "induction").excess == pytest.approx((score - chance) / (1 - chance), abs=1e-6)
    assert found.of(0, 0, "induction").excess > 0.5

    # A trained model's second layer: the own type leads, and plain induction has at least the attention that it has.
    _, model = trained(graph, 10, beta=6.0, steps=100)
    scored = probes.scan(model, tokens, templates=[*TEMPLATES, own], queries=[-1])
    excess = {name: scored.of(1, 0, name).excess for name in scored.names}
    assert max(excess, key=lambda name: excess[name] or 0) == own.name
    assert excess["induction"] > 0.4


# -------------------------------------------------------------------------------------------------------- what is written


def test_json_has_the_agreed_form() -> None:
    written = json.loads(json.dumps(verified().to_dict(), allow_nan=False))
    assert {"heads", "settings", "provenance", "coinciding", "graphs", "tokens", "verification"} <= set(written)
    by_name = {(head["layer"], head["head"], head["template"]): head for head in written["heads"]}
    assert len(by_name) == 2 * len(verified().scores.names)
    induction = by_name[1, 0, "induction"]
    assert {"score", "chance", "excess", "stderr", "sink"} <= set(induction)
    assert induction["verdict"] == "causal"
    assert induction["effect"] > 1
    assert induction["called"]
    assert "verdict" not in by_name[0, 0, "induction"]
    assert written["settings"]["n_sequences"] == 8


def test_the_folder(tmp_path: Path, plain_report: None) -> None:
    out = tmp_path / "out"
    found = scan(induction_model(), n_sequences=4, templates=["induction"], out=out, page=write_page)
    assert {path.name for path in out.iterdir()} == {"scan.json", "scan.csv", "scan.safetensors", "report.html"}
    saved = json.loads((out / "scan.json").read_text())
    assert sorted(saved.pop("files")) == ["report.html", "scan.csv", "scan.json", "scan.safetensors"]
    assert saved.pop("sha256")
    assert saved == found.to_dict()
    table = pd.read_csv(out / "scan.csv")
    assert list(table.score) == pytest.approx([head["score"] for head in saved["heads"]])
    assert set(table.model) == {"disentangled-transformer"}
    scan(
        induction_model(), n_sequences=4, templates=["induction"], out=out, page=write_page
    )  # the same settings: replaced
    with pytest.raises(CausalProbeError, match="holds a result of other settings"):
        scan(induction_model(), n_sequences=5, templates=["induction"], out=out, page=write_page)
    scan(induction_model(), n_sequences=5, templates=["induction"], out=out, page=write_page, overwrite=True)
    assert json.loads((out / "scan.json").read_text())["settings"]["n_sequences"] == 5


def test_results_of_another_kind_are_not_replaced(tmp_path: Path, plain_report: None) -> None:
    (tmp_path / "result.json").write_text('{"files": ["result.json"], "settings": {}}')
    with pytest.raises(CausalProbeError, match="holds no earlier result"):
        scan(induction_model(), n_sequences=4, out=tmp_path, page=write_page, overwrite=True)


def test_the_table_has_the_verdicts() -> None:
    table = verified().to_pandas().set_index(["layer", "head", "template"])
    assert table.verdict[1, 0, "induction"] == "causal"
    assert pd.isna(table.verdict[0, 0, "induction"])
    assert table.effect[1, 0, "induction"] > 1
    assert list(table.called[lambda called: called].index) == [(0, 0, "previous-token"), (1, 0, "induction")]


def test_the_call_gives_the_same_result(tmp_path: Path) -> None:
    save(induction_model(), tmp_path / "model")
    found = scan(tmp_path / "model", n_sequences=4, templates=["induction"], seed=3, device="cpu")
    again: dict[str, Any] = {}
    exec(found.call.replace("experiments.scan(", "again = experiments.scan("), again)
    assert [*again["again"].scores] == [*found.scores]
    assert "experiments.scan(model" in verified().call


def test_the_report() -> None:
    page = report(verified()).to_html()
    assert len(page) < 3e6
    for words in (
        "What the attention heads of disentangled-transformer do",
        "Of 2 that were verified, 2 are causal",
        "Does the model use it?",
        "Excess attention of every head on the targets of each template",
        "Below the line L1H0 on one sequence",
        "Repeated random tokens",
        "olsson2022",
        "experiments.scan(model",
    ):
        assert words in page


def test_the_report_of_a_model_with_no_such_head() -> None:
    # English would be asked of a tokenizer; and one sequence has no standard errors.
    found = scan(DisentangledTransformer(12, 24), n_sequences=1)
    page = report(found).to_html()
    assert "None of its 2 heads is described by one of them" in page
    assert "none is drawn" in page
    assert "nan" not in repr(found)


def test_the_citation_names_what_was_done() -> None:
    text = str(verified().cite())
    assert "was scored against the templates" in text
    assert "called causal if either raised the loss by more than delta = 0.05 nats" in text
    assert text.count("@article{olsson2022") == 1


# -------------------------------------------------------------------------------------------------------------- bad input


def test_a_model_that_is_not_causal_is_refused_with_the_reasons() -> None:
    with pytest.raises(CausalProbeError, match="not causal") as refusal:
        scan(tiny_huggingface.bert(), n_sequences=2)
    assert "attend to later positions" in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "`top` is 0"),
        ({"templates": "inductoin"}, "did you mean 'induction'"),
        ({"templates": []}, "no template to look for"),
        ({"bos": "yes"}, "A BOS token was asked for"),
        ({"period": 30}, "Two copies of 30 different tokens"),
        ({"n_sequences": 1, "verify": True}, "scan two sequences or more"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CausalProbeError, match=message):
        scan(induction_model(), **options, out=tmp_path / "out", page=write_page)
    assert not (tmp_path / "out").exists()


def test_something_that_is_no_model() -> None:
    with pytest.raises(CausalProbeError, match="can't be given hooks"):
        scan(transformers.GPT2Config())


# --------------------------------------------------------------------------------------------------- templates from files


def test_templates_from_files(tmp_path: Path) -> None:
    graphs.write_graph(graphs.chain(6), tmp_path / "chain.json")
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\n"
        "from causal_probe.probes import Template, offset\n"
        "def Two_Back(tokens):\n"
        "    return offset(2)(tokens)\n"
        "mine = Template('mine', Two_Back, 'two back')\n"
        "number = 3\n"
    )
    found = choose_templates(
        ["induction", f"graph:{tmp_path / 'chain.json'}", f"successor-of-parent:{tmp_path / 'chain.json'}",
         f"{own}:Two_Back", f"{own}:mine"]
    )  # fmt: skip
    assert [template.name for template in found] == ["induction", "graph", "successor-of-parent", "two-back", "mine"]
    tokens = torch.tensor([[3, 1, 2, 3, 1]])
    assert torch.equal(found[1](tokens), probes.template("previous-token")(tokens))
    assert torch.equal(found[2](tokens), found[0](tokens))
    assert torch.equal(found[3](tokens), probes.template("offset-2")(tokens))
    scanned = experiments.scan(induction_model(), templates=[f"{own}:Two_Back"], n_sequences=3)
    assert scanned.scores.names == ("two-back",)
    for text, message in (
        (f"{own}:nothing", "holds no template or function 'nothing'"),
        (f"{own}:number", "holds no template or function 'number'"),
        ("absent.py:f", "names no file"),
        ("weird:f", "names no file"),
        (f"graph:{tmp_path / 'absent.json'}", "absent.json"),
    ):
        with pytest.raises(CausalProbeError, match=message):
            choose_templates([text])
    own.write_text("1 / 0")
    with pytest.raises(CausalProbeError, match="can't be run: ZeroDivisionError"):
        choose_templates([f"{own}:f"])


# -------------------------------------------------------------------------------------------------------------- circuits


def test_circuits_of_the_best_heads(tmp_path: Path) -> None:
    found = scan(
        induction_model(),
        n_sequences=8,
        templates=["previous-token", "induction"],
        attributions=True,
        out=tmp_path / "out",
        page=write_page,
    )
    by_edges = {circuit.attributions.edges: circuit for circuit in found.circuits}
    assert set(by_edges) == {"previous-token", "induction"}
    top = by_edges["induction"].attributions.top(1).iloc[0]
    assert (top["query"], top["key"]) == ("token", "L0H0.token")
    saved = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert saved["circuits"][1]["strongest"][0]["key"] == "L0H0.token"
    assert "What makes them attend there" in (tmp_path / "out" / "report.html").read_text()
    assert "attributions=True" in found.call


def test_why_there_are_no_circuits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise CausalProbeError("the scores are capped")

    monkeypatch.setattr(probes, "qk_attributions", refuse)
    found = scan(induction_model(), n_sequences=8, templates=["induction"], attributions=True)
    assert found.circuits == ()
    assert "the scores are capped" in report(found).to_html()


# --------------------------------------------------------------------------------------------------------------- corpora


def test_a_corpus_and_its_shards_merged(tmp_path: Path) -> None:
    model = to_hooked(tiny_huggingface.llama().double(), tiny_huggingface.tokenizer(bos=True), name="tiny")
    texts = tmp_path / "texts"
    texts.mkdir()
    draw = np.random.default_rng(0)
    for number in range(6):
        words = (f"t{token}" for token in draw.integers(3, 8, 40 + number))
        (texts / f"{number}.txt").write_text(" ".join(words))
    options: dict[str, Any] = {"corpus": texts, "length": 12, "templates": ["previous-token", "duplicate-token"]}
    whole = scan(model, **options, verify=True, out=tmp_path / "whole", page=write_page)
    direct = probes.scan(model, corpus(model, texts, length=12), templates=options["templates"])
    assert list(whole.scores) == list(direct)
    assert whole.intervals is not None
    pd.testing.assert_frame_equal(whole.intervals, bootstrap_intervals(direct))
    read = "6 documents, 20 sequences of 12 tokens; 35 of 255 tokens (13.7%)"
    page = (tmp_path / "whole" / "report.html").read_text()
    assert read in repr(whole)
    assert read in page
    assert "95% interval" in page
    assert "The first sequence of the corpus" in page
    saved = json.loads((tmp_path / "whole" / "scan.json").read_text())
    assert "scores.safetensors" in saved["files"]
    assert saved["heads"][0]["excess_low"] == whole.intervals["excess_low"][0]
    assert list(pd.read_csv(tmp_path / "whole" / "scan.csv").score_high) == pytest.approx(
        list(whole.intervals["score_high"])
    )
    again: dict[str, Any] = {"model": model}
    exec(whole.call.replace("experiments.scan(", "again = experiments.scan("), again)
    assert list(again["again"].scores) == list(whole.scores)

    folders = [tmp_path / "shard0", *(tmp_path / f"shard{i}.safetensors" for i in range(1, 4))]
    scan(model, **options, shard="0/4", out=folders[0], page=write_page)
    for i, file in enumerate(folders[1:], 1):
        scan(model, **options, shard=f"{i}/4").scores.save(file)
    merged = experiments.merge_scans(folders, out=tmp_path / "merged", page=write_page)
    assert (
        merged.scores.settings["tokens"][0]["sequences"] == 20
    )  # 3 of each document, 4 of the last two: 11 tokens and a BOS each
    for one, other in zip(merged.scores, whole.scores, strict=True):
        assert (*one[:3], one.rows, one.n_sequences) == (*other[:3], other.rows, other.n_sequences)
        assert one[3:9] == pytest.approx(other[3:9], abs=1e-9)
    assert read in repr(merged)
    assert read in (tmp_path / "merged" / "report.html").read_text()
    half = experiments.merge_scans(folders[:2], partial=True)
    assert "Not read: 2/4, 3/4" in repr(half)
    half.scores.save(tmp_path / "half.safetensors")
    assert list(experiments.merge_scans([tmp_path / "half.safetensors", *folders[2:]]).scores) == list(merged.scores)
    for saved_ones, message in (
        (folders[:3], "1 of its shards are missing: 3/4"),
        ([*folders, folders[1]], "share documents, which would count twice"),
        ([tmp_path, *folders], "No scan was saved in"),
        ([], "nothing to merge"),
    ):
        with pytest.raises(CausalProbeError, match=message):
            experiments.merge_scans(saved_ones)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 5}, "`length` is about a corpus, and none was given"),
        ({"shard": "0/2"}, "`shard` is about a corpus"),
        ({"corpus": ["t3 t4"], "n_sequences": 3}, "`n_sequences` is about sequences that are made"),
        ({"corpus": ["t3 t4"], "shard": "3/2"}, "A shard is i/n"),
        ({"corpus": ["t3 t4"]}, "the model has no tokenizer"),
    ],
)
def test_what_does_not_go_with_a_corpus(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        scan(induction_model(), **options)
