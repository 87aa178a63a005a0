"""Attachment of heads: a planted head, and every number by hand from a Hugging Face model's own attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as parts

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.models import DisentangledTransformer
from causal_probe.syntax import dependency_heads, generated_sentences, read_conllu
from causal_probe.syntax.treebank import Sentence, check_sentence
from causal_probe.syntax.words import tokenize
from tests import tiny_huggingface

#: Which kind of word governs which: 0 is the root.
GOVERNOR = {1: 0, 2: 0, 3: 1, 4: 2, 5: 2}


def tokenizer() -> Any:
    """``w0`` to ``w5`` are words of one token, ``w6`` and on are spelt by bytes of their names, so have several."""
    words = {f"w{i}": i for i in range(6)} | {"w": 6, "##6": 7, "##7": 8, "##8": 9, "##9": 10, "[UNK]": 11}
    fast = Tokenizer(parts.WordPiece(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]")


def planted() -> Any:
    """L0H0 attends from each word to its governor, which stands before it; L0H1 from each governor's last dependent nowhere: evenly."""
    model = DisentangledTransformer(d_vocab=12, n_positions=8, heads=(2,))
    block = model.block(0, 0, query="token", key="token")
    for word, governor in GOVERNOR.items():
        block[word, governor] = 60
    model.tokenizer = tokenizer()
    return model


def sentences(n: int, seed: int = 0) -> list[Sentence]:
    """The same tree over six words, in random orders in which governors stand first."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        order: list[int] = [0]
        while len(order) < 6:
            ready = [word for word in GOVERNOR if word not in order and GOVERNOR[word] in order]
            order.append(int(rng.choice(ready)))
        governors = tuple(order.index(GOVERNOR[word]) if word else -1 for word in order)
        relations = tuple("a" if word in (1, 2) else "b" if word else "root" for word in order)
        found.append(Sentence(tuple(f"w{word}" for word in order), governors, relations))
    return found


def test_a_head_that_attends_to_each_governor_has_all_attachments() -> None:
    found = dependency_heads(planted(), sentences(60))
    best = found.of()
    assert (best.name, best.direction, best.words) == ("L0H0", "to governor", 150)
    assert best.uas == found.to_governor[0][0] == found.undirected[0][0] == found.tree == 1
    assert best.stderr == found.tree_stderr == 0
    assert best.offset_uas < 0.5
    assert {each.relation for each in found.attachments} == {"all", "a", "b"}
    assert all(each.p_value < 1e-6 for each in found.attachments)
    assert found.chance == pytest.approx(1 / 5)
    # An even head: a word sees those before it alike, so a right attachment is one of as many.
    places = [child for each in sentences(60)[1::2] for child in range(1, 6)]
    assert found.to_governor[0][1] == pytest.approx(np.mean([1 / child for child in places]), abs=1e-6)
    assert "L0H0" in str(found)
    assert len(found.to_pandas()) == 3


def test_a_head_that_is_no_better_than_neighbours_says_so() -> None:
    """Governor always the word before: the offset -1 is right everywhere, and no head can beat it."""
    chains = [Sentence(each.words, (-1, 0, 1, 2, 3, 4), each.relations) for each in sentences(20)]
    model = DisentangledTransformer(d_vocab=12, n_positions=8, heads=(1,))
    model.block(0, 0, query="position", key="position").diagonal(-1).fill_(60)
    model.tokenizer = tokenizer()
    best = dependency_heads(model, chains).of()
    assert (best.uas, best.offset, best.offset_uas, best.p_value) == (1, -1, 1, 1)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_attachments_by_hand(kind: str) -> None:
    """Several tokens a word; loops over Hugging Face's attention."""
    build = getattr(tiny_huggingface, kind)
    hugging_face = build(attn_implementation="eager")
    model: Any = to_hooked(hugging_face, tokenizer=tokenizer(), name="tiny")
    rng = np.random.default_rng(1)
    its = []
    for _ in range(12):
        n = int(rng.integers(3, 6))
        governors = (-1, *(int(rng.integers(child)) for child in range(1, n)))
        its.append(Sentence(tuple(f"w{rng.integers(10)}" for _ in range(n)), governors, ("x",) * n))
    found = dependency_heads(model, its)
    tokenized = tokenize(model.tokenizer, its)
    credit: dict[tuple[int, int, int], list[float]] = {}
    for number, ((_, governors, _), (tokens, word_of)) in enumerate(zip(its, tokenized, strict=True)):
        if number % 2 == 0:
            continue
        with torch.no_grad():
            attention = build(attn_implementation="eager")(torch.tensor([tokens]), output_attentions=True).attentions
        for layer, pattern in enumerate(attention):
            for head in range(pattern.shape[1]):
                words = len(governors)
                table = np.zeros((words, words))
                for a in range(words):
                    mine = [t for t, word in enumerate(word_of) if word == a]
                    for b in range(words):
                        theirs = [t for t, word in enumerate(word_of) if word == b]
                        if a != b:
                            table[a, b] = np.mean([sum(float(pattern[0, head, q, k]) for k in theirs) for q in mine])
                for child in range(1, words):
                    right = table[child].max() > 0 and int(table[child].argmax()) == governors[child]
                    back = table[:, child].max() > 0 and int(table[:, child].argmax()) == governors[child]
                    credit.setdefault((layer, head, 0), []).append(float(right))
                    credit.setdefault((layer, head, 1), []).append(float(back))
    for (layer, head, direction), values in credit.items():
        given = (found.to_governor, found.from_governor)[direction]
        assert given[layer][head] == pytest.approx(np.mean(values), abs=1e-9), (layer, head, direction)


def test_a_treebank_is_read_as_conllu(tmp_path: Path) -> None:
    rows = [
        "# sent_id = 1",
        "1-2\tdon't\t_\t_\t_\t_\t_\t_\t_\t_",
        "1\tdo\t_\tAUX\t_\t_\t3\taux\t_\t_",
        "2\tn't\t_\tPART\t_\t_\t3\tadvmod\t_\t_",
        "3\tgo\t_\tVERB\t_\t_\t0\troot\t_\t_",
        "3.1\tempty\t_\t_\t_\t_\t_\t_\t_\t_",
        "",
    ]
    file = tmp_path / "one.conllu"
    file.write_text("\n".join(rows) + "\n")
    assert read_conllu(file) == (Sentence(("do", "n't", "go"), (2, 2, -1), ("aux", "advmod", "root")),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no sentence"),
        ("1\ta\t_\t_\t_\t_\t1\troot\t_\t_\n\n", "no tree"),
        ("1\ta\t_\t_\t_\t_\t7\troot\t_\t_\n\n", "no word"),
        ("1\ta\t_\t_\t_\t_\t2\tx\t_\t_\n2\tb\t_\t_\t_\t_\t1\tx\t_\t_\n\n", "no tree"),
        ("1\ta\t_\t_\t_\t_\tzwei\tx\t_\t_\n\n", "no CoNLL-U"),
        ("plain text\n\n", "CoNLL-U|no sentence"),
    ],
)
def test_what_is_no_treebank_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.conllu"
    file.write_text(text)
    with pytest.raises(CausalProbeError, match=said):
        read_conllu(file)
    with pytest.raises(CausalProbeError, match="no file"):
        read_conllu(tmp_path / "none.conllu")


def test_what_can_t_be_attached_is_refused() -> None:
    model = planted()
    with pytest.raises(CausalProbeError, match="four sentences"):
        dependency_heads(model, sentences(3))
    with pytest.raises(CausalProbeError, match="no tree"):
        dependency_heads(model, [Sentence(("w1", "w2"), (1, 0), ("x", "x"))] * 4)
    with pytest.raises(CausalProbeError, match="three lists"):
        dependency_heads(model, 5)
    with pytest.raises(CausalProbeError, match="context holds 8"):
        dependency_heads(model, [Sentence(("w1",) * 9, (-1, *range(8)), ("x",) * 9)] * 4)
    with pytest.raises(CausalProbeError, match="no relation 'nsubj'"):
        dependency_heads(model, sentences(8)).of("nsubj")
    model.tokenizer = None
    with pytest.raises(CausalProbeError, match="fast tokenizer"):
        dependency_heads(model, sentences(4))


def test_generated_sentences_are_trees_without_crossing_edges() -> None:
    its = generated_sentences(300, seed=3)
    assert len(set(its)) == 300
    assert its[:5] == generated_sentences(5, seed=3)
    for number, sentence in enumerate(its):
        check_sentence(sentence, str(number))
        edges = [sorted((word, governor)) for word, governor in enumerate(sentence.governors) if governor >= 0]
        assert not any(a < c < b < d for a, b in edges for c, d in edges)
    assert {relation for each in its for relation in each.relations} == {
        "root", "nsubj", "obj", "det", "amod", "case", "nmod", "acl:relcl", "advmod"
    }  # fmt: skip


def test_a_file_is_asked_as_its_sentences_are(tmp_path: Path) -> None:
    file = Path(__file__).parent / "two.conllu"
    assert read_conllu(file)[1] == Sentence(("Birds", "sing", "well"), (1, -1, 1), ("nsubj", "root", "advmod"))
    text = "".join(
        "".join(f"{i}\t{w}\t_\t_\t_\t_\t{g + 1}\t{r}\t_\t_\n" for i, (w, g, r) in enumerate(zip(*each, strict=True), 1))
        + "\n"
        for each in sentences(8)
    )
    (tmp_path / "own.conllu").write_text(text)
    given, read = (dependency_heads(planted(), its) for its in (sentences(8), tmp_path / "own.conllu"))
    assert given.attachments == read.attachments


@pytest.mark.parametrize("sentence", [((1, 2), (1, -1), ("a", "b")), (("w1", "w2"), (1.0, -1.0), ("a", "b"))])
def test_words_are_text_and_governors_whole_numbers(sentence: Any) -> None:
    with pytest.raises(CausalProbeError, match="whole numbers"):
        dependency_heads(planted(), [sentence] * 4)
