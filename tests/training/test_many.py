"""Many runs in one program: each is what a run by itself gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer
from causal_probe.tasks import InContextMarkov
from causal_probe.training import fit, fit_many, give_matcher
from causal_probe.training.stages import Stage

TREES = [InContextMarkov(graphs.random_forest(5, seed=seed), 3, concentration=0.3) for seed in range(3)]
DAGS = [InContextMarkov(graphs.random_dag(7, parents=2, seed=seed), 3, concentration=0.3) for seed in range(2)]
STAGED = (
    Stage("the graph", 4, 16, "sgd", 50.0, moves=("A0.position",)),
    Stage("the rest", 4, 16, "adamw", 0.03, moves=("A1", "W_U"), schedule="cosine", weight_decay=0.1),
)
SLOTS = (Stage("the rest", 5, 16, "adamw", 0.03, moves=("A0.tokens", "A1", "W_U"), weight_decay=0.1),)
JOINT = (Stage("joint", 5, 16, "adamw", 0.03, moves=("A0", "A1", "W_U")),)


def build(task: InContextMarkov, heads: tuple[int, ...], *, given: bool, seed: int) -> DisentangledTransformer:
    model = DisentangledTransformer(task.d_vocab, task.n_positions, heads, dtype=torch.float64)
    if given:
        give_matcher(model)
    else:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize(
    ("tasks", "heads", "stages", "given"),
    [
        (TREES, (1, 1), STAGED, True),
        (TREES, (1, 1), JOINT, False),
        (DAGS, (2, 1), JOINT, False),
        (DAGS, (2, 1), SLOTS, False),
        (DAGS, (2, 1), STAGED, True),
        (TREES[:1], (1, 2), JOINT, False),
    ],
)
def test_each_equals_its_single_run(tasks: list[InContextMarkov], heads: Any, stages: Any, given: bool) -> None:
    together, alone = ([build(task, heads, given=given, seed=i) for i, task in enumerate(tasks)] for _ in range(2))
    histories = fit_many(
        together, tasks, stages, generators=[torch.Generator().manual_seed(i) for i in range(len(tasks))]
    )
    for index, (model, task) in enumerate(zip(alone, tasks, strict=True)):
        history = fit(model, task, stages, generator=torch.Generator().manual_seed(index))
        assert histories[index].loss == pytest.approx(history.loss, rel=1e-10)
        assert histories[index].stage == history.stage
        assert histories[index].n_sequences == history.n_sequences
        for ours, theirs in zip(together[index].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_a_run_that_diverges_leaves_the_models_as_they_were() -> None:
    models = [build(task, (1, 1), given=False, seed=0) for task in TREES[:2]]
    before = [[p.detach().clone() for p in model.parameters()] for model in models]
    wild = Stage("wild", 30, 8, "sgd", 1e12, moves=("A0", "A1", "W_U"), weight_decay=1e12)
    with pytest.raises(CausalProbeError, match="too large"):
        fit_many(models, TREES[:2], [wild], generators=[torch.Generator().manual_seed(i) for i in range(2)])
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))


def test_bad_input() -> None:
    model, other = DisentangledTransformer(3, 6), DisentangledTransformer(3, 6, [2, 1])
    one, two = torch.Generator(), torch.Generator()
    for models, tasks, generators, message in (
        ([], [], [], "there are 0, 0 and 0"),
        ([model], TREES[:2], [one], "there are 1, 2 and 1"),
        ([model, other], TREES[:2], [one, two], "must share one shape"),
        ([model, DisentangledTransformer(3, 6)], TREES[:2], [one, one], "one was given twice"),
        ([DisentangledTransformer(3, 9)], TREES[:1], [one], "must share one shape"),
    ):
        with pytest.raises(CausalProbeError, match=message):
            fit_many(models, tasks, JOINT, generators=generators)
