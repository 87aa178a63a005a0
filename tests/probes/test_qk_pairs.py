"""Pairs of sources by intervention: beside plain hooks on transformers' own model, and where they equal what is predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.models import DisentangledTransformer
from tests.architectures.zoo import ARCHITECTURES, tokens

LAYER, HEAD = 1, 2


def written(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The stream before layer 1, and what some sources have written there, by hooks of torch."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, of_input: bool = False) -> Callable[..., None]:
        def look(module: Any, args: Any, output: Any) -> None:
            found[name] = args[0] if of_input else output[0] if isinstance(output, tuple) else output

        return look

    first, second = model.model.layers[:2]
    behind = getattr(first, "post_feedforward_layernorm", None) or first.mlp
    has_norm_behind = hasattr(first, "post_feedforward_layernorm")
    handles = [
        behind.register_forward_hook(keep("L0.mlp")),
        first.self_attn.o_proj.register_forward_hook(keep("z", of_input=True)),
        first.self_attn.o_proj.register_forward_hook(keep("attention")),
        first.post_attention_layernorm.register_forward_hook(keep("normed")),
        first.register_forward_pre_hook(
            lambda module, args, kwargs: found.update(embed=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        second.register_forward_pre_hook(
            lambda module, args, kwargs: found.update(stream=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
    ]
    with torch.no_grad():
        model(batch)
        for handle in handles:
            handle.remove()
        z = found["z"].reshape(*batch.shape, 4, -1)
        for head in range(4):
            alone = torch.zeros_like(z)
            alone[:, :, head] = z[:, :, head]
            mine = first.self_attn.o_proj(alone.flatten(2))
            found[f"L0H{head}"] = mine * found["normed"] / found["attention"] if has_norm_behind else mine
    return found["stream"], found


def log_contrast(model: Any, batch: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> float:
    """The contrast of the log of the attention to the previous token, where queries and keys read streams of their own."""
    layer = model.model.layers[LAYER]
    norm = getattr(layer, "input_layernorm", None) or (lambda stream: stream)
    with torch.no_grad():
        handles = [
            module.register_forward_pre_hook(lambda module, args, stream=stream: (norm(stream),))
            for module, stream in ((layer.self_attn.q_proj, query), (layer.self_attn.k_proj, key))
        ]
        pattern = model(batch, output_attentions=True).attentions[LAYER][:, HEAD].double()
        for handle in handles:
            handle.remove()
    total, n = 0.0, batch.shape[1]
    for row in pattern.log():
        each = []
        for i in range(1, n):
            seen = [j for j in range(i + 1) if row[i, j] > -80]
            each.append(float(row[i, i - 1] - torch.stack([row[i, j] for j in seen if j != i - 1]).mean()))
        total += sum(each) / len(each)
    return total / len(pattern)


@pytest.mark.parametrize("name", ["Llama 3", "Qwen3", "Gemma 3", "OLMo 2"])
def test_a_pair_by_plain_hooks(name: str):
    original = ARCHITECTURES[name].build()
    batch = tokens(3, 8, seed=2)
    found = probes.qk_attributions(to_hooked(original), batch, LAYER, HEAD, edges="previous-token", pairs=49)
    stream, each = written(original, batch)
    checked = 0
    for pair in found.pairs:
        if "bias" in (pair.query, pair.key):
            assert pair.intervened is None
            continue
        less = [(each[pair.query], 0), (0, each[pair.key]), (each[pair.query], each[pair.key]), (0, 0)]
        scores = [log_contrast(original, batch, stream - query, stream - key) for query, key in less]
        expected = scores[3] - scores[0] - scores[1] + scores[2]
        assert pair.intervened == pytest.approx(expected, abs=2e-4), (pair.query, pair.key)
        assert pair.predicted == pytest.approx(found.of(pair.query, pair.key), abs=1e-5)
        checked += 1
    assert checked == 36  # six sources, and biases
    # The norms make a difference here, and the frozen sum doesn't see it.
    assert max(abs(pair.intervened - pair.predicted) for pair in found.pairs if pair.intervened is not None) > 0.1


def test_without_norms_it_is_what_is_predicted():
    model = DisentangledTransformer(d_vocab=6, n_positions=12)
    model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)
    sequences = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(n)).repeat(2) for n in range(3)])
    for each in (model, model.to_transformer_lens()):
        found = probes.qk_attributions(each, sequences, 1, 0, edges="induction", pairs=3)
        first = found.pairs[0]
        assert first.predicted == pytest.approx(found.contribution.max(), abs=1e-4)
        assert first.intervened == pytest.approx(first.predicted, abs=1e-4)
        assert found.to_pandas()["intervened"][0] == pytest.approx(first.intervened)


def test_the_table_has_it_for_the_pairs_that_were_looked_at():
    model = to_hooked(ARCHITECTURES["Qwen3"].build())
    found = probes.qk_attributions(model, tokens(3, 8), LAYER, HEAD, edges="previous-token", pairs=2, sources="kinds")
    table = found.to_pandas()
    assert table["intervened"].notna().sum() == sum(pair.intervened is not None for pair in found.pairs)
    for pair in found.pairs:
        row = table[(table["query"] == pair.query) & (table["key"] == pair.key)].iloc[0]
        assert row["intervened"] == pytest.approx(pair.intervened)
        assert pair.intervened_stderr > 0


def test_an_edit_that_reaches_nothing_is_refused(monkeypatch: pytest.MonkeyPatch):
    from causal_probe.probes import qk_sides

    read = qk_sides.read_values

    def without_streams(*args: Any, edits: Any = None, **options: Any) -> dict[str, torch.Tensor]:
        kept = {name: edit for name, edit in (edits or {}).items() if "resid" not in name}
        return read(*args, edits=kept, **options)

    monkeypatch.setattr(qk_sides, "read_values", without_streams)
    model = to_hooked(ARCHITECTURES["Llama 3"].build())
    with pytest.raises(CausalProbeError, match="doesn't reach layer 1's attention"):
        probes.qk_attributions(model, tokens(2, 8), LAYER, HEAD, edges="previous-token", pairs=1)
