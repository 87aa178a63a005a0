"""Edges ablated one by one and together, beside plain hooks on Hugging Face's own modules; estimates beside finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from causal_probe import circuits
from causal_probe.circuits.check_truth import ablate
from causal_probe.circuits.contrasts import contrast_of
from causal_probe.circuits.interventions import Interventions, edges_of
from causal_probe.circuits.partial import Layers
from causal_probe.circuits.screen import attributions
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.hooks.check import undisturbed
from causal_probe.models.standard import StandardTransformer
from tests import tiny_huggingface as tiny
from tests.architectures import zoo

ANSWERS = torch.tensor([7, 3, 40, 22])
TOKENS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))


def score(logits: Tensor, rows: Tensor) -> Tensor:
    return logits[:, -1].log_softmax(-1).gather(-1, ANSWERS[rows][:, None])[:, 0]


def made(model: Any, contrast: str = "resample", *, corrupted: Tensor | None = None) -> Interventions:
    layers = Layers(model, TOKENS)
    clean = layers.clean(TOKENS)
    broken = None if corrupted is None else layers.clean(corrupted)
    found = contrast_of(contrast, layers, clean, broken, frozenset(), torch.Generator().manual_seed(0))
    return Interventions(layers, clean, found, score, torch.arange(len(TOKENS)))


# ----------------------------------------------------------------------------------------------------- beside plain hooks


def llama_places(model: Any, layer: int) -> dict[str, Any]:
    """The modules that a plain hook needs: what reads a layer's stream, and what projects it."""
    block = model.model.layers[layer]
    before_mlp = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
    return {
        "norm": block.input_layernorm,
        "q": block.self_attn.q_proj,
        "k": block.self_attn.k_proj,
        "v": block.self_attn.v_proj,
        "mlp": before_mlp,
        "logits": model.model.norm,
        "block": block,
    }


def gpt2_places(model: Any, layer: int) -> dict[str, Any]:
    block = model.transformer.h[layer]
    c_attn = block.attn.c_attn
    return {
        "norm": block.ln_1, "q": c_attn, "k": c_attn, "v": c_attn, "mlp": block.ln_2, "logits": model.transformer.ln_f, "block": block,
    }  # fmt: skip


def by_hand(
    model: Any, places: Callable[[Any, int], dict[str, Any]], layer: int, side: str, columns: slice, change: Tensor
) -> Tensor:
    """The metric when one receiver's input is changed, by hooks on the model's own modules."""
    at, handles = places(model, layer), []
    try:
        if side in "qkv":

            def project(module: Any, args: Any, out: Tensor) -> Tensor:
                new = module.forward(at["norm"].forward(seen["stream"] + change))
                out = out.clone()
                out[..., columns] = new[..., columns]
                return out

            seen: dict[str, Tensor] = {}
            handles.append(at["norm"].register_forward_pre_hook(lambda _, args: seen.update(stream=args[0])))
            handles.append(at[side].register_forward_hook(project))
        else:
            handles.append(at[side].register_forward_pre_hook(lambda _, args: (args[0] + change,)))
        with torch.no_grad():
            return score(model(TOKENS).logits, torch.arange(len(TOKENS)))
    finally:
        for handle in handles:
            handle.remove()


def parts_by_hand(model: Any, places: Callable[[Any, int], dict[str, Any]]) -> dict[str, Tensor]:
    """What the embeddings and layer 0 have written: its MLP, and in models without a norm behind the attention its head 1."""
    at, found, handles = places(model, 0), {}, []
    o = getattr(getattr(at["block"], "self_attn", None), "o_proj", None) or at["block"].attn.c_proj
    handles.append(at["block"].register_forward_pre_hook(lambda _, args: found.update(embed=args[0])))
    handles.append(places(model, 0)["mlp"].register_forward_pre_hook(lambda _, args: found.update(middle=args[0])))
    handles.append(places(model, 1)["block"].register_forward_pre_hook(lambda _, args: found.update(after=args[0])))
    handles.append(o.register_forward_pre_hook(lambda _, args: found.update(z=args[0])))
    try:
        with torch.no_grad():
            model(TOKENS)
            parts = {"embed": found["embed"], "L0.mlp": found["after"] - found["middle"]}
            if not hasattr(at["block"], "pre_feedforward_layernorm"):
                d = found["z"].shape[-1] // 4
                weight = o.weight if not hasattr(o, "nf") else o.weight.mT  # [d_model, all heads]
                parts["L0H1"] = found["z"][..., d : 2 * d] @ weight[:, d : 2 * d].mT
            return parts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["GPT-2", "Llama 3", "Qwen3", "Gemma 2"])
def test_an_edge_s_ablation_is_that_by_plain_hooks(name: str) -> None:
    original, model = zoo.hooked(zoo.ARCHITECTURES[name])
    places = gpt2_places if name == "GPT-2" else llama_places
    with undisturbed(model):
        run = made(model)
        parts = parts_by_hand(original, places)
        place, donors = run.contrast.place, run.contrast.donors
        assert donors is not None
        assert not bool(place[:, 0].any())
        assert bool((donors != torch.arange(len(donors))).all())
        width = original.config.hidden_size
        d_head = getattr(original.config, "head_dim", None) or width // 4
        for source, part in parts.items():
            if source == "embed" and name == "GPT-2":
                continue  # token and position are two sources there
            change = torch.zeros_like(part)
            change[place] = part[place][donors] - part[place]
            own = run.layers.part(run.clean.parts, source)
            centred = part - part.mean(-1, keepdim=True) if name == "GPT-2" and source == "L0H1" else part
            assert torch.allclose(own, centred, atol=1e-5)
            for receiver, side, number in (
                ("L1H2.q", "q", 2), ("L1H2.k", "k", 1), ("L1H2.v", "v", 1), ("L1.mlp", "mlp", 0), ("logits", "logits", 0)
            ):  # fmt: skip
                at = 2 if name == "GPT-2" else number
                offset = width * "qkv".index(side) if name == "GPT-2" and side in "qkv" else 0
                columns = slice(offset + at * d_head, offset + (at + 1) * d_head)
                expected = by_hand(original, places, 1, side, columns, change)
                effect = run.effects([(source, receiver)])[0]
                assert torch.allclose(run.before - effect, expected.double(), atol=1e-5), (source, receiver)
                assert float(effect.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["Llama 3", "Pythia", "Gemma 2", "Qwen3.5", "DeepSeek-V3"])
def test_one_edge_cut_together_with_none_is_that_edge_and_none_cut_is_the_model(name: str) -> None:
    _, model = zoo.hooked(zoo.ARCHITECTURES[name])
    with undisturbed(model):
        run = made(model)
        edges = edges_of(run.layers, run.read)
        some = edges[:: max(1, len(edges) // 7)]
        alone = run.effects(some)
        for edge, effect in zip(some, alone, strict=True):
            assert torch.allclose(run.before - run.without([edge]), effect, atol=1e-5)
        assert torch.allclose(run.without([]), run.before, atol=1e-6)
    if name == "DeepSeek-V3":  # keys and values share what carries them
        assert not [edge for edge in edges if "H" in edge[1]]
        assert [edge for edge in edges if edge[1] == "L1.mlp"]
    if name == "Qwen3.5":  # layer 0 mixes positions without attention, and reads the stream for that
        assert ("L0.mixer", "L1H0.q") in edges
        assert not [edge for edge in edges if edge[1].startswith("L0")]
        assert [edge for edge in edges if edge[1] == "L1.mlp"]
    if name == "Pythia":  # attention and MLP stand side by side
        assert ("L1H0", "L1.mlp") not in edges


@pytest.mark.parametrize("contrast", ["resample", "mean", "mean-by-position", "zero"])
def test_edges_cut_together_are_those_by_plain_hooks(contrast: str) -> None:
    known = circuits.known_circuit("planted-1")
    known.model.double()  # rounding of single precision adds up over a hundred edges, to 1.6e-5 on some processors
    global_tokens = known.sample(12, torch.Generator().manual_seed(3))
    with undisturbed(known.model):
        layers = Layers(known.model, global_tokens)
        clean = layers.clean(global_tokens)
        made_of = contrast_of(contrast, layers, clean, None, frozenset(), torch.Generator().manual_seed(0))
        rows = torch.arange(len(global_tokens))
        run = Interventions(layers, clean, made_of, lambda logits, at: known.metric(logits, global_tokens[at]), rows)
        edges = edges_of(layers, run.read)
        assert set(edges) == set(known.candidates())
        cut = [edge for number, edge in enumerate(edges) if number % 3]
        donors = {edge: lambda source=edge[0]: made_of.replacement(source) for edge in cut}
        expected = ablate(known.model, global_tokens, donors, known.metric)
        assert torch.allclose(run.without(cut), expected.double(), rtol=0, atol=1e-10)


def test_a_corrupted_prompt_s_parts_are_put_in() -> None:
    model = to_hooked(tiny.gpt2(vocab_size=60))
    other = TOKENS.clone()
    other[:, 2] = (other[:, 2] + 5) % 60
    with undisturbed(model):
        run = made(model, "corrupted", corrupted=other)
        every = edges_of(run.layers, run.read)
        whole = run.without(
            every
        )  # all that is read is of the corrupted prompt, but for what one position alone reads of itself
        logits = model(other)
        assert torch.allclose(whole, score(logits, torch.arange(4)).double(), atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- the screen


class Scaled:
    """A contrast whose changes are a small share of another's."""

    def __init__(self, contrast: Any, share: float) -> None:
        self.contrast, self.share = contrast, share

    def delta(self, source: str, now: Tensor | None = None) -> Tensor:
        return self.share * self.contrast.delta(source, now)


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3", "Gemma 2", "Pythia"])
def test_estimates_are_the_first_order_of_effects(name: str) -> None:
    original, _ = zoo.hooked(zoo.ARCHITECTURES[name])
    model = to_hooked(original.double())
    with undisturbed(model):
        run = made(model)
        whole, share = run.contrast, 3e-3  # Hugging Face's RMSNorm rounds to single precision in between
        run.contrast = Scaled(whole, share)  # type: ignore[assignment]
        edges = edges_of(run.layers, run.read)
        estimates = {edge: float(each.sum()) for edge, each in attributions(run, steps=1).items()}
        assert set(estimates) == set(edges)
        some = edges[::5]
        there = run.effects(some).mean(1)
        run.contrast = Scaled(whole, -share)  # type: ignore[assignment]
        effects = (there - run.effects(some).mean(1)) / 2  # what is of second order goes
        found = torch.tensor([estimates[edge] for edge in some], dtype=torch.float64)
        assert torch.allclose(found, effects, rtol=0, atol=2e-3 * float(effects.abs().max()))


def test_estimates_of_a_linear_model_sum_to_the_metric_s_difference() -> None:
    """Without norms and MLPs, with patterns that are even whatever the input: all is linear."""
    model = StandardTransformer(60, 9, d_model=8, n_layers=2, n_heads=2, d_head=4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name for part in ("W_Q", "W_K", "b_Q", "b_K")):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    with undisturbed(model):
        run = made(model)
        run.score = lambda logits, rows: logits[:, -1].gather(-1, ANSWERS[rows][:, None])[:, 0]
        run.before = run._scored(run.clean.logits)
        estimates = {edge: float(each.sum()) for edge, each in attributions(run, steps=2).items()}
        into = [edge for edge in estimates if edge[1] == "logits"]
        fall = float((run.before - run.without(into)).mean())
        assert sum(estimates[edge] for edge in into) == pytest.approx(fall, abs=1e-10)
        values = [edge for edge in estimates if edge[1] == "L1H0.v"]
        assert sum(estimates[edge] for edge in values) == pytest.approx(
            float((run.before - run.without(values)).mean()), abs=1e-10
        )


# --------------------------------------------------------------------------------------------------------------- refusals


def test_contrasts_that_can_not_be_taken() -> None:
    with undisturbed(model := to_hooked(tiny.gpt2(vocab_size=60))):
        layers = Layers(model, TOKENS)
        clean = layers.clean(TOKENS)
        generator = torch.Generator()
        with pytest.raises(CausalProbeError, match="Unknown contrast 'random'; choose from resample"):
            contrast_of("random", layers, clean, None, frozenset(), generator)
        with pytest.raises(CausalProbeError, match="takes corrupted prompts, and there are none"):
            contrast_of("corrupted", layers, clean, None, frozenset(), generator)
        with pytest.raises(CausalProbeError, match="fewer than two are left"):
            contrast_of("resample", layers, clean, None, frozenset(range(60)), generator)


def test_special_tokens_and_outliers_are_neither_taken_nor_replaced() -> None:
    with undisturbed(model := to_hooked(tiny.gpt2(vocab_size=60))):
        layers = Layers(model, TOKENS)
        clean = layers.clean(TOKENS)
        stream = clean.streams[1].clone()
        stream[2, 4] *= 1000
        clean.streams[1] = stream
        special = int(TOKENS[1, 3])
        found = contrast_of("resample", layers, clean, None, frozenset({special}), torch.Generator().manual_seed(0))
        left = torch.ones_like(TOKENS, dtype=torch.bool)
        left[:, 0] = left[2, 4] = False
        left[special == TOKENS] = False
        assert torch.equal(found.place, left)
        part = layers.part(clean.parts, "L0.mlp")
        assert not bool(found.delta("L0.mlp")[~left].any())
        kept = found.replacement("L0.mlp")[left]
        assert torch.allclose(kept.sort(0).values, part[left].sort(0).values)
        assert bool((found.delta("L0.mlp")[left].abs().sum(-1) > 0).all())


def test_models_that_can_not_be_run_in_parts() -> None:
    from causal_probe.models import DisentangledTransformer

    with pytest.raises(CausalProbeError, match="to_transformer_lens"):
        Layers(DisentangledTransformer(d_vocab=60, n_positions=9), TOKENS)
    with pytest.raises(CausalProbeError, match=r"bidirectional|not the sum of what the sources"):
        circuits.find_circuit(to_hooked(tiny.bert(vocab_size=60)), TOKENS.repeat(6, 1))
