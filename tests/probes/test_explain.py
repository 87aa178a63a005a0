"""CLEANN on models whose decision is known by construction."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from causal_probe import CausalProbeError
from causal_probe.discovery.marks import Marks
from causal_probe.discovery.possible_d_sep import possible_d_sep
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import discover_from_attention, explain, outputs_of
from causal_probe.probes.explain import summarise

TOKENS = torch.tensor([3, 1, 4, 2, 0, 3])


@pytest.fixture(scope="module")
def model() -> DisentangledTransformer:
    torch.manual_seed(0)
    model = DisentangledTransformer(d_vocab=6, n_positions=6, heads=(1,))
    with torch.no_grad():
        model.block(0, 0, query="position", key="position").normal_(std=2)
    return model


def needs(*positions: int) -> Any:
    """A decision that changes if and only if all of these positions are replaced by token 5."""

    def outputs(tokens: Tensor) -> Tensor:
        gone = (tokens[:, list(positions)] == 5).all(dim=1)
        return torch.stack([0.5 * torch.ones(len(tokens)), gone.float(), torch.full((len(tokens),), 0.2)], dim=1)

    return outputs


@pytest.mark.parametrize("positions", [(0,), (3,), (1, 4), (0, 2, 3)])
def test_all_sets_of_the_smallest_size_and_no_others(
    model: DisentangledTransformer, positions: tuple[int, ...]
) -> None:
    """Against brute force over every legal subset, each put to the model by hand."""
    found = discover_from_attention(model, TOKENS, samples=200)
    outputs = needs(*positions)
    explained = explain(found, outputs, target=5, replacement=5)["cleann"]
    tree = possible_d_sep(Marks.from_networkx(found.graphs[0].graph), 5)
    assert tree.nodes  # the target is joined to something
    passing: dict[int, set[tuple[int, ...]]] = {}
    for size in range(1, 6):
        for nodes in combinations(range(5), size):
            changed = TOKENS.clone()
            changed[list(nodes)] = 5
            legal = all(
                any(branch & ~sum(1 << k for k in nodes) == 0 for branch in tree.branches.get(n, [])) for n in nodes
            )
            if legal and int(outputs(changed[None]).argmax()) != 0:
                passing.setdefault(size, set()).add(nodes)
    assert set(explained.sets) == (passing[min(passing)] if passing else set())
    if explained.sets:
        assert set(explained.changed_to) == {1}
        assert set(explained.ranks) == {3}  # it was the last of three


def test_it_says_no_where_nothing_changes_the_decision(model: DisentangledTransformer) -> None:
    found = discover_from_attention(model, TOKENS, samples=200)
    explained = explain(
        found, lambda tokens: torch.tensor([[1.0, 0.0]]).repeat(len(tokens), 1), target=5, replacement=5
    )["cleann"]
    assert explained.sets == ()
    assert explained.size is None
    assert explained.tested > 0


def test_baselines_rank_by_what_they_say(model: DisentangledTransformer) -> None:
    """The decision's output is a sum over positions with known weights: leave-one-out and gradient find the heaviest first."""
    weights = torch.tensor([0.1, 2.0, 0.3, 0.7, 0.2, 0.0])

    def outputs(tokens: Tensor) -> Tensor:
        kept = ((tokens != 5).float() * weights).sum(dim=1)
        return torch.stack([kept, torch.full_like(kept, 1.5)], dim=1)

    found = discover_from_attention(model, TOKENS, samples=200)
    pattern = torch.eye(6)
    pattern[5] = torch.tensor([0.0, 0.1, 0.2, 0.6, 0.1, 0.0])
    explained = explain(
        found, outputs, target=5, replacement=5, methods=("leave-one-out", "attention"), pattern=pattern
    )
    assert explained["leave-one-out"].sets == ((1,),)
    assert explained["attention"].sets == ((1, 2, 3),)  # 3 first, then 2, then 1
    assert [each.tested for each in explained.values()] == [1, 3]


def test_gradient_times_input_is_the_derivative(model: DisentangledTransformer) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    bert = BertForMaskedLM._from_config(config, attn_implementation="eager").eval()
    outputs = outputs_of(bert, "masked", position=3)
    found = discover_from_attention(bert, torch.tensor([1, 2, 3, 4]), head="mean")
    explained = explain(found, outputs, target=3, replacement=10, methods=("gradient",), model=bert)["gradient"]
    decision = int(outputs(torch.tensor([[1, 2, 3, 4]])).argmax())
    embedding = bert.get_input_embeddings().weight[[1, 2, 3, 4]].detach()
    step = 1e-3
    scaled = []
    for position in range(3):
        rises = []
        for sign in (1, -1):
            moved = embedding.clone()
            moved[position] *= 1 + sign * step
            rises.append(bert(inputs_embeds=moved[None]).logits[0, 3, decision].item())
        scaled.append(abs(rises[0] - rises[1]) / (2 * step))
    first = max(range(3), key=scaled.__getitem__)
    if explained.sets:
        assert first in explained.sets[0]
    assert explained.tested >= 1


def test_many_inputs_are_summarised(model: DisentangledTransformer) -> None:
    found = discover_from_attention(model, TOKENS, samples=200)
    methods = ("cleann", "leave-one-out")
    each = [explain(found, needs(k % 5), target=5, replacement=5, methods=methods) for k in range(10)]
    table = summarise(each).to_pandas()
    assert table.loc["leave-one-out", "success"] == 1
    assert table.loc["cleann", "inputs"] == 10
    assert 0 <= table.loc["cleann", "success_low"] <= table.loc["cleann", "success"] <= 1
    with pytest.raises(CausalProbeError, match="one input at least"):
        summarise([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 6}, "the nodes are 0..5"),
        ({"methods": ("shap",)}, "The methods shap were asked for"),
        ({"methods": ("attention",)}, "give pattern"),
        ({"methods": ("gradient",)}, "give the model"),
        ({"head": 7}, "There is no graph of head 7"),
    ],
)
def test_bad_input(model: DisentangledTransformer, arguments: dict[str, Any], message: str) -> None:
    found = discover_from_attention(model, TOKENS, samples=200)
    with pytest.raises(CausalProbeError, match=message):
        explain(found, needs(0), **{"target": 5, "replacement": 5, **arguments})
    with pytest.raises(CausalProbeError, match="must give finite numbers"):
        explain(found, lambda tokens: torch.full((len(tokens), 2), torch.nan), target=5, replacement=5)


def test_decisions_are_checked(model: DisentangledTransformer) -> None:
    with pytest.raises(CausalProbeError, match="there are next, masked and class"):
        outputs_of(model, "item")
    with pytest.raises(CausalProbeError, match="read at a position"):
        outputs_of(model, "masked")
    assert outputs_of(model, "next")(TOKENS[None]).shape == (1, 6)
