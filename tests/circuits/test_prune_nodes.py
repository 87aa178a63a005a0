"""Nodes pruned, beside plain hooks on Hugging Face's own modules; planted circuits; overlaps beside draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from causal_probe import circuits, experiments
from causal_probe.circuits import Prompts, prune_nodes
from causal_probe.circuits.contrasts import contrast_of
from causal_probe.circuits.interventions import Interventions, edges_of
from causal_probe.circuits.nodes import NodeCircuit
from causal_probe.circuits.partial import Layers
from causal_probe.circuits.prune_nodes import Ablated
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.hooks.check import undisturbed
from causal_probe.models.standard import StandardTransformer
from tests import tiny_huggingface as tiny
from tests.own_answers import own_answers


def asked(
    model: Any, n: int = 24, length: int = 7, *, seed: int = 0, start: int = 3, stop: int = tiny.D_VOCAB
) -> Prompts:
    """Random prompts of which the model's own first and last answers are right and wrong."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = (torch.randint(start, stop, (n, length), generator=generator) for _ in range(2))
    with torch.no_grad():
        order = model(clean)[:, -1].argsort(-1, descending=True)
    return Prompts("mine", clean, (length - 1,), order[:, None, :1], order[:, None, -1:], corrupted)


def pretrained() -> Any:
    return to_hooked(tiny.llama().double(), tiny.tokenizer())


def by_plain_hooks(
    model: Any, kind: str, tokens: torch.Tensor, others: torch.Tensor | None, gone: Sequence[str]
) -> torch.Tensor:
    """Logits of Hugging Face's model with what o_proj reads of a head, or what an MLP gives, replaced by its mean over other prompts."""
    blocks = model.model.layers if kind == "llama" else model.transformer.h
    places = [(b.self_attn.o_proj if kind == "llama" else b.attn.c_proj, b.mlp) for b in blocks]
    count = model.config.num_attention_heads
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for layer, (out, mlp) in enumerate(places):
        handles.append(
            out.register_forward_pre_hook(lambda _, args, layer=layer: seen.__setitem__((layer, "z"), args[0]))
        )
        handles.append(
            mlp.register_forward_hook(lambda _, args, value, layer=layer: seen.__setitem__((layer, "mlp"), value))
        )
    with torch.no_grad():
        model(tokens if others is None else others)
    for handle in handles:
        handle.remove()
    means = {
        key: torch.zeros_like(value[:1]) if others is None else value.mean(0, keepdim=True)
        for key, value in seen.items()
    }

    def replace(layer: int, heads: list[int]) -> Any:
        def hook(module: Any, args: Any) -> Any:
            z = args[0].clone().unflatten(-1, (count, -1))
            z[:, :, heads] = means[layer, "z"].unflatten(-1, (count, -1))[:, :, heads]
            return (z.flatten(-2), *args[1:])

        return hook

    handles = []
    for layer, (out, mlp) in enumerate(places):
        heads = [head for head in range(count) if f"L{layer}H{head}" in gone]
        handles.append(out.register_forward_pre_hook(replace(layer, heads)))
        if f"L{layer}.mlp" in gone:
            handles.append(mlp.register_forward_hook(lambda *args, layer=layer: means[layer, "mlp"].expand_as(args[2])))
    with torch.no_grad():
        logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("contrast", ["corrupted-mean", "mean-by-position", "zero"])
def test_a_search_is_that_by_plain_hooks(kind: str, contrast: Any) -> None:
    plain = getattr(tiny, kind)().double()
    model = to_hooked(getattr(tiny, kind)().double())
    prompts = asked(model)
    found = prune_nodes(model, prompts, contrast=contrast, keep=0.8, n_random=3, seed=1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    search, report = (half.sort().values for half in order.tensor_split(2))
    score = prompts.score("logit-difference")

    def metric(rows: torch.Tensor, gone: Sequence[str]) -> torch.Tensor:
        others = {"corrupted-mean": prompts.corrupted, "mean-by-position": prompts.tokens, "zero": None}[contrast]
        given = None if others is None else others[rows]
        return score(by_plain_hooks(plain, kind, prompts.tokens[rows], given, gone), rows)

    heads = plain.config.num_attention_heads
    nodes = [name for layer in range(2) for name in (*(f"L{layer}H{h}" for h in range(heads)), f"L{layer}.mlp")]
    gone: list[str] = []
    clean, number = metric(search, []).mean(), 0
    while True:
        left, before = [node for node in nodes if node not in gone], len(gone)
        for node in left[::-1] if number % 2 == 0 else left:
            if metric(search, [*gone, node]).mean() >= 0.8 * clean:
                gone.append(node)
        number += 1
        if len(gone) == before:
            break
    assert found.nodes == tuple(node for node in nodes if node not in gone)
    assert 0 < len(found.nodes) < found.candidates == len(nodes)  # so that the test asks something
    assert len(found.sweeps) == number
    after, before_ = metric(report, gone), metric(report, [])
    assert found.kept == pytest.approx(float(after.mean() / before_.mean()), rel=1e-6)
    assert found.clean == pytest.approx(float(before_.mean()), rel=1e-6)
    assert found.baseline == pytest.approx(float(metric(report, nodes).mean()), rel=1e-6)
    share = ((after - found.kept * before_) / before_.mean()).numpy()
    assert found.kept_stderr == pytest.approx(share.std(ddof=1) / len(share) ** 0.5, rel=1e-6)
    assert len(found.random_kept) == 3


def test_the_stream_that_is_kept_changes_nothing() -> None:
    model = pretrained()
    prompts = asked(model)
    rows = torch.arange(24)
    with undisturbed(model):
        run = Ablated(Layers(model, prompts.tokens), prompts.tokens, prompts.corrupted, prompts.score(), rows)
        for gone in (["L1.mlp"], ["L1.mlp", "L1H2"], ["L0H1", "L1H2"], ["L1H2", "L0H1"], ["L0.mlp", "L0H1", "L1H0"]):
            assert run.value(gone) == pytest.approx(float(run.without(gone).mean()), rel=1e-9)


def test_without_nodes_is_without_all_of_their_edges() -> None:
    """Two ways to the same: heads at hook_z, and what they write taken out of every reader's input."""
    model = StandardTransformer(30, 7, d_model=16, n_layers=2, n_heads=2, d_head=8, d_mlp=24).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    prompts = asked(model, 8, start=0, stop=30)
    rows = torch.arange(8)
    with undisturbed(model):
        layers = Layers(model, prompts.tokens)
        run = Ablated(layers, prompts.tokens, prompts.corrupted, prompts.score(), rows)
        assert prompts.corrupted is not None
        clean, broken = layers.clean(prompts.tokens), layers.clean(prompts.corrupted)
        made = contrast_of("corrupted-mean", layers, clean, broken, frozenset(), generator)
        edges = Interventions(layers, clean, made, prompts.score(), rows)
        for gone in (["L0H1"], ["L0.mlp", "L1H0"], run.nodes):
            cut = [edge for edge in edges_of(layers, edges.read) if edge[0] in gone]
            assert run.without(gone).tolist() == pytest.approx(edges.without(cut).tolist(), abs=1e-9)


def planted(name: str) -> tuple[Any, Prompts]:
    known = circuits.known_circuit(name)
    tokens = known.sample(64, torch.Generator().manual_seed(0))
    order = known.model(tokens)[:, -1].argsort(-1, descending=True)
    return known, Prompts("planted", tokens, (tokens.shape[1] - 1,), order[:, None, :1], order[:, None, 1:2])


@pytest.mark.parametrize("seed", [0, 5])
def test_the_nodes_of_a_planted_circuit_are_found(seed: int) -> None:
    known, prompts = planted(f"planted-{seed}")
    found = prune_nodes(known.model, prompts, contrast="mean-by-position", keep=0.9)
    true = {source for source, _ in known.edges("mean-by-position") if source.startswith("L")}
    assert set(found.nodes) == true
    assert len(true) < found.candidates
    assert found.random_mean is not None
    assert found.kept > 0.9 > 0.5 > found.random_mean
    assert len(found.random_kept) == 20


def test_the_edges_between_what_is_left() -> None:
    known, prompts = planted("key-composition")
    found = prune_nodes(known.model, prompts, contrast="mean-by-position", edges=True)
    assert found.nodes == ("L0H0", "L1H0")
    assert found.edges is not None
    assert set(found.edges) <= set(known.edges("mean-by-position"))  # one that another stands in for may go
    assert {("L0H0", "L1H0.k"), ("L1H0", "logits")} <= set(found.edges)
    assert found.edges_kept is not None
    assert found.edges_kept > 0.8


def circuit(names: Sequence[str], heads: Sequence[int] = (4, 4, 4)) -> NodeCircuit:
    return NodeCircuit(
        tuple(names), 15, 1.0, 0.0, 0.9, 0.1, (), (), settings={"heads": list(heads)}, provenance={"model": "none"}
    )


def test_an_overlap_is_that_of_random_draws() -> None:
    one = circuit(["L0H1", "L1H0", "L1H2", "L1.mlp", "L2H0", "L2H1", "L2H3"])
    two = circuit(["L0H1", "L0H2", "L1H2", "L2H0", "L2H1"])
    found = one.overlap(two)
    assert found.shared == ("L0H1", "L1H2", "L2H0", "L2H1")
    assert found.jaccard == pytest.approx(4 / 7)
    drawn = np.random.default_rng(0)
    counts = np.array([
        sum(len(set(drawn.choice(4, a, replace=False)) & set(drawn.choice(4, b, replace=False))) for a, b in ((1, 2), (2, 1), (3, 2)))
        for _ in range(20_000)
    ])  # fmt: skip
    assert found.expected == pytest.approx(counts.mean(), abs=0.02)
    assert found.p == pytest.approx((counts >= 4).mean(), abs=0.01)
    assert two.overlap(one).p == pytest.approx(found.p)
    nothing = one.overlap(circuit([]))
    assert (nothing.shared, nothing.p, nothing.expected) == ((), 1.0, 0.0)
    assert circuit([]).overlap(circuit([])).jaccard is None
    with pytest.raises(CausalProbeError, match="different heads"):
        one.overlap(circuit(["L0H1"], heads=(2, 2)))


def test_what_can_not_be_pruned() -> None:
    known, prompts = planted("key-composition")
    bare = Prompts("bare", prompts.tokens, prompts.scored, prompts.right)
    for given, options, message in (
        (prompts.tokens, {}, "`prompts` is a Tensor"),
        (prompts, {}, "there are none. Give them, or choose mean-by-position"),
        (bare, {"contrast": "zero"}, "these prompts have none"),
        (prompts, {"contrast": "zero", "keep": 1.5}, "`keep` is 1.5"),
        (
            Prompts("few", prompts.tokens[:8], prompts.scored, prompts.right[:8], prompts.wrong[:8]),
            {"contrast": "zero"},
            "8 prompts can't be split",
        ),
        (
            Prompts("turned", prompts.tokens, prompts.scored, prompts.wrong, prompts.right),
            {"contrast": "zero"},
            "Does the model do the task",
        ),
    ):
        with pytest.raises(CausalProbeError, match=message):
            prune_nodes(known.model, given, **options)


def test_the_study_s_defaults_are_in_its_result(tmp_path: Path) -> None:
    plain = tiny.gpt2()
    (tmp_path / "own.jsonl").write_text(own_answers(plain))
    model = to_hooked(plain, tiny.tokenizer())
    found = experiments.model_circuit(model, task=str(tmp_path / "own.jsonl"), strategy="nodes", out=tmp_path / "out")
    assert (found.settings["keep"], found.settings["metric"], found.settings["contrast"]) == (
        0.8,
        "logit-difference",
        "corrupted-mean",
    )
    assert "80% of the metric (logit-difference)" in found.methods
    assert "logit-difference: clean" in str(found)
    assert "strategy='nodes'" in found.call
    assert NodeCircuit.load(tmp_path / "out" / "circuit.safetensors").nodes == found.nodes
