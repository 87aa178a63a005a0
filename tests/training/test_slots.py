"""Several parents: the evidence against finite differences, the query positions that it finds, and what heads learn from them."""

from __future__ import annotations

import networkx as nx
import pytest
import torch

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.probes import head_graphs, match_heads
from causal_probe.tasks import InContextMarkov
from causal_probe.training import evaluate, fit, task_loss
from causal_probe.training.slots import find_queries, give_slots, query_evidence
from causal_probe.training.stages import Stage

TASK = InContextMarkov(graphs.two_parent_tree(13), 3, concentration=0.1)  # node 12's parents are 5 and 11


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("position", [4, 11])
def test_the_evidence_is_the_gradient_of_the_model(position: int) -> None:
    """At a small beta, minus the gradient with respect to layer 0's scores, row by row, on the hooked forward."""
    beta, n = 1e-4, TASK.n_positions
    evidence = query_evidence(TASK, seeded(), n_sequences=512)[position]
    tokens, target = (getattr(TASK.sample(512, seeded()), name) for name in ("tokens", "target"))
    model = DisentangledTransformer(3, n, dtype=torch.float64)
    query = "token" if position == n - 1 else "L0H0.token"
    model.block(0, 0, query="position", key="position")[n - 1, position] = 0 if position == n - 1 else 60
    model.block(1, 0, query=query, key="L0H0.token").copy_(beta * torch.eye(3))
    model.output_block("L1H0.token").copy_(torch.eye(3))
    loss = task_loss(model(tokens)[:, -1], target.double()).mean()
    (gradient,) = torch.autograd.grad(loss, [model.A[0]])
    part = model.subspaces(0)["position"]
    measured = -gradient[0, part, part] / beta * n * torch.arange(1, n + 1)[:, None]
    torch.testing.assert_close(measured[: n - 1], evidence[: n - 1], rtol=1e-2, atol=1e-5)


def test_the_predicted_node_s_own_parents_are_found() -> None:
    evidence = query_evidence(TASK, seeded())
    assert find_queries(evidence, 2) == (5, 11)
    assert find_queries(evidence, 1) in {(5,), (11,)}
    leading = evidence[11].masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(-1), -1).argmax(-1)
    assert sum(int(leading[child]) == TASK.parents[child][1] for child in range(3, 11)) >= 7


def test_heads_learn_the_slots_that_they_were_given() -> None:
    model = DisentangledTransformer(3, TASK.n_positions, [2, 1])
    given = give_slots(model, TASK, generator=seeded())
    assert given == (
        "L1H0 compares (L0H0.token, L0H0.token): 1 I, for the token at position 5 (found)",
        "L1H0 compares (token, L0H1.token): 1 I, for the token at position 11 (found)",
        "W_U reads L1H0.token: I",
    )
    fit(
        model,
        TASK,
        [Stage("the graph", 15, 4096, "sgd", 7.5 * TASK.n_positions**2, moves=("A0.position",))],
        generator=seeded(1),
    )
    nodes = nx.DiGraph(TASK.graph.subgraph(TASK.children))
    match = match_heads(head_graphs(model, TASK.sample(64, seeded(2)).tokens), nodes)
    assert match.heads == (0, 1)
    assert match.mean_parent_attention > 0.7
    assert evaluate(model, [TASK.sample(2048, seeded(3))]) < 1.1


def test_a_graph_that_was_found_elsewhere_is_written_a_slot_for_each_head() -> None:
    model = DisentangledTransformer(3, TASK.n_positions, [2, 1])
    give_slots(model, TASK, generator=seeded(), graph=TASK.graph)
    pattern = head_graphs(model, TASK.sample(64, seeded(2)).tokens).values[0]
    for child in TASK.children:
        parents = TASK.parents[child]
        for head in (0, 1):
            if len(parents) == 2:
                assert pattern[head, child, parents[head]] > 0.99
    assert pattern[0, 11, 5] > 0.99  # the last row looks at the query position, whatever its own parent is
    before = model.A[0].detach().clone()
    fit(model, TASK, [Stage("the rest", 3, 64, "adamw", 0.03, moves=("A0.tokens", "A1", "W_U"))], generator=seeded(1))
    position = model.subspaces(0)["position"]
    assert torch.equal(model.A[0].detach()[:, position, position], before[:, position, position])


@pytest.mark.parametrize("graph", [nx.DiGraph([(0, 1)]), graphs.from_parents([None] * 13)])
def test_a_graph_of_other_nodes_or_parents_is_refused(graph: nx.DiGraph) -> None:
    with pytest.raises(CausalProbeError, match="0 to 12 was expected, the last of which has 2 parents"):
        give_slots(DisentangledTransformer(3, 12, [2, 1]), TASK, generator=seeded(), graph=graph)


def test_two_layers_only() -> None:
    with pytest.raises(CausalProbeError, match="defined for two layers; the model has 1"):
        give_slots(DisentangledTransformer(3, 12, [2]), TASK, generator=seeded())
