"""Corpora: what the documents are, where sequences begin and end, and that shards add up to the whole."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_probe import CausalProbeError, hooks, probes
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
    assert made.counts() == hooks.CorpusCounts(documents=3, sequences=3, tokens=8, left_over=2)
    assert torch.cat(list(made)).tolist() == [[1, 3, 4], [1, 5, 6], [1, 9, 10]]
    assert [sequence.tolist() for sequence in hooks.corpus(model, ["t3 t4 t5"], length=3, bos="no").sequences()] == [
        [3, 4, 5]
    ]


def test_files_folders_and_datasets_hold_the_same_documents(model, tmp_path):
    texts = ["t3 t4 t5\nt6\n", "t7 t8\n"]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "all").write_text("--\n".join(texts))
    rows = datasets.Dataset.from_dict({"text": texts})
    sources = [
        (texts, {}),
        (tmp_path, {}),
        ([Path(tmp_path / "a.txt"), Path(tmp_path / "b.txt")], {}),
        (tmp_path / "all", {"separator": "--"}),
        (rows, {}),
        (rows.to_iterable_dataset(), {}),
    ]
    for source, options in sources:
        assert list(hooks.read_documents(source, **options)) == texts
    assert list(hooks.read_documents(tmp_path / "all")) == ["--\n".join(texts)]


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=2), st.randoms(use_true_random=False))
def test_any_split_into_shards_gives_the_whole(model, texts, splits, order):
    """Split into shards, and those again; merged in any order."""
    whole = hooks.corpus(model, texts, length=5)
    shards = [whole]
    for n in splits:
        shards = [piece for shard in shards for piece in shard.shards(n)]
    counts = hooks.CorpusCounts()
    for shard in shards:
        counts += shard.counts()
    assert counts == whole.counts()
    order.shuffle(shards)
    filled = [shard for shard in shards if shard.counts().sequences]
    once = probes.scan(model, whole, templates=TEMPLATES)
    graphs_once = probes.head_graphs(model, whole)
    merged, *rest = [probes.scan(model, shard, templates=TEMPLATES) for shard in filled]
    graphs, *graphs_rest = [probes.head_graphs(model, shard) for shard in filled]
    for other, other_graphs in zip(rest, graphs_rest, strict=True):
        merged, graphs = merged.merge(other), graphs.merge(other_graphs)
    assert merged.shared == once.shared
    for one, other in zip(merged, once, strict=True):
        assert one[:3] == other[:3]
        assert (one.rows, one.sequences) == (other.rows, other.sequences)
        # what a sequence gives is kept as float32, and the order of a float64 sum may differ
        assert one[3:9] == pytest.approx(other[3:9], abs=1e-9)
    assert graphs.sequences == graphs_once.sequences
    for layer in range(2):
        np.testing.assert_allclose(graphs.weights[layer], graphs_once.weights[layer], rtol=0, atol=1e-12)
        np.testing.assert_allclose(graphs.stderr[layer], graphs_once.stderr[layer], rtol=0, atol=1e-7)


def test_what_is_no_corpus(model, tmp_path):
    bare = tiny_huggingface.llama()
    for source, options, message in (
        (tmp_path, {"length": 4}, "holds no .txt file"),
        (tmp_path / "nothing.txt", {"length": 4}, "can't be read as text"),
        (3, {"length": 4}, "found int"),
        ({"train": []}, {"length": 4}, "give one split"),
        ([{"content": "t3"}], {"length": 4}, "Document 0 has no text: its 'text' is of type NoneType"),
        (["t3"], {"length": 1}, "from 2 .* to 32 are possible"),
        (["t3"], {"length": 33}, "from 2 .* to 32 are possible"),
    ):
        with pytest.raises(CausalProbeError, match=message):
            list(hooks.corpus(model, source, **options))
    with pytest.raises(CausalProbeError, match="no tokenizer"):
        hooks.corpus(hooks.to_hooked(bare), ["t3"], length=4)
    with pytest.raises(CausalProbeError, match="no sequences"):
        probes.scan(model, hooks.corpus(model, ["t3"], length=9), templates=TEMPLATES)
    with pytest.raises(CausalProbeError, match="one shard or more"):
        hooks.corpus(model, ["t3"], length=4).shards(0)
