"""Circuits found where they are known; levels where there is nothing to find; and what can't be asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from causal_probe import circuits
from causal_probe.circuits import Circuit, Prompts, find_circuit
from causal_probe.circuits.found import CircuitEdge
from causal_probe.circuits.judging import judged, missed
from causal_probe.errors import CausalProbeError
from causal_probe.experiments import model_circuit
from causal_probe.hooks import to_hooked
from causal_probe.reports import report
from causal_probe.results import load
from tests import tiny_huggingface as tiny
from tests.own_answers import own_answers


def found_in(name: str, n: int = 96, **options: Any) -> tuple[Circuit, circuits.KnownCircuit]:
    known = circuits.known_circuit(name)
    tokens = known.sample(n, torch.Generator().manual_seed(0))
    return find_circuit(known.model, tokens, known.metric, **options), known


# ---------------------------------------------------------------------------------------------------- where it is known


@pytest.mark.parametrize(
    "name", [name for name in circuits.known_circuits() if not name.startswith(("tracr-", "and-", "or-"))]
)
def test_circuits_set_by_hand_are_found_exactly(name: str) -> None:
    found, known = found_in(name)
    agreement = found.compare(known)
    assert (agreement.precision, agreement.recall) == (1.0, 1.0), agreement
    assert found.kept == pytest.approx(1, abs=1e-4)
    assert found.lost == pytest.approx(1, abs=0.1)
    assert found.missed is None  # every edge was tested


@pytest.mark.parametrize(
    "name",
    ["tracr-induction", "tracr-balance", "tracr-sum-of-two-lags", "planted-201"],
)
def test_compiled_and_planted_circuits_are_found_exactly(name: str) -> None:
    found, known = found_in(name, 192)
    agreement = found.compare(known)
    assert (agreement.precision, agreement.recall) == (1.0, 1.0), agreement


@pytest.mark.parametrize("contrast", ["mean", "mean-by-position", "zero"])
def test_the_truth_of_each_contrast_is_found_under_it(contrast: str) -> None:
    found, known = found_in("key-composition", contrast=contrast)
    assert found.compare(known)[:2] == (1.0, 1.0)
    positional = [edge for edge in found.confirmed if edge[0] == "pos_embed"]
    assert bool(positional) == (contrast != "mean-by-position")


def test_an_or_gate_is_seen_by_pairs_alone_and_an_and_gate_by_each() -> None:
    found, known = found_in("or-gate", 192)
    assert found.compare(known)[:2] == (1.0, 1.0)
    assert found.confirmed == [("L0.mlp", "logits")]
    first, *_ = found.gates
    assert {first.kind, first.first, first.second} == {"or", "L0H0 -> L0.mlp", "L0H1 -> L0.mlp"}
    assert found.kept == pytest.approx(1, abs=1e-4)
    found, known = found_in("and-gate", 600)
    assert found.compare(known)[:2] == (1.0, 1.0)
    assert ("and", "L0H0 -> L0.mlp", "L0H1 -> L0.mlp") in [(g.kind, *sorted(g[1:3])) for g in found.gates]
    assert not [gate for gate in found.gates if gate.kind == "or"]


def test_what_the_screen_left_out_is_sampled() -> None:
    found, known = found_in("planted-5", most=60, sampled=30)
    assert len(found.edges) == 60
    assert sum(edge.sampled for edge in found.edges) == 30
    tested, confirmed, low, high = found.missed
    assert tested == 30
    assert confirmed == sum(edge.sampled and edge.status == "confirmed" for edge in found.edges)
    left = set(known.edges()) - {(edge.source, edge.receiver) for edge in found.edges if not edge.sampled}
    assert low <= len(left) / (found.candidates - 30) <= high
    assert "drawn from those left out by the screen" in str(found)


# ----------------------------------------------------------------------------------------------------------------- levels


def test_verdicts_and_their_p_values_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    edges = [(f"L0H{i}", "logits") for i in range(5)]
    effects = np.stack([generator.normal(mean, 0.05, 40) for mean in (1.0, 0.0, -1.0, 0.1, 0.0)])
    effects[3] += generator.normal(0, 2, 40)
    screened = dict.fromkeys(edges, 0.0)
    found = judged(edges, effects, screened, set(), 0.05, 0.1, "fdr")
    assert [found[edge].status for edge in edges] == ["confirmed", "negligible", "negative", "undecided", "negligible"]
    raw = [stats.ttest_1samp(each, 0.1, alternative="greater").pvalue for each in effects]
    np.testing.assert_allclose([found[edge].p for edge in edges], stats.false_discovery_control(raw), atol=1e-12)
    low, high = stats.ttest_1samp(effects[1], 0).confidence_interval(0.9)
    assert (found[edges[1]].low, found[edges[1]].high) == pytest.approx((low, high))
    family = judged(edges, effects, screened, set(), 0.05, 0.1, "family-wise")
    assert all(family[edge].p >= found[edge].p - 1e-12 for edge in edges)


def test_nothing_is_confirmed_more_often_than_the_level_says_where_answers_are_swapped_at_random() -> None:
    """The difference of two answers, its sign drawn for each prompt: no edge has a mean effect, whatever it does in each prompt."""
    model = to_hooked(tiny.gpt2(vocab_size=60))
    generator = torch.Generator().manual_seed(2)
    p_values, runs = [], 0
    from causal_probe.circuits import interventions as parts
    from causal_probe.circuits.contrasts import contrast_of
    from causal_probe.circuits.partial import Layers
    from causal_probe.hooks.check import undisturbed

    for _ in range(6):
        tokens = torch.randint(3, 60, (24, 7), generator=generator)
        answers = torch.randint(3, 60, (24, 2), generator=generator)
        signs = 2.0 * torch.randint(0, 2, (24,), generator=generator) - 1

        def score(logits: Tensor, rows: Tensor, answers: Tensor = answers, signs: Tensor = signs) -> Tensor:
            at = logits[:, -1].gather(-1, answers[rows])
            return signs[rows] * (at[:, 0] - at[:, 1])

        with undisturbed(model):
            layers = Layers(model, tokens)
            clean = layers.clean(tokens)
            contrast = contrast_of("resample", layers, clean, None, frozenset(), generator)
            run = parts.Interventions(layers, clean, contrast, score, torch.arange(24))
            edges = parts.edges_of(layers, run.read)
            effects = run.effects(edges).numpy()
        found = judged(edges, effects, dict.fromkeys(edges, 0.0), set(), 0.2, 0.0, "family-wise")
        runs += any(edge.status == "confirmed" for edge in found.values())
        p_values += [float(stats.ttest_1samp(each, 0, alternative="greater").pvalue) for each in effects[::20]]
    assert runs <= stats.binom.ppf(0.99, 6, 0.2)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_cut_edges_are_negligible() -> None:
    """A head that writes nothing, and a receiver that reads nothing."""
    model = to_hooked(tiny.gpt2(vocab_size=60))
    with torch.no_grad():
        model.blocks[0].attn.W_O[1] = 0
    tokens = torch.randint(3, 60, (24, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        likeliest = model(tokens)[:, -1:].argmax(-1, keepdim=True)
    found = find_circuit(model, Prompts("its own answers", tokens, (6,), likeliest))
    of_it = [edge for edge in found.edges if edge.source == "L0H1"]
    assert of_it
    assert {edge.status for edge in of_it} == {"negligible"}
    assert all(abs(edge.effect) < 1e-6 for edge in of_it)


def test_the_interval_of_what_is_missed_is_clopper_and_pearson_s() -> None:
    edge = CircuitEdge("embed", "logits", "negligible", 0, 0, 0, 0, 1, None, None, 0, True)
    edges = [edge] * 38 + [edge._replace(status="confirmed")] * 2 + [edge._replace(sampled=False)] * 60
    tested, confirmed, low, high = missed(edges, 1000)
    assert (tested, confirmed) == (40, 2)
    assert low == pytest.approx(stats.beta.ppf(0.025, 2, 39))
    assert high == pytest.approx(stats.beta.ppf(0.975, 3, 38))
    assert missed(edges, 100) is None


# ----------------------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def induction() -> Circuit:
    return found_in("key-composition")[0]


def test_a_circuit_comes_back_from_its_file_and_is_stated_in_json(induction: Circuit, tmp_path: Path) -> None:
    induction.save(tmp_path / "circuit.safetensors")
    again = load(tmp_path / "circuit.safetensors")
    assert isinstance(again, Circuit)
    assert again.to_dict() == induction.to_dict()
    stated = json.loads(json.dumps(induction.to_dict()))
    edge = stated["edges"][0]
    assert {"source", "receiver", "status", "effect", "stderr", "p"} <= set(edge)
    assert {"kept", "lost", "level", "delta", "contrast"} <= set(stated)
    assert stated["kept"] == pytest.approx(1, abs=1e-4)
    assert set(again.graph.edges) == set(induction.members)
    assert "delta" in str(induction)
    assert "H0: the metric" in induction.methods
    assert set(induction.by_component) >= {"embed", "L0H0", "L1H0", "logits"}
    assert len(induction.to_pandas()) == len(induction.edges)


def test_it_is_compared_with_any_graph(induction: Circuit) -> None:
    truth = nx.DiGraph([("embed", "L1H0.q"), ("embed", "L9H0.q")])
    found = induction.compare(truth)
    assert found.recall == 0.5
    assert found.missing == (("embed", "L9H0.q"),)
    assert len(found.extra) == len(induction.members) - 1
    with pytest.raises(CausalProbeError, match=r"a KnownCircuit or a networkx\.DiGraph"):
        induction.compare([("embed", "logits")])


def test_sizes_are_shares_of_the_metric_s_fall(induction: Circuit) -> None:
    assert [size.edges for size in induction.sizes] == sorted({size.edges for size in induction.sizes})
    assert induction.sizes[-1].edges == len(induction.members)
    assert induction.sizes[-1].random_kept < 0.5
    assert all(math.isfinite(value) for size in induction.sizes for value in size)


def test_prompts_with_answers_and_corrupted_ones() -> None:
    model = to_hooked(tiny.gpt2(vocab_size=60, n_positions=64))
    prompts = circuits.task_prompts(model, "induction", n=24)
    assert prompts.corrupted is not None
    # A random model does not do the task; but its own likeliest tokens are right by its lights.
    with torch.no_grad():
        logits = model(prompts.tokens)[:, list(prompts.scored)]
        broken = model(prompts.corrupted)[:, list(prompts.scored)]
    favoured = Prompts(
        "favoured", prompts.tokens, prompts.scored, (logits - broken).argmax(-1, keepdim=True), (logits - broken).argmin(-1, keepdim=True), prompts.corrupted,
    )  # fmt: skip
    found = find_circuit(model, favoured, contrast="corrupted", sizes=1)
    assert found.metric == "logit-difference"
    assert found.settings["prompts"] == "favoured"
    assert found.confirmed
    assert found.kept == pytest.approx(1, abs=0.5)


# ------------------------------------------------------------------------------------------------------------- bad input

MODEL = to_hooked(tiny.gpt2(vocab_size=60))
TOKENS = torch.randint(3, 60, (24, 7), generator=torch.Generator().manual_seed(0))


def last(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, -1].amax(-1)


@pytest.mark.parametrize(
    ("tokens", "metric", "options", "message"),
    [
        (TOKENS[:23], last, {}, "23 prompts can't be split into a screen, a test and a report of 8 or more each"),
        (TOKENS.float(), last, {}, "whole numbers"),
        ("a text", last, {}, "tokenizer"),
        (TOKENS, "logit-difference", {}, "Plain tokens have no answers"),
        (TOKENS, lambda logits, tokens: logits[:, -1, 0] * 0 + 1, {}, "doesn't fall when every edge is ablated"),
        (TOKENS, lambda logits, tokens: -last(logits, tokens), {}, "doesn't fall when every edge is ablated"),
        (TOKENS, lambda logits, tokens: logits[:, -1], {}, r"must give one number for each: \[8\]"),
        (TOKENS, lambda logits, tokens: last(logits, tokens) * math.nan, {}, "not finite on some prompt"),
        (TOKENS, last, {"contrast": "corrupted"}, "takes corrupted prompts, and there are none"),
        (TOKENS, last, {"contrast": "noise"}, "Unknown contrast 'noise'"),
        (TOKENS, last, {"delta": -1.0}, "delta is -1.0"),
        (TOKENS, last, {"level": 0.5}, "level is 0.5"),
        (TOKENS, last, {"most": 10, "sampled": 11}, "only 10 edges are tested"),
        (TOKENS, last, {"pairs": -1}, "pairs is -1"),
        (TOKENS + 60, last, {}, "vocabulary"),
    ],
)
def test_what_can_not_be_asked(tokens: Any, metric: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        find_circuit(MODEL, tokens, metric, **options)


# ------------------------------------------------------------------------------------------------------------ the command


def test_the_study_writes_its_folder(tmp_path: Path) -> None:
    """A random model is asked for what it says by itself, beside what it says after a corrupted prompt."""
    model = to_hooked(tiny.gpt2(), tiny.tokenizer())
    file = tmp_path / "mine.jsonl"
    file.write_text(own_answers(model))
    found = model_circuit(
        model, task=str(file), contrast="corrupted", most=60, sampled=10, bos="no", out=tmp_path / "out"
    )
    assert found.settings["task"] == str(file)
    assert json.loads((tmp_path / "out" / "circuit.json").read_text())["contrast"] == "corrupted"
    assert load(tmp_path / "out" / "circuit.safetensors").to_dict() == found.to_dict()
    assert found.baseline < found.clean
    assert len(found.edges) == 60
    assert "A circuit of" in str(report(found))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sums"}, "`task` is 'sums'; it is induction, ioi"),
        ({"task": "no.jsonl"}, "there is no such file"),
        ({"sampled": 300}, "`sampled` is 300, and `most` is 200"),
        ({"level": 0.5}, "`level` is 0.5"),
        ({"n_prompts": 23}, "`n_prompts` is 23"),
    ],
)
def test_options_are_refused_before_a_model_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CausalProbeError, match=message):
        model_circuit("no/such/model", **options)


def test_the_tasks_of_the_command_are_those_there_are() -> None:
    from causal_probe.circuits.prompt_tasks import TASKS
    from causal_probe.options.circuit import PROMPT_TASKS

    assert tuple(TASKS) == PROMPT_TASKS
