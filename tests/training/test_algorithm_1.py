"""Algorithm 1: stage 1 writes the graph into A1, stage 2 sharpens A2, and neither touches the other's matrix."""

from __future__ import annotations

import pytest
import torch

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.models import ReducedTransformer
from causal_probe.models.reduced import first_gradient
from causal_probe.tasks import InContextMarkov, generator
from causal_probe.training.algorithm_1 import algorithm_1, algorithm_1_stages
from causal_probe.training.stages import Stage


@pytest.fixture(scope="module")
def task() -> InContextMarkov:
    return InContextMarkov(graphs.from_parents([None, 0, 0, None, 2, 3, None, 4]), 3, 0.1)


def test_the_graph_is_learnt_first_and_the_comparison_then(task: InContextMarkov) -> None:
    model = ReducedTransformer(3, 9)
    one, two = algorithm_1_stages(9, graph_steps=20, steps=60, batch_size=2048)
    first = algorithm_1(model, task, (one,), generator=generator(0, "training"))
    assert torch.equal(model.A2, torch.eye(3))
    for parent, child in task.graph.edges:
        assert float(model.A1[child, : child + 1].softmax(-1)[parent].detach()) > 0.9
    kept = model.A1.detach().clone()
    second = algorithm_1(model, task, (two,), generator=generator(1, "training"))
    assert torch.equal(model.A1, kept)
    assert float(model.A2.diagonal().mean().detach()) > 1.2  # the comparison grows sharper
    assert first.n_sequences + second.n_sequences == 80 * 2048
    assert sum(second.loss[-10:]) < sum(first.loss[:10])
    assert set(first.stage) == {"stage 1"}


def test_one_step_is_the_first_gradient_times_the_rate(task: InContextMarkov) -> None:
    model = ReducedTransformer(3, 9, dtype=torch.float64)
    algorithm_1(model, task, (Stage("one", 1, 64, "sgd", 2.0, moves=("A1",)),), generator=generator(0, "training"))
    batch = task.sample(64, generator(0, "training"), dtype=torch.float64)
    u, m = first_gradient(batch.tokens, batch.target)
    product = (u.mT @ m / 64).tril()
    share = 1 / torch.arange(1, 10, dtype=torch.float64)[:, None]
    expected = 2.0 * share * (product - share * product.sum(-1, keepdim=True))
    torch.testing.assert_close(model.A1.detach(), expected.tril(), rtol=1e-9, atol=1e-12)


def test_bad_input_is_refused(task: InContextMarkov) -> None:
    source = generator(0, "training")
    with pytest.raises(CausalProbeError, match="Build a model of the task's shape"):
        algorithm_1(ReducedTransformer(3, 5), task, generator=source)
    with pytest.raises(CausalProbeError, match="Algorithm 1 moves A1 or A2 by sgd"):
        algorithm_1(ReducedTransformer(3, 9), task, (Stage("x", 1, 1, "adamw", 1.0, moves=("A1",)),), generator=source)
    several = InContextMarkov(graphs.two_parent_tree(10), 3)
    with pytest.raises(CausalProbeError, match="one parent per node"):
        algorithm_1(ReducedTransformer(3, 9), several, generator=source)
    broken = ReducedTransformer(3, 9)
    broken.A2.data[0, 0] = float("nan")
    with pytest.raises(CausalProbeError, match="weights that the model began with"):
        algorithm_1(broken, task, generator=source)
