"""Verdicts on planted circuits, and every number against loops by hand."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from scipy import stats

from causal_probe import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import Rule, next_token, repeated_tokens, scan, verify
from causal_probe.probes.ablation import Experiment, Laboratory
from causal_probe.probes.measures import Measured, repeated_token
from causal_probe.probes.replay import replayed
from causal_probe.probes.verification import Verification
from tests import tiny_huggingface

D_VOCAB, PERIOD = 12, 10
TEMPLATES = ["previous-token", "induction"]


def circuit(*, induction: int = 1, ignored: int = 0, heads: tuple[int, int] = (3, 6), noise: float = 0.0) -> Any:
    """L0H0 looks one back; L1H0, ... look after the last occurrence and say what they find; the next ones say nothing."""
    model = DisentangledTransformer(D_VOCAB, 2 * PERIOD + 1, heads)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = noise * torch.randn(parameter.shape, generator=generator)
    model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    for head in range(induction + ignored):
        model.block(1, head, query="token", key="L0H0.token").diagonal().fill_(30)
        model.block(1, head, query="token", key="position")[:, 0] = -60  # nothing comes before position 0
        if head < induction:
            model.output_block(f"L1H{head}.token").diagonal().fill_(9)
    return model


def checked(model: Any, **options: Any) -> Any:
    scores = scan(model, templates=TEMPLATES, period=PERIOD, n_sequences=8)
    return verify(scores, model, **{"period": PERIOD, "random_sets": 20, "exhaustive": True, **options})


def verdicts(found: Any) -> dict[tuple[str, str], str]:
    return {(each.name, each.template): each.verdict for each in found.verdicts}


# ---------------------------------------------------------------------------------------------------------------- verdicts


def test_an_ideal_induction_circuit_is_causal() -> None:
    found = checked(circuit())
    assert verdicts(found) == {("L0H0", "previous-token"): "causal", ("L1H0", "induction"): "causal"}
    assert found.of(1, 0, "induction").exceeds == 1
    assert len(found.unflagged) == 7
    assert max(map(abs, found.unflagged.values())) < 1e-4
    assert found.called("causal") == found.verdicts


def test_a_redundant_pair_is_redundant_and_what_nobody_reads_has_no_effect() -> None:
    found = checked(circuit(induction=2, ignored=1))
    assert verdicts(found) == {
        ("L0H0", "previous-token"): "causal",
        ("L1H0", "induction"): "redundant",
        ("L1H1", "induction"): "redundant",
        ("L1H2", "induction"): "no effect above delta",
    }
    for head in (0, 1):
        one = found.of(1, head, "induction")
        assert one.effect.value < 0.01 < 2 < one.restored.value
        assert one.effect.p_within < 0.01 < one.effect.p_value
        assert one.direct_effect.value > 5
    ignored = found.of(1, 2, "induction")
    assert ignored.direct_effect.value == pytest.approx(0, abs=1e-5)
    assert ignored.restored.value == pytest.approx(0, abs=1e-5)
    assert ignored.effect.p_within < 0.01
    joint = found.joint["induction"]
    assert joint.heads == ((1, 0), (1, 1), (1, 2))
    assert joint.effect.value > 2
    assert (joint.exceeds, len(joint.random)) == (1, 10)  # all sets of 3 of the 5


def test_a_head_that_is_written_out_by_mistake_is_negative() -> None:
    """The second head looks where it should and lowers the target's logit: ablating it helps, and the first one still does the task."""
    model = circuit(induction=2)
    model.output_block("L1H1.token").diagonal().fill_(-6)
    found = checked(model)
    assert found.of(1, 0).verdict == "causal"
    harmful = found.of(1, 1, "induction")
    assert (harmful.verdict, harmful.effect.p_negative < 0.01) == ("negative", True)
    assert harmful.effect.value < -0.05 < 0 > harmful.direct_effect.value


@pytest.mark.parametrize("how", ["zero W_O", "unread"])
def test_a_head_that_writes_nothing_that_is_read_has_no_effect(how: str) -> None:
    """Planted, so the truth is known: the effect is 0 exactly, and the claim is that of equivalence, not a test that failed."""
    model = circuit(ignored=1).to_transformer_lens()
    if how == "zero W_O":
        with torch.no_grad():
            model.blocks[1].attn.W_O[1] = 0
    found = checked(model)
    assert found.of(1, 0).verdict == "causal"
    nothing = found.of(1, 1, "induction")
    assert nothing.verdict == "no effect above delta"
    assert max(nothing.effect.p_within, nothing.pooled_effect.p_within) < 1e-6
    assert abs(nothing.zero_effect.value) < 1e-5


def test_a_model_that_does_not_do_the_task_gets_no_verdicts() -> None:
    """Its head looks after the last occurrence, and the output says something else with confidence."""
    model = circuit()
    model.output_block("L1H0.token").fill_(0).diagonal(1).fill_(9)
    found = checked(model)
    assert found.verdicts == ()
    assert found.loss.mean() > found.without["an even guess"] == pytest.approx(np.log(D_VOCAB))
    assert re.search(
        r"does not surely do the task: its loss .* an even guess is 2.48.*not ablated: L0H0, L1H0", repr(found)
    )
    assert "no verdicts" in repr(found)
    assert found.settings["forwards"] < 12
    with pytest.raises(CausalProbeError, match="no verdict 'attends only'"):
        found.called("attends only")


def test_knowing_which_tokens_there_are_is_not_doing_the_task() -> None:
    """A model that beats the even guess on all tokens alike does not copy."""
    model = circuit(noise=0.05)
    model.output_block("L1H0.token").fill_(0)
    logits = torch.zeros(2, 20, 40)
    logits[..., :12] = 5
    tokens = torch.arange(10).repeat(2, 2)
    found = repeated_token(logits, tokens)
    assert found.loss.max() < found.without["an even guess"].min()
    torch.testing.assert_close(found.loss, found.without["its own loss on what is not repeated"])


def pointers(n: int = 1) -> Any:
    """L0H0, ... look at the same token one period back and write where that is; L1H0 looks one after that, and says the token."""
    model = DisentangledTransformer(D_VOCAB, 2 * PERIOD + 1, (3, 6))
    for parameter in model.parameters():
        parameter.data.zero_()
    for head in range(n):
        model.block(0, head, query="token", key="token").diagonal().fill_(30)
        model.block(0, head, query="position", key="position").diagonal().fill_(-60)  # not at itself
        model.block(1, 0, query=f"L0H{head}.position", key="position").diagonal(1).fill_(60)
    model.output_block("L1H0.token").diagonal().fill_(9)
    exported = model.to_transformer_lens()
    with torch.no_grad():
        exported.blocks[0].attn.W_V[:n, :D_VOCAB] = 0  # they read where the token is, and not the token
    return exported


def test_a_pointer_is_causal_though_its_mean_at_each_position_is_its_value() -> None:
    """In sequences of one period it points at the same place in all of them: a position-wise mean replaces it by itself."""
    model = pointers()
    scores = scan(model, templates=["duplicate-token", "induction"], period=PERIOD, n_sequences=8)
    same = repeated_tokens(model, n_sequences=40, period=PERIOD, seed=1).tokens
    found = verify(scores, model, same, measure=repeated_token, random_sets=20)
    assert verdicts(found) == {("L0H0", "duplicate-token"): "causal", ("L1H0", "induction"): "causal"}
    pointer = found.of(0, 0)
    assert abs(pointer.effect.value) < 0.1 < 2 < pointer.pooled_effect.value
    assert pointer.reason == "ablation hurts with its mean over all positions"
    assert pointer.distance < 0.01 < 0.1 < pointer.pooled_distance
    assert "L0H0: what it writes hardly differs from its mean at each position" in repr(found)
    assert ("L0H0", "L1H0") in found.dependence.edges
    # On sequences of varied periods, which are the default, either baseline shows it.
    varied = verify(scores, model, period=PERIOD, random_sets=20).of(0, 0)
    assert varied.verdict == "causal"
    assert min(varied.effect.value, varied.pooled_effect.value, varied.distance) > 0.5


def test_more_harmful_unflagged_heads_keep_a_head_from_being_causal() -> None:
    """An effect that every second head has is no evidence for a type of head."""
    model = circuit(heads=(3, 3))
    for head in (1, 2):  # one says the current token and the other takes it back: alone, the first is a disaster
        model.block(0, head, query="position", key="position").diagonal().fill_(30)
    model.output_block("L0H1.token").diagonal().fill_(20)
    model.output_block("L0H2.token").diagonal().fill_(-20)
    found = checked(model).of(1, 0, "induction")
    assert found.effect.p_value < 0.01
    assert found.exceeds == pytest.approx(3 / 4)
    assert (found.verdict, found.reason) == (
        "undecided",
        "ablation hurts, but only more than for 75% of the unflagged heads",
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_models_have_nothing_to_verify(seed: int) -> None:
    model = DisentangledTransformer(D_VOCAB, 21, (2, 2))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    found = checked(model)
    assert (found.verdicts, found.joint, found.unflagged, found.settings["forwards"]) == ((), {}, {}, 0)
    assert "nothing to verify" in repr(found)
    assert found.to_pandas().empty
    assert found.to_dict()["verdicts"] == []
    # And were all heads flagged: a model that doesn't do the task gets no verdicts.
    forced = checked(model, rule=Rule(minimum_excess=-2.0))
    assert (forced.verdicts, forced.joint) == ((), {})
    assert "does not surely do the task" in forced.undefined["verdicts"]


def test_redundant_pointers_are_redundant() -> None:
    """Two heads that point at the same place: alone neither is needed, and a mean at each position can't see them even together."""
    model = pointers(2)
    scores = scan(model, templates=["duplicate-token"], period=PERIOD, n_sequences=8)
    same = repeated_tokens(model, n_sequences=40, period=PERIOD, seed=1).tokens
    found = verify(scores, model, same, measure=repeated_token, random_sets=20, exhaustive=True)
    assert verdicts(found) == {("L0H0", "duplicate-token"): "redundant", ("L0H1", "duplicate-token"): "redundant"}
    assert found.of(0, 0).restored.value < 0.1 < 2 < found.of(0, 0).pooled_restored.value
    few = verify(scores, model, same, measure=repeated_token, random_sets=20)
    assert verdicts(few) == verdicts(found)
    assert few.of(0, 0).restored is None
    assert few.of(0, 0).pooled_restored == found.of(0, 0).pooled_restored
    assert found.of(0, 0).reason.endswith("with its mean over all positions")


def test_dependence_is_of_induction_heads_on_the_previous_token_head() -> None:
    graph = checked(circuit(induction=2)).dependence
    assert set(graph.nodes) == {"L0H0", "L1H0", "L1H1"}
    assert set(graph.edges) == {("L0H0", "L1H0"), ("L0H0", "L1H1")}
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.nodes["L1H0"] == {"layer": 1, "head": 0, "verdicts": {"induction": "redundant"}}
    edge = graph.edges["L0H0", "L1H1"]
    assert edge["template"] == "induction"
    # With what looks one back averaged away, the head finds no earlier occurrence: a row's attention is spread.
    assert edge["fall"] > 0.8


# -------------------------------------------------------------------------------------------------------------- by hand


def gpt2() -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = tiny_huggingface.gpt2(bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    return build_bridge_from_module(model, architecture="GPT2LMHeadModel", hf_config=model.config)


def llama() -> Any:
    """Four query heads on two key-value heads."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = tiny_huggingface.llama(attn_implementation="eager")
    return build_bridge_from_module(model, architecture="LlamaForCausalLM", hf_config=model.config)


def exported() -> Any:
    return circuit(induction=2, noise=0.2, heads=(2, 2)).to_transformer_lens()


MODELS = {
    "disentangled": lambda: circuit(induction=2, noise=0.2, heads=(2, 2)),
    "transformer-lens": exported,
    "gpt2": gpt2,
    "llama": llama,
}


def by_hand(model: Any, tokens: torch.Tensor, heads: Any, means: dict[int, torch.Tensor], rows: range) -> Any:
    """Loss of the next token with heads replaced by ``means`` by layer, [pos, head, d_head] or with a batch before."""
    hooks = [
        (f"blocks.{layer}.attn.hook_z", lambda z, hook, layer=layer, head=head: put(z, head, means[layer]))
        for layer, head in heads
    ]
    with torch.no_grad():
        out = model.run_with_hooks(tokens, fwd_hooks=hooks).double().log_softmax(-1)
    return np.array([-np.mean([float(out[b, i, tokens[b, i + 1]]) for i in rows]) for b in range(len(tokens))])


def put(z: torch.Tensor, head: int, donor: torch.Tensor) -> torch.Tensor:
    z = z.clone()
    z[:, :, head] = donor[..., head, :]
    return z


@pytest.mark.parametrize("kind", MODELS)
def test_every_number_by_hand(kind: str) -> None:
    model = MODELS[kind]()
    made = repeated_tokens(model, n_sequences=15, period=8, seed=3).tokens
    tokens, others, rows = made[:5], made[5:], range(8, 15)
    scores = scan(model, templates=TEMPLATES, n_sequences=256, period=8)
    # Random models have no head that deserves a flag: flag the best two, so that there are both kinds.
    excess = sorted(score.excess for score in scores if score.template == "induction")
    rule = Rule(minimum_excess=(excess[-2] + excess[-3]) / 2, level=0.9, delta=0.001)
    found = verify(
        scores,
        model,
        tokens,
        templates=["induction"],
        measure=untested(next_token(rows)),
        reference=others,
        rule=rule,
        random_sets=3,
        ranked_on=3,
        exhaustive=True,
    )
    flagged = [(each.layer, each.head) for each in found.verdicts]
    assert flagged
    assert found.unflagged

    with torch.no_grad():
        z = model.run_with_cache(others)[1]
    layers = {
        layer: z[f"blocks.{layer}.attn.hook_z"].reshape(5, 2, 16, *z[f"blocks.{layer}.attn.hook_z"].shape[2:])
        for layer in range(2)
    }
    means = {layer: its.mean(1) for layer, its in layers.items()}
    pooled = {layer: its[:, :, 1:].mean((1, 2))[:, None].repeat(1, 16, 1, 1) for layer, its in layers.items()}
    for layer, mean in pooled.items():  # position 0 stays as it is, also with other heads replaced
        mean[:, 0] = model.run_with_cache(tokens)[1][f"blocks.{layer}.attn.hook_z"][:, 0]
    clean = by_hand(model, tokens, [], means, rows)
    np.testing.assert_allclose(found.loss, clean, atol=1e-4)

    def rise(heads: Any, how: float = 1.0, by: Any = means) -> Any:
        return by_hand(model, tokens, heads, {layer: how * mean for layer, mean in by.items()}, rows) - clean

    for each in found.verdicts:
        head = (each.layer, each.head)
        check(each.effect, rise([head]))
        check(each.pooled_effect, rise([head], by=pooled))
        check(each.zero_effect, rise([head], 0.0))
        rest = [other for other in flagged if other != head]
        check(each.restored, rise(flagged) - rise(rest))
        own = model.run_with_cache(tokens)[1][f"blocks.{head[0]}.attn.hook_z"][:, 1:, head[1]].double()
        share = (own - means[head[0]][:, 1:, head[1]]).square().sum((1, 2)) / own.square().sum((1, 2))
        assert each.distance == pytest.approx(float(share.mean()), rel=1e-4)
    joint = found.joint["induction"]
    check(joint.effect, rise(flagged))
    check(joint.pooled_effect, rise(flagged, by=pooled))
    for head, value in found.unflagged.items():
        assert value == pytest.approx(rise([head])[:3].mean(), abs=1e-4)
    share = np.mean([rise([flagged[0]])[:3].mean() > rise([other])[:3].mean() for other in found.unflagged])
    assert found.verdicts[0].exceeds == pytest.approx(share)

    # p-values by their formula, corrected by Holm's procedure over the heads and both baselines
    values = [rise([head], by=by) for head in flagged for by in (means, pooled)]

    def tested(sign: float, above: float) -> Any:
        return np.array([stats.ttest_1samp(sign * value, above, alternative="greater").pvalue for value in values])

    given = [effect for each in found.verdicts for effect in (each.effect, each.pooled_effect)]
    for name, raw in {
        "p_value": tested(1, rule.delta),
        "p_negative": tested(-1, rule.delta),
        "p_within": np.maximum(tested(1, -rule.delta), tested(-1, -rule.delta)),
    }.items():
        order = raw.argsort()
        expected = np.maximum.accumulate(np.minimum(1, raw[order] * np.arange(len(raw), 0, -1)))
        np.testing.assert_allclose(np.array([getattr(each, name) for each in given])[order], expected, atol=5e-3)


def untested(measure: Any) -> Any:
    """The measure without predictors that a model would have to beat: random models do no task."""
    return lambda logits, batch: replace(measure(logits, batch), without={})


def check(estimate: Any, values: np.ndarray) -> None:
    assert estimate.value == pytest.approx(values.mean(), abs=1e-4)
    assert estimate.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)), abs=1e-4)


def test_the_direct_effect_of_a_disentangled_head_is_its_rows_of_the_unembedding() -> None:
    model = MODELS["disentangled"]()
    tokens, rows = repeated_tokens(model, n_sequences=4, period=8).tokens, range(8, 15)
    laboratory = Laboratory(
        model, next_token(rows), reference=tokens.repeat(len(tokens), 1), n_sequences=len(tokens), example=tokens[:2]
    )
    _, cache = model.run_with_cache(tokens)
    with torch.no_grad():
        experiment = Experiment(laboratory, tokens, direct=True)
        experiment.observe()
        for layer, head in [(0, 0), (1, 1)]:
            z = cache[f"blocks.{layer}.attn.hook_z"][:, :, head]
            start = model.A[layer].shape[1] * (1 + head)
            written = (z - z.mean(0)) @ model.W_U[start : start + z.shape[-1]]  # [batch, pos, d_vocab]
            centred = written - written.mean(-1, keepdim=True)
            expected = [np.mean([float(centred[b, i, tokens[b, i + 1]]) for i in rows]) for b in range(4)]
            found = experiment.direct_effect((layer, head))
            np.testing.assert_allclose(found, expected, atol=1e-4)
            assert found.abs().max() > 0.1


def test_the_direct_effect_in_gpt2_goes_through_the_last_normalization_alone() -> None:
    """What the head adds to the stream, by W_O, is taken from the last stream, and nothing else is."""
    model = gpt2()
    hugging_face = tiny_huggingface.gpt2(bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    tokens, rows = repeated_tokens(model, n_sequences=3, period=8).tokens, range(8, 15)
    laboratory = Laboratory(
        model, next_token(rows), reference=tokens.repeat(len(tokens), 1), n_sequences=len(tokens), example=tokens[:2]
    )
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        experiment = Experiment(laboratory, tokens, direct=True)
        experiment.observe()
        for layer, head in [(0, 1), (1, 0)]:
            d_head = 8
            own = slice(head * d_head, (head + 1) * d_head)
            z = cache[f"blocks.{layer}.attn.hook_z"][:, :, head]
            W_O = hugging_face.transformer.h[layer].attn.c_proj.weight[own]
            last = cache["blocks.1.hook_resid_post"]
            without = last - (z - z.mean(0)) @ W_O
            logits = [hugging_face.lm_head(hugging_face.transformer.ln_f(stream)) for stream in (last, without)]
            target = torch.stack([torch.stack([tokens[b, i + 1] for i in rows]) for b in range(3)])[..., None]
            centred = [(x - x.mean(-1, keepdim=True))[:, list(rows)].gather(-1, target)[..., 0].mean(1) for x in logits]
            np.testing.assert_allclose(experiment.direct_effect((layer, head)), centred[0] - centred[1], atol=1e-4)


def test_the_noise_of_the_reference_is_in_the_standard_error() -> None:
    """Over 250 repetitions with 8 sequences, z has the law of Student's t; if the 8 shared three references, it would be too wide."""
    model, blocks, n, rows = MODELS["disentangled"](), 250, 8, range(8, 15)
    tokens = repeated_tokens(model, n_sequences=blocks * n, period=8, seed=1).tokens
    others = repeated_tokens(model, n_sequences=blocks * n * 3, period=8, seed=2).tokens
    shared = others.view(blocks, n, 3, -1)[:, :1].expand(-1, n, -1, -1).reshape(others.shape)
    spread, covered = {}, {}
    with torch.no_grad():
        for name, reference in {"own": others, "shared": shared}.items():
            laboratory = Laboratory(
                model, next_token(rows), reference=reference, n_sequences=len(tokens), example=tokens[:2]
            )
            experiment = Experiment(laboratory, tokens)
            clean = experiment.observe().loss
            effect = (experiment.ablate([(0, 0)], "mean").loss - clean).double().numpy().reshape(blocks, n)
            t = (effect.mean(1) - effect.mean()) / (effect.std(1, ddof=1) / n**0.5)
            spread[name], covered[name] = t.std(), np.mean(abs(t) < stats.t.ppf(0.975, n - 1))
    assert spread["own"] == pytest.approx(stats.t(n - 1).std(), abs=0.1)
    assert abs(covered["own"] - 0.95) < 0.025
    assert spread["shared"] > spread["own"] + 0.2


def test_falls_of_scores_by_hand() -> None:
    model = circuit(noise=0.1, heads=(2, 2))
    made = repeated_tokens(model, n_sequences=4, period=PERIOD, seed=5)
    scores = scan(model, templates=TEMPLATES, period=PERIOD, n_sequences=8)
    others = repeated_tokens(model, n_sequences=4, period=PERIOD, seed=6).tokens
    found = verify(
        scores, model, made.tokens, measure=next_token(range(PERIOD, 2 * PERIOD - 1)), reference=others.repeat(4, 1)
    )
    with torch.no_grad():
        z = model.run_with_cache(others)[1]["blocks.0.attn.hook_z"][:, :, 0]
        clean = model.run_with_cache(made.tokens)[1]["blocks.1.attn.hook_pattern"][:, 0]
        falls = []
        for first, value in (
            (0, z.mean(0)),
            (1, z[:, 1:].mean((0, 1))),
        ):  # by its mean at each position, and over all but 0

            def ablate(z: Any, hook: Any, first: int = first, value: Any = value) -> Any:
                z[:, first:, 0] = value
                return z

            with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", ablate)]):
                ablated = model.run_with_cache(made.tokens)[1]["blocks.1.attn.hook_pattern"][:, 0]
            fell = clean - ablated
            falls.append(torch.stack([fell[:, PERIOD + i, i + 1] for i in range(PERIOD)]).mean(0).numpy())
    edge = found.dependence.edges["L0H0", "L1H0"]
    fall = max(falls, key=np.mean)
    assert edge["fall"] == pytest.approx(fall.mean(), abs=1e-5)
    assert edge["stderr"] == pytest.approx(fall.std(ddof=1) / 2, abs=1e-5)


# --------------------------------------------------------------------------------------------------------- how it is run


@pytest.mark.parametrize("kind", MODELS)
def test_layers_below_the_first_ablated_head_are_replayed(kind: str) -> None:
    """And the result is exactly that of running them."""
    model = MODELS[kind]()
    tokens = repeated_tokens(model, n_sequences=4, period=8).tokens
    laboratory = Laboratory(
        model, next_token(), reference=tokens.repeat(len(tokens), 1), n_sequences=len(tokens), example=tokens[:2]
    )
    assert laboratory.replays
    fired: list[int] = []
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: fired.append(1))]):
        experiment = Experiment(laboratory, tokens, direct=True)
        experiment.observe()
        assert fired
        fired.clear()
        found = experiment.ablate([(1, 0)], "mean"), experiment.direct_effect((1, 0))
        assert not fired
        laboratory.replays = laboratory.passes = False
        whole = Experiment(laboratory, tokens, direct=True)
        whole.observe()
        assert torch.equal(found[0].loss, whole.ablate([(1, 0)], "mean").loss)
        torch.testing.assert_close(found[1], whole.direct_effect((1, 0)), rtol=1e-5, atol=1e-5)
        assert fired
    assert not any("forward" in vars(block) for block in model.blocks)


def test_a_forward_that_someone_else_has_wrapped_is_put_back() -> None:
    model = circuit()
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda x: own(x)
    wrapped = vars(model.blocks[0])["forward"]
    with replayed(model, {0: torch.zeros(1), 1: torch.zeros(2)}):
        assert [len(block(None)) for block in model.blocks] == [1, 2]
    assert vars(model.blocks[0])["forward"] is wrapped
    assert "forward" not in vars(model.blocks[1])


def test_the_cost_is_what_the_documentation_says() -> None:
    found = checked(circuit(induction=2, ignored=1), n_sequences=8, ranked_on=4, random_sets=10)
    # batches of 4 and 4; 4 flagged heads, 5 unflagged, 10 random sets of 3, and 5 of 1 that are the unflagged heads
    on_all = 2 * (
        2 + 2 * (4 + 1 + 3) + 2 * 4
    )  # as it is, twice; by baseline one head, the three, two of the three; zero, direct
    ranked = 2 * (5 + 10)  # with either baseline
    set_up = 13  # what the model can do, and which short cuts give the same
    assert on_all + ranked <= found.settings["forwards"] <= on_all + ranked + set_up
    few = checked(circuit(induction=2, ignored=1), n_sequences=8, ranked_on=4, random_sets=10, exhaustive=False)
    assert verdicts(few) == verdicts(found)
    assert few.settings["forwards"] <= on_all + 5 + 10 + set_up
    assert (found.settings["n_sequences"], found.settings["ranked_on"]) == (8, 4)


def test_results_do_not_depend_on_the_batch_size() -> None:
    model = circuit(induction=2, noise=0.1)
    scores = scan(model, templates=TEMPLATES, period=PERIOD, n_sequences=8)
    one, other = (verify(scores, model, period=PERIOD, random_sets=4, batch_size=size) for size in (2, 8))
    table, same = (each.to_pandas() for each in (one, other))
    assert len(table) >= 3
    for column in table:
        if table[column].dtype == float:
            np.testing.assert_allclose(table[column], same[column], atol=1e-5)
        else:
            assert list(table[column]) == list(same[column])


@pytest.mark.parametrize("build", [circuit, gpt2], ids=["disentangled", "bridge"])
def test_the_model_is_left_as_it_was(build: Any) -> None:
    model = build()
    model.train()
    scores = scan(model, templates=["induction"], period=8, n_sequences=4)
    rule = Rule(minimum_excess=-2.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verify(scores, model, period=8, n_sequences=2, ranked_on=2, random_sets=2, rule=rule)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_measure_of_ones_own_on_batches_of_ones_own() -> None:
    """A task whose batches carry soft targets: the loss is on the last query, and there is no one target."""
    model = circuit()

    class Batch:
        def __init__(self, seed: int) -> None:
            self.tokens = repeated_tokens(model, n_sequences=3, period=PERIOD, seed=seed).tokens[:, : 2 * PERIOD - 1]
            self.target = torch.nn.functional.one_hot(self.tokens[:, PERIOD - 1], D_VOCAB).float()

    def measure(logits: torch.Tensor, batch: Batch) -> Measured:
        return Measured(-(batch.target * logits[:, -1].log_softmax(-1)).sum(-1), None)

    scores = scan(model, templates=TEMPLATES, period=PERIOD, n_sequences=8)
    with pytest.raises(CausalProbeError, match="Batches of your own need a `reference`"):
        verify(scores, model, [Batch(7), Batch(8)], measure=measure)
    others = [Batch(seed) for seed in range(9, 17)]
    found = verify(scores, model, [Batch(7), Batch(8)], measure=measure, reference=others)
    assert verdicts(found) == {("L0H0", "previous-token"): "causal", ("L1H0", "induction"): "causal"}
    assert found.of(1, 0, "induction").direct_effect is None
    assert found.undefined["direct_effect"] == "what is measured has no one target"
    assert found.to_dict()["verdicts"][0]["direct_effect"] is None
    assert found.to_pandas()["direct_effect"].isna().all()
    assert len(found.loss) == 6


def test_without_unflagged_heads_ranks_are_undefined() -> None:
    found = checked(circuit(heads=(1, 1)))
    assert verdicts(found) == {("L0H0", "previous-token"): "causal", ("L1H0", "induction"): "causal"}
    assert [each.exceeds for each in found.verdicts] == [None, None]
    assert found.undefined["exceeds"] == "there are no unflagged heads to compare with"
    assert found.joint["induction"].exceeds is None


# ----------------------------------------------------------------------------------------------------- results and errors


def test_results_are_written_printed_and_cited(tmp_path: Path) -> None:
    found = checked(circuit(induction=2, ignored=1))
    written = found.to_dict()
    assert {"verdicts", "joint", "unflagged", "dependence", "rule", "settings"} <= set(written)
    assert written["rule"] == asdict(Rule())
    assert written["verdicts"][1]["effect"].keys() == {"value", "stderr", "p_value", "p_negative", "p_within"}
    assert {(edge["source"], edge["target"]) for edge in written["dependence"]["edges"]} == set(found.dependence.edges)
    assert "redundant" in repr(found)
    assert re.search(r"L1H2 +induction +no effect above delta", repr(found))
    assert "3 heads together" in repr(found)
    assert found._repr_html_().count("<tr>") == 5
    assert "by more than delta = 0.05 nats and more than for 95% of the unflagged heads" in found.cite().methods
    table = found.to_pandas()
    assert list(table["low"] <= table["excess"]) == [True] * 4
    with pytest.raises(CausalProbeError, match="no verdict 'maybe'; there is causal, redundant, negative, no effect"):
        found.called("maybe")
    assert found.of("L1H2", template="induction") == found.of(1, 2) == found.verdicts[-1]
    found.save(tmp_path / "found.safetensors")
    loaded = Verification.load(tmp_path / "found.safetensors")
    assert (loaded.to_dict(), repr(loaded)) == (written, repr(found))


def test_sinks_the_current_token_and_ngrams_are_not_verified_by_default() -> None:
    model = circuit()
    tokens = repeated_tokens(model, n_sequences=8, period=PERIOD).tokens
    scores = scan(model, tokens, templates=[*TEMPLATES, "current-token", "first-token", "induction-2gram"])
    assert verify(scores, model, period=PERIOD, random_sets=2).settings["templates"] == TEMPLATES


def test_wrong_arguments_are_told_all_at_once() -> None:
    model = circuit()
    scores = scan(model, templates=TEMPLATES, period=PERIOD, n_sequences=8)
    with pytest.raises(
        CausalProbeError,
        match=r"offset-3 was not scanned \(but previous-token, induction\); n_sequences must be at least 2 and is 1; "
        r"ranked_on must be at least 2 and is 0; random_sets must be at least 0 and is -1; batch_size must be at least 2 and is 1",
    ):
        verify(scores, model, templates=["offset-3"], n_sequences=1, ranked_on=0, random_sets=-1, batch_size=1)
    with pytest.raises(CausalProbeError, match="no template whose heads"):
        verify(scores, model, templates=[])
    with pytest.raises(CausalProbeError, match="scores are of 2 layers, the model has 1"):
        verify(scores, DisentangledTransformer(D_VOCAB, 21, (1,)))
    with pytest.raises(CausalProbeError, match="a model with other heads"):
        verify(scores, circuit(heads=(2, 6)), period=PERIOD)
    few = repeated_tokens(model, n_sequences=7, period=PERIOD).tokens
    with pytest.raises(CausalProbeError, match=r"7 sequences were given.*Give 8 sequences or more"):
        verify(scores, model, few)
    with pytest.raises(CausalProbeError, match="fewer than two sequences"):
        verify(scores, model, few[:1], reference=few)
    with pytest.raises(CausalProbeError, match="holds 3 sequences of 20 tokens; 4 of 20 are measured"):
        verify(scores, model, few[:4], reference=few[4:])
    with pytest.raises(CausalProbeError, match="There are no sequences"):
        verify(scores, model, [])
    single = scan(model, templates=TEMPLATES, period=PERIOD, n_sequences=1)
    with pytest.raises(CausalProbeError, match="scan two sequences or more"):
        verify(single, model)


@pytest.mark.parametrize("queries", [[20], [-1], [25], []])
def test_a_next_token_that_is_not_there(queries: list[int]) -> None:
    with pytest.raises(CausalProbeError, match="have a next token at 0 to 18"):
        next_token(queries)(torch.zeros(1, 20, 4), torch.zeros(1, 20, dtype=torch.long))


def test_a_loss_that_is_no_number_is_refused() -> None:
    model = circuit()
    scores = scan(model, templates=TEMPLATES, period=PERIOD, n_sequences=8)
    for loss, what in ((torch.full((2,), torch.nan), "nan"), (torch.zeros(5), r"one finite number for each of")):
        with pytest.raises(CausalProbeError, match=what):
            verify(
                scores,
                model,
                period=PERIOD,
                measure=lambda logits, batch, loss=loss: Measured(loss + 0 * logits.sum(), None),
            )


def test_heads_whose_edits_change_nothing_are_refused() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = tiny_huggingface.bert(attn_implementation="eager")
    bridge = build_bridge_from_module(model, architecture="BertForMaskedLM", hf_config=model.config)
    tokens = tiny_huggingface.tokens(4)

    def whole(logits: torch.Tensor, batch: Any) -> Measured:  # of a model that does not run at all
        return Measured(torch.zeros(len(batch), requires_grad=True) + 1, None)

    with pytest.raises(CausalProbeError, match="No effect of a head can be measured"):
        Laboratory(bridge, whole, reference=tokens, n_sequences=2, example=tokens)
