"""Everything here on models in 16 bits, as large models are loaded: beside the same model in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from causal_probe.circuits import Prompts, find_circuit, next_scores, prompt_circuit, prune_nodes
from causal_probe.circuits.edge_methods import EDGE_METHODS
from causal_probe.hooks import to_hooked
from tests import tiny_huggingface as tiny

#: By how much effects may miss those in float64, in nats: logits in bfloat16 are exact to 2^-9 of their size.
ROUNDING = {torch.float16: 0.01, torch.bfloat16: 0.08}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def both(request: pytest.FixtureRequest) -> tuple[Any, Any, float]:
    """A model in 16 bits, the same weights in float64, and the rounding between them."""
    half = tiny.llama().to(request.param)
    exact = tiny.llama().double()
    exact.load_state_dict({name: value.double() for name, value in half.state_dict().items()})
    return to_hooked(half, tiny.tokenizer()), to_hooked(exact, tiny.tokenizer()), ROUNDING[request.param]


def asked(model: Any, n: int = 24) -> Prompts:
    clean, corrupted = tiny.tokens(n, 6), tiny.tokens(n, 6).roll(1, 0)
    with torch.no_grad():
        order = model(clean)[:, -1].argsort(-1, descending=True)
    return Prompts("mine", clean, (5,), order[:, None, :1], order[:, None, -1:], corrupted)


@pytest.mark.parametrize("contrast", ["resample", "mean", "corrupted", "zero"])
def test_circuits(both: tuple[Any, Any, float], contrast: str) -> None:
    half, exact, rounding = both
    prompts = asked(exact)
    found = [
        {edge[:2]: edge.effect for edge in find_circuit(model, prompts, contrast=contrast, sizes=1, pairs=0).edges}
        for model in (half, exact)
    ]
    assert found[0].keys() == found[1].keys()
    assert max(abs(found[0][edge] - found[1][edge]) for edge in found[0]) < rounding


def test_one_prompt_and_nodes(both: tuple[Any, Any, float]) -> None:
    half, exact, rounding = both
    prompts = asked(exact)
    one = Prompts("one", prompts.tokens[:1], (5,), prompts.right[:1], prompts.wrong[:1], prompts.corrupted[:1])  # type: ignore[index]
    effects = [{edge[:2]: edge.effect for edge in prompt_circuit(model, one).edges} for model in (half, exact)]
    shared = effects[0].keys() & effects[1].keys()
    assert len(shared) > 20
    assert max(abs(effects[0][edge] - effects[1][edge]) for edge in shared) < rounding
    kept = [prune_nodes(model, prompts) for model in (half, exact)]
    assert kept[0].clean == pytest.approx(kept[1].clean, abs=rounding)


def test_next_scores(both: tuple[Any, Any, float]) -> None:
    half, exact, _ = both
    words = [f"t{i}" for i in range(5, 17)]
    found = [next_scores(model, words, top=7, bos="no") for model in (half, exact)]
    np.testing.assert_allclose(found[0].next, found[1].next, atol=2 / len(words))


@pytest.mark.parametrize(
    "name", [name for name in EDGE_METHODS if "ACDC" not in name and name != "circuit"]
)  # it ablates edges, as "ablation" does
def test_scores_of_every_method(name: str) -> None:
    half, exact = tiny.llama().bfloat16(), tiny.llama().double()
    exact.load_state_dict({key: value.double() for key, value in half.state_dict().items()})
    tokens = tiny.tokens(24, 5)

    def metric(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 3] - logits[:, -1, 4]

    found = [EDGE_METHODS[name](model, tokens, metric).scores for model in (to_hooked(half), to_hooked(exact))]
    assert found[0].keys() == found[1].keys()
    values = np.array([[each[edge] for edge in found[0]] for each in found])
    assert np.corrcoef(values)[0, 1] > 0.99
