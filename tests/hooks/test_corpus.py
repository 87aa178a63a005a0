"""Corpora: what the documents are, where sequences begin and end, and that shards add up to the whole."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_probe import CausalProbeError, hooks, probes, results
from causal_probe.hooks.corpus import CorpusCounts, missing_shards, read_documents
from causal_probe.probes.bootstrap import bootstrap_intervals
from causal_probe.probes.evidence import Evidence
from causal_probe.probes.head_scores import HeadScores
from tests import tiny_huggingface

TEMPLATES = ("previous-token", "duplicate-token")


@pytest.fixture(scope="module")
def model():
    return hooks.to_hooked(tiny_huggingface.llama().double(), tiny_huggingface.tokenizer(bos=True))


@pytest.fixture(scope="module")
def texts():
    """Documents of 0 to 14 tokens."""
    draw = np.random.default_rng(0)
    return [" ".join(f"t{token}" for token in draw.integers(3, 12, draw.integers(0, 15))) for _ in range(24)]


def test_sequences_end_where_documents_do(model):
    made = hooks.corpus(model, ["t3 t4 t5 t6 t7", "t8", "t9 t10"], length=3)
    assert [sequence.tolist() for sequence in made.sequences()] == [[1, 3, 4], [1, 5, 6], [1, 9, 10]]
    assert made.counts() == CorpusCounts(documents=3, sequences=3, tokens=8, left_over=2)
    assert torch.cat(list(made)).tolist() == [[1, 3, 4], [1, 5, 6], [1, 9, 10]]
    assert [sequence.tolist() for sequence in hooks.corpus(model, ["t3 t4 t5"], length=3, bos="no").sequences()] == [
        [3, 4, 5]
    ]


def test_files_folders_and_datasets_hold_the_same_documents(model, tmp_path):
    texts = ["t3 t4 t5\nt6\n", "t7 t8\n"]
    (tmp_path / "folder").mkdir()
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / "folder" / f"{name}.txt").write_text(text)
    (tmp_path / "folder" / "readme.md").write_text("no document")
    (tmp_path / "all").write_text("--\n".join(texts))
    rows = datasets.Dataset.from_dict({"text": texts})
    sources = [
        (texts, {}),
        (tmp_path / "folder", {}),
        ([Path(tmp_path / "a.txt"), Path(tmp_path / "b.txt")], {}),
        (tmp_path / "all", {"separator": "--"}),
        (rows, {}),
        (rows.to_iterable_dataset(), {}),
        (rows.to_iterable_dataset().rename_column("text", "body"), {"field": "body"}),
        (tmp_path / "rows.parquet", {}),
        (tmp_path / "lines.jsonl", {"field": "body"}),
    ]
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "lines.jsonl").write_text("\n\n".join(json.dumps({"body": text}) for text in texts))
    for source, options in sources:
        assert list(read_documents(source, **options)) == texts
    assert list(read_documents(tmp_path / "all")) == ["--\n".join(texts)]


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=2), st.randoms(use_true_random=False))
def test_any_split_into_shards_gives_the_whole(model, texts, splits, order):
    """Split into shards, and those again; merged in any order."""
    whole = hooks.corpus(model, texts, length=5)
    shards = [whole]
    for n in splits:
        shards = [piece for shard in shards for piece in shard.shards(n)]
    counts = CorpusCounts()
    for shard in shards:
        counts += shard.counts()
    assert counts == whole.counts()
    order.shuffle(shards)
    filled = [shard for shard in shards if shard.counts().sequences]
    once = probes.scan(model, whole, templates=TEMPLATES)
    graphs_once = probes.head_graphs(model, whole)
    merged, *rest = [probes.scan(model, shard, templates=TEMPLATES) for shard in shards]  # some of them empty
    graphs, *graphs_rest = [probes.head_graphs(model, shard) for shard in filled]
    merged = merged.merge(*rest)
    for other_graphs in graphs_rest:
        graphs = graphs.merge(other_graphs)
    (read,), (read_once,) = (scores.settings["tokens"] for scores in (merged, once))
    assert {**read, "shards": None} == {**read_once, "shards": None}
    assert missing_shards(read) == ()
    assert {name: read[name] for name in dataclasses.asdict(counts)} == dataclasses.asdict(counts)
    assert merged.shared == once.shared
    for one, other in zip(merged, once, strict=True):
        assert one[:3] == other[:3]
        assert (one.rows, one.n_sequences) == (other.rows, other.n_sequences)
        # what a sequence gives is kept as float32, and the order of a float64 sum may differ
        assert one[3:9] == pytest.approx(other[3:9], abs=1e-9)
    assert graphs.n_sequences == graphs_once.n_sequences
    for layer in range(2):
        np.testing.assert_allclose(graphs.values[layer], graphs_once.values[layer], rtol=0, atol=1e-12)
        np.testing.assert_allclose(graphs.stderr[layer], graphs_once.stderr[layer], rtol=0, atol=1e-7)


def test_saved_shards_merge_as_they_would_have(model, texts, tmp_path):
    shards = hooks.corpus(model, texts, length=5).shards(3)
    for i, shard in enumerate(shards):
        probes.scan(model, shard, templates=TEMPLATES).save(tmp_path / f"{i}-scores.safetensors")
        probes.head_graphs(model, shard).save(tmp_path / f"{i}-graphs.safetensors")
    scores = [HeadScores.load(tmp_path / f"{i}-scores.safetensors") for i in range(3)]
    direct = [probes.scan(model, shard, templates=TEMPLATES) for shard in shards]
    for one, other in zip(scores, direct, strict=True):
        assert list(one) == list(other)
        assert one.to_dict() == other.to_dict()
        assert one.templates == other.templates
    together = scores[0].merge(*scores[1:])
    assert list(together) == list(direct[0].merge(*direct[1:]))
    whole = probes.scan(model, hooks.corpus(model, texts, length=5), templates=TEMPLATES)
    columns = ["score_low", "score_high", "excess_low", "excess_high"]
    intervals = [bootstrap_intervals(each, resamples=100)[columns] for each in (together, whole)]
    np.testing.assert_allclose(*intervals, rtol=0, atol=1e-7)  # the order of the sequences decides nothing
    graphs = [Evidence.load(tmp_path / f"{i}-graphs.safetensors") for i in range(3)]
    merged, once = graphs[0].merge(graphs[1]).merge(graphs[2]), probes.head_graphs(model, whole_of(shards))
    for layer in range(2):
        np.testing.assert_allclose(merged.values[layer], once.values[layer], rtol=0, atol=1e-12)
    assert {**merged.provenance["corpus"], "shards": None} == {**once.provenance["corpus"], "shards": None}


def whole_of(shards):
    return dataclasses.replace(shards[0], shard=(0, 1))


def test_what_can_not_be_merged(model, texts, tmp_path):
    (tmp_path / "a").write_text("t3 t4 t5 t6\n--\nt7 t8 t9 t10\n")
    (tmp_path / "b").write_text("t3 t4 t5 t6\n")

    def scan(name, **options):
        made = hooks.corpus(model, tmp_path / name, **{"length": 3, "separator": "--", **options})
        return probes.scan(model, made, templates=TEMPLATES)

    with pytest.raises(CausalProbeError, match=r"shards 0/2 and 0/1 of .* share documents, which would count twice"):
        scan("a", shard="0/2").merge(scan("a"))
    with pytest.raises(CausalProbeError, match="their length differs, 3 and 4"):
        scan("a", shard="0/2").merge(scan("a", shard="1/2", length=4))
    both = scan("a", shard="1/2").merge(scan("b"))  # two corpora make a larger one
    (read,) = both.settings["tokens"]
    assert read["source"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert read["sequences"] == 2 + 2
    assert missing_shards(read) == (f"{tmp_path / 'a'} 0/2",)
    assert missing_shards(both.merge(scan("a", shard="0/2")).settings["tokens"][0]) == ()
    own = probes.Template("own", lambda tokens: tokens[:, :, None] == tokens[:, None], "mine")
    probes.scan(model, hooks.corpus(model, texts, length=5), templates=[own]).save(tmp_path / "own.safetensors")
    loaded = HeadScores.load(tmp_path / "own.safetensors")
    with pytest.raises(CausalProbeError, match="holds its name and not its function"):
        loaded.templates[0](torch.tensor([[1, 2]]))
    probes.head_graphs(model, hooks.corpus(model, texts, length=5)).save(tmp_path / "graphs.safetensors")
    for path, message in (
        (tmp_path / "nothing", "Can't read .*nothing"),
        (tmp_path / "a", "was expected to be a safetensors file"),
        (tmp_path / "graphs.safetensors", "holds evidence .Evidence., no HeadScores"),
    ):
        with pytest.raises(CausalProbeError, match=message):
            HeadScores.load(path)
    arrays, about = results.read_arrays(tmp_path / "own.safetensors")
    newer = {**about, "format": 2, "provenance": {"versions": {"causal-probe": "9.0"}}}
    results.write_arrays(tmp_path / "own.safetensors", arrays, about=newer)
    with pytest.raises(CausalProbeError, match=r"format 2, written by causal-probe 9\.0; .* Upgrade"):
        HeadScores.load(tmp_path / "own.safetensors")


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL", ".json"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_holds_json_is_never_read_as_prose(suffix, encoding, tmp_path):
    documents = [{"text": "t3 \u00e9"}, {"text": "t4", "more": 1}]
    lines = json.dumps(documents) if suffix == ".json" else "\n".join(map(json.dumps, documents))
    (tmp_path / f"a{suffix}").write_text(lines, encoding=encoding)
    for source in (tmp_path / f"a{suffix}", tmp_path):
        assert list(read_documents(source)) == ["t3 \u00e9", "t4"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".gz", ".zst", ".html", ".xml", ".yaml", ".arrow", ".npy", ".docx"])
def test_a_suffix_that_is_not_read_is_refused(suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_text("t3")
    with pytest.raises(
        CausalProbeError, match=f"is no file of documents: its name ends in {suffix}, and files in .txt"
    ):
        list(read_documents(tmp_path / f"a{suffix}"))
    with pytest.raises(CausalProbeError, match=f"also holds a{suffix}; of a folder .txt, .jsonl"):
        list(read_documents(tmp_path))


def test_a_folder_holds_documents_whatever_the_case_and_no_hidden_files_and_readmes(tmp_path):
    for name in ("A.TXT", "b.txt", "._b.txt", "._a.jsonl", "README.txt", "readme", "LICENSE"):
        (tmp_path / name).write_text(name)
    (tmp_path / "more").mkdir()
    assert list(read_documents(tmp_path)) == ["A.TXT", "b.txt"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("t3\n--\nt4", encoding="utf-8-sig")
    assert list(read_documents(tmp_path / "a.txt")) == ["t3\n--\nt4"]
    assert list(read_documents(tmp_path / "a.txt", separator="--")) == ["t3\n", "t4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": null}', "Line 1 of .* has no text: its 'text' is of type NoneType. Leave it out."),
        ("a.jsonl", '{"text": "t3"}\n{"body": 3}', "Line 2 of .* it has no 'text'. It has 'body': name the field."),
        ("a.jsonl", "{}", "It has nothing: name the field."),
        ("a.jsonl", "3", "Line 1 of .* has no text: it is of type int"),
        (
            "a.jsonl",
            '{"text": "t3 \\ud800"}',
            r"Line 1 of .* is no text: it holds '.ud800', half of a character, at place 3",
        ),
        ("a.jsonl", "[" * 100_000, "can't be read as JSON lines: it is nested too deep"),
        ("a.json", "[" * 100_000, "can't be read as a JSON list: it is nested too deep"),
        ("a.json", '{"text": "t3"}', "can't be read as a JSON list: it holds a dict"),
        ("a.txt", b"\xff\xfe", "can't be read as text in UTF-8"),
    ],
)
def test_a_document_without_text_is_refused_with_its_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CausalProbeError, match=message) as caught:
        list(read_documents(tmp_path / name))
    assert len(str(caught.value)) < 1000


def test_files_that_are_none_are_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(CausalProbeError, match="it is no file"):
        list(read_documents(tmp_path / "a.txt"))
    for name in ("x" * 5000, "~nouser/x.txt", "nul\0.txt"):
        with pytest.raises(CausalProbeError, match="can't be read: it is not there") as caught:
            list(read_documents(name))
        assert len(str(caught.value)) < 500
    with pytest.raises(CausalProbeError, match="half of a character"):
        list(read_documents(["t3", "\ud800"]))
    (tmp_path / "b.txt").write_text("t3")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(read_documents("~/b.txt")) == ["t3"]


def test_what_is_no_corpus(model, tmp_path):
    bare = tiny_huggingface.llama()
    (tmp_path / "empty").mkdir()
    for name in ("bad.jsonl", "bad.parquet"):
        (tmp_path / name).write_text("neither")
    datasets.Dataset.from_dict({"body": ["t3"]}).to_parquet(tmp_path / "other.parquet")
    for source, options, message in (
        (tmp_path / "empty", {"length": 4}, "holds no .txt, .jsonl, .ndjson, .json or .parquet file"),
        (tmp_path / "nothing.txt", {"length": 4}, "nothing.txt can't be read: it is not there"),
        (3, {"length": 4}, "found int"),
        ({"train": []}, {"length": 4}, "give one split"),
        ([{"content": "t3"}], {"length": 4}, "Document 0 has no text: it has no 'text'. It has 'content': name the"),
        (iter(["t3"]), {"length": 4}, "list_iterator can be read once"),
        (["t3"], {"length": 4, "shard": "2/2"}, "A shard is i/n, .* Found '2/2'"),
        (["t3"], {"length": 4, "shard": "one"}, "A shard is i/n"),
        (tmp_path / "bad.jsonl", {"length": 4}, "can't be read as JSON lines"),
        (tmp_path / "bad.parquet", {"length": 4}, "can't be read as Parquet"),
        (tmp_path / "other.parquet", {"length": 4}, "has no column 'text'; it has 'body'"),
        (["t3"], {"length": 1}, "from 2 .* to 32 are possible"),
        (["t3"], {"length": 33}, "from 2 .* to 32 are possible"),
    ):
        with pytest.raises(CausalProbeError, match=message):
            list(hooks.corpus(model, source, **options))
    with pytest.raises(CausalProbeError, match="no tokenizer"):
        hooks.corpus(hooks.to_hooked(bare), ["t3"], length=4)
    with pytest.raises(CausalProbeError, match="fills a sequence of 9 tokens: there are 1 documents of 1 tokens"):
        probes.scan(model, hooks.corpus(model, ["t3"], length=9), templates=TEMPLATES)
    with pytest.raises(CausalProbeError, match="one shard or more"):
        hooks.corpus(model, ["t3"], length=4).shards(0)
