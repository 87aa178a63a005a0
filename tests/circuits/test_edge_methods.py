"""Methods that score edges, each against a computation of its own with plain hooks, and all in other coordinates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from causal_probe import circuits
from causal_probe.circuits.check_truth import ablate, parts_of
from causal_probe.circuits.compiled import has_tracr
from causal_probe.circuits.edge_methods import EDGE_METHODS, EdgeMethod, Scores
from causal_probe.circuits.known import Edge, KnownCircuit
from causal_probe.circuits.turning import rotated
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import undisturbed


@pytest.fixture(scope="module")
def between() -> KnownCircuit:
    return circuits.known_circuit("mlp-between")


@pytest.fixture(scope="module")
def tokens(between: KnownCircuit) -> Tensor:
    return between.sample(48, torch.Generator().manual_seed(1))


def scores(name: str, circuit: KnownCircuit, tokens: Tensor) -> dict[Edge, float]:
    return dict(EDGE_METHODS[name](circuit.model, tokens, circuit.metric).scores)


# ----------------------------------------------------------------------------------------- against plain hooks and gradients


@pytest.mark.parametrize("name", ["zero", "mean by position", "corrupted"])
def test_ablation_is_what_plain_hooks_give(name: str, between: KnownCircuit, tokens: Tensor) -> None:
    found = scores(f"ablation, {name}", between, tokens)
    assert set(found) == set(between.candidates())
    with undisturbed(between.model):
        parts = parts_of(between.model, tokens)
        new = {
            "zero": torch.zeros_like,
            "mean by position": lambda part: part.mean(0, keepdim=True).expand_as(part),
            "corrupted": lambda part: part.roll(1, 0),
        }[name]
        before = between.metric(between.model(tokens), tokens)
        for edge, score in found.items():
            after = ablate(between.model, tokens, {edge: lambda edge=edge: new(parts[edge[0]])}, between.metric)
            assert score == pytest.approx(abs(float((before - after).mean())), abs=1e-5)


def test_the_squared_distance_is_that_of_all_logits(between: KnownCircuit, tokens: Tensor) -> None:
    found = scores("distance, mean by position", between, tokens)
    with undisturbed(between.model):
        parts, before = parts_of(between.model, tokens), between.model(tokens)
        for edge in (("L0.mlp", "L1H0.k"), ("embed", "L1H0.q"), ("pos_embed", "L0H0.k"), ("L1H0", "logits")):
            mean = parts[edge[0]].mean(0, keepdim=True).expand_as(parts[edge[0]])
            changed = ablate(
                between.model, tokens, {edge: lambda mean=mean: mean}, lambda logits, _: (logits - before).square().flatten(1).mean(1)
            )  # fmt: skip
            assert found[edge] == pytest.approx(float(changed.mean()), abs=1e-6)


def test_attribution_at_one_point_is_gradient_times_change(between: KnownCircuit, tokens: Tensor) -> None:
    found = scores("EAP", between, tokens)
    model: Any = between.model
    with undisturbed(model):
        parts = parts_of(model, tokens)
    names = {"L0H0.q": ("blocks.0.hook_q_input", 0), "L0.mlp": ("blocks.0.hook_mlp_in", None)}
    names |= {f"L1H0.{side}": (f"blocks.1.hook_{side}_input", 0) for side in "qkv"}
    for receiver, (hook_name, head) in names.items():
        leaves: list[Tensor] = []

        def add(value: Tensor, hook: Any, leaves: list[Tensor] = leaves, head: int | None = head) -> Tensor:
            leaves.append(torch.zeros_like(value if head is None else value[:, :, head], requires_grad=True))
            if head is None:
                return value + leaves[0]
            value = value.clone()
            value[:, :, head] += leaves[0]
            return value

        with torch.enable_grad():
            total = between.metric(model.run_with_hooks(tokens, fwd_hooks=[(hook_name, add)]), tokens).sum()
            (gradient,) = torch.autograd.grad(total, leaves)
        for source in ("embed", "pos_embed", "L0H0"):
            if (source, receiver) in found:
                change = parts[source].roll(1, 0) - parts[source]
                wanted = abs(float((gradient * change).sum()) / len(tokens))
                assert found[source, receiver] == pytest.approx(wanted, abs=1e-5), (source, receiver)


def test_path_patching_goes_through_mlps_and_leaves_heads_as_they_are(between: KnownCircuit, tokens: Tensor) -> None:
    found, model = scores("path patching", between, tokens), between.model
    with undisturbed(model):
        parts = parts_of(model, tokens)
        change = parts["L0H0"].roll(1, 0) - parts["L0H0"]
        written: dict[str, Tensor] = {}

        def arrive(value: Tensor, hook: Any) -> Tensor:
            return value + change

        def note(value: Tensor, hook: Any) -> None:
            written["mlp"] = value

        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_in", arrive), ("blocks.0.hook_mlp_out", note)])
        through = change + written["mlp"] - parts["L0.mlp"]

        def put(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[:, :, 0] += through
            return value

        before = between.metric(model(tokens), tokens)
        after = between.metric(model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_k_input", put)]), tokens)
    assert found["L0H0", "L1H0.k"] == pytest.approx(abs(float((before - after).mean())), abs=1e-5)
    # the edge alone carries nothing: keys read what the MLP has written
    assert found["L0H0", "L1H0.k"] > 0.1
    assert scores("ablation, corrupted", between, tokens)["L0H0", "L1H0.k"] < 1e-6


def test_pruning_keeps_what_each_threshold_asks_for(between: KnownCircuit, tokens: Tensor) -> None:
    found = scores("ACDC, resample", between, tokens)
    assert {edge for edge, share in found.items() if share} == set(between.edges())
    assert set(found.values()) <= {0.0, 0.3, 0.03, 0.003}


def test_attention_weighs_what_values_hold(tokens: Tensor) -> None:
    circuit = circuits.known_circuit("key-composition")
    found, model = scores("attention", circuit, tokens), circuit.model
    with undisturbed(model):
        parts = parts_of(model, tokens)
        _, cache = model.run_with_cache(tokens)
        for layer, source in ((0, "embed"), (1, "pos_embed"), (1, "L0H0")):
            attn = model.blocks[layer].attn
            written = cache[f"blocks.{layer}.attn.hook_pattern"][:, 0] @ (parts[source] @ attn.W_V[0]) @ attn.W_O[0]
            assert found[source, f"L{layer}H0.v"] == pytest.approx(float(written.norm(dim=-1).mean()), abs=1e-5)


def test_score_attributions_are_a_source_s_part_of_the_scores(tokens: Tensor) -> None:
    circuit = circuits.known_circuit("key-composition")
    found, model = scores("QK attributions", circuit, tokens), circuit.model
    attn = model.blocks[1].attn
    with undisturbed(model):
        parts = parts_of(model, tokens)
        _, cache = model.run_with_cache(tokens)
    queries = (parts["embed"] + parts["pos_embed"] + parts["L0H0"]) @ attn.W_Q[0]
    its = (queries @ (parts["L0H0"] @ attn.W_K[0]).mT).detach()
    target = cache["blocks.1.attn.hook_pattern"][:, 0].argmax(-1)
    values = []
    for row in range(len(tokens)):
        for query in range(1, tokens.shape[1]):
            seen = its[row, query, : query + 1]
            values.append(float(seen[target[row, query]] - seen.mean()))
    assert found["L0H0", "L1H0.k"] == pytest.approx(abs(sum(values) / len(values)), rel=1e-4)


def test_gradients_of_scores_are_those_of_the_softmax(tokens: Tensor) -> None:
    circuit = circuits.known_circuit("value-composition")
    found, model = scores("score gradients", circuit, tokens), circuit.model
    few = tokens[:32]
    leaves: list[Tensor] = []

    def add(value: Tensor, hook: Any) -> Tensor:
        leaves.append(torch.zeros_like(value, requires_grad=True))
        return value + leaves[0]

    with torch.enable_grad():
        logits = model.run_with_hooks(few, fwd_hooks=[("blocks.1.attn.hook_attn_scores", add)])
        (slope,) = torch.autograd.grad(circuit.metric(logits, few).sum(), leaves)
    with undisturbed(model):
        parts = parts_of(model, few)
    attn = model.blocks[1].attn
    keys = sum(parts[source] for source in ("embed", "pos_embed", "L0H0")) @ attn.W_K[0]
    its = (parts["pos_embed"] @ attn.W_Q[0]) @ keys.mT
    wanted = (torch.where(slope[:, 0] == 0, 0, slope[:, 0] * its)).sum((1, 2)).abs().mean()
    assert found["pos_embed", "L1H0.q"] == pytest.approx(float(wanted.detach()), rel=1e-3, abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- all of them


#: The ACDC of one contrast stands for that of both.
@pytest.mark.parametrize("name", [name for name in EDGE_METHODS if name != "ACDC"])
def test_no_figure_depends_on_the_coordinates(name: str, between: KnownCircuit, tokens: Tensor) -> None:
    circuit = between if name != "upstream" else circuits.known_circuit("unread-head")  # heads that read heads
    turned = rotated(circuit, seed=3)
    own, other = (scores(name, each, tokens[:24]) for each in (circuit, turned))
    assert own.keys() == other.keys()
    largest = max(map(abs, own.values()))
    assert largest > 0
    for edge, value in own.items():
        assert other[edge] == pytest.approx(value, abs=2e-3 * largest), edge


@pytest.mark.parametrize("name", ["key-composition", "and-gate"])
def test_interventions_rank_every_true_edge_first(name: str, tokens: Tensor) -> None:
    circuit = circuits.known_circuit(name)
    for method in ("ablation, resample", "distance, resample", "circuit", "ACDC, resample"):
        found = scores(method, circuit, tokens)
        assert roc_auc_score([edge in circuit.truth.edges for edge in found], [*found.values()]) == 1


def test_claims_are_the_members_of_the_circuit_and_gates_have_their_effect_together() -> None:
    circuit = circuits.known_circuit("or-gate")
    tokens = circuit.sample(96, torch.Generator().manual_seed(1))
    found = EDGE_METHODS["circuit"](circuit.model, tokens, circuit.metric)
    assert set(found.claims[0.05]) == set(circuit.edges())
    assert set(found.claims[0.001]) < set(
        found.claims[0.05]
    )  # those of the gate are confirmed in pairs, at the level of the run
    assert found.scores["L0H0", "L0.mlp"] > 0.1
    assert abs(found.effects["L0H0", "L0.mlp"].value) < 1e-6


@pytest.mark.skipif(not has_tracr(), reason="tracr is not installed")
@pytest.mark.parametrize("name", ["induction", "share-of-a"])
def test_what_depends_on_the_position_alone_is_missed_by_contrasts_at_each_position(name: str) -> None:
    circuit = circuits.known_circuit(f"tracr-{name}")
    tokens = circuit.sample(64, torch.Generator().manual_seed(1))
    edges = [edge for edge in circuit.candidates() if edge[1] != "logits" and edge not in circuit.constant]
    true = [edge in circuit.truth.edges for edge in edges]
    positional = sum(circuit.truth.edges[edge]["kind"] == "positional" for edge in edges if edge in circuit.truth.edges)
    at_each, elsewhere = (scores(f"distance, {name}", circuit, tokens) for name in ("mean by position", "resample"))
    assert roc_auc_score(true, [elsewhere[edge] for edge in edges]) == 1
    missed = roc_auc_score(true, [round(at_each[edge], 9) for edge in edges])
    assert missed == pytest.approx(1 - positional / (2 * sum(true)), abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({}, "gives no score"),
        ([1, 2], "gives list"),
        ({("embed", "L0H0.q"): float("nan")}, "must give a finite number"),
        ({"embed -> L0H0.q": 1.0}, "a pair of names"),
        (Scores({}), "gives no score"),
    ],
)
def test_an_answer_that_is_none_is_refused(answer: Any, said: str, between: KnownCircuit, tokens: Tensor) -> None:
    method = EdgeMethod("mine", "", lambda model, tokens, metric: answer)
    with pytest.raises(CausalProbeError, match=said):
        method(between.model, tokens, between.metric)


def test_a_method_names_a_contrast_of_which_there_is_a_truth() -> None:
    with pytest.raises(CausalProbeError, match="corrupted"):
        EdgeMethod("mine", "", lambda model, tokens, metric: {}, contrast="corrupted")
