"""Scanning: against plain loops over the full cache, in pieces, on made sequences, on models that have learnt nothing."""

from __future__ import annotations

import gc
import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import from_parents
from causal_probe.hooks import preflight, to_hooked
from causal_probe.hooks.means import mean_patterns
from causal_probe.hooks.record import micro_batch_size
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import (
    TEMPLATES,
    Template,
    from_graph,
    offset,
    repeated_tokens,
    scan,
    sequences,
    successor_of_parent,
    template,
)
from causal_probe.probes.head_scores import HeadScores
from causal_probe.probes.scoring import score_patterns
from causal_probe.probes.sequences import Sequences, ngram_tokens
from causal_probe.probes.template_sums import TemplateSums
from tests.probes import oracle
from tests.tiny_models import MODELS, disentangled, random_tokens, transformer_lens

GRAPH = from_parents([None, 0, 0, [1, 2], None, 3, 5])
SCORED = [*TEMPLATES, "offset-2", "induction-4gram", from_graph(GRAPH), successor_of_parent(GRAPH)]
NAMES = [found if isinstance(found, str) else found.name for found in SCORED]


def cached_patterns(model, tokens):
    _, cache = model.run_with_cache(tokens)
    return [cache[f"blocks.{layer}.attn.hook_pattern"].detach() for layer in range(model.cfg.n_layers)]


def equal(one: HeadScores, other: HeadScores) -> bool:
    """Whether every raw number is the same, to the last bit."""
    return all(
        np.array_equal(mine, theirs)
        for name in one.names
        for mine, theirs in zip(arrays(one.sums[name]), arrays(other.sums[name]), strict=True)
    ) and (one.names, one.shared) == (other.names, other.shared)


def arrays(evidence: TemplateSums):
    return [*evidence.attention, *evidence.sink, evidence.rows, evidence.chance]


# ------------------------------------------------------------------------------------------------------------ definition


@pytest.mark.parametrize("queries", [None, [-1], [2, 5]])
@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_plain_loops_over_the_full_cache(kind, queries):
    model, tokens = MODELS[kind](), random_tokens(6, seed=3)
    found = scan(model, tokens, templates=SCORED, batch_size=4, queries=queries)
    rows = None if queries is None else [query % 7 for query in queries]
    defined = 0
    for layer, pattern in enumerate(cached_patterns(model, tokens)):
        for head in range(pattern.shape[1]):
            for name in NAMES:
                ours = found.of(layer, head, name)
                theirs = oracle.score(
                    name, pattern[:, head].tolist(), tokens.tolist(), edges=set(GRAPH.edges), queries=rows
                )
                values = (ours.score, ours.chance, ours.excess, ours.stderr, ours.sink, ours.rows, ours.n_sequences)
                for mine, other in zip(values, theirs, strict=True):
                    assert mine == (other if other is None else pytest.approx(other, abs=1e-6)), (name, layer, head)
                defined += ours.score is not None
    assert defined > 2 * len(NAMES)


def test_large_and_dense_targets_are_scored_in_pieces(monkeypatch):
    """The same numbers, whatever the pieces: of sequences when templates are compiled, of pairs when patterns are read."""
    from causal_probe.probes import scoring as targets

    tokens = random_tokens(5, n=7)
    pattern = torch.rand(5, 3, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril()
    pattern /= pattern.sum(-1, keepdim=True)
    dense = Template("dense", lambda tokens: torch.ones(7, 7, dtype=torch.bool).tril(-1))
    whole = score_patterns([pattern], tokens, templates=["induction", dense])
    monkeypatch.setattr(targets, "MASKS", 2 * 2 * 49)
    monkeypatch.setattr(targets, "NUMBERS", 2 * 3 * 4)
    assert len(targets.compile_targets([*TEMPLATES.values()][:2], tokens)) == 3
    pieces = score_patterns([pattern], tokens, templates=["induction", dense])
    for one, other in zip(whole, pieces, strict=True):
        assert one == pytest.approx(other)
    assert whole.shared == pieces.shared
    assert whole.of(0, 0, "dense").rows == 5 * 6


def test_the_standard_error_of_the_excess_is_that_of_the_jackknife():
    """Chance differs between sequences here, so the excess is a ratio of two means."""
    generator = np.random.default_rng(0)
    rows = generator.integers(1, 9, 300)
    chance = rows * generator.uniform(0.05, 0.4, 300)
    attention = (chance + rows * generator.uniform(0, 0.5, 300))[:, None].astype(np.float32)
    evidence = TemplateSums((attention,), (attention,), rows[:, None], chance[:, None])

    def excess(keep):
        score, expected = (attention[keep, 0] / rows[keep]).mean(), (chance[keep] / rows[keep]).mean()
        return (score - expected) / (1 - expected)

    left_out = np.array([excess(np.arange(300) != i) for i in range(300)])
    jackknife = math.sqrt(299 / 300 * ((left_out - left_out.mean()) ** 2).sum())
    assert evidence.summary[0]["excess_stderr"][0] == pytest.approx(jackknife, rel=0.01)
    assert evidence.summary[0]["excess"][0] == pytest.approx(excess(np.arange(300)))


def test_sequences_without_a_row_are_left_out_and_counted():
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3], [1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5]])  # induction in 3, 1 and 0 rows
    pattern = torch.full((3, 1, 6, 6), 1.0, dtype=torch.float64).tril()
    pattern /= pattern.sum(-1, keepdim=True)
    found = score_patterns([pattern], tokens, templates=["induction", "duplicate-token"]).of(0, 0, "induction")
    assert (found.rows, found.n_sequences) == (4, 2)
    assert found.score == pytest.approx(((1 / 4 + 1 / 5 + 1 / 6) / 3 + 1 / 6) / 2)
    one = score_patterns([pattern[1:]], tokens[1:], templates=["induction"]).of(0, 0, "induction")
    assert (one.score, one.stderr, one.excess_stderr) == (pytest.approx(1 / 6), None, None)


# ----------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("kind", MODELS)
def test_a_merge_is_one_run_over_both(kind):
    model, tokens = MODELS[kind](), random_tokens(8)
    whole = scan(model, tokens, templates=SCORED, batch_size=2)
    first = scan(model, tokens[:2], templates=SCORED, batch_size=2)
    merged = first.merge(scan(model, tokens[2:], templates=SCORED, batch_size=2))
    assert equal(whole, merged)
    assert not equal(whole, first.merge(replace(first)).merge(replace(first)).merge(replace(first)))
    assert merged.settings == whole.settings
    assert list(merged) == list(whole)


def test_merged_runs_on_made_sequences_say_what_both_were():
    model = disentangled(scale=0.3)
    one, other = (scan(model, templates="induction", n_sequences=4, seed=seed) for seed in (0, 1))
    merged = one.merge(other)
    assert [tokens[0]["seed"] for tokens in merged.settings["tokens"]] == [0, 1]
    assert len(merged.sums["induction"].rows) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": ["induction"]}, "templates differ"),
        ({"queries": [-1]}, "queries differ"),
        ({"model": transformer_lens}, "models differ"),
        ({"model": lambda: disentangled((1, 1))}, r"heads differ, \(2, 1\) and \(1, 1\)"),
    ],
)
def test_what_does_not_fit_is_not_merged(change, message):
    def run(model=disentangled, **options):
        return scan(model(), random_tokens(2), **{"templates": ["induction", "previous-token"], **options})

    with pytest.raises(CausalProbeError, match=message):
        run().merge(run(**change))


def test_the_batch_size_changes_nothing():
    model, tokens = disentangled(), random_tokens(7)
    whole = scan(model, tokens)
    assert all(equal(whole, scan(model, tokens, batch_size=size)) for size in (1, 3, 7))
    assert equal(whole, scan(model, [tokens[:4], SimpleNamespace(tokens=tokens[4:])]))


def test_the_default_batch_keeps_patterns_and_logits_small():
    def batch(**cfg):
        model = disentangled()
        vars(model.cfg).update(cfg)
        return micro_batch_size(model, 512)

    assert batch(n_layers=12, n_heads=12, d_vocab=50_257) == 1  # 144 patterns of 1 MiB: two sequences are above 256 MiB
    assert batch(n_layers=2, n_heads=2, d_vocab=50_257) == 2  # logits of 98 MiB
    assert batch(n_layers=2, n_heads=2, d_vocab=10) == 64


def test_no_pattern_outlives_its_hook():
    """At the last of eight hooks, its own pattern is alive, and at most the one before, on the model's own stack."""
    model, alive = disentangled(), []

    def count(pattern, hook):
        kept = (value for value in gc.get_objects() if issubclass(type(value), torch.Tensor))
        alive.append(len({value.data_ptr() for value in kept if value.shape[0:1] + value.shape[2:] == (1, 7, 7)}))

    def batches():
        yield from random_tokens(3).split(1)
        model.blocks[1].attn.hook_pattern.add_hook(count)
        yield random_tokens(1)

    scan(model, batches(), templates=["induction", "previous-token"])
    assert alive in ([1], [2])


def test_the_model_is_left_as_it_was_also_after_an_exception():
    model = disentangled()
    model.train()
    model.A[0].requires_grad_(False)
    fired = []
    model.blocks[0].attn.hook_pattern.add_hook(lambda pattern, hook: fired.append(1))

    def fail(tokens):
        raise RuntimeError("on purpose")

    scan(model, random_tokens(2))
    with pytest.raises(RuntimeError, match="on purpose"):
        scan(model, random_tokens(2), templates=Template("fails", fail))
    assert fired
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.A] == [False, True]
    assert [len(point.fwd_hooks) for point in model.hook_dict.values() if point.fwd_hooks] == [1]


# --------------------------------------------------------------------------------------------------------- what is called


def set_by_hand(d_vocab=9, n_positions=19):
    """L0H0 a previous-token head, L0H1 uniform; L1H0 an induction head."""
    model = DisentangledTransformer(d_vocab, n_positions, (2, 1))
    model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)
    return model


def test_heads_set_by_hand_are_called_what_they_are():
    found = scan(set_by_hand())
    assert {(head.layer, head.head, head.template) for head in found.called()} == {
        (0, 0, "previous-token"),
        (1, 0, "induction"),
    }
    assert [(head.layer, head.head) for head in found.top("induction", 1)] == [(1, 0)]
    assert [len(found.top("induction", k)) for k in (2, 10)] == [2, 3]
    best = found.top("induction")
    assert [head.score for head in best] == sorted((head.score for head in best), reverse=True)
    assert found.called(minimum=0.999) == tuple(head for head in found.called() if head.excess > 0.999)
    assert not scan(set_by_hand(), templates="induction", n_sequences=1).called()  # one sequence has no standard error


def test_uniform_attention_has_no_excess():
    found = scan(DisentangledTransformer(9, 19, (2, 1)), templates=SCORED[:8])
    assert len(found.names) == 8
    assert max(abs(head.excess) for head in found) < 1e-6
    assert not found.called(minimum=0.01)


def test_a_model_that_does_not_use_its_patterns_is_refused():
    from tests import tiny_huggingface

    model = to_hooked(tiny_huggingface.bert(), tiny_huggingface.tokenizer())
    with pytest.raises(
        CausalProbeError, match="attend to later positions"
    ):  # what they show is right, but an encoder's
        scan(model, tiny_huggingface.tokens())
    with pytest.raises(CausalProbeError, match=r"decorative, for the model's output does not depend"):
        preflight(model, tiny_huggingface.tokens())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_a_model_that_was_stopped_early_runs_on_as_before(kind):
    """A scan ends behind the last block; with the logits, nothing else of the model is lost."""
    from tests import tiny_huggingface

    model, tokens = to_hooked(getattr(tiny_huggingface, kind)()), tiny_huggingface.tokens()
    before = model(tokens)
    unembedded = []
    model.unembed.register_forward_hook(lambda *_: unembedded.append(1))
    mean_patterns(model, tokens)
    assert not unembedded
    scan(model, tokens)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert torch.equal(model(tokens), before)
    assert unembedded
    torch.testing.assert_close(model(tokens[:, :5]), before[:, :5])  # no keys and values of the scan are left over


def test_what_is_no_hooked_model_is_told():
    with pytest.raises(
        CausalProbeError, match="A Linear can't be probed: it has no cfg, hook_dict, hooks, run_with_hooks"
    ):
        scan(torch.nn.Linear(2, 2))


def random_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager")
    )


def random_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, max_position_embeddings=64, num_key_value_heads=2, attn_implementation="eager", **shape
        )
    )


@pytest.mark.parametrize("architecture", [random_gpt2, random_llama])
def test_random_models_are_called_nothing(architecture):
    """Twenty draws of the weights; patterns are checked to be the model's own, neither uniform nor all the same."""
    torch.manual_seed(0)
    model = to_hooked(architecture())
    largest = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        found = scan(model, n_sequences=4)
        assert found.names == tuple(TEMPLATES)
        assert not found.called()
        largest.append(max(abs(head.excess) for head in found))
    assert min(largest) > 0.01
    assert len(set(largest)) == 20


def test_templates_that_coincide_on_the_data_are_reported():
    model = set_by_hand()
    found = scan(model, templates=["previous-token", "offset-1", "duplicate-token", "induction", "offset-9"])
    assert found.coinciding == (("previous-token", "offset-1"), ("duplicate-token", "offset-9"))
    assert found.overlap("previous-token", "offset-1") == 1
    assert found.overlap("previous-token", "duplicate-token") == 0
    assert "the same targets on these sequences: previous-token, offset-1" in repr(found)
    grams = ["induction", "induction-2gram", "induction-3gram"]
    given = scan(model, repeated_tokens(model).tokens, templates=grams)
    assert 0.8 < given.overlap(*grams[:2]) < 1  # they differ in the first row of the second copy, and only there
    assert scan(model, templates=grams[:2]).overlap(*grams[:2]) is None  # each on its own sequences
    ngrams = ngram_tokens(DisentangledTransformer(20, 49), n=3).tokens
    apart = scan(DisentangledTransformer(20, 49), ngrams, templates=grams)
    assert apart.overlap(*grams[:2]) < 0.6 > apart.overlap(*grams[1:])


def every_other(model, *, n_sequences=None, period=None, bos="auto", seed=0):
    """x y x z x ..., as ``shown_by`` of a template of one's own."""
    tokens = torch.randint(1, 5, (n_sequences or 3, 8), generator=torch.Generator().manual_seed(seed))
    tokens[:, ::2] = 0
    return Sequences(tokens, {"kind": "", "n_sequences": len(tokens)})


def test_a_template_brings_the_sequences_that_show_it():
    model = DisentangledTransformer(5, 8)
    model.block(0, 0, query="position", key="position").diagonal(-2).fill_(30)
    own = Template(
        "same-token-two-back",
        lambda tokens: offset(2)(tokens) & template("duplicate-token")(tokens),
        shown_by=every_other,
    )
    found = scan(model, templates=["previous-token", own, "induction-2gram"])
    assert [(its["kind"], its["templates"]) for its in found.settings["tokens"]] == [
        ("repeated", ["previous-token"]),
        ("every_other", ["same-token-two-back"]),
        ("2-gram", ["induction-2gram"]),
    ]
    assert found.of(0, 0, own.name).score == pytest.approx(1)
    assert found.overlap(own.name, "previous-token") is None
    with pytest.raises(CausalProbeError, match="no sequences of the kind 'walks'; there are 'repeated', 'N-gram'"):
        scan(model, templates=Template("odd", own.targets, shown_by="walks"))


# -------------------------------------------------------------------------------------------------------- made sequences


class Tokenizer:
    """Adds token 7 in front; 7 (BOS), 8 (EOS) and 9 (padding) are special; 10 and 11 are never given."""

    bos_token_id, eos_token_id, pad_token_id = 7, 8, 9
    all_special_ids = (7, 8, 9)
    added_tokens_decoder = {}  # noqa: RUF012 - as Hugging Face has it

    def __init__(self, adds=True, fragments=()):
        self.adds = adds
        self.fragments = fragments

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [7] * (self.adds and add_special_tokens) + [0] * len(text)}

    def batch_decode(self, rows):
        return [" ".join("o\ufffd" if token in self.fragments else str(token) for token in row) for row in rows]

    def get_vocab(self):
        return {str(token): token for token in range(10)}

    def __len__(self):
        return 10


def with_tokenizer(n_ctx=18, d_vocab=12, adds=True):
    model = DisentangledTransformer(d_vocab, n_ctx - 1)
    model.tokenizer = Tokenizer(adds)
    return model


@pytest.mark.parametrize(
    ("adds", "bos", "start"),
    [(True, "auto", [7]), (False, "auto", []), (False, "yes", [7]), (True, "yes", [7]), (True, "no", [])],
)
def test_bos_is_what_was_asked_for_and_is_recorded(adds, bos, start):
    model = with_tokenizer(adds=adds)
    made = repeated_tokens(model, bos=bos)
    assert made.settings["start"] == start
    assert made.settings["bos"] == bos
    assert (made.tokens[:, : len(start)] == 7).all()
    assert (made.tokens[:, len(start) :] < 7).all()
    assert scan(model, templates="induction", bos=bos).settings["tokens"][0]["start"] == start


def test_periods_are_drawn_without_replacement_and_without_special_tokens():
    made = repeated_tokens(with_tokenizer(), n_sequences=40, seed=5)
    period = made.settings["period"]
    assert made.settings == {
        "kind": "repeated", "n_sequences": 40, "period": 7, "copies": 2, "bos": "auto", "start": [7], "drawn_from": 7,
        "seed": 5,
    }  # fmt: skip
    first, second = made.tokens[:, 1 : 1 + period], made.tokens[:, 1 + period :]
    assert torch.equal(first, second)
    assert all(sorted(row) == list(range(7)) for row in first.tolist())
    assert len({tuple(row) for row in first.tolist()}) > 30
    assert torch.equal(made.tokens, repeated_tokens(with_tokenizer(), n_sequences=40, seed=5).tokens)
    assert not torch.equal(made.tokens, repeated_tokens(with_tokenizer(), n_sequences=40, seed=6).tokens)


def test_fragments_of_characters_are_not_drawn():
    model = with_tokenizer(n_ctx=32)
    model.tokenizer = Tokenizer(fragments=(2, 5))
    made = repeated_tokens(model)
    assert made.settings["drawn_from"] == 5
    assert set(made.tokens[:, 1:].flatten().tolist()) == {0, 1, 3, 4, 6}
    assert not {2, 5} & set(ngram_tokens(model, n=2).tokens[:, 1:].flatten().tolist())
    with pytest.raises(CausalProbeError, match="5 can be drawn"):
        repeated_tokens(model, period=6)


def test_a_context_that_is_not_named_holds_all_that_is_made_by_default():
    model = DisentangledTransformer(100, 110)
    model.n_positions = model.cfg.n_ctx = None  # as of a model with ALiBi
    assert repeated_tokens(model).tokens.shape == (32, 100)
    assert ngram_tokens(model, n=2).settings["period"] == 50


@pytest.mark.parametrize(
    ("d_vocab", "n_ctx", "period", "copies", "sequences"),
    [(1000, 1024, 50, 2, 32), (1000, 41, 20, 2, 80), (10, 21, 10, 2, 160), (3, 21, 3, 6, 534), (60, 61, 30, 2, 54)],
)
def test_period_and_number_adapt_to_vocabulary_and_context(d_vocab, n_ctx, period, copies, sequences):
    made = repeated_tokens(DisentangledTransformer(d_vocab, n_ctx - 1))
    assert made.tokens.shape[1] < n_ctx
    assert (made.settings["period"], made.settings["copies"], made.settings["n_sequences"]) == (
        period,
        copies,
        sequences,
    )
    assert made.tokens.shape == (sequences, period * copies)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("d_vocab", [2, 3, 11])
def test_in_n_gram_sequences_fewer_tokens_match_without_the_n_gram(n, d_vocab):
    made = ngram_tokens(DisentangledTransformer(d_vocab, 44), n=n, n_sequences=6)
    period = made.settings["period"]
    m = period // 2 ** (n - 1)
    assert m == min(d_vocab, 22 // 2 ** (n - 1))
    for row in made.tokens.tolist():
        assert row[:period] == row[period:]
        for k in range(1, n + 1):
            grams = [tuple(row[i : i + k]) for i in range(period)]  # around the end, as the second copy has it
            assert {grams.count(gram) for gram in grams} == {2 ** (n - k)}
        grams = [tuple(row[i : i + n]) for i in range(period)]
        ends = {}
        for gram in grams:
            ends.setdefault(gram[1:], set()).add(gram[0])
        assert {len(before) for before in ends.values()} == {
            2
        }  # the last n-1 tokens match, and the one before does not
    assert len({tuple(row) for row in made.tokens.tolist()}) > 1


def test_n_gram_templates_are_scored_on_their_own_sequences():
    model = DisentangledTransformer(20, 49)
    found = scan(model, n_sequences=3)
    by_kind = {tokens["kind"]: tokens for tokens in found.settings["tokens"]}
    plain, grams = by_kind["repeated"], by_kind["3-gram"]
    assert grams["templates"] == ["induction-2gram", "induction-3gram"]
    assert (plain["kind"], grams["kind"], grams["period"]) == ("repeated", "3-gram", 24)
    assert found.names == tuple(TEMPLATES)
    short = scan(DisentangledTransformer(20, 9), n_sequences=3)  # room for a period of 4: 2-grams, no 3-grams
    assert {"repeated", "2-gram"} <= {tokens["kind"] for tokens in short.settings["tokens"]}
    assert "induction-3gram" not in short.names
    with pytest.raises(
        CausalProbeError, match=r"Sequences for 3-grams need two copies of 8 tokens or more; .* 4 is possible"
    ):
        scan(DisentangledTransformer(20, 9), templates="induction-3gram")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 30}, "Two copies of 30 different tokens are wanted, .* room for 7 tokens, and 5 can be drawn"),
        ({"period": 1}, "Two copies of 1 different"),
        ({"n_sequences": 0}, "`n_sequences` is 0. It must be a whole number of at least 1"),
        ({"bos": "yes"}, "A BOS token was asked for, and the model names none"),
        ({"bos": "maybe"}, "bos is 'auto', 'yes' or 'no'; it is 'maybe'"),
        ({"tokens": random_tokens(2), "period": 3}, "period=3 is about sequences that are made, and tokens were given"),
        ({"templates": "inductoin"}, "There is no template 'inductoin'"),
        ({"tokens": random_tokens(2), "queries": [7]}, "no query 7 in sequences of 7 tokens"),
        ({"tokens": random_tokens(2), "batch_size": 0}, "`batch_size` is 0. It must be a whole number of at least 1"),
        ({"tokens": random_tokens(2).float()}, "whole numbers"),
        ({"tokens": [random_tokens(2), random_tokens(2).float()]}, "of whole numbers"),
        ({"tokens": [1, 2]}, "For one sequence, give tokens"),
        ({"tokens": []}, "There are no sequences"),
    ],
)
def test_bad_input_is_told(options, message):
    with pytest.raises(CausalProbeError, match=message):
        scan(disentangled(), **options)


# ---------------------------------------------------------------------------------------------------------------- results


def test_a_table_has_one_row_for_each_head_and_template():
    found = scan(set_by_hand(), n_sequences=3)
    table = found.to_pandas()
    assert len(table) == 3 * len(found.names)
    fields = list(found.of(0, 0, "induction")._fields)
    assert list(table.columns) == [*fields, "excess_low", "excess_high", "p_value"]
    row = table[(table.layer == 1) & (table.template == "induction")].iloc[0]
    assert tuple(row)[: len(fields)] == tuple(found.of(1, 0, "induction"))
    one = scan(set_by_hand(), templates="induction", n_sequences=1).to_pandas()
    assert one[["stderr", "excess_low", "excess_high", "p_value"]].isna().all(axis=None)


def test_json_has_the_agreed_form():
    found = scan(set_by_hand(), torch.tensor([[0, 1, 2, 3]]), templates=["previous-token", "induction"])
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {"kind", "format", "scores", "templates", "settings", "provenance"} <= written.keys()
    assert "sums" not in written
    assert written["scores"][0].keys() >= {"layer", "head", "template", "score", "chance", "excess", "stderr", "sink"}
    assert [(head["layer"], head["head"], head["template"]) for head in written["scores"][:3]] == [
        (0, 0, "previous-token"), (0, 0, "induction"), (0, 1, "previous-token"),
    ]  # fmt: skip
    assert written["scores"][1]["score"] is None
    assert written["undefined"] == {
        "induction": "No row has a target of 'induction' and a visible key that is none",
        "previous-token: stderr": "a standard error needs two sequences or more",
    }
    assert found.top("induction") == ()
    assert "No row has a target of 'induction'" in repr(found)
    with pytest.raises(CausalProbeError, match="No row has a target of 'induction'"):
        found.heatmap("induction")


def test_a_heat_map_is_what_viz_draws():
    from causal_probe.viz import heads

    found = scan(set_by_hand(), n_sequences=3)
    scores = found.heatmap("induction", value="score")
    assert [len(layer) for layer in scores] == [2, 1]
    assert scores[1][0] == found.of(1, 0, "induction").score
    assert len(heads(scores).axes[0].texts) == 3
    with pytest.raises(CausalProbeError, match="A head has no 'p'; the values are score, chance, excess"):
        found.heatmap("induction", value="p")


def test_it_prints_and_cites():
    found = scan(set_by_hand(), n_sequences=3)
    assert f"disentangled-transformer: 3 heads in 2 layers, {len(TEMPLATES)} templates, 3 sequences" in repr(found)
    assert "<td>induction</td><td>L1H0</td><td>0.9" in found._repr_html_()
    assert "olsson2022" in found.cite().bibtex
    assert "nichani2024" not in found.cite().bibtex
    graph = successor_of_parent(GRAPH)
    assert "nichani2024" in scan(set_by_hand(), n_sequences=3, templates=graph).cite().bibtex


def test_a_head_is_found_by_name_and_calls_by_template():
    found = scan(set_by_hand(), n_sequences=3)
    assert found.of("L1H0", "induction") == found.of((1, 0), "induction") == found.of(1, 0, "induction")
    assert found.called("induction") == tuple(each for each in found.called() if each.template == "induction") != ()
    assert [each.template for each in found.of("L1H0")] == [*found.names]
    with pytest.raises(CausalProbeError, match="'copying' was not scored"):
        found.called("copying")


def test_what_is_not_there_is_told():
    found = scan(set_by_hand(), n_sequences=3, templates=["induction"])
    with pytest.raises(CausalProbeError, match="'previous-token' was not scored; those that were: induction"):
        found.top("previous-token")
    with pytest.raises(CausalProbeError, match=r"no head L2H0\. Heads, counted from 0: layer 0: 2, layer 1: 1"):
        found.of(2, 0, "induction")
    with pytest.raises(CausalProbeError, match="Patterns of 2 sequences of 4 tokens are"):
        score_patterns([torch.zeros(2, 1, 3, 3)], torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("make", [sequences.repeated_tokens, partial(sequences.ngram_tokens, n=2)])
def test_the_number_of_sequences_is_checked_before_memory_is_taken(make):
    with pytest.raises(
        CausalProbeError, match=r"1,000,000,000 sequences of periods of .* at most [\d,]+ are made at once"
    ):
        make(DisentangledTransformer(d_vocab=12, n_positions=48), n_sequences=10**9)


def test_attention_on_nothing_is_a_column():
    """By a plain loop over transformers' own patterns, on the rows that the template scores; 0 and no column without sinks."""
    from tests.architectures.zoo import ARCHITECTURES, tokens

    original, batch = ARCHITECTURES["GPT-OSS"].build(), tokens(3, 12)
    found = scan(to_hooked(original), batch, templates=["previous-token", "induction"])
    with torch.no_grad():
        patterns = original(batch, output_attentions=True).attentions
    for layer, window in enumerate((5, 99)):
        for head in range(4):
            each = []
            for b in range(3):
                rows = []
                for i in range(12):
                    seen = [j for j in range(i + 1) if j > i - window]
                    on = [
                        j for j in seen if j > 0 and int(batch[b, j - 1]) == int(batch[b, i]) and j <= i and j - 1 < i
                    ]
                    if on and len(on) < len(seen):
                        rows.append(1 - float(patterns[layer][b, head, i].sum()))
                if rows:
                    each.append(np.mean(rows))
            one = found.of(layer, head, "induction")
            if not each:
                assert one.nothing is None
                continue
            assert one.nothing == pytest.approx(np.mean(each), abs=1e-5)
    assert max(one.nothing for one in found.of("previous-token")) > 0.01
    assert found.to_nothing
    assert "nothing" in found.to_pandas().columns
    assert "nothing" in found.table().columns
    merged = found.merge(replace(found))
    assert merged.of(1, 0, "previous-token").nothing == pytest.approx(found.of(1, 0, "previous-token").nothing)
    plain = scan(to_hooked(ARCHITECTURES["Llama 3"].build()), batch, templates="previous-token")
    assert plain.of(0, 0, "previous-token").nothing == 0
    assert "nothing" not in plain.table().columns
