"""The attention patterns of ideal heads against every template, with values that were derived by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from causal_probe.probes import TEMPLATES, from_graph, scan, successor_of_parent
from causal_probe.probes.scoring import score_patterns

BOS = 99
#: The templates whose scores were derived for every ideal head.
NAMES = [
    "previous-token", "duplicate-token", "induction", "induction-2gram", "induction-3gram", "current-token", "first-token",
]  # fmt: skip

#: By template: tokens, and by query the keys that are its targets there, by hand. Each template that is shipped has a row.
GOLDEN = {
    "previous-token": ([3, 1, 4, 1], {1: [0], 2: [1], 3: [2]}),
    "duplicate-token": ([3, 1, 3, 1, 3], {2: [0], 3: [1], 4: [0, 2]}),
    "induction": ([3, 1, 3, 1, 3], {2: [1], 3: [2], 4: [1, 3]}),
    "induction-2gram": ([3, 1, 3, 1, 3], {3: [2], 4: [3]}),
    "induction-3gram": ([3, 1, 3, 1, 3], {4: [3]}),
    "current-token": ([3, 1, 4], {0: [0], 1: [1], 2: [2]}),
    "first-token": ([3, 1, 4], {0: [0], 1: [0], 2: [0]}),
}


def repeated(period, bos, batch=3):
    """[BOS] x_1 ... x_p x_1 ... x_p, other tokens in each sequence."""
    generator = torch.Generator().manual_seed(0)
    periods = torch.stack([torch.randperm(50, generator=generator)[:period] for _ in range(batch)])
    return torch.cat([torch.full((batch, bos), BOS), periods, periods], 1)


def one_hot(keys):
    """Pattern [1, 1, query, key] of a head whose row i is wholly on ``keys[i]``."""
    return torch.eye(len(keys), dtype=torch.float64)[torch.tensor(keys)][None, None]


def ideal_heads(period, bos):
    """Each attends where its name says, and to position 0 where there is no such key."""
    n, second = bos + 2 * period, bos + period
    rows = range(n)
    uniform = torch.ones(n, n, dtype=torch.float64).tril()
    return {
        "previous": one_hot([max(i - 1, 0) for i in rows]),
        "duplicate": one_hot([i - period if i >= second else 0 for i in rows]),
        "induction": one_hot([i - period + 1 if i >= second else 0 for i in rows]),
        "2gram": one_hot([i - period + 1 if i > second else 0 for i in rows]),
        "current": one_hot(list(rows)),
        "sink": one_hot([0 for _ in rows]),
        "uniform": (uniform / uniform.sum(-1, keepdim=True))[None, None],
    }


def by_hand(p, b):
    """The score of each ideal head on previous, duplicate, induction, 2-gram, 3-gram, current, first.

    There are n = b + 2p - 1 rows after row 0. Previous, current and first have a target in each of them (row 0 sees its target
    alone and is left out); duplicate and induction in the p rows of the second copy; the 2-gram (3-gram) in p - 1 (p - 2) of
    them, because the second copy's first token was not seen after the period's last. Without BOS, position 0 is the first
    token, which the first row of the second copy has as its duplicate.
    """
    n = b + 2 * p - 1
    no_bos = 1 - b

    def mean_of_inverse(first, last):
        return sum(1 / (i + 1) for i in range(first, last + 1)) / (last - first + 1)

    everywhere = mean_of_inverse(1, n)
    return {
        "previous": [1, 0, 0, 0, 0, 0, 1 / n],
        "duplicate": [1 / n, 1, 0, 0, 0, 0, p / n],
        "induction": [1 / n, 0, 1, 1, 1, 0, (b + p - 1) / n],
        "2gram": [1 / n, no_bos / p, (p - 1) / p, 1, 1, 0, (b + p) / n],
        "current": [0, 0, 0, 0, 0, 1, 0],
        "sink": [1 / n, no_bos / p, 0, 0, 0, 0, 1],
        "uniform": [
            everywhere,
            mean_of_inverse(b + p, n),
            mean_of_inverse(b + p, n),
            mean_of_inverse(b + p + 1, n),
            mean_of_inverse(b + p + 2, n),
            everywhere,
            everywhere,
        ],
    }


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_shipped_template_has_its_targets_where_they_were_put_by_hand(name):
    assert name in GOLDEN, "give the template a row in GOLDEN"
    tokens, expected = GOLDEN[name]
    targets = TEMPLATES[name](torch.tensor([tokens]))[0]
    found = {query: row.nonzero().flatten().tolist() for query, row in enumerate(targets) if row.any()}
    assert found == expected


@pytest.mark.parametrize("bos", [0, 1])
@pytest.mark.parametrize("period", [4, 5, 12, 13])
def test_ideal_heads_score_what_was_derived_by_hand(period, bos):
    tokens, heads = repeated(period, bos), ideal_heads(period, bos)
    pattern = torch.cat(list(heads.values()), 1).expand(3, -1, -1, -1)
    found = score_patterns([pattern], tokens, NAMES)
    expected = by_hand(period, bos)
    for head, name in enumerate(heads):
        scores = [found.of(0, head, template).score for template in NAMES]
        np.testing.assert_allclose(scores, expected[name], atol=1e-6, err_msg=name)
    chance = [found.of(0, 0, template).chance for template in NAMES]
    np.testing.assert_allclose(chance, expected["uniform"], atol=1e-12)
    n = bos + 2 * period - 1
    rows = [n, period, period, period - 1, period - 2, n, n]
    assert [found.of(0, 0, template).rows for template in NAMES] == [3 * count for count in rows]


def test_the_excess_of_an_ideal_head_is_one_and_that_of_uniform_attention_zero():
    heads = ideal_heads(6, 1)
    found = score_patterns([torch.cat(list(heads.values()), 1)], repeated(6, 1, batch=1))
    own = dict(zip(["previous", "duplicate", "induction", "2gram", "current", "sink"], [0, 1, 2, 3, 5, 6], strict=True))
    for name, template in own.items():
        assert found.of(0, list(heads).index(name), NAMES[template]).excess == pytest.approx(1, abs=1e-6)
    for template in NAMES:
        assert found.of(0, list(heads).index("uniform"), template).excess == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("period", [6, 7])
@pytest.mark.parametrize("bos", [0, 1])
def test_an_induction_head_that_is_off_by_one_is_none(period, bos):
    second = bos + period
    rows = range(bos + 2 * period)
    past = one_hot([i - period if i >= second else 0 for i in rows])
    future = one_hot([i - period + 2 if i >= second else 0 for i in rows])
    found = score_patterns([torch.cat([past, future], 1)], repeated(period, bos, batch=1))
    for head in (0, 1):
        shifted = found.of(0, head, "induction")
        assert shifted.score == 0
        assert shifted.excess == pytest.approx(-shifted.chance / (1 - shifted.chance))
        assert shifted.excess < -0.05
    assert found.of(0, 0, "duplicate-token").score == 1
    assert found.of(0, 1, "duplicate-token").score == 0


def test_where_fewer_tokens_match_the_n_gram_heads_come_apart():
    #                       0  1  2  3  4  5  6  7  8  9
    tokens = torch.tensor([[7, 8, 9, 8, 5, 7, 8, 9, 8, 5]])
    induction = torch.zeros(10, 10)
    for query, keys in {3: [2], 5: [1], 6: [2, 4], 7: [3], 8: [2, 4, 7], 9: [5]}.items():
        induction[query, keys] = 1 / len(keys)
    for query in (0, 1, 2, 4):
        induction[query, 0] = 1
    two = one_hot([0, 0, 0, 0, 0, 0, 2, 3, 4, 5]).float()
    three = one_hot([0, 0, 0, 0, 0, 0, 0, 3, 4, 5]).float()
    found = score_patterns([torch.cat([induction[None, None], two, three], 1)], tokens)
    names = ["induction", "induction-2gram", "induction-3gram"]
    scores = [[found.of(0, head, name).score for name in names] for head in range(3)]
    # Row 6 is split in two and row 8 in three: (1/2 + 1 + 1/3 + 1) / 4 and (1 + 1/3 + 1) / 3. The 2-gram head misses rows 3 and 5.
    expected = [[1, 17 / 24, 7 / 9], [4 / 6, 1, 1], [3 / 6, 3 / 4, 1]]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert [found.of(0, 0, name).rows for name in names] == [6, 4, 3]
    chance = found.of(0, 0, "induction").chance
    assert chance == pytest.approx((1 / 4 + 1 / 6 + 2 / 7 + 1 / 8 + 3 / 9 + 1 / 10) / 6)


def test_only_the_rows_asked_for_count():
    period, bos = 5, 1
    heads = ideal_heads(period, bos)
    pattern = torch.cat([heads["induction"], heads["previous"]], 1)
    tokens = repeated(period, bos, batch=1)
    last = score_patterns([pattern], tokens, queries=[-1])
    assert (last.of(0, 0, "induction").rows, last.of(0, 0, "induction").score) == (1, 1)
    assert last.of(0, 1, "previous-token").chance == pytest.approx(1 / 11)
    first = score_patterns([pattern], tokens, queries=range(1, bos + period))
    assert first.of(0, 0, "induction").score is None
    assert first.of(0, 0, "previous-token").score == pytest.approx(
        1 / 5
    )  # of its rows on position 0, row 1's is the previous


def test_graphs_are_templates():
    from causal_probe.graphs import chain, from_parents

    graph = from_parents([None, 0, 0, 2, None])
    tokens = torch.tensor([[1, 2, 3, 3, 4, 1], [1, 2, 1, 2, 3, 3]])
    rows = {"parents": [0, 0, 0, 2, 0, 0], "previous": [0, 0, 1, 2, 3, 4]}
    pattern = torch.cat([one_hot(keys) for keys in rows.values()], 1).expand(2, -1, -1, -1)
    templates = [
        from_graph(graph),
        successor_of_parent(graph),
        successor_of_parent(chain(6), name="chain"),
        "induction",
    ]
    found = score_patterns([pattern], tokens, templates=templates)
    # Rows 1, 2 and 3 have a parent; "previous" agrees with it in rows 1 (0) and 3 (2).
    assert found.of(0, 0, "graph").score == 1
    assert found.of(0, 1, "graph").score == pytest.approx(2 / 3)
    assert found.of(0, 0, "graph").chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    # The children of 0 are {1, 2}, of 2 {3}. First sequence: row 3 (token 3, as node 2) -> {3}; row 5 (token 1, as node 0) ->
    # {1, 2}. Second: row 2 (token 1, as 0) -> {1, 2}; no later row repeats the token of node 0 or of node 2.
    assert found.of(0, 0, "successor-of-parent").rows == 3
    assert found.of(0, 0, "successor-of-parent").chance == pytest.approx(((1 / 4 + 2 / 6) / 2 + 2 / 3) / 2)
    assert found.of(0, 1, "successor-of-parent").score == pytest.approx((0 + 1) / 2)  # row 2 is on key 1
    assert found.coinciding == (("chain", "induction"),)


def test_a_perfect_head_scores_as_transformer_lens_scores_it_up_to_the_rows_without_a_target():
    """detect_head's "mul" is our score x rows with a target / all rows: 0.495 for a perfect induction head on BOS + 50 + 50."""
    from transformer_lens import head_detector

    patterns = torch.cat(list(ideal_heads(50, 1).values()), 1)
    tokens = repeated(50, 1, batch=1)
    found = score_patterns([patterns], tokens)
    ours, theirs = found.of(0, 2, "induction"), head_detector.get_induction_head_detection_pattern(tokens)
    mul = head_detector.compute_head_attention_similarity_score(
        patterns[0, 2], theirs, exclude_bos=False, exclude_current_token=False, error_measure="mul"
    )
    assert ours.score == pytest.approx(1)
    assert mul == pytest.approx(50 / 101) == pytest.approx(ours.score * ours.rows / 101)


@pytest.mark.parametrize("name", ["previous", "duplicate", "induction"])
def test_random_patterns_score_as_transformer_lens_scores_them(name):
    from transformer_lens import head_detector

    template = "induction" if name == "induction" else f"{name}-token"
    detection = getattr(head_detector, f"get_{template.replace('-', '_')}_head_detection_pattern")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(6, (4, 20), generator=generator)
    raw = torch.randn(4, 3, 20, 20, generator=generator, dtype=torch.float64)
    pattern = raw.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(-1)
    for sequence in range(4):
        found = score_patterns([pattern[[sequence]]], tokens[[sequence]], templates=[template])
        for head in range(3):
            ours = found.of(0, head, template)
            mul = head_detector.compute_head_attention_similarity_score(
                pattern[sequence, head],
                detection(tokens[[sequence]]).double(),
                exclude_bos=False,
                exclude_current_token=False,
                error_measure="mul",
            )
            # Theirs counts a row whose targets are all visible keys; only row 1 with both keys its targets can be one.
            assert found.of(0, head, template).rows == int((detection(tokens[[sequence]]).sum(-1) > 0).sum())
            assert ours.score * ours.rows / 20 == pytest.approx(mul, abs=1e-6)


def test_the_model_route_gives_what_the_pattern_route_gives():
    from tests.tiny_models import disentangled, random_tokens

    model, tokens = disentangled((2, 3)), random_tokens(9)
    _, cache = model.run_with_cache(tokens)
    patterns = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in (0, 1)]
    by_model, by_pattern = scan(model, tokens, batch_size=4), score_patterns(patterns, tokens)
    assert by_model.heads == (2, 3)
    for one, other in zip(by_model, by_pattern, strict=True):
        assert one[:3] == other[:3]
        assert one[3:] == pytest.approx(other[3:], abs=1e-6)
