"""Trees of charts against every tree, a planted encoder, and charts by another way of masking."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.syntax import generated_sentences, tree_projection
from causal_probe.syntax.chart import (
    agreement,
    balanced_tree,
    best_tree,
    bracket_f1,
    brackets_of,
    branching_tree,
    greedy_tree,
    micro_f1,
    random_tree,
    redrawn_chart,
    t_score,
)
from causal_probe.syntax.masked import masked_encoder
from causal_probe.syntax.projection import _chart
from causal_probe.syntax.treebank import Sentence
from causal_probe.syntax.words import Tokenized
from tests import tiny_huggingface
from tests.syntax.test_dependency_heads import tokenizer

Tree = dict[tuple[int, int], int]


def every_tree(i: int, j: int) -> Iterator[Tree]:
    if i == j:
        yield {}
    for k in range(i, j):
        for left in every_tree(i, k):
            for right in every_tree(k + 1, j):
                yield {(i, j): k, **left, **right}


def value(chart: np.ndarray, tree: Tree) -> float:
    return sum(chart[i, k] + chart[k + 1, j] for (i, j), k in tree.items())


@pytest.mark.parametrize("n", range(1, 9))
def test_the_best_tree_is_the_best_of_all(n: int) -> None:
    rng = np.random.default_rng(n)
    trees = list(every_tree(0, n - 1))
    assert len(trees) == [1, 1, 2, 5, 14, 42, 132, 429][n - 1]
    for _ in range(3):
        chart = rng.random((n, n))
        assert value(chart, best_tree(chart)) == pytest.approx(max(value(chart, tree) for tree in trees))
        assert greedy_tree(chart) in trees


def test_greedy_trees_are_seldom_the_best() -> None:
    rng = np.random.default_rng(0)
    charts = [rng.random((10, 10)) for _ in range(200)]
    assert np.mean([greedy_tree(chart) == best_tree(chart) for chart in charts]) < 0.1


def test_t_scores_of_random_trees_are_0_on_average_and_by_hand() -> None:
    rng = np.random.default_rng(1)
    chart = rng.random((6, 6))
    scores = [t_score(chart, random_tree(6, rng)) for _ in range(20_000)]
    assert abs(np.mean(scores)) < 4 * np.std(scores) / len(scores) ** 0.5
    by_hand = 0.0
    for (i, j), k in best_tree(chart).items():
        values = [chart[i, m] + chart[m + 1, j] for m in range(i, j)]
        by_hand += values[k - i] - sum(values) / len(values)
    assert t_score(chart, best_tree(chart)) == pytest.approx(by_hand)


def test_agreement_is_the_mean_over_all_spans_but_the_whole() -> None:
    chart = np.arange(9.0).reshape(3, 3)
    assert agreement(chart, {(0, 2): 0, (1, 2): 1}) == (chart[0, 0] + chart[1, 2] + chart[1, 1] + chart[2, 2]) / 4


def test_a_redrawn_chart_keeps_the_scores_of_each_length() -> None:
    chart = np.random.default_rng(2).random((7, 7))
    drawn = redrawn_chart(chart, np.random.default_rng(3))
    assert not np.array_equal(drawn, chart)
    for length in range(7):
        assert sorted(np.diag(drawn, length)) == sorted(np.diag(chart, length))


def test_trees_that_look_at_nothing_and_their_f1() -> None:
    right, left = (frozenset(branching_tree(4, right=which)) for which in (True, False))
    assert right == {(0, 3), (1, 3), (2, 3)}
    assert left == {(0, 3), (0, 2), (0, 1)}
    assert frozenset(balanced_tree(4)) == {(0, 3), (0, 1), (2, 3)}
    assert bracket_f1(right, left) == pytest.approx(1 / 3)
    assert bracket_f1(frozenset(), frozenset()) == 0
    assert micro_f1([right, left], [right, frozenset([(0, 3)])]) == pytest.approx(2 * 4 / (6 + 4))
    its = Sentence(("the", "cat", "saw", "a", "dog"), (1, 2, -1, 4, 2), ("x",) * 5)
    assert brackets_of(its) == {(0, 1), (0, 4), (3, 4)}


# ----------------------------------------------------------------------------------------------------- a planted encoder


def zigzag(n: int, seed: int) -> list[Sentence]:
    """Each word governs the next, which stands at either end of what is left: every tree is binary, and another."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        low, high, order = 0, 5, []
        while low <= high:
            take = low if rng.random() < 0.5 else high
            order.append(take)
            low, high = (low + 1, high) if take == low else (low, high - 1)
        governors = [-1] * 6
        for governor, word in itertools.pairwise(order):
            governors[word] = governor
        found.append(Sentence(tuple(f"w{w}" for w in rng.permutation(6)), tuple(governors), ("x",) * 6))
    return found


class Planted:
    """Each word's last vector is the mean of the visible words of its smallest bracket."""

    n_layers = 2

    def __init__(self, sentences: list[Sentence], *, causal: bool = False, blind: bool = True) -> None:
        self.tokenizer = tokenizer()
        self.brackets = {
            tuple(self.tokenizer(" ".join(each.words))["input_ids"]): brackets_of(each) for each in sentences
        }
        self.causal, self.blind = causal, blind

    def like(self, tokens: list[int], seen: torch.Tensor) -> Any:
        """Of other tokens in hidden places, the brackets of the first sentence that fits; an unknown sentence is one bracket."""
        fit = (
            brackets
            for known, brackets in self.brackets.items()
            if all(a == b or not see for a, b, see in zip(known, tokens, seen, strict=True))
        )
        return frozenset([(0, len(tokens) - 1)]) if seen.all() else next(fit)

    def __call__(self, tokens: torch.Tensor, visible: torch.Tensor, first_layer: int) -> torch.Tensor:
        rows = []
        for its, seen in zip(tokens.tolist(), visible, strict=True):
            brackets = self.brackets.get(tuple(its)) or self.like(its, seen)
            vectors = torch.nn.functional.one_hot(torch.tensor(its), 12).float()
            sees = seen.clone() if self.blind else torch.ones_like(seen)
            out = []
            for place in range(len(its)):
                i, j = min((b for b in brackets if b[0] <= place <= b[1]), key=lambda b: b[1] - b[0])
                end = place if self.causal else j
                chosen = [p for p in range(i, end + 1) if sees[p]] or [place]
                out.append(vectors[chosen].mean(0) + 0.01)
            rows.append(torch.stack(out))
        return torch.stack(rows)


def test_an_encoder_that_averages_brackets_has_their_trees() -> None:
    sentences = zigzag(24, 0)
    found = tree_projection(Planted(sentences), sentences)
    trees = {each.tree: each for each in found.trees}
    assert trees["encoder"].f1 == trees["encoder"].f1_paper == 1
    assert max(trees[name].f1 for name in ("right-branching", "left-branching", "balanced", "random")) < 0.7
    assert found.agreement > found.control + 5 * found.agreement_stderr
    for name in ("right-branching", "left-branching", "balanced", "random"):
        assert trees[name].p_value == 0.5**12  # the smallest that twelve sentences can show
    assert trees["encoder, greedy"].p_value is None
    assert len(found.charts) == 12
    for chart, sentence in zip(found.charts, sentences[1::2], strict=True):
        assert all(chart[span] == pytest.approx(1) for span in brackets_of(sentence))
    assert "encoder" in str(found)


def test_what_has_no_tree_is_refused() -> None:
    sentences = zigzag(8, 1)
    with pytest.raises(CausalProbeError, match="causal model"):
        tree_projection(Planted(sentences, causal=True), sentences)
    with pytest.raises(CausalProbeError, match="mask has no effect"):
        tree_projection(Planted(sentences, blind=False), sentences)
    with pytest.raises(CausalProbeError, match="Four sentences"):
        tree_projection(Planted(sentences), sentences, most_words=3)
    with pytest.raises(CausalProbeError, match="causal model"):
        tree_projection(tiny_huggingface.gpt2(), sentences, tokenizer=tokenizer())
    with pytest.raises(CausalProbeError, match="encoders of Hugging Face"):
        tree_projection(tiny_huggingface.mamba(), sentences, tokenizer=tokenizer())
    with pytest.raises(CausalProbeError, match="fast tokenizer"):
        tree_projection(tiny_huggingface.bert(), sentences)


@functools.cache
def bert() -> Any:
    return tiny_huggingface.bert(attn_implementation="eager").eval()


def test_a_chart_by_another_way_of_masking() -> None:
    """With every layer masked it is Hugging Face's own mask [batch, query, key]; with layers from 1 on, its layers by hand."""
    vectors, n_layers = masked_encoder(bert())
    assert n_layers == 2
    tokens, word_of = (1, 7, 8, 9, 12, 2), (-1, 0, 1, 1, 2, -1)
    encoder, ids = bert().bert, torch.tensor([tokens])

    def cosine(span: tuple[int, int], masked: torch.Tensor) -> float:
        inside = [place for place, word in enumerate(word_of) if span[0] <= word <= span[1]]
        with torch.no_grad():
            whole = encoder(ids).last_hidden_state[0]
        return float(torch.nn.functional.cosine_similarity(masked[inside].sum(0), whole[inside].sum(0), dim=0))

    for first in (0, 1):
        chart = _chart(vectors, Tokenized(tokens, word_of), first)
        for i in range(3):
            for j in range(i, 3):
                seen = torch.tensor([word < 0 or i <= word <= j for word in word_of])
                with torch.no_grad():
                    if first == 0:
                        masked = encoder(ids, attention_mask=seen[None]).last_hidden_state[0]
                    else:
                        hidden = encoder.encoder.layer[0](encoder.embeddings(ids))
                        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None, None]
                        out = encoder.encoder.layer[1](hidden, mask)
                        masked = (out[0] if isinstance(out, tuple) else out)[0]
                assert chart[i, j] == pytest.approx(cosine((i, j), masked), abs=1e-5)
        assert chart[2, 0] == 0


def test_an_untrained_encoder_scores_like_its_control() -> None:
    sentences = [each for each in generated_sentences(40, seed=5) if len(each.words) < 9]
    words = sorted({word for each in sentences for word in each.words})
    renamed = [Sentence(tuple(f"w{words.index(w) % 6}" for w in each.words), *each[1:]) for each in sentences]
    found = tree_projection(bert(), renamed, tokenizer=tokenizer())
    assert abs(found.t_score) < 4 * found.t_stderr + 0.01
    assert all(each.p_value is None or each.p_value > 0.01 for each in found.trees)
    assert {each.tree for each in found.trees} >= {"encoder", "random"}


def test_an_encoder_of_nan_is_refused() -> None:
    sentences = zigzag(8, 1)
    broken = tiny_huggingface.bert(attn_implementation="eager").eval()
    for parameter in broken.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(CausalProbeError, match="NaN"):
        tree_projection(broken, sentences, tokenizer=tokenizer())


def test_sentences_of_two_words_have_no_bracket_to_find() -> None:
    sentences = [Sentence((f"w{i}", f"w{i + 1}"), (1, -1), ("x", "root")) for i in range(4)]
    found = tree_projection(
        bert(), [*sentences, Sentence(("w0", "w1", "w2"), (1, 2, -1), ("x",) * 3)], tokenizer=tokenizer()
    )
    assert [each.f1 for each in found.trees] == [None] * 7
    assert all(each.p_value is None for each in found.trees)
